#!/usr/bin/env python3
"""A table of predictions for pictures without labels, with confidences that were calibrated and the doubtful set aside.

    python predict.py photos --checkpoint output/train/RUN/best
    python predict.py photos --checkpoint output/train/RUN/best --target-accuracy 0.95 --split-folders sorted
    python predict.py list.csv --model resnet50 --pretrained --topk 5 --coverage 0.9 --results-file -

Pictures are folders (of any depth), files, lists of files (.txt, .csv, .tsv, .jsonl), .parquet files, or a --dataset
with its --split. The table has a row a picture, in the order given: filename, label (the class's name), confidence
(after the temperature that validate.py --save-temperature keeps with the weights), raw_confidence (before), margin
(largest logit less the second), energy (log-sum-exp of the logits; low for pictures of something else) and error (of a
picture that cannot be opened; the rest of its row is empty). --min-confidence and --target-accuracy add decision
(accepted or unsure), --coverage adds prediction_set and set_size, --topk further classes.

Flags are those of timm's inference.py where they mean the same. Any number of processes gives the same table,
but for the last digit of a number on processors that round a batch of another size differently.
"""
import argparse
import csv
import io
import json
import logging
import math
import os
import re
import shutil
from argparse import Namespace
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.data.dataset_info import CustomDatasetInfo, DatasetInfoLabelMapper
from timm.utils import setup_default_logging
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from backbone import (
    add_device_arguments,
    add_image_arguments,
    add_weights_arguments,
    agree_on_precision,
    check_model,
    check_weights_arguments,
    evaluate_batches,
    load_model,
)
from checkpoint import read_run, use_kept_bits
from data import DataConfig, ViewDataset, create_loader, evaluation_batches, limit_workers
from decisions import SET_SCORES, class_scores, kept_level, scaled_probs, set_sizes, threshold_from_confidence
from figures import Cell, contact_sheet
from inputs import LISTS, PlainFolder, limited, open_pictures
from program import (
    ArgumentParser,
    RunError,
    UsageError,
    name_some,
    once_a_machine,
    replace_file,
    run_program,
    setup_accelerator,
    show,
)
from scaling import read_temperature
from sources import MAX_PIXELS, ImageError, JoinedSource, Source, refuse_unused_folder

_logger = logging.getLogger('predict')

ENDINGS = {'csv': '.csv', 'json': '.json', 'json-record': '.jsonl', 'json-split': '.json', 'parquet': '.parquet'}
ACCEPTED, UNSURE = 'accepted', 'unsure'
SHOWN = 20  # rows on the console
SHEET_CLASSES = 12


# --- Arguments --------------------------------------------------------------------------------------------------------

def create_predict_parser() -> argparse.ArgumentParser:
    flag = argparse.BooleanOptionalAction
    parser = ArgumentParser(description='A table of predictions for pictures without labels.')
    group = parser.add_argument_group('Model')
    group.add_argument('--checkpoint', metavar='PATH', default=None,
                       help='a folder of weights: RUN/best or RUN/last of train_ssl.py, or any that timm saved with a '
                            'config.json; or a weight file of timm\'s train.py')
    add_weights_arguments(group)
    group.add_argument('--num-classes', type=int, metavar='N', default=None, help='classes of a weight file\'s model')

    group = parser.add_argument_group('Pictures')
    group.add_argument('pictures', metavar='PICTURES', nargs='*', default=[],
                       help='folders, of which all pictures below are taken, single pictures, .parquet files, or lists '
                            'of files: .txt with a path a line; .csv, .tsv or .jsonl with a column file_name, '
                            'filename, path or image')
    group.add_argument('--data-dir', metavar='DIR', default=None,
                       help='without PICTURES and --dataset a folder like these; with a list the folder that its paths '
                            'are relative to (default: the list\'s own); else as train_ssl.py --data-dir')
    group.add_argument('--dataset', metavar='NAME', default=None, help='as train_ssl.py --dataset')
    group.add_argument('--split', metavar='NAME', default=None,
                       help='split of --dataset (default: the first of validation, val, valid, test that exists)')
    group.add_argument('--input-key', metavar='COLUMN', default=None, help='column of the pictures or of their paths')
    group.add_argument('--dataset-download', action=flag, default=False, help='let torchvision download (torch/)')
    group.add_argument('--max-pixels', type=int, metavar='N', default=MAX_PIXELS,
                       help=f'pixels up to which a picture is decoded, a guard of the memory (default: {MAX_PIXELS})')
    add_image_arguments(parser)

    group = parser.add_argument_group(
        'Decision',
        'What validate.py --calibration-split ... --save-temperature has stored with the weights is used: it was '
        'measured on images with labels. Where there is none, the confidences themselves are believed, and this is '
        'said.',
    )
    either = group.add_mutually_exclusive_group()
    either.add_argument('--min-confidence', type=float, metavar='P', default=None,
                        help='pictures of a lower confidence are unsure')
    either.add_argument('--target-accuracy', type=float, metavar='A', default=None,
                        help='accept the pictures of a confidence above which this accuracy is expected, such as 0.95')
    group.add_argument('--coverage', type=float, metavar='C', default=None,
                       help='give for each picture a set of classes that holds the right one with this probability, '
                            'such as 0.9 (split conformal prediction)')
    group.add_argument('--set-score', default='raps', choices=SET_SCORES,
                       help='of --coverage: adaptive prediction sets as they are (aps), or kept small where there are '
                            'many classes (raps, the default)')
    add_device_arguments(parser)

    group = parser.add_argument_group('Results')
    group.add_argument('--results-dir', metavar='DIR', default='output/predict', help='default: output/predict')
    group.add_argument('--results-file', metavar='NAME', default='predictions',
                       help='name in --results-dir (default: predictions, with the ending of the format); - for '
                            'standard output')
    group.add_argument('--results-format', nargs='+', default=['csv'], choices=list(ENDINGS),
                       help='csv, json (an object by file name), json-record (an object a line), json-split, parquet '
                            '(default: csv)')
    group.add_argument('--topk', type=int, metavar='N', default=1, help='classes for each picture (default: 1)')
    group.add_argument('--results-separate-col', action='store_true',
                       help='a column for each of the --topk classes, in place of lists')
    group.add_argument('--label-type', default='description', choices=['none', 'name', 'description', 'detailed'],
                       help='for weights that have descriptions, as ImageNet\'s (default: description)')
    group.add_argument('--include-index', action='store_true', help='the class\'s number too')
    group.add_argument('--exclude-output', action='store_true',
                       help='leave out confidences, margin and energy')
    for name, column in (('filename', 'filename'), ('label', 'label'), ('index', 'index'), ('output', 'confidence')):
        group.add_argument(f'--{name}-col', metavar='NAME', default=column, help=f'column\'s name (default: {column})')
    group.add_argument('--no-console-results', action='store_true', help='print no result')
    group.add_argument('--split-folders', metavar='DIR', default=None,
                       help='sort the pictures into DIR/<class>/ and DIR/unsure/, a new or empty folder, as links')
    group.add_argument('--copy', action='store_true', help='of --split-folders: copies in place of links')
    group.add_argument('--contact-sheet', metavar='FILE', default=None,
                       help='draw the most and the least sure pictures of each class, as PNG')
    return parser


def _parse_args(argv: list[str] | None = None) -> Namespace:
    parser = create_predict_parser()
    args = parser.parse_intermixed_args(argv)
    parser.at_least(args, batch_size=1, workers=0, topk=1)
    for name in ('min_confidence', 'target_accuracy', 'coverage'):
        value = getattr(args, name)
        if value is not None and not (0 < value < 1 or (name == 'min_confidence' and 0 <= value <= 1)):
            parser.error(f'--{name.replace("_", "-")} {value:g}: expected a number between 0 and 1, such as 0.9')
    check_weights_arguments(parser, args)
    if not args.pictures and args.dataset is None and args.data_dir is None:
        parser.error('give pictures: a folder, files, a list of files, or --dataset')
    if args.pictures and (args.dataset is not None or args.split is not None):
        parser.error(f'{args.pictures[0]} and --{"dataset" if args.dataset is not None else "split"}: give one of them')
    if args.copy and not args.split_folders:
        parser.error('--copy: it goes with --split-folders')
    args.results_format = list(dict.fromkeys(args.results_format))
    if args.results_file == '-' and (len(args.results_format) > 1 or args.results_format == ['parquet']):
        parser.error('--results-file -: standard output takes one --results-format, of csv, json, json-record and '
                     'json-split')
    if {'json', 'json-split'} <= set(args.results_format):
        parser.error('--results-format json json-split: both would be the same file')
    return args


# --- Set-up -----------------------------------------------------------------------------------------------------------

def open_all(args: Namespace) -> Source:
    """The pictures, in the order given.

    Raises:
        UsageError: If one of them cannot be had, or a folder has none.
    """
    data_dir = args.data_dir
    names = args.pictures
    if not names and args.dataset is None and args.split is None:
        names, data_dir = [data_dir], None
        if not os.path.exists(names[0]):
            raise UsageError(f'--data-dir {names[0]}: no such folder')
    for name in args.pictures:
        if not os.path.exists(name) and not name.lower().endswith('.parquet'):
            raise UsageError(f'{name}: no such file or folder (data sets by name are given as --dataset)')
    if args.pictures and data_dir is not None and not any(Path(name).suffix.lower() in LISTS for name in args.pictures):
        raise UsageError(f'--data-dir {data_dir}: the paths of a list are relative to it, and no list is given')
    if args.dataset:
        refuse_unused_folder(args.dataset, args.data_dir)
    parts = [
        open_pictures(name, data_dir, args.split, args.input_key, args.dataset_download, args.max_pixels)
        for name in names or [args.dataset or '']
    ]
    if args.input_key is not None and all(isinstance(part, PlainFolder) and not part.columns for part in parts):
        raise UsageError(f'--input-key {args.input_key}: {name_some(names or [args.dataset])} has no columns')
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, PlainFolder) for part in parts):
        paths, names = ([item for part in parts for item in getattr(part, key)] for key in ('paths', 'names'))
        return limited(PlainFolder(paths, names), args.max_pixels)
    joined = JoinedSource(parts)
    joined.max_pixels = args.max_pixels
    return joined


def choose_names(model: nn.Module, checkpoint: Path | None, run: dict, label_type: str) -> list[str]:
    """The classes' names, from the weights, the run's labels.json, or for a model of timm's those of ImageNet; numbers
    where there are none.
    """
    config, number = dict(model.pretrained_cfg or {}), model.num_classes
    names, info = config.get('label_names'), None
    file = checkpoint.parent / 'labels.json' if checkpoint is not None and run else None
    if not names and file is not None and file.is_file():
        with suppress(OSError, ValueError, AttributeError):  # a run's file that is damaged costs the names alone
            names = json.loads(file.read_text()).get('class_names')
    if names:
        try:
            info = CustomDatasetInfo(names, config.get('label_descriptions'))
        except (TypeError, ValueError) as error:
            raise UsageError(f'the class names that the weights keep are not usable: {error}') from error
    elif not run and label_type != 'none':
        subset = infer_imagenet_subset(model)
        if subset is not None:
            info = ImageNetInfo(subset)
            _logger.info(f'The weights keep no class names: taken for the {number} classes of {subset}')
    if info is None or label_type == 'none':
        if label_type != 'none':
            _logger.warning('Neither the weights nor the run keep class names: classes are given by number')
        return [str(k) for k in range(number)]
    mapper = DatasetInfoLabelMapper(info, label_type)
    covered = mapper.coverage(number)
    if covered.missing or covered.extra:
        _logger.warning(f'{covered.missing} of {number} classes have no name, and {covered.extra} names no class')
    return [mapper(k) for k in range(number)]


@dataclass
class Decisions:
    """By what pictures are accepted, and sets formed.

    Attributes:
        temperature: 1 if none is kept with the weights.
        threshold: Least confidence of an accepted picture; None if it is yet to be found, or nothing is to be decided.
        sets: Whether prediction sets are asked for.
        quantile: Of these; None: every class is in.
        set_score: One of SET_SCORES.
    """
    temperature: float = 1.
    threshold: float | None = None
    sets: bool = False
    quantile: float | None = None
    set_score: str = 'raps'


def _find_kept(kept: dict | None, asked: float, flag: str, where: str) -> str | None:
    """The level to go by; None if none at all was kept."""
    level = kept_level(kept, asked)
    if kept and level is None:
        raise UsageError(f'{flag} {asked:g}: {where} keeps {", ".join(kept)}; validate.py {flag} {asked:g} '
                         '--save-temperature adds it')
    if level is not None and float(level) > asked + 1e-9:
        _logger.info(f'{flag} {asked:g}: {where} keeps none for it, so that of {level} is taken, which is on the safe '
                     'side')
    return level


def read_decisions(args: Namespace, checkpoint: Path | None, config: DataConfig) -> Decisions:
    """What validate.py kept with the weights, as far as it is asked for, and tells what the decisions rest on.

    Raises:
        UsageError: If it is damaged, or the accuracy or coverage asked for is not among it.
    """
    found = Decisions(threshold=args.min_confidence, sets=args.coverage is not None, set_score=args.set_score)
    saved, where = {}, f'{checkpoint}'
    if checkpoint is not None and checkpoint.is_dir():
        where = str(checkpoint / 'config.json')
        try:
            saved = read_temperature(checkpoint) or {}
            found.temperature = saved.get('temperature', 1.)
            if saved:
                _logger.info(f'Confidences are those after temperature {found.temperature:.3f}, which was fitted '
                             f'{saved.get("fitted", "with labels")} on {saved.get("images")} images of '
                             f'{saved["split"]}')
            level = kept = None
            if args.target_accuracy is not None:
                level = _find_kept(saved.get('thresholds'), args.target_accuracy, '--target-accuracy', where)
            if level is not None:
                kept = saved['thresholds'][level]
                if kept is None:
                    raise UsageError(f'--target-accuracy {args.target_accuracy:g}: the {saved.get("images")} images of '
                                     f'{saved["split"]} are too few, or too few of them right, to promise {level}; '
                                     'give a lower one')
                found.threshold = float(kept['threshold'])
                _logger.info(f'Accepted from confidence {found.threshold:.4f} on: that were '
                             f'{100 * kept["coverage"]:.0f} % of the {saved.get("images")} images of {saved["split"]}, '
                             f'and {100 * kept["accuracy"]:.1f} % of them were right (95 % interval '
                             f'{100 * kept["accuracy_low"]:.1f} to {100 * kept["accuracy_high"]:.1f} %)')
            level = None
            if found.sets:
                level = _find_kept(saved.get('sets', {}).get(args.set_score), args.coverage, '--coverage', where)
            if level is not None:
                kept = saved['sets'][args.set_score][level]
                found.quantile = None if kept['quantile'] is None else float(kept['quantile'])
                _logger.info(f'Prediction sets hold the right class with a probability of {level} at least, for '
                             f'pictures like those of {saved["split"]}, on which they had {kept["mean_size"]:.2f} '
                             'classes on average')
                if found.quantile is None:
                    _logger.warning(f'{saved.get("images")} calibration images are too few for --coverage {level}: '
                                    'every set holds all classes')
            if saved.get('missing_classes') and (found.sets or found.threshold is not None):
                _logger.warning(f'The calibration images lacked {saved["missing_classes"]} of the classes: on pictures '
                                'of these, neither thresholds nor prediction sets hold')
        except UsageError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f'{where}: its block calibration is damaged ({type(error).__name__} {error}); '
                             'validate.py --save-temperature writes it anew') from error
    if not saved:
        _logger.info('No temperature is kept with these weights: confidence is the raw one (validate.py '
                     '--save-temperature)')
    elif saved.get('input_size') not in (None, list(config.input_size)):
        _logger.warning(f'The temperature was found on images of {saved["input_size"]}, not {list(config.input_size)}')
    believed = 'no labels were at hand to check this (validate.py --calibration-split ... --save-temperature)'
    if found.sets and not saved.get('sets'):
        found.quantile, found.set_score = args.coverage, 'aps'
        _logger.warning(f'Prediction sets are the classes that have {args.coverage:g} of the probability, if '
                        f'confidences mean what they say; {believed}')
    if args.target_accuracy is not None and found.threshold is None:
        _logger.warning(f'--target-accuracy {args.target_accuracy:g} is taken from the confidences themselves; '
                        f'{believed}')
    return found


def prepare_outputs(args: Namespace) -> None:
    """Makes the folders of the results, rather now than after all predictions.

    Raises:
        UsageError: If one of them cannot be made, a file is to go where a folder is, --split-folders has something in
            it, or takes no links.
    """
    files = [('--results-file', path) for path in table_paths(args).values()]
    files += [('--contact-sheet', Path(args.contact_sheet))] if args.contact_sheet else []
    wanted = [('--results-dir', Path(args.results_dir))] if table_paths(args) else []
    wanted += [(flag, path.absolute().parent) for flag, path in files]
    wanted += [('--split-folders', Path(args.split_folders))] if args.split_folders else []
    for flag, folder in wanted:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f'{flag} {folder}: cannot be made: {error.strerror}') from error
    for flag, path in files:
        if path.is_dir():
            raise UsageError(f'{flag} {path}: is a folder; give the name of a file')
    if not args.split_folders:
        return
    folder = Path(args.split_folders)
    if any(folder.iterdir()):
        raise UsageError(f'--split-folders {folder}: has something in it; give a new or empty folder')
    if not args.copy:
        trial = folder / '.link'
        try:
            trial.symlink_to(folder.absolute())
            trial.unlink()
        except OSError as error:
            raise UsageError(f'--split-folders {folder}: links cannot be made there ({error.strerror}); add '
                             '--copy') from error


# --- Prediction -------------------------------------------------------------------------------------------------------

class PictureDataset(ViewDataset):
    """Pictures as they come. One that cannot be decoded is an item of zeros, with its index as `skipped`.

    Args:
        source: The pictures.
        view: PIL -> uint8 tensor of `shape`.
        shape: C, H, W.
    """

    def __init__(self, source: Source, view, shape: tuple[int, int, int]):
        super().__init__(source, {'image': view})
        self.shape = shape

    def __getitem__(self, i: int) -> dict:
        try:
            image, skipped = self.views['image'](self.source.image(i)), -1
        except ImageError:
            image, skipped = torch.zeros(self.shape, dtype=torch.uint8), i
        return dict(image=image, index=i, skipped=skipped)


@dataclass
class Predictions:
    """What a model says about N pictures, in their order.

    Attributes:
        good: Whether the picture could be decoded, [N] bool; where not, the rest means nothing.
        classes: The most probable ones, [N, k] int64.
        probs: Theirs, after the temperature, [N, k] float32.
        raw: Probability of the first class before the temperature, [N] float32.
        margin: Largest logit less the second, [N] float32.
        energy: log-sum-exp of the logits, [N] float32.
        sets: Classes of the prediction set, N arrays of int64; None if not asked for.
    """
    good: np.ndarray
    classes: np.ndarray
    probs: np.ndarray
    raw: np.ndarray
    margin: np.ndarray
    energy: np.ndarray
    sets: list[np.ndarray] | None


def summarise(logits: torch.Tensor, decisions: Decisions, topk: int) -> tuple[np.ndarray, ...]:
    """classes, probs, raw, margin and energy of `Predictions` for logits [B, K], and the sets' sizes and classes."""
    order = logits.argsort(dim=1, descending=True, stable=True)  # among equals the first, as argmax takes it
    probs = scaled_probs(logits, decisions.temperature)
    best = logits.gather(1, order[:, :2])
    found = [
        order[:, :topk],
        probs.gather(1, order[:, :topk]),
        scaled_probs(logits, 1.).amax(1),
        best[:, 0] - best[:, 1],
        logits.logsumexp(1),
    ]
    if decisions.sets:
        classes, scores = class_scores(probs.cpu(), decisions.set_score)  # float64, which not every device has
        found += [set_sizes(scores, decisions.quantile), classes]
    return tuple(value.cpu().numpy() for value in found)


@torch.no_grad()
def predict(
        model: nn.Module,
        config: DataConfig,
        view,
        source: Source,
        decisions: Decisions,
        accelerator: Accelerator,
        args: Namespace,
) -> Predictions | None:
    """Looks at every picture once, over all processes; the main one gets the result, others None.

    Raises:
        RunError: If logits are not finite, or the device's memory is too small.
    """
    topk = min(args.topk, model.num_classes)
    if topk < args.topk:
        _logger.info(f'--topk {args.topk}: there are {topk} classes')
    columns = [np.zeros(0, np.int64), np.zeros(0, bool), np.zeros((0, topk), np.int64), np.zeros((0, topk), np.float32)]
    parts = [(*columns, *(np.zeros(0, np.float32),) * 3)]
    sets = {}
    size = max(1, min(args.batch_size, len(source)))
    batches = evaluation_batches(len(source), size, accelerator.process_index, accelerator.num_processes)
    dataset = PictureDataset(source, view, config.input_size)
    workers = args.workers if batches else 0
    loader = create_loader(dataset, batches, workers, args.pin_mem, accelerator.device)
    visible = accelerator.is_main_process
    with (
        tqdm(total=len(source), unit='picture', dynamic_ncols=True, disable=None if visible else True) as bar,
        logging_redirect_tqdm() if visible else nullcontext(),
    ):
        for batch, logits in evaluate_batches(model, loader, size, config, accelerator, args.channels_last):
            index, good = batch['index'].cpu().numpy(), (batch['skipped'] < 0).cpu().numpy()
            bad = np.flatnonzero(good & ~logits.isfinite().all(1).cpu().numpy())
            if len(bad):
                raise RunError(f'logits are not finite (NaN or inf) for {source.where(int(index[bad[0]]))}'
                               + ('; try without --amp' if args.amp else ''))
            *values, last, order = (*summarise(logits, decisions, topk), *(None,) * (0 if decisions.sets else 2))
            parts.append((index, good, *values))
            if decisions.sets:
                sets.update((i, row[:n].copy()) for i, n, row in zip(index.tolist(), last.tolist(), order))
            bar.update(min(len(index) * accelerator.num_processes, len(source) - bar.n))
    own = [([np.concatenate(part) for part in zip(*parts)], sets)]
    gathered = gather_object(own) if accelerator.num_processes > 1 else own
    if not accelerator.is_main_process:
        return None
    index, *values = (np.concatenate(part) for part in zip(*(columns for columns, _ in gathered)))
    joined = {i: classes for _, part in gathered for i, classes in part.items()}
    order = index.argsort()
    ranked = [joined[i] for i in index[order].tolist()] if decisions.sets else None
    return Predictions(*(value[order] for value in values), ranked)


def accepted(found: Predictions, decisions: Decisions) -> np.ndarray:
    """Pictures that were opened and are not unsure, [N] bool."""
    if decisions.threshold is None:
        return found.good
    return found.good & (found.probs[:, 0].astype(np.float64) >= decisions.threshold)


# --- Table ------------------------------------------------------------------------------------------------------------

def printable(name: str) -> str:
    """A file's name as text: bytes that are no UTF-8 are spelt out."""
    return os.fsencode(name).decode('utf-8', 'backslashreplace')


def tell_errors(source: Source, good: np.ndarray) -> dict[int, str]:
    """Why each of the pictures that could not be decoded is broken, in one line."""
    told = {}
    for i in np.flatnonzero(~good).tolist():
        try:
            source.image(i)
            told[i] = 'could not be decoded at first'  # a file that has come or changed meanwhile
        except ImageError as error:
            reason = error.__cause__
            told[i] = printable(' '.join(str(getattr(reason, 'strerror', None) or reason).split()))
    return told


def given_names(source: Source) -> list[str]:
    """What the pictures are called in tables."""
    names = source.names if isinstance(source, PlainFolder) else map(source.where, range(len(source)))
    return [*map(printable, names)]


def table_columns(args: Namespace, topk: int) -> list[tuple[str, pa.DataType]]:
    """The table's columns in their order, by name and type, with so many classes a picture. Names may be equal."""
    text, number, real = pa.string(), pa.int64(), pa.float32()
    is_named = args.label_type != 'none'
    ranked = [(args.index_col, number)] * (args.include_index or not is_named) + [(args.label_col, text)] * is_named
    columns = [(args.filename_col, text), *ranked]
    if not args.exclude_output:
        columns += [(name, real) for name in (args.output_col, 'raw_confidence', 'margin', 'energy')]
    if args.min_confidence is not None or args.target_accuracy is not None:
        columns.append(('decision', text))
    if args.coverage is not None:
        columns += [('prediction_set', pa.list_(text)), ('set_size', number)]
    if topk > 1:
        for name, kind in [*ranked, *[('prob', real)] * (not args.exclude_output)]:
            if args.results_separate_col:
                columns += [(f'{name}_{i}', kind) for i in range(topk)]
            else:
                columns.append((f'topk_{name}', pa.list_(kind)))
    return [*columns, ('error', text)]


def create_table(
        source: Source,
        found: Predictions,
        names: list[str],
        decisions: Decisions,
        errors: dict[int, str],
        args: Namespace,
) -> dict[str, list]:
    """Columns of the table by name, those of `table_columns`; None where a broken picture has no value."""
    good, topk = found.good.tolist(), found.classes.shape[1]

    def column(values) -> list:
        return [value if fine else None for value, fine in zip(values, good)]

    is_named, numbers = args.label_type != 'none', found.classes.tolist()
    ranked = [numbers] * (args.include_index or not is_named)
    ranked += [[[names[k] for k in row] for row in numbers]] * is_named
    columns = [given_names(source), *(column(row[0] for row in rows) for rows in ranked)]
    if not args.exclude_output:
        columns += [column(v.tolist()) for v in (found.probs[:, 0], found.raw, found.margin, found.energy)]
    if decisions.threshold is not None:
        columns.append(column(ACCEPTED if yes else UNSURE for yes in accepted(found, decisions).tolist()))
    if found.sets is not None:
        columns.append(column([names[k] for k in classes.tolist()] for classes in found.sets))
        columns.append(column(map(len, found.sets)))
    if topk > 1:
        for rows in [*ranked, *[found.probs.tolist()] * (not args.exclude_output)]:
            if args.results_separate_col:
                columns += [column(row[i] for row in rows) for i in range(topk)]
            else:
                columns.append(column(rows))
    columns.append([errors.get(i) for i in range(len(source))])
    return {name: values for (name, _), values in zip(table_columns(args, topk), columns, strict=True)}


def rounded(value):
    """A value as text formats hold it: float32 has no more than these digits."""
    if isinstance(value, float):
        return float(f'{value:.7g}')
    return [rounded(item) for item in value] if isinstance(value, list) else value


def write_text(file, table: dict[str, list], form: str) -> None:
    """The table in one of the text formats to an open file."""
    rows = zip(*([rounded(value) for value in values] for values in table.values()))
    if form == 'csv':
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(table)
        writer.writerows(
            [json.dumps(cell, ensure_ascii=False) if isinstance(cell, list) else cell for cell in row] for row in rows
        )
    elif form == 'json-record':
        for row in rows:
            file.write(json.dumps(dict(zip(table, row)), ensure_ascii=False) + '\n')
    elif form == 'json-split':
        json.dump(dict(columns=list(table), data=list(rows)), file, indent=4, ensure_ascii=False)
    else:
        by_name = {row[0]: dict(zip(list(table)[1:], row[1:])) for row in rows}
        json.dump(by_name, file, indent=4, ensure_ascii=False)


def table_paths(args: Namespace) -> dict[str, Path]:
    """The table's files by format; none if it goes to standard output."""
    if args.results_file == '-':
        return {}
    stem, ending = os.path.splitext(args.results_file)
    stem = stem if ending in ENDINGS.values() else args.results_file
    return {form: Path(args.results_dir) / (stem + ENDINGS[form]) for form in args.results_format}


def write_tables(table: dict[str, list], kinds: dict[str, pa.DataType], args: Namespace) -> list[Path]:
    """Writes the table in all formats, each file whole or not at all; to standard output if that is asked for.

    Args:
        table: Columns by name.
        kinds: Their types, by name too, as a column may be empty.
        args: The program's.
    """
    paths = table_paths(args)
    if not paths:
        with suppress(BrokenPipeError), os.fdopen(os.dup(1), 'w', encoding='utf-8', newline='') as file:
            write_text(file, table, args.results_format[0])
    for form, path in paths.items():
        def write(part, form=form):
            if form == 'parquet':
                return pq.write_table(pa.table({key: pa.array(table[key], kind) for key, kind in kinds.items()}), part)
            with open(part, 'w', encoding='utf-8', newline='') as file:
                write_text(file, table, form)

        replace_file(path, write)
    return [*paths.values()]


def check_columns(source: Source, num_classes: int, args: Namespace) -> None:
    """Raises UsageError if the table would lose a column or, as JSON by file name, a row."""
    columns = Counter(name for name, _ in table_columns(args, min(args.topk, num_classes)))
    twice = [name for name, number in columns.items() if number > 1]
    if twice:
        raise UsageError(f'two columns would have the same name, {twice[0]}: change --filename-col, --label-col, '
                         '--index-col or --output-col')
    if 'json' in args.results_format:
        name, number = next(iter(Counter(given_names(source)).most_common(1)), ('', 0))
        if number > 1:
            raise UsageError(f'--results-format json is an object by file name, and {name} is given {number} times; '
                             'json-record and csv keep both')


def check_links(source: Source, args: Namespace) -> None:
    """Raises UsageError if --split-folders is to link to pictures that are no files."""
    if not args.split_folders or args.copy or isinstance(source, PlainFolder):
        return
    parts = zip(source.starts, source.parts) if isinstance(source, JoinedSource) else [(0, source)]
    for start, part in parts:
        if len(part) and not isinstance(next(iter(part.data_of([0]))), str):
            raise UsageError(f'--split-folders: {source.where(start)} is no file to link to: add --copy')


# --- Pictures ---------------------------------------------------------------------------------------------------------

def folder_names(names: list[str]) -> list[str]:
    """Folders for classes: their names without what a file system does not take, all different and none `unsure`."""
    taken, folders = {UNSURE}, []
    for number, name in enumerate(names):
        folder = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]', '_', name).strip(' .') or '_'
        folder = os.fsencode(folder)[:200].decode('utf-8', 'ignore')
        while folder.casefold() in taken:  # also on systems that do not tell capitals from small letters
            folder += f'_{number}'
        taken.add(folder.casefold())
        folders.append(folder)
    changed = [(name, folder) for name, folder in zip(names, folders) if name != folder]
    if changed:
        _logger.info(f'{len(changed)} of {len(names)} class folders are not spelt as the class, such as '
                     f'{changed[0][1]} for {changed[0][0]!r}')
    return folders


def split_folders(
        root: Path,
        source: Source,
        found: Predictions,
        names: list[str],
        decisions: Decisions,
        copy: bool,
) -> None:
    """Sorts the pictures into root/<class>/ and root/unsure/, which appear all at once; broken ones are left out.

    Pictures of one name in a folder are numbered; one that was given twice is there once.

    Raises:
        RunError: If something cannot be written.
        UsageError: If a picture is no file, and is to be linked to.
    """
    folders, sure = folder_names(names), accepted(found, decisions)
    root = root.resolve()  # a link to a folder stays one
    part = root.with_name(f'.{root.name}.{os.getpid()}.part')
    used, renamed = {}, 0  # by folder the names in it, and what they show
    try:
        part.mkdir()
        for i in np.flatnonzero(found.good).tolist():
            folder = folders[found.classes[i, 0]] if sure[i] else UNSURE
            data = source.data(i)
            here = used.setdefault(folder, {})
            if not here:
                (part / folder).mkdir()
            if isinstance(data, str):
                data = os.path.abspath(data)
                stem, ending = os.path.splitext(os.path.basename(data))
            elif copy:
                image = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else Image.fromarray(data)
                stem, ending = str(i), f'.{(image.format or "png").lower()}'
            else:
                raise UsageError(f'{source.where(i)} is no file to link to: add --copy')
            name, number, shown = stem + ending, 2, data if isinstance(data, str) else i
            while here.get(name.casefold(), shown) != shown:
                name, number = f'{stem}_{number}{ending}', number + 1
            if name.casefold() in here:
                continue
            here[name.casefold()] = shown
            renamed += number > 2
            if not isinstance(data, str):
                if isinstance(data, bytes):
                    (part / folder / name).write_bytes(data)
                else:
                    image.save(part / folder / name)
            elif copy:
                shutil.copy2(data, part / folder / name)
            else:
                os.symlink(data, part / folder / name)
        os.replace(part, root)  # which is empty
        if renamed:
            _logger.info(f'--split-folders: {renamed} files have a number at the end of their name, as others in their '
                         'folder are called the same')
    except OSError as error:
        raise RunError(f'--split-folders {root}: {error.filename or root}: {error.strerror or error}') from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def draw_sheet(path: Path, source: Source, found: Predictions, names: list[str], decisions: Decisions) -> None:
    """Writes the most and the least sure pictures of each class, with their files' names, of the classes with the most
    pictures.
    """
    confidence, first = found.probs[:, 0], np.where(found.good, found.classes[:, 0], -1)
    sure = accepted(found, decisions)
    classes = [k for k, _ in Counter(first[found.good].tolist()).most_common()]
    if len(classes) > SHEET_CLASSES:
        _logger.info(f'--contact-sheet: the {SHEET_CLASSES} classes with the most pictures of {len(classes)} are drawn')

    places = [printable(source.where(i)) for i in range(len(source))]
    alike = Counter(map(os.path.basename, places))

    def cell(row):
        place, image = places[row], source.image(int(row))
        name = os.path.basename(place)
        name = name if alike[name] == 1 else os.path.join(os.path.basename(os.path.dirname(place)), name)
        image.thumbnail((192, 192))  # never enlarges
        note = f'{confidence[row]:.3f}' + ('' if sure[row] else f' {UNSURE}')
        return Cell(image, name, None, note)

    parts = []
    for k in classes[:SHEET_CLASSES]:
        rows = np.flatnonzero(first == k)
        rows = rows[np.argsort(-confidence[rows], kind='stable')]
        most = min(8, math.ceil(len(rows) / 2))
        least = min(8, len(rows) - most)
        name = ' '.join(names[k].split())
        parts.append((f'{name}: the {most} most sure of {len(rows)}', [cell(row) for row in rows[:most]]))
        if least:
            parts.append((f'{name}: the {least} least sure', [cell(row) for row in rows[:-least - 1:-1]]))
    contact_sheet(parts, path)


# --- Main -------------------------------------------------------------------------------------------------------------

def tell_results(
        table: dict[str, list],
        found: Predictions,
        names: list[str],
        decisions: Decisions,
        args: Namespace,
) -> None:
    """Prints the first rows and how many pictures went where."""
    def short(value, limit):
        text = f'{value:.3f}' if isinstance(value, float) else ' '.join(str(value).split())
        return text if len(text) <= limit else f'{text[:(limit - 1) // 2]}…{text[-(limit // 2):]}'

    label = args.label_col if args.label_type != 'none' else args.index_col
    shown = [key for key in (args.filename_col, label, args.output_col, 'decision', 'set_size') if key in table]
    rows = [shown]
    for i in range(min(SHOWN, len(found.good))):
        cells = [short(table[key][i], 48) if found.good[i] else '' for key in shown[1:]]
        cells = cells if found.good[i] else ['cannot be opened', *cells[1:]]
        rows.append([short(table[args.filename_col][i], 60), *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(shown))]
    for row in rows:
        show('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    if len(found.good) > SHOWN:
        show(f'... and {len(found.good) - SHOWN} more')
    sure = accepted(found, decisions)
    counts = Counter(found.classes[sure, 0].tolist()).most_common()
    told = [f'{number} {short(names[k], 48)}' for k, number in counts[:10]]
    told += [f'{sum(n for _, n in counts[10:])} of {len(counts) - 10} other classes'] * (len(counts) > 10)
    told += [f'{int((found.good & ~sure).sum())} {UNSURE}'] * (decisions.threshold is not None)
    told += [f'{int((~found.good).sum())} that cannot be opened'] * (not found.good.all())
    show(f'{len(found.good)} pictures: {", ".join(told)}' if len(found.good) else 'no pictures')


def write_results(
        source: Source,
        found: Predictions,
        names: list[str],
        decisions: Decisions,
        args: Namespace,
) -> None:
    """Decides and writes everything; on the main process."""
    number = int(found.good.sum())
    if args.target_accuracy is not None and decisions.threshold is None:
        confidence = torch.from_numpy(found.probs[found.good, 0])
        value = threshold_from_confidence(confidence, args.target_accuracy)
        decisions.threshold = math.inf if value is None else value
        told = f'from confidence {value:.4f} on' if value is not None else 'none: no confidence is high enough'
        _logger.info(f'Accepted are {int((confidence >= decisions.threshold).sum())} of {number} pictures, {told}')
    errors = tell_errors(source, found.good)
    for i, reason in list(errors.items())[:SHOWN]:
        _logger.warning(f'{printable(source.where(i))} cannot be opened and has an empty row: {reason}')
    if len(errors) > SHOWN:
        _logger.warning(f'... and {len(errors) - SHOWN} more that cannot be opened; see the column error')
    table = create_table(source, found, names, decisions, errors, args)
    written = write_tables(table, dict(table_columns(args, found.classes.shape[1])), args)
    if args.split_folders:
        split_folders(Path(args.split_folders), source, found, names, decisions, args.copy)
        written.append(Path(args.split_folders))
    if args.contact_sheet and number:
        sheet = Path(args.contact_sheet)
        replace_file(sheet, lambda part: draw_sheet(part, source, found, names, decisions))
        written.append(sheet)
    if args.results_file != '-' and not args.no_console_results:
        tell_results(table, found, names, decisions, args)
        show('\n'.join(map(str, written)))
    if len(source) and not number:
        raise RunError(f'none of {len(source)} pictures can be opened')


def main(args: Namespace) -> None:
    checkpoint = Path(args.checkpoint).resolve() if args.checkpoint else None
    run = read_run(checkpoint) if checkpoint else {}
    agree_on_precision(args, [args.checkpoint or args.model], [run])
    accelerator = setup_accelerator(args.device, args.amp, args.amp_dtype)
    _logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    args.workers = limit_workers(args.workers)
    with once_a_machine(accelerator):  # downloads and caches are written once
        source = open_all(args)
        model, config, view = load_model(args, checkpoint, run)
    use_kept_bits(checkpoint, [source])
    model.eval().to(accelerator.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    check_model(model, config, accelerator, args.checkpoint or args.model)
    if model.num_classes < 2:
        raise UsageError(f'{args.checkpoint or args.model} has {model.num_classes} class: there is nothing to predict')
    check_columns(source, model.num_classes, args)
    check_links(source, args)
    names = choose_names(model, checkpoint, run, args.label_type)
    decisions = read_decisions(args, checkpoint, config)
    if accelerator.is_main_process:
        prepare_outputs(args)
    _logger.info(f'{len(source)} pictures as {"x".join(map(str, config.input_size))}, {model.num_classes} classes, '
                 f'{accelerator.num_processes} process(es), device {accelerator.device}')
    found = predict(model, config, view, source, decisions, accelerator, args)
    accelerator.end_training()  # the rest needs no other process
    if accelerator.is_main_process:
        write_results(source, found, names, decisions, args)


if __name__ == '__main__':
    setup_default_logging()
    run_program(lambda: main(_parse_args()))
