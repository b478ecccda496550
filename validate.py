#!/usr/bin/env python3
"""Calibration report of trained classifiers: metrics with intervals, pictures, and what after-training scaling does.

    python validate.py --checkpoint output/train/RUN/best --results-dir DIR
    python validate.py --checkpoint A/best B/best --calibration-split 'train[:10%]' --ood-dataset FOLDER
    accelerate launch validate.py --model resnet50 --pretrained --dataset hfds/imagenet-1k

A run's own args.yaml and its weights' config.json say what to evaluate and how; a flag on the command line wins. Any
number of processes gives the same digits: each image is evaluated once, and all are put in order before anything is
computed.

For each checkpoint the results folder (with several checkpoints a folder in it for each) receives metrics.json,
predictions.parquet, reliability.png, confidence.png, risk_coverage.png and classes.png, and reliability_<scaling>.png
where scalings were fitted. classes.csv has figures by class, confusion.csv and confusion.png tell which class is taken
for which. comparison.csv holds the printed table with all metrics. Several checkpoints also share
comparison.png, comparison_<scaling>.png and risk_coverage.png.

AUROC in the first table is that of confidence telling right from wrong predictions. The second table is about keeping
only the most confident images. The terms are in metrics.py.
"""
import argparse
import csv
import hashlib
import json
import logging
import math
import os
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from PIL import Image
from timm.utils import setup_default_logging
from torch import nn

from backbone import (
    add_device_arguments,
    add_image_arguments,
    add_weights_arguments,
    agree_on_precision,
    check_model,
    check_weights_arguments,
    class_names_of,
    evaluate_batches,
    load_model,
)
from checkpoint import read_run, use_kept_bits
from data import DataConfig, ViewDataset, create_loader, evaluation_batches, limit_workers
from decisions import LEVELS, measure_decisions
from digests import COMPARED_FILES, COMPARED_MOST, digest_pictures, from_text, place_pictures, spread
from figures import (
    Panel,
    class_diagram,
    confidence_histogram,
    confusion_diagram,
    reliability_diagram,
    risk_coverage_diagram,
)
from imbalance import tail_error
from inputs import open_pictures
from labels import match_classes, read_labels
from metrics import (
    calibration_report,
    class_report,
    confidence_and_correct,
    confusion_matrix,
    ece_difference_interval,
    equal_mass_bins,
    ood_metrics,
    ood_scores,
    reliability_bins,
)
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
from scaling import MIN_TEMPERATURE, add_temperature, draw_partners, fit_temperature, fit_vector, read_temperature
from seeds import item_seed
from sources import (
    SOURCE_FLAGS,
    ImageError,
    NoEvaluationSplit,
    PartSource,
    Source,
    absolute_name,
    align_numbers,
    locate,
    open_run_source,
    open_source,
    refuse_overlap,
    unlabeled_split,
)
from splits import HELD_OUT

_logger = logging.getLogger('validate')

# Of the command line and of a run's args.yaml: which images.
DATA_KEYS = ('dataset', 'data_dir', 'val_split', 'train_split', 'dataset_download', 'class_map', 'input_key',
             'target_key', 'skip_bad_images', 'max_pixels', 'val_labels',
             'unlabeled_split')
# How the pictures and the text call logits that were scaled.
SCALED = {'temperature': 'after temperature scaling', 'vector': 'after vector scaling',
          'saved': 'after the saved temperature', 'pseudo': 'after temperature scaling without labels'}
OOD_SCORES = ('msp', 'energy', 'margin')


# --- Arguments --------------------------------------------------------------------------------------------------------

def create_validate_parser() -> argparse.ArgumentParser:
    flag = argparse.BooleanOptionalAction
    parser = ArgumentParser(description='Calibration report of trained classifiers.',
                            stray='; weights are given as --checkpoint RUN/last')
    group = parser.add_argument_group('Checkpoints')
    group.add_argument('--checkpoint', metavar='PATH', nargs='+', default=[],
                       help='folders of weights: RUN/best or RUN/last of train_ssl.py, or any that timm saved with a '
                            'config.json; or weight files of timm\'s train.py. Several are compared. best/ was chosen '
                            'by the score on the run\'s evaluation split: on that split, report last/')
    add_weights_arguments(group)
    group.add_argument('--num-classes', type=int, metavar='N', default=None,
                       help='classes of the model; given, it may have more classes than the data set has names')

    group = parser.add_argument_group('Dataset', 'What is not given is taken from the args.yaml of the run.')
    group.add_argument('--dataset', metavar='NAME', default=None, help='as train_ssl.py --dataset')
    group.add_argument('--data-dir', metavar='DIR', default=None, help='as train_ssl.py --data-dir')
    group.add_argument('--split', '--val-split', dest='val_split', metavar='NAME', default=None,
                       help='split to evaluate; held-out: the part that the run\'s --val-fraction held out (default: '
                            'the run\'s --test-split, else its --val-split, else the first of validation, val, valid, '
                            'test that exists, also after --val-fraction)')
    group.add_argument('--train-split', metavar='NAME', default=None,
                       help='training split, to which labels.json refers (default: the run\'s, else train)')
    group.add_argument('--val-labels', metavar='FILE', default=None,
                       help='labels of a split that is a flat folder, as train_ssl.py --val-labels')
    group.add_argument('--dataset-download', action=flag, default=None, help='let torchvision download (torch/)')
    group.add_argument('--input-key', metavar='COLUMN', default=None, help='image column (hub, parquet, arrow)')
    group.add_argument('--target-key', metavar='COLUMN', default=None, help='label column (hub, parquet, arrow)')
    group.add_argument('--class-map', metavar='FILE', default=None, help='timm\'s class map (image folders)')
    group.add_argument('--skip-bad-images', action=flag, default=None,
                       help='leave out images that cannot be decoded, and count them, instead of stopping')
    group.add_argument('--max-pixels', type=int, metavar='N', default=None, help='as train_ssl.py --max-pixels')

    add_image_arguments(parser)

    group = parser.add_argument_group(
        'After-training calibration',
        'Adds rows for temperature scaling (one number) and vector scaling (two a class), fitted by maximum likelihood '
        'on other images than those evaluated: what is found among these, by content, is left out of the fit.',
    )
    group.add_argument('--calibration-split', metavar='NAME', default=None,
                       help='fit on this split of the same data set, with its labels (held-out: as of --split); all '
                            'but torchvision\'s sets take slices, as train[:10%%], also of the split evaluated: '
                            '--split "test[20%%:]" --calibration-split "test[:20%%]", if it is not sorted by '
                            'class as image folders are. The labeled images of the '
                            'compared runs are left out. Images that a run saw unlabeled are not: their labels are '
                            'ones that it did not have')
    group.add_argument('--calibration-from-labeled', metavar='FILE', nargs='?', const='', default=None,
                       help='fit on labeled images of the training split: those that FILE lists, a file like a run\'s '
                            'labels.json, or without FILE the run\'s own. On its own labeled images a model is nearly '
                            'always right, and the fit takes this for calibration: expect a temperature that is too '
                            'low, even at its bound. For an honest fit without more labels, train on a part of them '
                            '(train_ssl.py --labels-file) and give the rest here; unless it is taken out of the '
                            'unlabeled set, the run then still sees it there')
    group.add_argument('--calibration', default=None, choices=['pseudo'],
                       help='pseudo: a temperature without any label, beside the others if these are asked for too. '
                            'Pairs of unlabeled images are mixed, and the prediction on the dominant one counts as '
                            'the label of the mixture (arXiv 2307.07489). Not for networks that were trained with '
                            'mixing, such as --calibratemix: it makes them much too confident')
    group.add_argument('--unlabeled-split', metavar='NAME', default=None,
                       help='split whose images --calibration pseudo takes, without their labels (default: the '
                            'unlabeled split of the run). What is evaluated, and the labeled images of the run, are '
                            'left out by content')
    group.add_argument('--save-temperature', action=flag, default=False,
                       help='store the temperature, by which logits are to be divided, in the config.json of each '
                            'checkpoint folder, as calibration.temperature; a later report without a fit shows it. '
                            'From --calibration-split also what predict.py decides by: confidence thresholds and '
                            'the quantiles of prediction sets. Of a temperature fitted with labels and one without '
                            'them, the former')
    levels = ' '.join(f'{level:g}' for level in LEVELS)
    group.add_argument('--target-accuracy', type=float, metavar='A', nargs='+', default=None,
                       help=f'accuracies to store thresholds for (default: {levels})')
    group.add_argument('--coverage', type=float, metavar='C', nargs='+', default=None,
                       help=f'coverages to store the quantiles of prediction sets for (default: {levels})')

    group = parser.add_argument_group('Out-of-distribution detection')
    group.add_argument('--ood-dataset', metavar='NAME', nargs='+', default=[],
                       help='images of something else, put through the same transform: names as for --dataset, '
                            'folders of images or .parquet files, of which all are taken unless --ood-split is given')
    group.add_argument('--ood-data-dir', metavar='DIR', default=None, help='as --data-dir, for --ood-dataset')
    group.add_argument('--ood-split', metavar='NAME', default=None,
                       help='default: the first of validation, val, valid, test that exists')

    add_device_arguments(parser)

    group = parser.add_argument_group('Results')
    group.add_argument('--results-dir', metavar='DIR', default='output/validate', help='default: output/validate')
    group.add_argument('--save-logits', action=flag, default=False, help='a column of logits in predictions.parquet')
    group.add_argument('--bootstrap', type=int, metavar='N', default=1000,
                       help='resamplings for the 95 %% intervals; 0 for none (default: 1000)')
    group.add_argument('--seed', type=int, metavar='N', default=0, help='of the resampling (default: 0)')
    return parser


def _parse_args(argv: list[str] | None = None) -> Namespace:
    parser = create_validate_parser()
    args = parser.parse_args(argv)
    parser.at_least(args, batch_size=1, workers=0, bootstrap=0)
    for flag, levels in (('--target-accuracy', args.target_accuracy), ('--coverage', args.coverage)):
        if levels and not (args.save_temperature and args.calibration_split):
            parser.error(f'{flag}: what it asks for is stored by --save-temperature with --calibration-split')
        if not all(0 < level < 1 for level in levels or ()):
            parser.error(f'{flag} {" ".join(f"{level:g}" for level in levels)}: expected numbers between 0 and 1')
    check_weights_arguments(parser, args)
    if args.calibration_split is not None and args.calibration_from_labeled is not None:
        parser.error('--calibration-split and --calibration-from-labeled: give one of them')
    if args.unlabeled_split is not None and args.calibration is None:
        parser.error(f'--unlabeled-split {args.unlabeled_split}: only --calibration pseudo takes its images; add it')
    if args.save_temperature and not fits(args) and args.calibration is None:
        parser.error('--save-temperature: nothing is fitted; add --calibration-split, --calibration-from-labeled or '
                     '--calibration pseudo')
    if args.save_temperature and not (args.checkpoint and all(Path(path).is_dir() for path in args.checkpoint)):
        parser.error('--save-temperature: only checkpoint folders have a config.json to store it in')
    return args


def fits(args: Namespace) -> bool:
    return args.calibration_split is not None or args.calibration_from_labeled is not None


# --- What to evaluate -------------------------------------------------------------------------------------------------

def name_checkpoints(checkpoints: list[Path]) -> list[str]:
    """Short and different names: the run's, else the run's and the folder's, else numbered ones."""
    names = [path.parent.name if (path.parent / 'args.yaml').exists() else path.name for path in checkpoints]
    if len(set(names)) < len(names):
        names = [f'{path.parent.name}-{path.name}' for path in checkpoints]
    if len(set(names)) < len(names):
        names = [f'{name}-{number}' for number, name in enumerate(names, 1)]
    return names


def choose_data(args: Namespace, run: dict) -> Namespace:
    """Arguments that name the images: the command line's over the run's over train_ssl.py's defaults.

    Another --dataset than the run's leaves the run's splits, columns and class map behind. `own` tells whether it is
    the data set that the run was trained on, and `names` what it is called here and was called then.
    `val_labels_split` is the split that --val-labels belongs to.
    """
    given = {key: getattr(args, key) for key in DATA_KEYS if getattr(args, key) is not None}
    for key in ('data_dir', 'class_map', 'val_labels'):  # as a run keeps them, wherever it was started
        if os.path.exists(given.get(key) or ''):
            given[key] = os.path.abspath(given[key])
    if given.get('dataset'):
        given['dataset'] = absolute_name(given['dataset'])
        if not run.get('dataset') and given['dataset'] == run.get('data_dir'):
            given['dataset'] = ''  # a run keeps a folder as its --data-dir
    own = bool(run) and given.get('dataset', run.get('dataset')) == run.get('dataset')
    if own and args.val_split is None:
        given['val_split'] = run.get('test_split') or run.get('val_split')
    data = Namespace(**{**SOURCE_FLAGS, **(run if own else {}), **given, 'own': own})
    data.names = {which.get('dataset') or which.get('data_dir') for which in (vars(data), run if own else {})}
    data.val_labels_split = data.val_split if 'val_labels' in given or not own else run.get('val_split')
    if data.val_labels_split not in (data.val_split, args.calibration_split):
        data.val_labels = None
    return data


def holds_labeled(data: Namespace, file: Path) -> bool:
    """Whether the training split at another --data-dir than the run's has a labeled picture of its labels.json.

    Then it is the run's data set, which was moved. Files of before digests tell nothing, and are believed.
    """
    try:
        content = json.loads(file.read_text())
        known, index = from_text(content.get('digests', [])), torch.tensor(content['index'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f'{file}: cannot be read ({type(error).__name__} {error})') from error
    known = known[known != 0]
    if not len(known):
        return True
    try:
        train = open_source(data, data.train_split)
    except UsageError:  # a folder without that split, which the run's has; else opening what is asked for tells why
        return bool(data.dataset)
    looked_at = spread(len(train), COMPARED_FILES if train.in_files() else COMPARED_MOST)
    looked_at = torch.cat([index[index < len(train)], looked_at])
    return bool(torch.isin(digest_pictures(train, looked_at), known).any())


def check_own_data(name: str, checkpoint: Path | None, data: Namespace, run: dict) -> None:
    """Clears `own` where --data-dir names another folder, and none of the run's labeled pictures is in it.

    Positions in the run's training split then mean nothing.
    """
    file = checkpoint.parent / 'labels.json' if checkpoint is not None else None
    if not data.own or data.data_dir == run.get('data_dir') or file is None or not file.exists():
        return
    if not os.path.isdir(data.data_dir):
        return  # opening it tells
    if not holds_labeled(data, file):
        data.own, data.names = False, {data.dataset or data.data_dir}
        _logger.info(f'{name}: no labeled picture of its training was found in {data.data_dir}: taken as other data')


def agree_on_data(names: list[str], chosen: list[Namespace]) -> Namespace:
    """The data arguments of the first checkpoint; raises UsageError if another is to be evaluated on other images."""
    first = chosen[0]
    for name, other in zip(names, chosen):
        for key in ('dataset', 'data_dir', 'val_split', 'class_map', 'input_key', 'target_key', 'val_labels'):
            ours, theirs = getattr(first, key), getattr(other, key)
            if ours != theirs:
                flag = 'split' if key == 'val_split' else key.replace('_', '-')
                if key == 'dataset':  # a folder is no --dataset but a --data-dir
                    ours, theirs = (data.dataset or data.data_dir for data in (first, other))
                raise UsageError(f'{names[0]} has --{flag} {ours} and {name} {theirs}: checkpoints are compared on the '
                                 'same images, so give the flag')
    if not first.dataset and not first.data_dir:
        raise UsageError(f'{names[0]} comes without a run\'s args.yaml: give --dataset')
    return first


def open_held_out(data: Namespace, checkpoints: list[Path | None]) -> Source:
    """The images that --val-fraction held out of the training split of the runs, by their labels.json.

    Raises:
        UsageError: If there are none, the runs differ in them, or one is not in the data any more.
    """
    found, known = set(), {}
    for checkpoint in checkpoints:
        file = checkpoint.parent / 'labels.json' if checkpoint is not None else None
        try:
            content = json.loads(file.read_text()) if file is not None and file.exists() else {}
            found.add(tuple(content.get('held_out', ())))
            if 'held_out_digests' in content:  # not in older files
                known[tuple(content['held_out_digests'])] = file, content['held_out_rows']
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f'{file}: cannot be read ({type(error).__name__} {error})') from error
    if len(found) != 1 or () in found or len(known) > 1:
        raise UsageError(f'split {HELD_OUT}: not all checkpoints are of runs that held out the same images by '
                         '--val-fraction; give another split')
    train, held_out = open_source(data, data.train_split), torch.tensor(found.pop())
    if known:
        [(texts, (of, rows))] = known.items()
        return PartSource(train, place_pictures(f'split {HELD_OUT} of {of}', train, held_out, torch.tensor(rows),
                                                from_text(texts), HELD_OUT))
    index = read_labels(file, train, content['num_classes'], content.get('class_names'))[0]
    if index.tolist() != content['index']:
        raise UsageError(f'split {HELD_OUT}: the images of {data.train_split} stand in another order than in the run')
    return PartSource(train, held_out)


def open_split(data: Namespace, split: str | None, checkpoints: list[Path | None], run: Path | None) -> Source:
    """A split of the data, or what --val-fraction held out; `run` is the folder whose args.yaml names the data."""
    if split == HELD_OUT:
        return open_held_out(data, checkpoints)
    try:
        source = open_source(data, split) if run is None else open_run_source(data, split, run)
        refuse_overlap(source, split)
        return source
    except NoEvaluationSplit:
        if split is not None or getattr(data, 'val_fraction', None) is None:
            raise
        _logger.info(f'There is no evaluation split, so that --split {HELD_OUT} is taken: what --val-fraction held out')
        data.val_split = HELD_OUT
        return open_held_out(data, checkpoints)


def split_names(split: str) -> set[str]:
    """Splits that an expression such as `train[:10%]+test` draws on."""
    return {part.partition('[')[0].strip() for part in split.split('+')}


def may_share(split: str, other: str, data: Namespace) -> bool:
    """Whether two splits of the run's data set may have images in common, as what was held out and its split do."""
    both = [split_names(which) for which in (split, other)]
    for names in both:
        if HELD_OUT in names:
            names |= split_names(data.train_split)
    return bool(both[0] & both[1])


@dataclass
class Images:
    """The sets to evaluate."""
    data: Namespace
    test: Source
    calibration: Source | None
    unlabeled: Source | None
    ood: dict[str, Source]


def check_classes(
        source: Source,
        split: str,
        model: nn.Module,
        data: Namespace,
        given: int | None,
        by_number: bool = False,
        in_part: bool = False,
) -> torch.Tensor:
    """The labels of the images as the model numbers its classes, `[N]` int64; -1: none.

    Args:
        source: The images.
        split: For messages.
        model: With names of its classes they are matched by name, else by number.
        data: The data set, for messages.
        given: A number of classes that the user gave, for which a data set with fewer names is accepted.
        by_number: Whether the user says that names which have nothing in common are of the same numbers.
        in_part: Whether images may have no label, if some have one.

    Raises:
        UsageError: Unless they are classes of the model.
    """
    where = data.dataset or data.data_dir
    if (source.targets < 0).all() or (not in_part and (source.targets < 0).any()):
        raise UsageError(f'{where}: {int((source.targets < 0).sum())} of the {len(source)} images of split {split} '
                         'have no label')
    names = class_names_of(model)
    targets, own_names = align_numbers(source.targets, source.class_names, names)
    if not names or not own_names:
        largest = int(targets.max()) + 1
        named = len(own_names) if own_names else largest
        if largest > model.num_classes or (own_names and named != model.num_classes and given is None):
            raise UsageError(
                f'{where} has {named} classes and the model {model.num_classes}: a label would mean another class. '
                'Give --class-map for a folder with a part of the classes, or --num-classes if the numbers agree'
            )
    return match_classes(
        source, names, model.num_classes, f'{where} split {split}', run='the model', same_numbering=by_number,
    )


# --- Evaluation -------------------------------------------------------------------------------------------------------

@dataclass
class Outputs:
    """What a model says about a set of images, in their order.

    Attributes:
        index: Positions in the set, [N] int64; an image that was skipped is missing.
        target: Labels, [N] int64.
        digest: Of the pictures' content, [N] int64: equal pictures have equal ones.
        logits: [N, K] float32.
    """
    index: torch.Tensor
    target: torch.Tensor
    digest: torch.Tensor
    logits: torch.Tensor

    def keep(self, rows: torch.Tensor) -> 'Outputs':
        return Outputs(*(value[rows] for value in vars(self).values()))


def picture_digest(image: Image.Image) -> int:
    content = hashlib.blake2b(image.tobytes(), digest_size=8, salt=repr(image.size).encode()[:16])
    return int.from_bytes(content.digest(), 'little', signed=True)


@torch.no_grad()
def collect(
        model: nn.Module,
        dataset: ViewDataset,
        config: DataConfig,
        accelerator: Accelerator,
        args: Namespace,
) -> Outputs:
    """Evaluates every image once over all processes, and gives all of them to each process.

    Raises:
        RunError: If logits are not finite, an image cannot be decoded, or the device's memory is too small.
    """
    size = min(args.batch_size, len(dataset))
    batches = evaluation_batches(len(dataset), size, accelerator.process_index, accelerator.num_processes)
    loader = create_loader(dataset, batches, args.workers, args.pin_mem, accelerator.device)
    parts = [(*(torch.zeros(0, dtype=torch.int64),) * 3, torch.zeros(0, model.num_classes))]
    for batch, logits in evaluate_batches(model, loader, size, config, accelerator, args.channels_last):
        good = batch['skipped'] < 0
        parts.append(tuple(v[good].cpu() for v in (batch['index'], batch['target'], batch['digest'], logits)))
    values = [torch.cat(part).to(accelerator.device) for part in zip(*parts)]
    if accelerator.num_processes > 1:
        # An index of -1 marks the rows that only make the processes' parts equally long.
        values = [accelerator.gather(accelerator.pad_across_processes(v, pad_index=-1)) for v in values]
    outputs = Outputs(*(value.cpu() for value in values))
    outputs = outputs.keep(outputs.index >= 0)
    outputs = outputs.keep(outputs.index.argsort())
    if len(outputs.index) < len(dataset):
        _logger.warning(f'{len(dataset) - len(outputs.index)} of {len(dataset)} images cannot be decoded: left out')
    if not len(outputs.index):
        raise RunError(f'none of {len(dataset)} images can be decoded')
    finite = outputs.logits.isfinite().all(1)
    if not finite.all():
        index = int(dataset.index[outputs.index[~finite][0]])
        raise RunError(f'logits are not finite (NaN or inf) for image {index} ({dataset.source.where(index)})'
                       + ('; try without --amp' if args.amp else ''))
    return outputs


class PairDataset(ViewDataset):
    """Images, each with a view of another one beside it, `partner`, which is to be mixed into it.

    Args:
        partner: For each item the one that it is paired with, [n] int64.
    """

    def __init__(self, *args, partner: torch.Tensor, **options):
        super().__init__(*args, **options)
        self.partner = partner

    def __getitem__(self, key):
        item, other = super().__getitem__(key), super().__getitem__(int(self.partner[key]))
        broken = [part for part in (item, other) if isinstance(part, ImageError)]
        return broken[0] if broken else dict(item, partner=other['image'])


# --- Results ----------------------------------------------------------------------------------------------------------

@dataclass
class Result:
    """A checkpoint's outputs, and the scalings of them that are reported."""
    name: str
    checkpoint: Path | None
    config: DataConfig
    outputs: Outputs
    calibration: Outputs | None
    labeled: Outputs | None
    mixed: Outputs | None  # of pairs of unlabeled images; the target is the prediction on the dominant one
    ood: dict[str, Outputs]
    class_names: list[str] | None = None
    chosen_by: str = ''  # what best/ was chosen by: a metric on a split
    labeled_by_class: torch.Tensor | None = None  # images that it was trained on, [K] int64, where that is known
    scaled: dict[str, torch.Tensor] = field(default_factory=dict)  # logits by scaling, the first is 'none'
    parameters: dict[str, dict] = field(default_factory=dict)
    reports: dict[str, dict] = field(default_factory=dict)


def choose_calibration_images(results: list[Result], args: Namespace) -> None:
    """Takes images out of the fit that are evaluated or, with --calibration-split, labeled ones of a run."""
    trained = torch.zeros(0, dtype=torch.int64)
    if args.calibration_split is not None:
        trained = torch.cat([trained, *(result.labeled.digest for result in results if result.labeled is not None)])
    for result in results:
        found = result.calibration
        evaluated = torch.isin(found.digest, result.outputs.digest)
        seen = torch.isin(found.digest, trained) & ~evaluated
        rows = ~evaluated & ~seen
        told = f'{int(evaluated.sum())} are evaluated'
        if args.calibration_split is not None:  # else those are what is asked for
            told += f', {int(seen.sum())} were labeled in training'
        if not rows.any():
            raise UsageError(f'{args.calibration_split or "--calibration-from-labeled"}: none of {len(rows)} images is '
                             f'left to fit on ({told}); give another split or slices that do not overlap')
        if found.logits.shape[1] > 1 and len(found.target[rows].unique()) == 1:
            raise UsageError(f'{args.calibration_split or "--calibration-from-labeled"}: all {int(rows.sum())} images '
                             'to fit on are of one class; a slice of image folders takes one class after the other, so '
                             'give a split of its own')
        result.calibration = found.keep(rows)
        _logger.info(f'{result.name}: {int(rows.sum())} of {len(rows)} calibration images are used: {told}')


def saved_temperature(checkpoint: Path | None, data: Namespace, config: DataConfig) -> float | None:
    """The temperature kept with a checkpoint; None if it was fitted on the split that is evaluated. One of another
    image size is told.
    """
    if checkpoint is None or not checkpoint.is_dir():
        return None
    try:
        saved = read_temperature(checkpoint)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if saved is None:
        return None
    if saved.get('dataset') in data.names and may_share(saved['split'], data.val_split, data):
        _logger.warning(f'{checkpoint / "config.json"}: its temperature is not shown, as it was fitted on '
                        f'{saved["split"]}, which may hold images of {data.val_split}')
        return None
    if saved.get('input_size') not in (None, list(config.input_size)):
        _logger.warning(f'{checkpoint / "config.json"}: its temperature was found on images of {saved["input_size"]}, '
                        f'not {list(config.input_size)}')
    return saved['temperature']


def scale(result: Result, data: Namespace) -> None:
    """Fills in the scaled logits: fitted ones, or those of a saved temperature."""
    logits = result.outputs.logits
    result.scaled['none'], result.parameters['none'] = logits, {}
    fit_on = result.calibration
    if result.mixed is not None:
        value, at_bound = fit_temperature(result.mixed.logits, result.mixed.target)
        result.scaled['pseudo'] = logits.double() / value
        result.parameters['pseudo'] = dict(temperature=value, at_bound=at_bound, images=len(result.mixed.index))
        if at_bound:
            _logger.warning(f'{result.name}: the temperature without labels is at its bound of {value:g}, since the '
                            f'likelihood of {len(result.mixed.index)} mixtures has no maximum')
        elif value < 1:  # seen on solar cells, alike as they are, and after training with mixing
            _logger.warning(f'{result.name}: the temperature without labels is {value:.2f}, which makes it surer than '
                            'it was. Where mixtures are too easy to tell, that is wrong: compare it with one from '
                            'labels (--calibration-split)')
    elif fit_on is None:
        value = saved_temperature(result.checkpoint, data, result.config)
        if value is not None:
            result.scaled['saved'] = logits.double() / value
            result.parameters['saved'] = dict(temperature=value)
    if fit_on is None:
        return
    value, at_bound = fit_temperature(fit_on.logits, fit_on.target)
    result.scaled['temperature'] = logits.double() / value
    result.parameters['temperature'] = dict(temperature=value, at_bound=at_bound)
    factor, offset = fit_vector(fit_on.logits, fit_on.target, value)
    result.scaled['vector'] = logits.double() * factor + offset
    result.parameters['vector'] = dict(factor=factor.tolist(), offset=offset.tolist())
    if at_bound:
        right = int((fit_on.logits.argmax(1) == fit_on.target).sum())
        _logger.warning(
            f'{result.name}: the temperature is at its bound of {value:g}, since the likelihood of the calibration '
            f'images ({right} of {len(fit_on.target)} right) has no maximum '
            + ('above it: they are too easy for this model to tell how sure it should be'
               if value == MIN_TEMPERATURE else 'below it: its logits say no more about them than chance')
        )
    missing = sorted({*range(fit_on.logits.shape[1])} - {*fit_on.target.tolist()})
    if missing:
        names = [result.class_names[k] if k < len(result.class_names or ()) else str(k) for k in missing]
        _logger.warning(f'{result.name}: {len(missing)} classes have no calibration image ({name_some(names)}); vector '
                        'scaling can only lower their logits. Is it a slice of data that is sorted by class?')


def interval(report: dict, name: str) -> str:
    """A rate in percent with its interval."""
    if f'{name}_low' not in report:
        return f'{report[name]:.2f}'
    return f'{report[name]:.2f} [{report[f"{name}_low"]:.2f}, {report[f"{name}_high"]:.2f}]'


def align(rows: list[list[str]], left: int = 2) -> str:
    """Columns of text, the first `left` flush left, the others flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return '\n'.join(
        '  '.join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    )


def without_empty(rows: list[list[str]]) -> list[list[str]]:
    """The rows of a table without the columns that say nothing under their head."""
    kept = [any(cells) for cells in zip(*rows[1:])]
    return [[cell for cell, keep in zip(row, kept) if keep] for row in rows]


def format_table(results: list[Result]) -> str:
    """What most readers look for, with intervals."""
    range_of = ' [95 %]' if 'ece_low' in results[0].reports['none'] else ''
    rows = [['run', 'scaling', 'T', f'error %{range_of}', f'ECE %{range_of}', 'NLL', 'Brier', 'AUROC', 'best by']]
    any_at_bound = False
    for result in results:
        for scaling, report in result.reports.items():
            temperature = result.parameters[scaling].get('temperature')
            at_bound = result.parameters[scaling].get('at_bound', False)
            any_at_bound |= at_bound
            rows.append([
                result.name,
                scaling,
                '' if temperature is None else f'{temperature:.3f}' + '*' * at_bound,
                *(interval(report, key) for key in ('error', 'ece')),
                *(f'{report[key]:.4f}' for key in ('nll', 'brier')),
                '' if report['auroc'] is None else f'{report["auroc"]:.2f}',
                result.chosen_by,
            ])
    notes = ['* at its bound: the likelihood of the calibration images has no maximum'] * any_at_bound
    if range_of:
        notes.append('the interval of ECE takes off what chance adds to it, so it reaches further down than up')
    return '\n'.join([align(without_empty(rows)), *notes])


def format_further_table(results: list[Result]) -> str:
    """Figures that treat classes alike, and the ECE by other definitions."""
    rows = [['run', 'scaling', 'balanced acc %', 'macro-F1 %', 'rarest third error %', 'ECE %: equal-mass',
             'class-balanced', 'class-wise', 'smooth']]
    keys = ('balanced_accuracy', 'macro_f1', 'tail_error',
            'ece_equal_mass', 'ece_balanced', 'ece_classwise', 'ece_smooth')
    for result in results:
        for scaling, report in result.reports.items():
            rows.append([result.name, scaling, *('' if report[key] is None else f'{report[key]:.2f}' for key in keys)])
    return align(without_empty(rows))


def format_selective_table(results: list[Result]) -> str:
    rows = [['run', 'scaling', '% kept at 95 % accuracy', 'at 99 %', 'accuracy % with 80 % kept', 'with 90 %', 'AURC']]
    keys = ('coverage_at_95', 'coverage_at_99', 'accuracy_at_80', 'accuracy_at_90', 'aurc')
    for result in results:
        for scaling, report in result.reports.items():
            rows.append([result.name, scaling, *(f'{report[key]:.2f}' for key in keys)])
    return align(rows)


def format_ood_table(results: list[Result], metrics: list[dict]) -> str:
    rows = [['run', 'out-of-distribution set', 'score', 'images', 'AUROC', 'FPR95', 'AUPR in', 'AUPR out']]
    for result, by_set in zip(results, metrics):
        for name, by_score in by_set.items():
            for score in OOD_SCORES:
                rows.append([result.name, name, score, str(by_score['count']),
                             *(f'{by_score[score][key]:.2f}' for key in ('auroc', 'fpr95', 'aupr_in', 'aupr_out'))])
    return align(rows, left=3)


def what_is_left(results: list[Result], args: Namespace) -> list[str]:
    """For each checkpoint beside the first: how much larger its ECE is than the first one's, unscaled and scaled."""
    first, lines = results[0], []
    for other in results[1:]:
        lines.append(f'ECE of {other.name} minus ECE of {first.name}, in percentage points'
                     + (', with its 95 % interval:' if args.bootstrap else ':'))
        raw = other.reports['none']['ece'] - first.reports['none']['ece']
        for scaling in first.scaled:
            if scaling not in other.scaled:
                continue
            difference = other.reports[scaling]['ece'] - first.reports[scaling]['ece']
            line = f'  {SCALED.get(scaling, "unscaled")}: {difference:+.2f}'
            if args.bootstrap:
                sides = [confidence_and_correct(r.scaled[scaling], r.outputs.target) for r in (first, other)]
                low, high = ece_difference_interval(*sides, args.bootstrap, args.seed)
                line += f' [{100 * low:+.2f}, {100 * high:+.2f}]'
            if scaling != 'none' and abs(raw) >= 0.5:  # a share of next to nothing says nothing
                line += f'; the gap is {100 * abs(difference / raw):.0f} % of the unscaled one'
                if difference / raw < 0:
                    line += f', and now {(other if difference > 0 else first).name} has the larger ECE'
            lines.append(line)
    return lines


def measure_ood(result: Result) -> dict[str, dict]:
    """By set: the number of images and, by score, the metrics in percent."""
    measured = {}
    for name, outputs in result.ood.items():
        measured[name] = dict(count=len(outputs.index))
        for score in OOD_SCORES:
            values = ood_metrics(ood_scores(result.outputs.logits, score), ood_scores(outputs.logits, score))
            measured[name][score] = {key: 100 * value for key, value in values.items()}
    return measured


def picture_name(name: str, scaling: str) -> str:
    return f'{name}.png' if scaling == 'none' else f'{name}_{scaling}.png'


def result_files(scalings: Iterable[str]) -> list[str]:
    """Names of the files of one checkpoint with these scalings."""
    return ['metrics.json', 'predictions.parquet', 'confidence.png', 'risk_coverage.png', 'classes.png', 'classes.csv',
            'confusion.csv', 'confusion.png', *(picture_name('reliability', scaling) for scaling in scalings)]


def left_over(folder: Path, results: list[Result], has_ood: bool) -> list[str]:
    """Files and folders of checkpoints that an earlier report left in the folder and this one does not write, by name.

    They are told and not removed: report.py and others give files the same names.
    """
    several, every = len(results) > 1, ('none', *SCALED)
    own = [folder / result.name if several else folder for result in results]
    known = {place / name for place in (folder, *own) for name in result_files(every)}
    known |= {folder / 'ood.csv', *(folder / picture_name('comparison', scaling) for scaling in every)}
    written = {place / name for place, result in zip(own, results) for name in result_files(result.scaled)}
    written |= {folder / 'risk_coverage.png', *[folder / 'ood.csv'] * has_ood}
    written |= {folder / picture_name('comparison', scaling) for scaling in results[0].scaled if several}
    folders = {path.parent for path in folder.glob('*/predictions.parquet') if (path.parent / 'metrics.json').exists()}
    found = [path for path in known - written if path.exists()] + [path for path in folders if path not in own]
    return sorted(str(path.relative_to(folder)) for path in found)


def write_result(folder: Path, result: Result, about: dict, ood: dict, args) -> None:
    """Files of one checkpoint, into a folder that is there."""
    outputs = result.outputs
    confidence, correct = confidence_and_correct(outputs.logits, outputs.target)
    predicted = outputs.logits.argmax(1)

    bins = {key: value.tolist() for key, value in reliability_bins(confidence, correct)._asdict().items()}
    content = OrderedDict(
        run=result.name,
        **about,
        chosen_by=result.chosen_by or None,
        precision=args.amp_dtype if args.amp else 'float32',
        class_names=result.class_names,
        input_size=result.config.input_size,
        **result.reports['none'],
        bins=bins,
        calibration_images=None if result.calibration is None else len(result.calibration.index),
        scaled={
            scaling: dict(result.parameters[scaling], **report)
            for scaling, report in result.reports.items() if scaling != 'none'
        },
        ood=ood,
    )
    (folder / 'metrics.json').write_text(json.dumps(content, indent=1) + '\n')

    columns = dict(
        index=outputs.index.numpy(),
        target=outputs.target.numpy(),
        predicted=predicted.numpy(),
        confidence=confidence.numpy(),
    )
    if args.save_logits:
        columns['logits'] = pa.FixedSizeListArray.from_arrays(
            outputs.logits.flatten().numpy(), outputs.logits.shape[1],
        )
    pq.write_table(pa.table(columns), folder / 'predictions.parquet')

    for scaling, logits in result.scaled.items():
        pair = confidence_and_correct(logits, outputs.target)
        panels = [Panel('bins of equal width', reliability_bins(*pair)),
                  Panel('bins of equal mass', equal_mass_bins(*pair))]
        heading = result.name if scaling == 'none' else f'{result.name}, {SCALED[scaling]}'
        reliability_diagram(panels, folder / picture_name('reliability', scaling), heading)
    confidence_histogram(confidence, correct, folder / 'confidence.png', result.name)
    risk_coverage_diagram([(result.name, confidence, correct)], folder / 'risk_coverage.png')
    names = list(result.class_names or [])
    names += [str(k) for k in range(len(names), outputs.logits.shape[1])]
    write_classes(folder, result, names)
    class_diagram(predicted, confidence, correct, folder / 'classes.png', names, result.name)


def write_classes(folder: Path, result: Result, names: list[str]) -> None:
    """Figures by class in percent, where there are any, and the confusion matrix as numbers and as a picture."""
    outputs = result.outputs
    columns = class_report(outputs.logits, outputs.target)._asdict()
    counts = {key: columns.pop(key).tolist() for key in ('images', 'predicted')}
    labeled = {} if result.labeled_by_class is None else dict(labeled=result.labeled_by_class.tolist())
    rates = {key: ['' if math.isnan(value) else 100 * value for value in columns[key].tolist()] for key in columns}
    write_csv(folder / 'classes.csv', [
        dict(number=k, name=name, **{key: values[k] for key, values in (labeled | counts | rates).items()})
        for k, name in enumerate(names)
    ])
    matrix = confusion_matrix(outputs.logits, outputs.target)
    with open(folder / 'confusion.csv', 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
        csv.writer(file).writerows([['true', *names], *([name, *row] for name, row in zip(names, matrix.tolist()))])
    confusion_diagram(matrix, folder / 'confusion.png', names, result.name)
    absent = counts['images'].count(0)
    if absent:
        _logger.warning(f'{result.name}: {absent} of {len(names)} classes have no image in this split; they have no '
                        'recall, and balanced accuracy is that of the others')


def write_comparison(folder: Path, results: list[Result]) -> None:
    """Pictures with all checkpoints side by side."""
    for scaling in results[0].scaled:
        panels = []
        for result in results:
            if scaling in result.scaled:
                report = result.reports[scaling]
                note = f'95 %: {report["ece_low"]:.1f} to {report["ece_high"]:.1f}' if 'ece_low' in report else ''
                pair = confidence_and_correct(result.scaled[scaling], result.outputs.target)
                panels.append(Panel(result.name, reliability_bins(*pair), note))
        reliability_diagram(panels, folder / picture_name('comparison', scaling), SCALED.get(scaling, ''))
    curves = [(result.name, *confidence_and_correct(result.outputs.logits, result.outputs.target))
              for result in results]
    risk_coverage_diagram(curves, folder / 'risk_coverage.png')


def write_csv(path: Path, rows: list[dict]) -> None:
    with open(path, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
        writer = csv.DictWriter(file, rows[0], restval='')
        writer.writeheader()
        writer.writerows(rows)


def find_decisions(result: Result, args: Namespace) -> dict[str, dict]:
    """What predict.py decides by, for the checkpoint's folder. Images that it was trained on would promise too much."""
    if args.calibration_split is None:
        _logger.info(f'{result.name}: no thresholds and prediction sets are stored: they need --calibration-split')
        return {}
    fit_on, temperature = result.calibration, result.parameters['temperature']['temperature']
    missing = fit_on.logits.shape[1] - len(fit_on.target.unique())
    if missing:
        _logger.warning(f'{result.name}: the thresholds and prediction sets that are stored hold for pictures like the '
                        f'calibration images, which lack {missing} of the {fit_on.logits.shape[1]} classes')
    found = measure_decisions(
        fit_on.logits, fit_on.target, temperature, args.target_accuracy or LEVELS, args.coverage or LEVELS,
        args.bootstrap, args.seed,
    )
    found['missing_classes'] = missing
    for level, kept in found['thresholds'].items():
        if kept is None:
            told = (f'{result.name}: no threshold is stored for accuracy {level}: {len(fit_on.target)} images are too '
                    'few, or too few of them right, to promise it')
        else:
            low, high = (100 * kept[key] for key in ('accuracy_low', 'accuracy_high'))
            told = (f'{result.name}: for accuracy {level} confidence {kept["threshold"]:.4f} is stored: '
                    f'{100 * kept["coverage"]:.0f} % of the images have it or more, and {100 * kept["accuracy"]:.1f} % '
                    f'of these are right (95 % interval {low:.1f} to {high:.1f} %)')
        _logger.info(told)
    return found


def report_results(results: list[Result], images: Images, args: Namespace) -> None:
    """Measures, prints the tables and writes the files; on the main process."""
    data = images.data
    about = dict(dataset=data.dataset or data.data_dir, split=data.val_split)
    if fits(args):
        choose_calibration_images(results, args)
    for result in results:
        scale(result, data)
        for scaling, logits in result.scaled.items():
            report = result.reports[scaling] = calibration_report(
                logits, result.outputs.target, bootstrap=args.bootstrap, seed=args.seed,
            )
            labeled = result.labeled_by_class
            classes = class_report(logits, result.outputs.target)
            report['tail_error'] = None if labeled is None else tail_error(classes, labeled)
    ood = [measure_ood(result) for result in results]
    heading = f'{len(results[0].outputs.index)} images of {about["dataset"]} {about["split"]}'
    if fits(args):
        number = '/'.join(str(n) for n in OrderedDict.fromkeys(len(r.calibration.index) for r in results))
        heading += f'; scalings fitted on {number} images of {args.calibration_split or "the labeled training images"}'
    if args.calibration == 'pseudo':
        number = '/'.join(str(n) for n in OrderedDict.fromkeys(len(r.mixed.index) for r in results))
        heading += f'; scaling "pseudo" fitted on {number} mixtures of unlabeled images of {unlabeled_split(data)}'
    show(f'{heading}\n{format_table(results)}\n\n{format_further_table(results)}\n\n{format_selective_table(results)}')
    if args.ood_dataset:
        show(f'\n{format_ood_table(results, ood)}')
    if len(results) > 1:
        show('\n' + '\n'.join(what_is_left(results, args)))

    folder = Path(args.results_dir)
    try:
        for result, measured in zip(results, ood):
            own = folder / result.name if len(results) > 1 else folder
            write_result(own, result, about, measured, args)
        write_csv(folder / 'comparison.csv', [
            dict(run=result.name, scaling=scaling, temperature=result.parameters[scaling].get('temperature', ''),
                 chosen_by=result.chosen_by, **row)
            for result in results for scaling, row in result.reports.items()
        ])
        if args.ood_dataset:
            write_csv(folder / 'ood.csv', [
                dict(run=result.name, ood_dataset=name, count=by_score['count'], score=score, **by_score[score])
                for result, by_set in zip(results, ood) for name, by_score in by_set.items() for score in OOD_SCORES
            ])
        if len(results) > 1:
            write_comparison(folder, results)
    except OSError as error:
        raise RunError(f'{folder} cannot be written: {error.strerror or error}') from error
    old = left_over(folder, results, bool(args.ood_dataset))
    if old:
        _logger.warning(f'{folder} also holds what this report has not written and an earlier one may have: '
                        f'{name_some(old)}')
    show(f'\nResults in {folder}')
    if args.save_temperature:
        store_temperatures(results, about['dataset'], data, args)


def store_temperatures(results: list[Result], dataset: str, data: Namespace, args: Namespace) -> None:
    """Puts each temperature into the config.json of its checkpoint; then raises RunError if one is at its bound.

    Of one that was fitted with labels and one without, the former.
    """
    kind = 'temperature' if fits(args) else 'pseudo'
    at_bound = [f'{result.checkpoint}' for result in results if result.parameters[kind]['at_bound']]
    for result in results:
        if result.parameters[kind]['at_bound']:
            continue
        content = add_temperature(
            result.checkpoint,
            temperature=result.parameters[kind]['temperature'],
            images=len((result.calibration if fits(args) else result.mixed).index),
            dataset=dataset,
            split=(args.calibration_split or data.train_split) if fits(args) else unlabeled_split(data),
            fitted='with labels' if fits(args) else 'without labels',
            input_size=result.config.input_size,
            **find_decisions(result, args),
        )
        replace_file(result.checkpoint / 'config.json', lambda part: part.write_text(content))  # noqa: B023
    if at_bound:
        raise RunError(f'--save-temperature: no temperature is stored in {" and ".join(at_bound)}, where it is at its '
                       'bound' + ('; the other checkpoints have theirs' if len(at_bound) < len(results) else ''))


# --- Main -------------------------------------------------------------------------------------------------------------

def find_labels(
        args: Namespace,
        checkpoint: Path | None,
        data: Namespace,
        name: str,
) -> tuple[Path | None, Path | None]:
    """The labels file of the images that are evaluated too, if any, and the run's own.

    They are evaluated to fit on them, or to know them in --calibration-split and leave them out.
    """
    own = checkpoint.parent / 'labels.json' if data.own else None
    own = own if own is not None and own.exists() else None
    if args.calibration_from_labeled is not None:
        if not args.calibration_from_labeled and own is None:
            raise UsageError(f'--calibration-from-labeled: {name} has no labels.json of a run on these data; give a '
                             'FILE')
        return Path(args.calibration_from_labeled) if args.calibration_from_labeled else own, own
    if data.own and args.calibration_split and split_names(args.calibration_split) & split_names(data.train_split):
        if own is None:
            _logger.warning(f'{name}: no labels.json tells which images it was trained on; they may be among the '
                            'calibration images, and the fit then takes it for more accurate than it is')
        return own, own
    return None, own


def check_unlabeled(own_index: torch.Tensor, train: Source, data: Namespace) -> None:
    """Raises UsageError, before anything is evaluated, where pseudo-calibration has no image that was not labeled."""
    if unlabeled_split(data) == data.train_split and len(train) - len(own_index.unique()) < 2:
        raise UsageError(f'--calibration pseudo: all {len(train)} images of {data.train_split} were labeled in '
                         'training; leave it out, or give other pictures as --unlabeled-split (a folder will do)')


def mix_unlabeled(
        evaluate: Callable[..., Outputs],
        source: Source,
        leave_out: torch.Tensor,
        name: str,
        args: Namespace,
) -> Outputs:
    """Pseudo-calibration's set: mixtures of two images each, labeled as the model sees the dominant one by itself.

    Args:
        evaluate: Of a source, positions, targets and the kind of set; gives the model's outputs.
        source: The unlabeled images; if they have labels, these are not used.
        leave_out: Digests of images that are not to be in it.
        name: The model's.

    Raises:
        UsageError: If less than two images are left.
    """
    found = evaluate(source, None, torch.full((len(source),), -1))
    rows = ~torch.isin(found.digest, leave_out)
    told = f'{int(rows.sum())} of {len(rows)} unlabeled images are mixed'
    told += '' if rows.all() else '; the others are evaluated, or were labeled in training'
    if rows.sum() < 2:
        raise UsageError(f'--calibration pseudo: {told}; give another --unlabeled-split')
    _logger.info(f'{name}: {told}')
    kept = found.keep(rows)
    partner = draw_partners(len(kept.index), item_seed(args.seed, 'pseudo-calibration'))
    return evaluate(source, kept.index, kept.logits.argmax(1), partial(PairDataset, partner=partner))


def evaluate_labeled(
        evaluate: Callable[..., Outputs],
        name: str,
        source: Source,
        targets: torch.Tensor,
) -> Outputs:
    """The outputs on the images of a source that have a label; tells how many have none."""
    rows = (targets >= 0).nonzero().squeeze(1)
    if len(rows) < len(targets):
        _logger.info(f'{name}: {len(targets) - len(rows)} of {len(targets)} calibration images have no label and are '
                     'left out')
    return evaluate(source, rows, targets[rows])


def labels_to_use(
        images: Images,
        model: nn.Module,
        run: dict,
        args: Namespace,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Labels of the images to evaluate and, if there are any, of those to fit on, as the model numbers its classes.

    Raises:
        UsageError: Unless all are classes of the model.
    """
    given = run.get('num_classes') if args.num_classes is None else args.num_classes
    by_number = args.num_classes is not None and not run
    tested = check_classes(images.test, images.data.val_split, model, images.data, given, by_number)
    if images.calibration is None:
        return tested, None
    fitted = check_classes(images.calibration, args.calibration_split, model, images.data, given, by_number, True)
    if class_names_of(model) is None and images.calibration.class_names != images.test.class_names:
        raise UsageError(f'--calibration-split {args.calibration_split}: it has other classes than split '
                         f'{images.data.val_split}')
    return tested, fitted


def mixing_flags(run: dict) -> list[str]:
    """The arguments by which a run of train_ssl.py or of timm's train.py was trained on mixed images."""
    found = [f'--{key.replace("_", "-")}' for key in ('calibratemix', 'mixup', 'cutmix', 'cutmix_minmax')
             if run.get(key)]
    return found + [f'--algorithm {name}' for name in ('mixmatch', 'remixmatch') if run.get('algorithm') == name]


def tell_mixing(name: str, run: dict) -> None:
    """Warns of a temperature from mixtures where the network was trained on mixtures."""
    if mixing_flags(run):
        _logger.warning(f'{name}: it was trained with {", ".join(mixing_flags(run))}. On mixtures it is then as right '
                        'and as unsure as it was taught to be: the temperature without labels is off, mostly too low')


def evaluate_checkpoint(
        name: str,
        checkpoint: Path | None,
        run: dict,
        data: Namespace,
        images: Images,
        accelerator: Accelerator,
        args: Namespace,
) -> Result:
    """A model's outputs on all sets of images, on every process."""
    model, config, view = load_model(args, checkpoint, run)
    use_kept_bits(checkpoint, [images.test, images.calibration, images.unlabeled, *images.ood.values()])
    names = class_names_of(model)
    test_targets, fit_targets = labels_to_use(images, model, run, args)
    model.eval().to(accelerator.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    check_model(model, config, accelerator, name)
    _logger.info(f'{name}: images {"x".join(map(str, config.input_size))}, mean {config.mean}, std {config.std}, '
                 f'{accelerator.num_processes} process(es), device {accelerator.device}, '
                 f'{args.amp_dtype if args.amp else "float32"}')

    def evaluate(source, index=None, targets=None, kind=ViewDataset):
        views = {'image': view, 'digest': picture_digest}
        dataset = kind(source, views, index, targets, skip_bad=images.data.skip_bad_images)
        return collect(model, dataset, config, accelerator, args)

    if checkpoint is not None:
        known = checkpoint.parent / 'labels.json'
        tell_trained(name, known, data, images.data.val_split, images.test, 'its score is too good')
        if images.calibration is not None and not data.own:  # of its own, these are left out of the fit
            tell_trained(name, known, data, args.calibration_split, images.calibration,
                         'there it is right more often than elsewhere, so expect too low a temperature')
    labeled = mixed = own = None
    labels_file, own_file = find_labels(args, checkpoint, data, name)
    if labels_file is not None or (own_file is not None and images.unlabeled is not None):
        with once_a_machine(accelerator):
            train = open_source(data, data.train_split)
        use_kept_bits(checkpoint, [train])
        own = own_file and read_labels(own_file, train, model.num_classes, names)
    if labels_file is not None:
        found = own if labels_file == own_file else read_labels(labels_file, train, model.num_classes, names)
        if args.calibration_from_labeled is not None and own is not None:
            tell_known(name, int(torch.isin(found[0], own[0]).sum()), len(found[0]))
        labeled = evaluate(train, *found[:2])
    if own is not None and images.unlabeled is not None:
        check_unlabeled(own[0], train, images.data)
    tested = evaluate(images.test, targets=test_targets)
    if images.unlabeled is not None:
        known = [tested] if own is None else [tested, evaluate(train, own[0])]
        mixed = mix_unlabeled(evaluate, images.unlabeled, torch.cat([part.digest for part in known]), name, args)
        tell_mixing(name, run)
    return Result(
        name,
        checkpoint,
        config,
        tested,
        labeled if images.calibration is None else evaluate_labeled(evaluate, name, images.calibration, fit_targets),
        labeled,
        mixed,
        {ood_name: evaluate(source) for ood_name, source in images.ood.items()},
        names or align_numbers(images.test.targets, images.test.class_names, None)[1],
        tell_choice(name, checkpoint, images.data, args.calibration_split),
        read_labeled_by_class(checkpoint, model.num_classes),
    )


def tell_known(name: str, known: int, number: int) -> None:
    """Warns of calibration images that are labeled ones of the training."""
    if known:
        _logger.warning(f'{name}: {known} of {number} calibration images are labeled images of its training, where it '
                        'is right more often than elsewhere: expect too low a temperature')


def read_metrics(checkpoint: Path | None) -> dict:
    """What a run wrote about the weights in its folder, empty if there is nothing."""
    file = checkpoint / 'metrics.json' if checkpoint is not None else None
    if file is None or not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f'{file}: {error}') from error


def read_labeled_by_class(checkpoint: Path | None, num_classes: int) -> torch.Tensor | None:
    """Labeled images of each class in the run's training, `[K]` int64; None where that is not known."""
    found = read_metrics(checkpoint).get('classes', {}).get('labeled', ())
    return torch.tensor(found) if len(found) == num_classes else None


def tell_choice(name: str, checkpoint: Path | None, data: Namespace, fit_split: str | None) -> str:
    """What a best/ was chosen by, '' if it is none; warns if it was the split that is evaluated or fitted on."""
    if checkpoint is None or checkpoint.name != 'best':
        return ''
    chosen_by = read_metrics(checkpoint).get('best_chosen_by', '')
    split = chosen_by.partition(' on ')[2]
    if chosen_by and data.own and may_share(split, data.val_split, data):
        _logger.warning(f'{name}: best/ was chosen by {chosen_by}, which is evaluated here: its score is too good. '
                        'Report last/, or choose on a part that --val-fraction holds out of the training split')
    if chosen_by and data.own and fit_split is not None and may_share(split, fit_split, data):
        _logger.warning(f'{name}: best/ was chosen by {chosen_by}, and temperature and thresholds are fitted on these '
                        'images, where it is better than elsewhere. Take last/, or another --calibration-split')
    return chosen_by


def tell_trained(name: str, own_file: Path, data: Namespace, split: str, source: Source, then: str) -> None:
    """Warns of labeled images of a run among others: by position in the run's own data set, everywhere by content.

    Args:
        name: The model's.
        own_file: The run's labels.json.
        data: Where the images come from.
        split: Their split, for messages.
        source: The images.
        then: What follows from it.

    Raises:
        UsageError: If the file cannot be read, or does not fit the training split.
    """
    if not own_file.exists():
        return
    found, in_training, least = torch.zeros(len(source), dtype=torch.bool), '', ''
    try:
        content = json.loads(own_file.read_text())
        known = from_text(content.get('digests', []))
        if data.own and split_names(split) & split_names(data.train_split):
            train = open_source(data, data.train_split)
            place = locate(train, source)
            in_training = f', and {int((place >= 0).sum())} are in its training split'
            place = place[content['index']]
            found[place[place >= 0]] = True
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UsageError(f'{own_file}: does not fit {data.train_split} ({type(error).__name__} {error})') from error
    if not found.any():
        looked_at = spread(len(source), COMPARED_FILES if source.in_files() else COMPARED_MOST)
        found[looked_at] = torch.isin(digest_pictures(source, looked_at), known[known != 0])
        least = 'at least ' * (len(looked_at) < len(source) or len(known) < len(content['index']))
    if found.any():
        _logger.warning(f'{name}: {least}{int(found.sum())} of the {len(source)} images of {split} are labeled images '
                        f'of its training{in_training}: {then}')


def main(args: Namespace) -> None:
    checkpoints = [Path(path).resolve() for path in args.checkpoint] or [None]
    runs = [read_run(path) if path else {} for path in checkpoints]
    names = name_checkpoints(checkpoints) if args.checkpoint else [args.model.replace('/', '_')]
    asked = args.amp
    agree_on_precision(args, names, runs)
    try:
        accelerator = setup_accelerator(args.device, args.amp, args.amp_dtype)
    except UsageError as error:
        if args.amp and asked is None:
            raise UsageError(f'{names[0]} was trained with --amp: {error}; --no-amp evaluates in float32') from error
        raise
    for logger in (_logger, logging.getLogger('train')):  # the modules' own
        logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    chosen = [choose_data(args, run) for run in runs]
    with once_a_machine(accelerator):
        for which in zip(names, checkpoints, chosen, runs):
            check_own_data(*which)
    data = agree_on_data(names, chosen)
    inherited = data.own and args.dataset is None and args.data_dir is None
    run = checkpoints[0].parent if inherited else None
    args.workers = limit_workers(args.workers)
    with once_a_machine(accelerator):  # downloads and caches are written once
        images = Images(
            data,
            open_split(data, data.val_split, checkpoints, run),
            open_split(data, args.calibration_split, checkpoints, run) if args.calibration_split else None,
            open_source(data, unlabeled_split(data)) if args.calibration == 'pseudo' else None,
            {
                name: open_pictures(name, args.ood_data_dir, args.ood_split, max_pixels=data.max_pixels)
                for name in args.ood_dataset
            },
        )
    if data.val_split is None:
        data.val_split = images.test.name.rpartition(' ')[2]  # the one that create_source found
    if accelerator.is_main_process:
        results_dir = Path(args.results_dir)
        for folder in (results_dir, *(results_dir / name for name in names if len(names) > 1)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f'--results-dir {folder}: cannot be made: {error.strerror}') from error
    results = [
        evaluate_checkpoint(*which, images, accelerator, args) for which in zip(names, checkpoints, runs, chosen)
    ]
    accelerator.end_training()  # the rest needs no other process, and may take longer than they would wait
    if accelerator.is_main_process:
        report_results(results, images, args)


if __name__ == '__main__':
    setup_default_logging()
    run_program(lambda: main(_parse_args()))
