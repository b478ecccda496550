"""Which images are labeled, and with what: draws, label files, label noise, threshold samples, classes of two sets."""
import argparse
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from filelists import is_name_list, match_names, read_names
from program import UsageError
from seeds import item_seed
from sources import Source

_logger = logging.getLogger('train')


def label_seed(args: argparse.Namespace) -> int:
    return args.seed if args.label_seed is None else args.label_seed


@dataclass
class Labels:
    """The labeled images of a run.

    Attributes:
        index: Positions in the training split, `[L]` int64.
        label: Their labels, `[L]` int64.
        original: Their labels before --label-noise, `[L]` int64, or None.
        trained: What they are trained as, `[L]` int64: K in place of the labels of threshold samples.
    """
    index: torch.Tensor
    label: torch.Tensor
    original: torch.Tensor | None
    trained: torch.Tensor


def choose_labels(args: argparse.Namespace, train: Source, num_classes: int) -> Labels:
    """Draws or reads the labeled images, as the arguments say."""
    original = None
    if args.labels_file:
        if is_name_list(args.labels_file):
            index = find_named(args.labels_file, train, args.input_key)
            label = train.targets[index]
        else:
            index, label, original = read_labels(args.labels_file, train.targets, num_classes)
        if args.num_labels not in (None, len(index)):
            raise UsageError(f'--num-labels {args.num_labels}: --labels-file {args.labels_file} has {len(index)}')
    else:
        if args.label_fold is not None:
            index = read_fold(args.data_dir, args.label_fold, len(train))
        elif (args.num_labels, args.labels_per_class, args.label_fraction) == (None, None, None):
            index = (train.targets >= 0).nonzero().squeeze(1)
        else:
            index = select_labeled(
                train.targets,
                args.num_labels,
                num_classes,
                label_seed(args),
                args.labels_per_class,
                args.label_fraction,
            )
            if args.num_labels and args.num_labels % num_classes:
                _logger.info(f'{args.num_labels} labels over {num_classes} classes: some classes get one more than '
                             'others')
        label = train.targets[index]
    if args.label_noise:
        original, label = label, flip_labels(label, args.label_noise, num_classes, label_seed(args))
    trained = label
    if args.aum_threshold_samples is not None:
        rows = draw_threshold_samples(len(label), num_classes, label_seed(args), args.aum_threshold_samples)
        trained = label.index_fill(0, rows, num_classes)
    return Labels(index, label, original, trained)


def find_named(file: str, train: Source, input_key: str | None = None) -> torch.Tensor:
    """Images of the training split whose files a list names, `[L]` int64, ascending; see `filelists.match_names`.

    Raises:
        UsageError: If the images have no file names, none is found, or one is ambiguous or has no label.
    """
    paths = train.file_paths()
    if paths is None:
        raise UsageError(f'--labels-file {file}: lists names of files, which the images of this data set do not have')
    index = torch.tensor(match_names(read_names(Path(file), input_key), paths, f'--labels-file {file}'))
    without = index[train.targets[index] < 0]
    if len(without):
        raise UsageError(f'--labels-file {file}: {len(without)} of the {len(index)} images have no label in the '
                         f'training split, such as {paths[without[0]]}')
    return index


def select_labeled(
        targets: torch.Tensor,
        num_labels: int | None,
        num_classes: int,
        seed: int,
        labels_per_class: int | None = None,
        label_fraction: float | None = None,
) -> torch.Tensor:
    """Draws the labeled images, balanced over the classes or in proportion to them.

    A generator of its own makes the draw depend on the targets and the seed alone. Just one of num_labels,
    labels_per_class and label_fraction is given.

    Args:
        targets: `[N]` int64; -1 is never drawn.
        num_labels: In total. If it is no multiple of num_classes, a random choice of classes gets one more than the
            others.
        num_classes: K.
        seed: Of the draw.
        labels_per_class: The same number of every class.
        label_fraction: This share of every class, rounded, at least one image.

    Returns:
        `[L]` int64 indices, ascending.

    Raises:
        UsageError: If num_labels is below num_classes or a class has too few images.
    """
    generator = np.random.default_rng(seed)
    has = torch.bincount(targets[targets >= 0], minlength=num_classes).numpy()[:num_classes]
    if label_fraction is not None:
        asked = f'--label-fraction {label_fraction}'
        if not 0 < label_fraction <= 1:
            raise UsageError(f'{asked}: expected a number in (0, 1]')
        wanted = np.maximum(np.floor(label_fraction * has + 0.5).astype(int), 1)
    elif labels_per_class is not None:
        asked = f'--labels-per-class {labels_per_class}'
        if labels_per_class < 1:
            raise UsageError(f'{asked}: expected 1 or more')
        wanted = np.full(num_classes, labels_per_class)
    else:
        asked = f'--num-labels {num_labels}'
        if num_labels < num_classes:
            raise UsageError(f'{asked}: at least one for each of the {num_classes} classes is needed')
        wanted = np.full(num_classes, num_labels // num_classes)
        wanted[generator.permutation(num_classes)[:num_labels % num_classes]] += 1
    by_class = np.split(targets.argsort(stable=True).numpy(), np.cumsum([(targets < 0).sum(), *has]))[1:]
    drawn = []
    for label, (members, number) in enumerate(zip(by_class, wanted)):
        if len(members) < number:
            raise UsageError(f'{asked}: asks for {number} images of class {label}, which has {len(members)}')
        drawn.append(generator.choice(members, number, replace=False))
    return torch.from_numpy(np.sort(np.concatenate(drawn)))


def read_fold(data_dir: str | None, fold: int, num_images: int) -> torch.Tensor:
    """One of STL-10's predefined folds of 1,000 labeled images, as `[L]` int64 indices into its training split.

    Raises:
        UsageError: If `stl10_binary/fold_indices.txt` in data_dir is missing, does not fit, or has no such fold.
    """
    file = Path(data_dir or '.') / 'stl10_binary' / 'fold_indices.txt'
    try:
        folds = [torch.tensor([int(i) for i in line.split()]) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f'--label-fold: {file} cannot be read ({error}); STL-10\'s own files have it') from error
    if not 0 <= fold < len(folds):
        raise UsageError(f'--label-fold {fold}: {file} has the folds 0 to {len(folds) - 1}')
    if not len(folds[fold]) or folds[fold].min() < 0 or folds[fold].max() >= num_images:
        raise UsageError(f'--label-fold {fold}: {file} does not fit a training split of {num_images} images')
    return folds[fold].sort().values


def match_classes(
        source: Source,
        class_names: list[str] | None,
        num_classes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of a second evaluation set that show a run's classes, and their labels as the run numbers them.

    Classes are matched by name where both sets name them alike (wnids), else by number: ImageNet's copies and WebVision
    share one order, and the mini variant has the first 50.

    Returns:
        Indices `[n]` int64 into source and targets `[n]` int64.

    Raises:
        UsageError: If no class is shared.
    """
    targets = source.targets
    theirs = source.class_names or []
    if class_names and set(class_names) & set(theirs):
        number = {name: i for i, name in enumerate(class_names)}
        table = torch.tensor([number.get(name, -1) for name in theirs] + [-1])  # the last entry is for label -1
        targets = table[targets]
    index = ((targets >= 0) & (targets < num_classes)).nonzero().squeeze(1)
    if not len(index):
        raise UsageError('--extra-val: none of its images shows a class of this run')
    return index, targets[index]


def flip_labels(target: torch.Tensor, share: float, num_classes: int, seed: int) -> torch.Tensor:
    """Gives this share of the labels `[L]`, rounded, another class, drawn uniformly among the others."""
    generator = np.random.default_rng(item_seed(seed, 'label noise'))
    rows = generator.permutation(len(target))[:int(share * len(target) + 0.5)]
    flipped = target.clone()
    flipped[rows] = (target[rows] + torch.from_numpy(generator.integers(1, num_classes, len(rows)))) % num_classes
    return flipped


def draw_threshold_samples(num_labels: int, num_classes: int, seed: int, which: int) -> torch.Tensor:
    """Rows `[n]` int64 of the labeled set to be trained as an extra class (Pleiss et al. 2020, arXiv 2001.10528).

    One in K+1, so that the extra class is as large as an average other one; the draws 1 and 2 of a seed are disjoint.

    Raises:
        UsageError: If there are too few labels for one such row.
    """
    number = num_labels // (num_classes + 1)
    if not number:
        raise UsageError(f'--aum-threshold-samples: needs {num_classes + 1} labeled images or more, not {num_labels}')
    order = np.random.default_rng(item_seed(seed, 'threshold samples')).permutation(num_labels)
    return torch.from_numpy(np.sort(order[(which - 1) * number:which * number]))


def write_labels(
        path: Path,
        index: torch.Tensor,
        target: torch.Tensor,
        original: torch.Tensor | None = None,
        **about,
) -> None:
    """Writes the labeled draw as JSON: lists of index, target and (if labels were flipped) original, and about them."""
    content = dict(about, num_labels=len(index), index=index.tolist(), target=target.tolist())
    if original is not None:
        content.update(num_flipped=int((target != original).sum()), original=original.tolist())
    path.write_text(json.dumps(content, indent=1) + '\n')


def read_labels(
        path: str | Path,
        targets: torch.Tensor,
        num_classes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Reads a labels file back: indices `[L]`, their labels `[L]`, and the labels before flipping `[L]` or None; int64.

    The labels may differ from the set's own, as they do in studies of label noise.

    Raises:
        UsageError: If the file is missing or broken, or does not fit the data set.
    """
    try:
        content = json.loads(Path(path).read_text())
        index, target = (torch.tensor(content[key]) for key in ('index', 'target'))
        original = torch.tensor(content['original']) if 'original' in content else None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = f'{type(error).__name__} {error}'
        raise UsageError(f'--labels-file {path}: {reason}; expected index and target lists') from error
    if index.ndim != 1 or index.shape != target.shape or not len(index):
        raise UsageError(f'--labels-file {path}: index and target must be lists of one length, and not empty')
    if not index.dtype == target.dtype == torch.int64:
        raise UsageError(f'--labels-file {path}: index and target must be whole numbers')
    if original is not None and (original.shape != target.shape or original.dtype != torch.int64):
        raise UsageError(f'--labels-file {path}: original must be a list of whole numbers, as long as target')
    for key, here in (('num_images', len(targets)), ('num_classes', num_classes)):
        if content.get(key, here) != here:
            raise UsageError(f'--labels-file {path}: made for another set: its {key} is {content[key]}, here {here}')
    if len(index.unique()) != len(index):
        raise UsageError(f'--labels-file {path}: an index stands there twice')
    if index.min() < 0 or index.max() >= len(targets):
        raise UsageError(f'--labels-file {path}: an index is outside of the {len(targets)} images of this split')
    for labels in (target, original):
        if labels is not None and (labels.min() < 0 or labels.max() >= num_classes):
            raise UsageError(f'--labels-file {path}: a label is outside of the {num_classes} classes')
    return index, target, original
