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
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from glob import glob
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from timm.data import create_transform, resolve_input_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.models import load_checkpoint, resolve_model_input_args
from timm.utils import ParseKwargs, setup_default_logging
from torch import nn
from torchvision import transforms

import wide_resnet  # noqa: F401  registers wide_resnet28_2 and others with timm
from checkpoint import read_args
from data import DataConfig, Feed, ViewDataset, create_loader, evaluation_batches
from figures import (
    class_diagram,
    confidence_histogram,
    confusion_diagram,
    reliability_diagram,
    risk_coverage_diagram,
)
from labels import read_labels
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
from program import RunError, UsageError, replace_file, run_program, setup_accelerator
from scaling import (
    DOMINANT,
    MIN_TEMPERATURE,
    add_temperature,
    draw_partners,
    fit_temperature,
    fit_vector,
    read_temperature,
)
from seeds import item_seed
from sources import (
    KNOWN,
    SOURCE_FLAGS,
    HFSource,
    ImageError,
    Source,
    create_source,
    open_source,
    open_tables,
    unlabeled_split,
)

_logger = logging.getLogger('validate')

# Of the command line and of a run's args.yaml: which images, and for weights without a config.json, which model.
DATA_KEYS = ('dataset', 'data_dir', 'val_split', 'train_split', 'dataset_download', 'class_map', 'input_key',
             'target_key', 'skip_bad_images', 'unlabeled_split')
MODEL_KEYS = ('in_chans', 'num_classes', 'model_kwargs', 'img_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean',
              'std')
OOD_SCORES = ('msp', 'energy', 'margin')


# --- Arguments --------------------------------------------------------------------------------------------------------

def create_validate_parser() -> argparse.ArgumentParser:
    flag = argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(
        description='Calibration report of trained classifiers.',
        allow_abbrev=False,
    )
    group = parser.add_argument_group('Checkpoints')
    group.add_argument('--checkpoint', metavar='PATH', nargs='+', default=[],
                       help='folders of weights: RUN/best or RUN/last of train_ssl.py, or any that timm saved with a '
                            'config.json; or weight files of timm\'s train.py. Several are compared. best/ was chosen '
                            'by the score on the run\'s evaluation split: on that split, report last/')
    group.add_argument('-m', '--model', metavar='NAME', default=None,
                       help='timm model of the weight files (default: that of the args.yaml beside them), or with '
                            '--pretrained the model to evaluate')
    group.add_argument('--pretrained', action=flag, default=False, help='timm\'s pretrained weights of --model')
    group.add_argument('--use-ema', action=flag, default=False,
                       help='the averaged weights in weight files (folders of train_ssl.py hold nothing else)')
    group.add_argument('--num-classes', type=int, metavar='N', default=None,
                       help='classes of the model; given, it may have more classes than the data set has names')
    group.add_argument('--model-kwargs', nargs='*', action=ParseKwargs, default=None, metavar='K=V',
                       help='further arguments of the model\'s constructor')

    group = parser.add_argument_group('Dataset', 'What is not given is taken from the args.yaml of the run.')
    group.add_argument('--dataset', metavar='NAME', default=None, help='as train_ssl.py --dataset')
    group.add_argument('--data-dir', metavar='DIR', default=None, help='as train_ssl.py --data-dir')
    group.add_argument('--split', '--val-split', dest='val_split', metavar='NAME', default=None,
                       help='split to evaluate (default: the run\'s, else the first of validation, val, valid, test '
                            'that exists)')
    group.add_argument('--train-split', metavar='NAME', default=None,
                       help='training split, to which labels.json refers (default: the run\'s, else train)')
    group.add_argument('--dataset-download', action=flag, default=None, help='let torchvision download (torch/)')
    group.add_argument('--input-key', metavar='COLUMN', default=None, help='image column (hub, parquet, arrow)')
    group.add_argument('--target-key', metavar='COLUMN', default=None, help='label column (hub, parquet, arrow)')
    group.add_argument('--class-map', metavar='FILE', default=None, help='timm\'s class map (image folders)')
    group.add_argument('--skip-bad-images', action=flag, default=None,
                       help='leave out images that cannot be decoded, and count them, instead of stopping')

    group = parser.add_argument_group('Images', 'What is not given is taken from the config.json of the weights, or '
                                                'from timm\'s of a model.')
    group.add_argument('--img-size', type=int, metavar='N', default=None, help='image side in pixels')
    group.add_argument('--in-chans', type=int, metavar='N', default=None, help='image channels, 3 or 1')
    group.add_argument('--crop-pct', type=float, metavar='X', default=None, help='share that the crop keeps')
    group.add_argument('--crop-mode', default=None, choices=['center', 'squash', 'border'], help='timm\'s crop mode')
    group.add_argument('--interpolation', default=None, help='of the resizing',
                       choices=['nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos'])
    group.add_argument('--mean', type=float, nargs='+', metavar='X', default=None, help='channel means')
    group.add_argument('--std', type=float, nargs='+', metavar='X', default=None, help='channel standard deviations')
    group.add_argument('--use-train-size', action=flag, default=False,
                       help='timm\'s training size where a pretrained model has a larger one for evaluation')

    group = parser.add_argument_group(
        'After-training calibration',
        'Adds rows for temperature scaling (one number) and vector scaling (two a class), fitted by maximum likelihood '
        'on other images than those evaluated: what is found among these, by content, is left out of the fit.',
    )
    group.add_argument('--calibration-split', metavar='NAME', default=None,
                       help='fit on this split of the same data set, with its labels; all but torchvision\'s sets take '
                            'slices, as train[:10%%], also of the split evaluated: --split "test[20%%:]" '
                            '--calibration-split "test[:20%%]". The labeled images of the compared runs are left out. '
                            'Images that a run saw unlabeled are not: their labels are ones that it did not have')
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
                            'checkpoint folder, as calibration.temperature; a later report without a fit shows it. Of '
                            'one fitted with labels and one without, the former')

    group = parser.add_argument_group('Out-of-distribution detection')
    group.add_argument('--ood-dataset', metavar='NAME', nargs='+', default=[],
                       help='images of something else, put through the same transform: names as for --dataset, '
                            'folders of images or .parquet files, of which all are taken unless --ood-split is given')
    group.add_argument('--ood-data-dir', metavar='DIR', default=None, help='as --data-dir, for --ood-dataset')
    group.add_argument('--ood-split', metavar='NAME', default=None,
                       help='default: the first of validation, val, valid, test that exists')

    group = parser.add_argument_group('Device and loading')
    group.add_argument('--device', default=None, choices=['cpu', 'cuda', 'mps'],
                       help='default: what Accelerate finds. cpu is obeyed; the others must be what it finds')
    group.add_argument('--amp', action=flag, default=False, help='mixed precision (default: float32)')
    group.add_argument('--amp-dtype', default='bfloat16', choices=['float16', 'bfloat16'],
                       help='of --amp (default: bfloat16; timm\'s is float16)')
    group.add_argument('--channels-last', action=flag, default=False, help='channels-last memory layout')
    group.add_argument('-b', '--batch-size', type=int, metavar='N', default=256, help='per process (default: 256)')
    group.add_argument('-j', '--workers', type=int, metavar='N', default=4,
                       help='loading processes, per process (default: 4)')
    group.add_argument('--pin-mem', action=flag, default=False, help='pin memory for faster copies to a GPU')

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
    for name, least in (('batch_size', 1), ('workers', 0), ('bootstrap', 0)):
        if getattr(args, name) < least:
            parser.error(f'--{name.replace("_", "-")} {getattr(args, name)}: expected {least} or more')
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        parser.error(f'--crop-pct {args.crop_pct}: expected a number above 0 and up to 1')
    if not args.checkpoint and not args.model:
        parser.error('give --checkpoint RUN/best, or --model NAME --pretrained')
    if args.model and not args.checkpoint and not args.pretrained:
        parser.error(f'--model {args.model}: its weights are random; add --pretrained or --checkpoint FILE')
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

def read_run(checkpoint: Path) -> dict:
    """The arguments of the run that a checkpoint belongs to, empty if none are found one level above it.

    Raises:
        UsageError: If there is no such checkpoint, or its args.yaml is no mapping.
    """
    if not checkpoint.exists():
        raise UsageError(f'--checkpoint {checkpoint}: no such file or folder')
    if checkpoint.is_dir() and not (checkpoint / 'config.json').exists():
        inside = ' or '.join(str(checkpoint / name) for name in ('best', 'last') if (checkpoint / name).is_dir())
        raise UsageError(f'--checkpoint {checkpoint}: no config.json in it' + (f'; give {inside}' if inside else ''))
    if checkpoint.is_file() and (checkpoint.parent / 'config.json').exists():
        raise UsageError(f'--checkpoint {checkpoint}: give its folder, which says what model it is')
    if checkpoint.is_file() and checkpoint.suffix == '.safetensors' and checkpoint.name.startswith('checkpoint-'):
        raise UsageError(f'--checkpoint {checkpoint}: this is a state to resume from; weights are in best/ and last/')
    path = checkpoint.parent / 'args.yaml'
    return read_args(path) if path.exists() else {}


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
    the data set that the run was trained on.
    """
    given = {key: getattr(args, key) for key in DATA_KEYS if getattr(args, key) is not None}
    own = bool(run) and given.get('dataset', run.get('dataset')) == run.get('dataset')
    return Namespace(**{**SOURCE_FLAGS, **(run if own else {}), **given, 'own': own})


def agree_on_data(names: list[str], chosen: list[Namespace]) -> Namespace:
    """The data arguments of the first checkpoint; raises UsageError if another is to be evaluated on other images."""
    first = chosen[0]
    for name, other in zip(names, chosen):
        for key in ('dataset', 'data_dir', 'val_split', 'class_map', 'input_key', 'target_key'):
            ours, theirs = getattr(first, key), getattr(other, key)
            if ours != theirs:
                flag = 'split' if key == 'val_split' else key.replace('_', '-')
                raise UsageError(f'{names[0]} has --{flag} {ours} and {name} {theirs}: checkpoints are compared on the '
                                 'same images, so give the flag')
    if not first.dataset and not first.data_dir:
        raise UsageError(f'{names[0]} comes without a run\'s args.yaml: give --dataset')
    return first


def split_names(split: str) -> set[str]:
    """Splits that an expression such as `train[:10%]+test` draws on."""
    return {part.partition('[')[0].strip() for part in split.split('+')}


class PlainFolder(Source):
    """All images below a folder, without labels."""

    def __init__(self, paths: list[str]):
        self.paths, self.class_names = paths, None
        self.targets = torch.full((len(paths),), -1)

    def data(self, index: int) -> str:
        return self.paths[index]

    def where(self, index: int) -> str:
        return self.paths[index]


def open_ood_source(args: Namespace, name: str) -> Source:
    """A set without need of labels: without --ood-split all images of a folder or of parquet files."""
    if args.ood_split is None and name not in KNOWN and Path(name).is_dir():
        paths = [path for path, _ in find_images_and_targets(name)[0]]
        if paths:
            return PlainFolder(paths)
    if args.ood_split is None and name.endswith('.parquet') and glob(name, recursive=True):
        return HFSource(open_tables(sorted(glob(name, recursive=True))), name, labeled=False)
    return create_source(name, args.ood_data_dir, args.ood_split, labeled=False)


@dataclass
class Images:
    """The sets to evaluate."""
    data: Namespace
    test: Source
    calibration: Source | None
    unlabeled: Source | None
    ood: dict[str, Source]


def load_model(args: Namespace, checkpoint: Path | None, run: dict) -> tuple[nn.Module, DataConfig, Callable]:
    """The model, its data configuration, and its evaluation transform (PIL RGB -> uint8 `[C, H, W]`).

    Raises:
        UsageError: If the weights or the model cannot be had, or do not take such images.
    """
    asked = {}
    if checkpoint is None:
        source = name = args.model
    elif checkpoint.is_dir():
        source, name = str(checkpoint), f'local-dir:{checkpoint}'
    else:
        source, name = str(checkpoint), args.model or run.get('model')
        asked = {key: run[key] for key in MODEL_KEYS if run.get(key) is not None}
        if not name:
            raise UsageError(f'--checkpoint {checkpoint}: no args.yaml beside it says what model it is; give --model')
    asked.update((key, getattr(args, key)) for key in MODEL_KEYS if getattr(args, key) is not None)
    is_file = checkpoint is not None and checkpoint.is_file()
    try:
        model = timm.create_model(**resolve_model_input_args(
            name,
            asked,
            pretrained=not is_file,
            # Elsewhere another number than the weights' would give a random head without a word.
            num_classes=asked.get('num_classes') if is_file else None,
            **asked.get('model_kwargs', {}),
        ))
        if is_file:
            load_checkpoint(model, str(checkpoint), use_ema=args.use_ema)
        config = resolve_input_data_config(model, asked, use_test_size=not args.use_train_size)
    except Exception as error:  # the hub, pickle, safetensors and each model have their own ways to complain
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise UsageError(f'{source}: {reason[:500]}') from error
    if args.num_classes not in (None, model.num_classes):
        raise UsageError(f'--num-classes {args.num_classes}: {source} has {model.num_classes}')
    channels = config['input_size'][0]
    if channels not in (1, 3):
        raise UsageError(f'{source} takes images of {channels} channels; expected 3 or 1')
    # The last step makes a tensor; greyscale has to come before it.
    *steps, to_tensor = create_transform(
        config['input_size'],
        interpolation=config['interpolation'],
        crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'],
        mean=config['mean'],
        normalize=False,
    ).transforms
    view = transforms.Compose([*steps, *([transforms.Grayscale()] if channels == 1 else []), to_tensor])
    config = DataConfig(**{key: config[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')})
    return model, config, view


def check_classes(source: Source, split: str, model: nn.Module, data: Namespace, given: int | None) -> None:
    """Raises UsageError unless the labels of the images are classes of the model."""
    where = data.dataset or data.data_dir
    if (source.targets < 0).any():
        raise UsageError(f'{where}: split {split} has images without a label')
    largest = int(source.targets.max()) + 1
    named = len(source.class_names) if source.class_names else largest
    if largest > model.num_classes or (source.class_names and named != model.num_classes and given is None):
        raise UsageError(
            f'{where} has {named} classes and the model {model.num_classes}: a label would mean another class. Give '
            '--class-map for a folder with a part of the classes, or --num-classes if the numbers agree'
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
    # A kernel may depend on the size of a batch, in the last digit of its results. So each batch is filled up, and
    # results do not depend on where a process's part ends.
    size = min(args.batch_size, len(dataset))
    batches = evaluation_batches(len(dataset), size, accelerator.process_index, accelerator.num_processes)
    loader = create_loader(dataset, batches, args.workers, args.pin_mem)
    parts = [(*(torch.zeros(0, dtype=torch.int64),) * 3, torch.zeros(0, model.num_classes))]
    for batch in Feed(loader, config, accelerator.device, args.channels_last):
        image, good = batch['image'], batch['skipped'] < 0
        if 'partner' in batch:
            image = DOMINANT * image + (1 - DOMINANT) * batch['partner']
        filled = torch.cat([image, image[-1:].expand(size - len(image), -1, -1, -1)]) if len(image) < size else image
        try:
            with accelerator.autocast():
                logits = model(filled)[:len(image)].float()
        except torch.OutOfMemoryError as error:
            raise RunError(f'out of memory with --batch-size {size}; give a smaller one') from error
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


@torch.no_grad()
def check_model(model: nn.Module, config: DataConfig, accelerator: Accelerator, name: str) -> None:
    """Raises UsageError unless the model turns such an image into logits."""
    try:
        with accelerator.autocast():
            shape = model(torch.zeros(1, *config.input_size, device=accelerator.device)).shape
    except (RuntimeError, AssertionError, ValueError, AttributeError) as error:
        raise UsageError(f'{name} does not take images of {"x".join(map(str, config.input_size))}: '
                         f'{" ".join(str(error).split())[:300]}') from error
    if tuple(shape) != (1, model.num_classes) or not model.num_classes:
        raise UsageError(f'{name} gives {list(shape)} for an image; expected logits of its {model.num_classes} classes')


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
    scaled: dict[str, torch.Tensor] = field(default_factory=dict)  # logits by scaling, the first is 'none'
    parameters: dict[str, dict] = field(default_factory=dict)
    reports: dict[str, dict] = field(default_factory=dict)


def choose_calibration_images(results: list[Result], args: Namespace) -> None:
    """Takes images out of the fit that are evaluated, unlabeled or, with --calibration-split, labeled ones of a run."""
    trained = torch.zeros(0, dtype=torch.int64)
    if args.calibration_split is not None:
        trained = torch.cat([trained, *(result.labeled.digest for result in results if result.labeled is not None)])
    for result in results:
        found = result.calibration
        evaluated = torch.isin(found.digest, result.outputs.digest)
        seen = torch.isin(found.digest, trained) & ~evaluated
        rows = ~evaluated & ~seen & (found.target >= 0)
        told = f'{int(evaluated.sum())} are evaluated, {int(seen.sum())} were labeled in training'
        if not rows.any():
            raise UsageError(f'{args.calibration_split or "--calibration-from-labeled"}: none of {len(rows)} images is '
                             f'left to fit on ({told}); give another split or slices that do not overlap')
        result.calibration = found.keep(rows)
        _logger.info(f'{result.name}: {int(rows.sum())} of {len(rows)} calibration images are used: {told}, '
                     f'{int((found.target < 0).sum())} have no label')


def saved_temperature(checkpoint: Path | None, data: Namespace) -> float | None:
    """The temperature kept with a checkpoint; None if it was fitted on the split that is evaluated."""
    if checkpoint is None or not checkpoint.is_dir():
        return None
    try:
        saved = read_temperature(checkpoint)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if saved is None:
        return None
    same = saved.get('dataset') == (data.dataset or data.data_dir)
    if same and split_names(saved['split']) & split_names(data.val_split):
        _logger.warning(f'{checkpoint / "config.json"}: its temperature is not shown, as it was fitted on '
                        f'{saved["split"]}, which may hold images of {data.val_split}')
        return None
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
    elif fit_on is None:
        value = saved_temperature(result.checkpoint, data)
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
    missing = fit_on.logits.shape[1] - len(fit_on.target.unique())
    if missing:
        _logger.warning(f'{result.name}: {missing} classes have no calibration image; vector scaling can only lower '
                        'their logits')


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


def format_table(results: list[Result]) -> str:
    range_of = ' [95 %]' if 'ece_low' in results[0].reports['none'] else ''
    rows = [['run', 'scaling', 'T', f'error %{range_of}', 'balanced acc', 'macro-F1', f'ECE %{range_of}', 'equal-mass',
             'class-wise', 'smooth', 'NLL', 'Brier', 'AUROC']]
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
                interval(report, 'error'),
                *(f'{report[key]:.2f}' for key in ('balanced_accuracy', 'macro_f1')),
                interval(report, 'ece'),
                *(f'{report[key]:.2f}' for key in ('ece_equal_mass', 'ece_classwise', 'ece_smooth')),
                f'{report["nll"]:.4f}',
                f'{report["brier"]:.4f}',
                '' if report['auroc'] is None else f'{report["auroc"]:.2f}',
            ])
    note = '\n* at its bound: the likelihood of the calibration images has no maximum'
    return align(rows) + (note if any_at_bound else '')


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
    """For each checkpoint beside the first: its difference in ECE from it, before and after scaling."""
    first, lines = results[0], []
    for other in results[1:]:
        lines.append(f'ECE of {other.name} less that of {first.name}, in points:')
        raw = other.reports['none']['ece'] - first.reports['none']['ece']
        for scaling in first.scaled:
            if scaling not in other.scaled:
                continue
            difference = other.reports[scaling]['ece'] - first.reports[scaling]['ece']
            text = f'  {difference:+.2f}'
            if args.bootstrap:
                sides = [confidence_and_correct(r.scaled[scaling], r.outputs.target) for r in (first, other)]
                low, high = ece_difference_interval(*sides, args.bootstrap, args.seed)
                text += f' [{100 * low:+.2f}, {100 * high:+.2f}]'
            text += ' unscaled' if scaling == 'none' else f' after {scaling} scaling'
            if scaling != 'none' and abs(raw) >= 0.5:  # a share of next to nothing says nothing
                text += f', {100 * difference / raw:.0f} % of it'
            lines.append(text)
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


def shorten(text: str, limit: int) -> str:
    """Leaves out the middle: names often differ at their end."""
    return text if len(text) <= limit else f'{text[:(limit - 1) // 2]}…{text[-(limit // 2):]}'


def panel_title(result: Result, scaling: str) -> str:
    name = shorten(result.name, 36)
    return name if scaling == 'none' else f'{name}\n{scaling} scaling'


def write_result(folder: Path, result: Result, about: dict, ood: dict, class_names: list[str] | None, args) -> None:
    """Files of one checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    outputs = result.outputs
    confidence, correct = confidence_and_correct(outputs.logits, outputs.target)
    predicted = outputs.logits.argmax(1)

    bins = {key: value.tolist() for key, value in reliability_bins(confidence, correct)._asdict().items()}
    content = OrderedDict(
        run=result.name,
        **about,
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
        title = panel_title(result, scaling)
        panels = [(f'{title}\nequal width', reliability_bins(*pair)), (f'{title}\nequal mass', equal_mass_bins(*pair))]
        reliability_diagram(panels, folder / ('reliability.png' if scaling == 'none' else f'reliability_{scaling}.png'))
    confidence_histogram(confidence, correct, folder / 'confidence.png')
    risk_coverage_diagram([(shorten(result.name, 36), confidence, correct)], folder / 'risk_coverage.png')
    names = list(class_names or [])
    names += [str(k) for k in range(len(names), outputs.logits.shape[1])]
    write_classes(folder, result, names)
    class_diagram(predicted, confidence, correct, folder / 'classes.png', [shorten(name, 24) for name in names])


def write_classes(folder: Path, result: Result, names: list[str]) -> None:
    """Figures by class in percent, where there are any, and the confusion matrix as numbers and as a picture."""
    outputs = result.outputs
    columns = class_report(outputs.logits, outputs.target)._asdict()
    counts = {key: columns.pop(key).tolist() for key in ('images', 'predicted')}
    rates = {key: ['' if math.isnan(value) else 100 * value for value in columns[key].tolist()] for key in columns}
    write_csv(folder / 'classes.csv', [
        dict(number=k, name=name, **{key: values[k] for key, values in (counts | rates).items()})
        for k, name in enumerate(names)
    ])
    matrix = confusion_matrix(outputs.logits, outputs.target)
    with open(folder / 'confusion.csv', 'w', newline='') as file:
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
                title = panel_title(result, scaling)
                if 'ece_low' in report:
                    title += f'\nECE, 95 % interval: {report["ece_low"]:.1f} to {report["ece_high"]:.1f} %'
                pair = confidence_and_correct(result.scaled[scaling], result.outputs.target)
                panels.append((title, reliability_bins(*pair)))
        reliability_diagram(panels, folder / ('comparison.png' if scaling == 'none' else f'comparison_{scaling}.png'))
    curves = [(shorten(r.name, 36), *confidence_and_correct(r.outputs.logits, r.outputs.target)) for r in results]
    risk_coverage_diagram(curves, folder / 'risk_coverage.png')


def write_csv(path: Path, rows: list[dict]) -> None:
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0], restval='')
        writer.writeheader()
        writer.writerows(rows)


def report_results(results: list[Result], images: Images, args: Namespace) -> None:
    """Measures, prints the tables and writes the files; on the main process."""
    data = images.data
    about = dict(dataset=data.dataset or data.data_dir, split=data.val_split)
    if fits(args):
        choose_calibration_images(results, args)
    for result in results:
        scale(result, data)
        for scaling, logits in result.scaled.items():
            result.reports[scaling] = calibration_report(
                logits, result.outputs.target, bootstrap=args.bootstrap, seed=args.seed,
            )
    ood = [measure_ood(result) for result in results]
    heading = f'{len(results[0].outputs.index)} images of {about["dataset"]} {about["split"]}'
    if fits(args):
        number = '/'.join(str(n) for n in OrderedDict.fromkeys(len(r.calibration.index) for r in results))
        heading += f'; scalings fitted on {number} images of {args.calibration_split or "the labeled training images"}'
    if args.calibration == 'pseudo':
        number = '/'.join(str(n) for n in OrderedDict.fromkeys(len(r.mixed.index) for r in results))
        heading += f'; scaling "pseudo" fitted on {number} mixtures of unlabeled images of {unlabeled_split(data)}'
    print(f'{heading}\n{format_table(results)}\n\n{format_selective_table(results)}')
    if args.ood_dataset:
        print(f'\n{format_ood_table(results, ood)}')
    if len(results) > 1:
        print('\n' + '\n'.join(what_is_left(results, args)))

    folder = Path(args.results_dir)
    try:
        for result, measured in zip(results, ood):
            own = folder / result.name if len(results) > 1 else folder
            write_result(own, result, about, measured, images.test.class_names, args)
        write_csv(folder / 'comparison.csv', [
            dict(run=result.name, scaling=scaling, temperature=result.parameters[scaling].get('temperature', ''), **row)
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
    print(f'\nResults in {folder}')
    if args.save_temperature:
        kind = 'temperature' if fits(args) else 'pseudo'
        for result in results:
            if result.parameters[kind]['at_bound']:
                raise RunError(f'--save-temperature: none stored in {result.checkpoint}, as it is at its bound')
            content = add_temperature(
                result.checkpoint,
                temperature=result.parameters[kind]['temperature'],
                images=len((result.calibration if fits(args) else result.mixed).index),
                dataset=about['dataset'],
                split=(args.calibration_split or data.train_split) if fits(args) else unlabeled_split(data),
                fitted='with labels' if fits(args) else 'without labels',
            )
            replace_file(result.checkpoint / 'config.json', lambda part: part.write_text(content))  # noqa: B023


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
    told = (f'{int(rows.sum())} of {len(rows)} unlabeled images are mixed; the others are evaluated, or were labeled '
            'in training')
    if rows.sum() < 2:
        raise UsageError(f'--calibration pseudo: {told}; give another --unlabeled-split')
    _logger.info(f'{name}: {told}')
    kept = found.keep(rows)
    partner = draw_partners(len(kept.index), item_seed(args.seed, 'pseudo-calibration'))
    return evaluate(source, kept.index, kept.logits.argmax(1), partial(PairDataset, partner=partner))


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
    given = run.get('num_classes') if args.num_classes is None else args.num_classes
    check_classes(images.test, images.data.val_split, model, images.data, given)
    if images.calibration is not None:
        check_classes(images.calibration, args.calibration_split, model, images.data, given)
        if images.calibration.class_names != images.test.class_names:
            raise UsageError(f'--calibration-split {args.calibration_split}: it has other classes than split '
                             f'{images.data.val_split}')
    model.eval().to(accelerator.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    check_model(model, config, accelerator, name)
    _logger.info(f'{name}: images {"x".join(map(str, config.input_size))}, mean {config.mean}, std {config.std}, '
                 f'{accelerator.num_processes} process(es), device {accelerator.device}')

    def evaluate(source, index=None, targets=None, kind=ViewDataset):
        views = {'image': view, 'digest': picture_digest}
        dataset = kind(source, views, index, targets, skip_bad=images.data.skip_bad_images)
        return collect(model, dataset, config, accelerator, args)

    labeled = mixed = None
    labels_file, own_file = find_labels(args, checkpoint, data, name)
    if labels_file is not None or (own_file is not None and images.unlabeled is not None):
        with accelerator.main_process_first():
            train = open_source(data, data.train_split)
    if labels_file is not None:
        index, targets, _ = read_labels(labels_file, train.targets, model.num_classes)
        if args.calibration_from_labeled is not None and own_file is not None:
            trained = read_labels(own_file, train.targets, model.num_classes)[0]
            known = int(torch.isin(index, trained).sum())
            if known:
                _logger.warning(f'{name}: {known} of {len(index)} calibration images are labeled images of its '
                                'training, where it is right more often than elsewhere: expect too low a temperature')
        labeled = evaluate(train, index, targets)
    tested = evaluate(images.test)
    if images.unlabeled is not None:
        known = [tested]
        if own_file is not None:
            known.append(evaluate(train, read_labels(own_file, train.targets, model.num_classes)[0]))
        mixed = mix_unlabeled(evaluate, images.unlabeled, torch.cat([part.digest for part in known]), name, args)
        if run.get('calibratemix'):
            _logger.warning(f'{name}: it was trained with --calibratemix. On mixtures it is then as right and as '
                            'unsure as it was taught to be, and the temperature without labels comes out too low')
    return Result(
        name,
        checkpoint,
        config,
        tested,
        labeled if images.calibration is None else evaluate(images.calibration),
        labeled,
        mixed,
        {ood_name: evaluate(source) for ood_name, source in images.ood.items()},
    )


def main(args: Namespace) -> None:
    accelerator = setup_accelerator(args.device, args.amp, args.amp_dtype)
    _logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    checkpoints = [Path(path).resolve() for path in args.checkpoint] or [None]
    runs = [read_run(path) if path else {} for path in checkpoints]
    names = name_checkpoints(checkpoints) if args.checkpoint else [args.model.replace('/', '_')]
    chosen = [choose_data(args, run) for run in runs]
    data = agree_on_data(names, chosen)
    with accelerator.main_process_first():  # downloads and caches are written once
        images = Images(
            data,
            open_source(data, data.val_split),
            open_source(data, args.calibration_split) if args.calibration_split else None,
            open_source(data, unlabeled_split(data)) if args.calibration == 'pseudo' else None,
            {name: open_ood_source(args, name) for name in args.ood_dataset},
        )
    if data.val_split is None:
        data.val_split = images.test.name.rpartition(' ')[2]  # the one that create_source found
    if accelerator.is_main_process:
        try:
            Path(args.results_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f'--results-dir {args.results_dir}: cannot be made: {error.strerror}') from error
    results = [
        evaluate_checkpoint(*which, images, accelerator, args) for which in zip(names, checkpoints, runs, chosen)
    ]
    accelerator.end_training()  # the rest needs no other process, and may take longer than they would wait
    if accelerator.is_main_process:
        report_results(results, images, args)


if __name__ == '__main__':
    setup_default_logging()
    run_program(lambda: main(_parse_args()))
