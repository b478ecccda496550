"""Which images are labeled, and with what: draws, label files, label noise, threshold samples, classes of two sets."""
import argparse
import json
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from digests import from_text, place_pictures
from filelists import is_name_list, match_names, read_names
from folders import composed
from imbalance import check_sizes, draw, draws_unlabeled, labeled_sizes, tell_sizes
from program import UsageError, name_some, quoted
from seeds import item_seed
from sources import Source, align_numbers, renumber

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
            index = find_named(args.labels_file, train, args.input_key, args.val_fraction is not None)
            label = train.targets[index]
        else:
            index, label, original = read_labels(args.labels_file, train, num_classes, train.class_names)
        if args.num_labels not in (None, len(index)):
            raise UsageError(f'--num-labels {args.num_labels}: --labels-file {args.labels_file} has {len(index)}')
    else:
        if args.label_fold is not None:
            index = read_fold(args.data_dir, args.label_fold, len(train))
        elif (args.num_labels, args.labels_per_class, args.label_fraction, args.imbalance_factor) == (None,) * 3 + (1,):
            index = (train.targets >= 0).nonzero().squeeze(1)
        else:
            index = select_labeled(
                train.targets,
                args.num_labels,
                num_classes,
                label_seed(args),
                args.labels_per_class,
                args.label_fraction,
                train.class_names,
                args.imbalance_factor,
            )
            if args.imbalance_factor != 1:
                sizes = torch.bincount(train.targets[index], minlength=num_classes).tolist()
                other = args.algorithm == 'supervised' or draws_unlabeled(args)
                _logger.info(f'--imbalance-factor {args.imbalance_factor:g}: {len(index):,} of the '
                             f'{int((train.targets >= 0).sum()):,} images that have a label are labeled, '
                             f'{tell_sizes(sizes)}'
                             + ('' if other else '; the unlabeled set stays as it is (--unlabeled-imbalance-factor)'))
            elif args.num_labels and args.num_labels % num_classes:
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


def find_named(file: str, train: Source, input_key: str | None = None, held_out: bool = False) -> torch.Tensor:
    """Images of the training split whose files a list names, `[L]` int64, ascending; see `filelists.match_names`.

    With `held_out`, some of those without a label may be held out.

    Raises:
        UsageError: If the images have no file names, none is found, or one is ambiguous or has no label.
    """
    paths = train.file_paths()
    if paths is None:
        raise UsageError(f'--labels-file {file}: lists names of files, which the images of this data set do not have')
    index = torch.tensor(match_names(read_names(Path(file), input_key), paths, f'--labels-file {file}'))
    without = index[train.targets[index] < 0]
    if len(without):
        or_held_out = ', or are held out to be evaluated (--val-fraction)' if held_out else ''
        raise UsageError(f'--labels-file {file}: {len(without)} of the {len(index)} images have no label in the '
                         f'training split{or_held_out}, such as {paths[without[0]]}')
    return index


def select_labeled(
        targets: torch.Tensor,
        num_labels: int | None,
        num_classes: int,
        seed: int,
        labels_per_class: int | None = None,
        label_fraction: float | None = None,
        class_names: list[str] | None = None,
        imbalance_factor: float = 1.,
) -> torch.Tensor:
    """Draws the labeled images, balanced over the classes, in proportion to them, or with sizes that fall (imbalance).

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
        class_names: For messages.
        imbalance_factor: See `imbalance.labeled_sizes`; 1 is off.

    Returns:
        `[L]` int64 indices, ascending.

    Raises:
        UsageError: If num_labels is below num_classes or a class has too few images.
    """
    generator = np.random.default_rng(seed)
    has = torch.bincount(targets[targets >= 0], minlength=num_classes).numpy()[:num_classes]
    if imbalance_factor != 1:
        asked, wanted = labeled_sizes(has, imbalance_factor, num_labels, labels_per_class, label_fraction)
        check_sizes(asked, wanted, has, imbalance_factor, class_names)
    elif label_fraction is not None:
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
    for label, (there, number) in enumerate(zip(has, wanted)):
        if there < number:
            name = class_names[label] if label < len(class_names or ()) else label
            hint = '' if there else '. A class without a picture: remove its folder, or leave it out by --class-map'
            if label_fraction is None and 0 < has.min() < has.max():
                share = min(wanted.sum() / has.sum(), 1)
                hint = f'. The classes are unequal: --label-fraction {share:.2g} would take this share of each'
            raise UsageError(f'{asked}: asks for {number} images of class {name}, which has {there}{hint}')
    return draw(targets, wanted, generator)


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


def _plain_number(name: str) -> str:
    number = re.fullmatch(r'0*(\d+?)(\.0*)?', name)
    return number[1] if number else name


def alike_names(names: Sequence[str], of: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """In what different names are alike, and those of them that are, with one of `of` among them."""
    for key, what in ((str.casefold, 'differ in capitals only'), (str.strip, 'differ in blanks at their ends only'),
                      (_plain_number, 'are the same number')):
        by_key = {}
        for name in names:
            by_key.setdefault(key(name), []).append(name)
        alike = [' and '.join(map(quoted, same)) for same in by_key.values() if len(same) > 1 and {*same} & {*of}]
        if alike:
            yield what, alike


CLASSES_HINT = '--class-map numbers the folders of images, --target-key names the label column of a table'


def match_classes(
        source: Source,
        class_names: list[str] | None,
        num_classes: int,
        what: str,
        run: str = 'the training split',
        others: str = 'refuse',
        same_numbering: bool = False,
) -> torch.Tensor:
    """A set's labels as a run numbers its classes, `[N]` int64; -1: no label.

    Classes are matched by name. Where one side has no names they are matched by number, which is told: by what the
    names of the other say, if these are whole numbers, else by their order.

    Args:
        source: The set.
        class_names: Of the run, or None.
        num_classes: Of the run, K.
        what: What messages call the set.
        run: What they call that which has the run's classes.
        others: Images of classes that the run lacks are refused, or else get the label -1, and this text tells of them.
        same_numbering: Both are known to number their classes alike, whatever they call them; then sets that share no
            name are matched by number.

    Raises:
        UsageError: If a class is not one of the run's.
    """
    theirs, class_names = (names and [*map(composed, names)] for names in (source.class_names, class_names))
    targets, theirs = align_numbers(source.targets, theirs, class_names)
    if theirs and not source.class_names:
        _logger.info(f'{what}: its labels are numbers, and are matched with the names of the classes of {run}, which '
                     'are whole numbers')
    shared = set(theirs or ()) & set(class_names or ())
    if not theirs or not class_names or (same_numbering and not shared):
        lacks = 'one numbering is known of both' if theirs and class_names else 'class names are not known of both'
        _logger.info(f'{what}: {lacks}, so its classes are matched with those of {run} by number')
        outside = targets >= num_classes
        if others == 'refuse' and outside.any():
            raise UsageError(f'{what}: it has labels up to {int(targets.max())}, and {run} has {num_classes} classes, '
                             f'0 to {num_classes - 1} ({CLASSES_HINT})')
        return torch.where(outside, -1, targets)
    if theirs == class_names:
        return targets
    mapped = renumber(targets, theirs, class_names)
    lost = (targets >= 0) & (mapped < 0)
    unknown = [theirs[number] for number in targets[lost].unique().tolist()]
    lacking = [name for name in class_names if name not in shared]
    if lost.any() and others == 'refuse':
        rest = f'; of its classes {what} lacks {name_some(lacking)}' if lacking else ''
        alike = next(alike_names([*unknown, *class_names], unknown), None)
        hint = f'names that {alike[0]}: {name_some(alike[1])}' if alike else CLASSES_HINT
        raise UsageError(f'{what}: {int(lost.sum())} of {len(targets)} images are of classes that {run} does not have: '
                         f'{name_some(unknown)}{rest} ({hint})')
    told = []
    if lost.any():
        told.append(f'{int(lost.sum())} of {len(targets)} images are of classes that {run} does not have '
                    f'({name_some(unknown)}) and {others}')
    if lacking:
        told.append(f'it lacks {len(lacking)} of the {len(class_names)} classes of {run} ({name_some(lacking)}), and '
                    'the others keep their numbers')
    elif not lost.any():
        told.append(f'its classes stand in another order than those of {run}, and are matched by name')
    _logger.warning(f'{what}: {"; ".join(told)}')
    return mapped


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
        source: Source,
        num_classes: int,
        class_names: list[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Reads a labels file back: indices `[L]`, their labels `[L]`, and the labels before flipping `[L]` or None; int64.

    The labels may differ from the set's own, as they do in studies of label noise. Classes are matched by name with
    those given, and pictures by content with those of the set, where the file tells them.

    Raises:
        UsageError: If the file is missing or broken, or does not fit the data set.
    """
    where = f'--labels-file {path}'
    try:
        content = json.loads(Path(path).read_text())
        index, target = (torch.tensor(content[key]) for key in ('index', 'target'))
        original = torch.tensor(content['original']) if 'original' in content else None
        digests = from_text(content['digests']) if 'digests' in content else None
        rows = torch.tensor(content['digest_rows']) if 'digest_rows' in content else torch.arange(len(index))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        reason = f'{type(error).__name__} {error}'
        raise UsageError(f'{where}: {reason}; expected index and target lists') from error
    if index.ndim != 1 or index.shape != target.shape or not len(index):
        raise UsageError(f'{where}: index and target must be lists of one length, and not empty')
    if not index.dtype == target.dtype == torch.int64:
        raise UsageError(f'{where}: index and target must be whole numbers')
    if original is not None and (original.shape != target.shape or original.dtype != torch.int64):
        raise UsageError(f'{where}: original must be a list of whole numbers, as long as target')
    names = content.get('class_names')
    if names and class_names and names != class_names:
        target = _match_labels(where, target, names, class_names)
        original = None if original is None else _match_labels(where, original, names, class_names)
    elif content.get('num_classes', num_classes) != num_classes:
        raise UsageError(f'{where}: made for another set: its num_classes is {content["num_classes"]}, here '
                         f'{num_classes}')
    if digests is None and content.get('num_images', len(source)) != len(source):
        raise UsageError(f'{where}: made for another set: its num_images is {content["num_images"]}, here '
                         f'{len(source)}')
    if len(index.unique()) != len(index):
        raise UsageError(f'{where}: an index stands there twice')
    if index.min() < 0 or (digests is None and index.max() >= len(source)):
        raise UsageError(f'{where}: an index is outside of the {len(source)} images of this split')
    for labels in (target, original):
        if labels is not None and (labels.min() < 0 or labels.max() >= num_classes):
            raise UsageError(f'{where}: a label is outside of the {num_classes} classes')
    if digests is not None:
        if len(digests) != len(rows) or (len(rows) and (rows.min() < 0 or rows.max() >= len(index))):
            raise UsageError(f'{where}: digests does not fit index')
        index = place_pictures(where, source, index, rows, digests)
    return index, target, original


def _match_labels(where: str, labels: torch.Tensor, names: list[str], wanted: list[str]) -> torch.Tensor:
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
        raise UsageError(f'{where}: a label is outside of its {len(names)} classes')
    mapped = renumber(labels, [*map(composed, names)], [*map(composed, wanted)])
    unknown = [names[number] for number in labels[mapped < 0].unique().tolist()]
    if unknown:
        raise UsageError(f'{where}: its labels are of classes that the training split does not have: '
                         f'{name_some(unknown)}; it has {name_some(wanted)}')
    if not torch.equal(mapped, labels):
        _logger.warning(f'{where}: its classes stand in another order, and are matched by name')
    return mapped
