"""Which images a run trains on, chooses its best weights by and is tested on: that they agree, and do not overlap."""
import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from digests import (
    COMPARED_FILES,
    MOST_DIGESTS,
    SAMPLE,
    Contents,
    digest_data,
    digest_pictures,
    shared_pictures,
    spread,
)
from folders import tell
from imbalance import draw_unlabeled, draws_unlabeled
from labels import Labels, alike_names, label_seed, match_classes
from program import UsageError, name_some
from seeds import item_seed
from sources import (
    PartSource,
    Source,
    align_numbers,
    create_source,
    is_published,
    known_facts,
    locate,
    open_source,
    refuse_overlap,
    refuse_unused_folder,
    settle_sources,
    unlabeled_split,
)

_logger = logging.getLogger('train')

HELD_OUT = 'held-out'  # what the part of the training split is called that --val-fraction holds out


@dataclass
class Sources:
    """The images of a run, before labels are drawn."""
    train: Source
    unlabeled: Source  # the same object as train unless --unlabeled-split differs
    evaluation: Source
    test: Source | None = None  # of --test-split
    held_out: torch.Tensor | None = None  # [V] int64, positions in train that are evaluated and not trained on


def hold_out(targets: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """A part of a set with the same share of every class, `[V]` int64 indices, ascending.

    Of every class of two images or more, at least one is held out and one is left. A function of labels and seed.
    """
    generator = np.random.default_rng(item_seed(seed, 'held out'))
    drawn = []
    has = torch.bincount(targets[targets >= 0])
    by_class = np.split(targets.argsort(stable=True).numpy(), np.cumsum([(targets < 0).sum(), *has]))[1:]
    for members in by_class:
        if not len(members):
            continue
        number = min(max(int(share * len(members) + 0.5), 1), len(members) - 1)
        drawn.append(generator.choice(members, number, replace=False))
    return torch.from_numpy(np.sort(np.concatenate(drawn))) if drawn else torch.zeros(0, dtype=torch.int64)


def open_sources(args: argparse.Namespace) -> Sources:
    """Opens the splits; with --val-fraction holds out a part of the training split, which then has no label there."""
    settle_sources(args)
    train = unlabeled = open_source(args, args.train_split)
    if not (train.targets >= 0).any():
        raise UsageError(f'--train-split {args.train_split}: none of its {len(train)} images has a label')
    if unlabeled_split(args) != args.train_split:
        unlabeled = open_source(args, unlabeled_split(args))
    held_out = None
    if args.val_fraction is None:
        evaluation = open_source(args, args.val_split)
    else:
        held_out = hold_out(train.targets, args.val_fraction, args.val_seed)
        if not len(held_out):
            raise UsageError(f'--val-fraction {args.val_fraction}: no class of --train-split {args.train_split} has '
                             'two images')
        evaluation = PartSource(train, held_out)
        train.targets = train.targets.index_fill(0, held_out, -1)
    name = evaluation_name(args, evaluation)
    if args.test_split == name:
        raise UsageError(f'--test-split {name}: best/ is chosen on it; choose by another one: --val-fraction holds out '
                         'a part of the training split')
    test = open_source(args, args.test_split) if args.test_split else None
    bits = max(train.bits, unlabeled.bits)
    asked = args.train_split, unlabeled_split(args), name, args.test_split
    for source, split in zip((train, unlabeled, evaluation, test), asked):
        if source is not None:
            refuse_overlap(source, split)
            use_bits(source, bits)
    return Sources(train, unlabeled, evaluation, test, held_out)


def use_bits(source: Source, bits: int) -> None:
    """Takes a source's deep greyscale as of the bits that training found in its pictures; 8: it found none."""
    if bits > 8 and source.bits != bits:
        rest = ' and the others of its set' if len(source) > 1 else ''
        cut = f'; what is above {2 ** bits - 1} is cut' if source.bits > bits else ''
        tell(f'{source.where(0)}{rest}: greyscale of more than 8 bits is taken as {bits} bits, as in training{cut}')
        source.bits = bits


def evaluation_name(args: argparse.Namespace, evaluation: Source) -> str:
    """What the evaluation split is called in logs and files."""
    return HELD_OUT if args.val_fraction is not None else args.val_split or evaluation.split or 'evaluation'


def tell_choice(args: argparse.Namespace, split: str) -> None:
    """Says which images choose best/, and if they are the test split, what that does to its score there."""
    line = f'best/ is chosen by {args.eval_metric} on {split}'
    if args.val_fraction is not None:
        then = 'validate.py reports a test split'
        if args.test_split:
            then = f'{args.test_split} is reported once, at the end'
        line += f', {100 * args.val_fraction:g} % of every class of {args.train_split}; {then}'
    elif split.partition('[')[0] == 'test':
        line += (', the test split: there its score is too good. Report last/, or hold out a part of the training '
                 'split to choose by (--val-fraction)')
    _logger.info(line)


def agree_on_classes(args: argparse.Namespace, sources: Sources) -> int:
    """Numbers the classes of all splits as the training split does, and returns their number K.

    Raises:
        UsageError: If a split that is evaluated has a class that the training split lacks, or no label.
    """
    train, evaluation = sources.train, sources.evaluation
    largest = int(train.targets.max()) + 1
    targets, names = align_numbers(evaluation.targets, evaluation.class_names, train.class_names)
    if not (train.class_names and names):
        largest = max(largest, int(targets.max()) + 1)
    num_classes = args.num_classes
    if num_classes is None:
        num_classes = len(train.class_names) if train.class_names else largest
    if args.num_classes is None and not train.class_names and largest > max(len(train), 2):
        raise UsageError(f'the data set has labels up to {largest - 1}, more classes than its {len(train)} training '
                         'images: are they ids? As words, in quotation marks, they are numbered by name; --num-classes '
                         f'{largest} keeps them as numbers')
    if largest < 2 and num_classes < 2:
        raise UsageError(f'--train-split {args.train_split} has only one class, {(train.class_names or [0])[0]}; a '
                         'classifier needs two')
    if num_classes < max(largest, 2):
        raise UsageError(f'--num-classes {num_classes}: the data set has labels up to {largest - 1}')
    tell_alike(train.class_names)
    name = evaluation_name(args, evaluation)
    evaluated = [(f'--val-split {name}' if args.val_split else f'split {name}', evaluation)]
    if sources.test is not None:
        evaluated.append((f'--test-split {args.test_split}', sources.test))
    for what, source in evaluated:
        if (source.targets < 0).any():
            raise UsageError(f'{what}: {int((source.targets < 0).sum())} of its {len(source)} images have no label')
        source.targets = match_classes(source, train.class_names, num_classes, what)
        source.class_names = train.class_names
    if sources.unlabeled is not train and (sources.unlabeled.targets >= 0).any():
        sources.unlabeled.targets = match_classes(
            sources.unlabeled, train.class_names, num_classes, f'--unlabeled-split {unlabeled_split(args)}',
            others='count as having no label',
        )
    named = min(num_classes, max(largest, len(train.class_names or ())))
    tell_missing(f'--train-split {args.train_split}', train, 'the data set', torch.arange(named), train.class_names)
    for what, source in evaluated:
        present = train.targets[train.targets >= 0].unique()
        tell_missing(what, source, f'--train-split {args.train_split}', present, train.class_names)
    return num_classes


def tell_alike(names: list[str] | None) -> None:
    """Warns of classes whose names differ in capitals or blanks only, or are the same number."""
    for what, alike in alike_names(names or [], names or []):
        _logger.warning(f'classes whose names {what} are different ones: {name_some(alike)}')


def tell_missing(what: str, source: Source, other: str, classes: torch.Tensor, names: list[str] | None) -> None:
    """Warns of classes `[n]` of another set that no image of this one shows."""
    present = {*source.targets.unique().tolist()}
    missing = [str(names[k] if names else k) for k in classes.tolist() if k not in present]
    if missing:
        _logger.warning(f'{what}: no image of {len(missing)} of the {len(classes)} classes that {other} has: '
                        f'{name_some(missing)}' + ('; is a slice of data that is sorted by class? --val-fraction holds '
                                                   'out a part of every class' if '[' in what else ''))


def match_extra(args: argparse.Namespace, class_names: list[str] | None, num_classes: int, bits: int):
    """The second evaluation set, the images of it that show a class of the run `[n]`, and their labels `[n]`, int64.

    Copies of ImageNet and WebVision number their classes alike, and the mini variant has the first 50.

    Raises:
        UsageError: If no class is shared.
    """
    refuse_unused_folder(args.extra_val, args.extra_val_dir, '--extra-val', '--extra-val-dir')
    extra = create_source(args.extra_val, args.extra_val_dir, None, max_pixels=args.max_pixels)
    use_bits(extra, bits)
    numbering = known_facts(args.dataset).get('numbering')
    alike = numbering is not None and numbering == known_facts(args.extra_val).get('numbering')
    alike = alike and len(extra.class_names or ()) == 1000 and len(class_names or ()) in (50, 1000)
    what = f'--extra-val {args.extra_val}'
    targets = match_classes(
        extra, class_names, num_classes, what, others='are left out', same_numbering=alike,
    )
    index = (targets >= 0).nonzero().squeeze(1)
    if not len(index):
        raise UsageError(f'{what}: none of its images shows a class of this run; its classes are '
                         f'{name_some(extra.class_names or ["not named"])}, those of the run '
                         f'{name_some(class_names or ["not named"])}')
    return extra, index, targets[index]


def place_labeled(
        args: argparse.Namespace,
        sources: Sources,
        labels: Labels,
        num_classes: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which images of the unlabeled split are used, `[U]` int64, and where among them the labeled ones stand, `[L]`
    int64 (-1: nowhere; None where --exclude-labeled leaves them out). Held-out images are not used, nor those that a
    draw with --unlabeled-imbalance-factor leaves out.
    """
    index = torch.arange(len(sources.unlabeled))
    everywhere = locate(sources.train, sources.unlabeled)
    position = everywhere[labels.index]
    if sources.held_out is not None:
        index = index[~torch.isin(index, everywhere[sources.held_out])]
    if args.exclude_labeled:
        if (position < 0).all():
            _logger.warning(f'--exclude-labeled: no labeled image is known to be in split {unlabeled_split(args)}, and '
                            'none is left out')
        index = index[~torch.isin(index, position)]
    if draws_unlabeled(args):
        index = draw_unlabeled(args, sources.unlabeled.targets, index, num_classes, label_seed(args),
                               sources.train.class_names)
    tell_unused(args, sources, labels, everywhere)
    if args.exclude_labeled:
        position = None
    elif len(index) < len(sources.unlabeled):
        place = torch.full((len(sources.unlabeled) + 1,), -1)
        place[index] = torch.arange(len(index))
        position = place[position]
    if not len(index):
        raise UsageError('no unlabeled image is left: every image is labeled, and --exclude-labeled leaves those out')
    return index, position


def tell_unused(args: argparse.Namespace, sources: Sources, labels: Labels, everywhere: torch.Tensor) -> None:
    """Warns of images of the training split that a run never sees: not drawn as labeled ones, nor in its unlabeled
    split, where their places are `everywhere`, `[N]` int64.
    """
    unused = everywhere < 0
    unused[labels.index] = False
    if sources.held_out is not None:
        unused[sources.held_out] = False
    if unused.any():
        both = f'{args.train_split}+{unlabeled_split(args)}'
        _logger.warning(f'{int(unused.sum())} of the {len(unused)} images of {args.train_split} are neither labeled '
                        f'nor unlabeled ones; --unlabeled-split {both} takes them as the latter')


# --- Content ----------------------------------------------------------------------------------------------------------

@dataclass
class Identity:
    """What data a run belongs to.

    Attributes:
        class_names: In the run's order, or None.
        sizes: Images of the training split, the unlabeled set and the evaluation set.
        bits: Of the training images' deep greyscale, see `pictures.find_bits`.
        rows: Labeled images that are digested, `[d]` int64 rows of the labeled set.
        digests: Theirs, `[d]` int64.
        sample: Digests of images spread over the unlabeled set, `[s]` int64.
        evaluated: That of the evaluation set's labels and those of images spread over it, `[1 + e]` int64.
        place: Tells where a labeled image lies, by row.
    """
    class_names: list[str] | None
    sizes: list[int]
    bits: int
    rows: torch.Tensor
    digests: torch.Tensor
    sample: torch.Tensor
    evaluated: torch.Tensor
    place: Callable[[int], str]

    def state(self) -> dict:
        return {key: getattr(self, key) for key in ('class_names', 'sizes', 'bits', 'digests', 'sample', 'evaluated')}

    def evaluates_other(self, old: dict) -> str:
        """How a checkpoint's evaluation set differs from this one; empty if it is not known to differ."""
        if old['sizes'][2] != self.sizes[2]:
            return f'had {old["sizes"][2]} images and has {self.sizes[2]}'
        differs = old.get('evaluated', self.evaluated) != self.evaluated  # not in older checkpoints
        parts = ['other labels'] * bool(differs[0])
        if differs[1:].any():
            parts.append(f'other pictures, or the same in another order ({int(differs[1:].sum())} of '
                         f'{len(differs) - 1} looked at)')
        return f'has {" and ".join(parts)}' if parts else ''

    def check(self, old: dict, what: str, same_places: bool) -> None:
        """Raises UsageError unless what a checkpoint was trained on are these data.

        With labeled images in other places than the checkpoint's, only those are compared that do not depend on them.
        """
        if old['class_names'] != self.class_names:
            names, ours = old['class_names'] or [], self.class_names or []
            parts = [f'it lacks {name_some(only)}' for only in [[n for n in ours if n not in names]] if only]
            parts += [f'here is no {name_some(only)}' for only in [[n for n in names if n not in ours]] if only]
            raise UsageError(f'{what}: the checkpoint was made with other classes: '
                             + ('; '.join(parts) or f'in the order {name_some(names)}, here {name_some(ours)}')
                             + '; give the data as it was (--class-map sets the order of folders)')
        for name, then, now in zip(('training split', 'unlabeled set'), old['sizes'], self.sizes):
            if then != now:
                raise UsageError(f'{what}: the data has changed: the {name} had {then} images and has {now}')
        if old.get('bits', self.bits) != self.bits:  # not in older checkpoints
            raise UsageError(f'{what}: the data has changed: greyscale was taken as {old["bits"]} bits, and is now '
                             f'taken as {self.bits}')
        order = torch.equal(old['digests'].sort().values, self.digests.sort().values)
        differs = (old['digests'] != self.digests) if same_places or order else torch.zeros(0)
        if differs.any():
            first = self.place(int(differs.nonzero()[0]))
            raise UsageError(f'{what}: the data has changed: labeled picture {first} is another one'
                             + ('; all are there, in another order' if order else ''))
        if len(old['sample']) == len(self.sample) and (old['sample'] != self.sample).any():
            raise UsageError(f'{what}: the data has changed: {int((old["sample"] != self.sample).sum())} of '
                             f'{len(self.sample)} pictures of the unlabeled set that were looked at are other ones, or '
                             'stand in another order')


def identify(
        sources: Sources,
        labels: Labels,
        unlabeled_index: torch.Tensor | None,
) -> Identity:
    """What data a run belongs to.

    Of more labeled pictures than MOST_DIGESTS as many are digested, of the unlabeled and the evaluated ones SAMPLE.
    """
    rows = spread(len(labels.index), MOST_DIGESTS)
    index = labels.index[rows]
    digests = digest_pictures(sources.train, index)
    tell_copies(sources.train, index, labels.label[rows], digests)
    sample = torch.zeros(0, dtype=torch.int64)
    if unlabeled_index is not None:
        sample = digest_pictures(sources.unlabeled, unlabeled_index[spread(len(unlabeled_index), SAMPLE)])
    evaluation = sources.evaluation
    evaluated = [digest_data([evaluation.targets.numpy()]),
                 digest_pictures(evaluation, spread(len(evaluation), SAMPLE))]
    return Identity(
        sources.train.class_names,
        [len(sources.train), 0 if unlabeled_index is None else len(unlabeled_index), len(sources.evaluation)],
        sources.train.bits,
        rows,
        digests,
        sample,
        torch.cat(evaluated),
        lambda row: f'{int(index[row])} ({sources.train.where(int(index[row]))})',
    )


def tell_copies(train: Source, index: torch.Tensor, label: torch.Tensor, digests: torch.Tensor) -> None:
    """Warns of pictures that are labeled more than once, by positions, labels and digests `[d]` int64."""
    order = digests.argsort(stable=True)
    same = (digests[order][1:] == digests[order][:-1]) & (digests[order][1:] != 0)
    pairs = torch.stack([order[:-1], order[1:]], 1)[same]
    alike = label[pairs[:, 0]] == label[pairs[:, 1]]
    for found, told in ((pairs[~alike], 'of another class'), (pairs[alike], 'of their class')):
        if len(found):
            one, other = (train.where(int(index[row])) for row in found[0])
            _logger.warning(f'{len(found)} labeled pictures are the same as another one {told}, such as {other} (as '
                            f'{one}); each counts')


# --- Overlap ----------------------------------------------------------------------------------------------------------

PUBLISHED_MOST = 0.1  # share of the images to evaluate above which no published set is taken as it is


@dataclass
class Evaluated:
    """Images that a run evaluates."""
    name: str
    contents: Contents
    same_set: bool  # as the training split
    published: bool


def check_overlap(
        args: argparse.Namespace,
        sources: Sources,
        labels: Labels,
        unlabeled_index: torch.Tensor | None,
        extra: tuple[Source, torch.Tensor] | None = None,
) -> None:
    """Refuses labeled images among those that are evaluated. Tells how many unlabeled ones are, and how many of
    --test-split were evaluated before.

    Within a data set's splits images are known by position, and everywhere by content. Published sets cannot be mended:
    of one whose splits share some pictures the number is told.

    Args:
        args: Of the command line.
        sources: The splits.
        labels: The labeled images.
        unlabeled_index: Images of the unlabeled split that are used, `[U]` int64, or None.
        extra: --extra-val, and which of its images are evaluated, `[n]` int64.

    Raises:
        UsageError: With some of the labeled images that are evaluated too.
    """
    published = is_published(args.dataset)
    evaluated = [
        Evaluated(name, Contents(source), True, published)
        for name, source in ((evaluation_name(args, sources.evaluation), sources.evaluation),
                             (args.test_split, sources.test)) if source is not None
    ]
    if extra is not None:
        both = published and is_published(args.extra_val)
        evaluated.append(Evaluated(f'--extra-val {args.extra_val}', Contents(*extra), False, both))
    labeled = Contents(sources.train, labels.index)
    for images in evaluated:
        refuse_labeled(images, labeled)
    if unlabeled_index is not None:
        unlabeled = Contents(sources.unlabeled, unlabeled_index)
        for images in evaluated:
            found, least = find_shared(images, unlabeled)
            if len(found):
                _logger.warning(f'{least}{len(found)} of the {len(images.contents.whole)} images to evaluate '
                                f'({images.name}) are in the unlabeled set too: the network sees them in training, '
                                'without their labels')
    for images in evaluated if sources.test is not None else []:
        tested = evaluated[1]
        if images is tested:
            continue
        found, least = find_shared(tested, images.contents, images.same_set)
        if len(found):
            used = f', and best/ is chosen on them by {args.eval_metric}' if images is evaluated[0] else ''
            _logger.warning(f'{least}{len(found)} of the {len(tested.contents.whole)} images of {tested.name} are in '
                            f'{images.name} too: they are evaluated before the end{used}')


def find_shared(images: Evaluated, others: Contents, same_set: bool = True) -> tuple[torch.Tensor, str]:
    """Which evaluated images are among others, by position or content, `[n]` int64, and 'at least ' or ''."""
    found, _, least = shared_pictures(images.contents, others, COMPARED_FILES)
    if images.same_set and same_set:
        place = locate(others.source, images.contents.source)[others.whole]
        found = torch.cat([found, place[place >= 0]])
    return found.unique(), least


def refuse_labeled(images: Evaluated, labeled: Contents) -> None:
    """Raises UsageError if labeled images are evaluated; of a published set a few are told."""
    def where(contents, index):
        return contents.source.where(int(index))

    if images.same_set:
        both = labeled.whole[locate(labeled.source, images.contents.source)[labeled.whole] >= 0]
        if len(both):
            raise UsageError(f'{len(both)} of the {len(labeled.whole)} labeled training images are among the images to '
                             f'evaluate ({images.name}), such as {where(labeled, both[0])}: give slices that do not '
                             'overlap, or --val-fraction to hold out a part of the training split')
    found, same, least = shared_pictures(images.contents, labeled)
    if not len(found):
        return
    pairs = [f'{where(images.contents, i)} (as {where(labeled, j)})' for i, j in zip(found[:3], same)]
    more = f' and {len(found) - 3} more' if len(found) > 3 else ''
    told = (f'{least}{len(found)} pictures of {images.name} are the same as labeled ones of training: '
            f'{", ".join(pairs)}{more}')
    if not images.published or len(found) > PUBLISHED_MOST * len(images.contents.index):
        raise UsageError(f'{told}; take them out of one of the two')
    _logger.warning(f'{told}; the set is published so, and they count')
