"""Unbalanced data: draws with exponentially falling class sizes, what is measured of rare classes, logit adjustment.

Of K classes the k-th, counted from 0 in the order of their numbers, gets

    floor(N1 * G ** (-k / (K - 1)))

images: N1 of class 0, N1 / G of the last one. With a negative factor the sizes stand in reversed order, so that class 0
has the fewest. This is what the published benchmarks call N1 and gamma_l of the labeled set and M1 and gamma_u of the
unlabeled set (DARP, arXiv 2007.08844; CReST, 2102.09559; DASO, 2106.05682; USB, 2208.07204).
"""
import argparse
import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from metrics import ClassReport, EvalMeter
from program import UsageError
from schedule import running_momentum
from seeds import item_seed

_logger = logging.getLogger('train')

MOST_SHOWN = 20  # class sizes in a line


# --- Arguments --------------------------------------------------------------------------------------------------------

def add_imbalance_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--imbalance-factor', type=float, metavar='G', default=1.,
                       help='draw the labeled images with class sizes that fall exponentially with the number of the '
                            'class: N1 of class 0, N1 / G of the last one (gamma_l of the long-tail benchmarks); -G: '
                            'the other way round, the last class has N1. N1 is --labels-per-class, or follows from '
                            'the total --num-labels; with --label-fraction it is this share of the largest N1 that '
                            'the classes allow, and without any of them all of that (default: 1, off)')
    group.add_argument('--unlabeled-imbalance-factor', type=float, metavar='G', default=1.,
                       help='draw the unlabeled images likewise (gamma_u), by the labels that their split must have: '
                            'M1 of class 0, M1 / G of the last one; -G: the other way round. The draw is from all '
                            'images of the split, labeled ones too unless --exclude-labeled is given, as the '
                            'benchmarks do (default: 1, off: the unlabeled set stays as it is)')
    group.add_argument('--unlabeled-per-class', type=int, metavar='M1', default=None,
                       help='M1, unlabeled images of the most frequent class; without a factor of every class '
                            '(default: the largest that the classes allow)')
    group.add_argument('--logit-adjustment', type=float, metavar='TAU', default=0.,
                       help='add TAU log(frequency of the class) to the logits in the labeled and in the '
                            'pseudo-labeled loss, so that rare classes are not left behind (arXiv 2007.07314, eq. 10; '
                            '1 is the paper\'s choice). Of labeled images the frequencies are counted, of '
                            'pseudo-labels they are running ones, by --stat-momentum, of the images that count. '
                            'Evaluation and the mixup loss take the logits as they are (default: 0, off)')


def check_imbalance(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with status 2 where these arguments make no sense, alone or beside others."""
    for name in ('imbalance_factor', 'unlabeled_imbalance_factor'):
        value = getattr(args, name)
        if not 1 <= abs(value) < np.inf:
            parser.error(f'--{name.replace("_", "-")} {value:g}: expected 1 or more, or for the reversed order -1 or '
                         'less: how many times as large the most frequent class is as the rarest')
    if args.imbalance_factor != 1:
        for name in ('labels_file', 'label_fold'):
            if getattr(args, name) is not None:
                parser.error(f'--imbalance-factor {args.imbalance_factor:g} would draw the labeled images that '
                             f'--{name.replace("_", "-")} {getattr(args, name)} gives: give --imbalance-factor 1')
    if args.unlabeled_per_class is not None and args.unlabeled_per_class < 1:
        parser.error(f'--unlabeled-per-class {args.unlabeled_per_class}: expected 1 or more')
    if not 0 <= args.logit_adjustment < np.inf:
        parser.error(f'--logit-adjustment {args.logit_adjustment:g}: expected 0 or more')
    if args.algorithm == 'supervised' and draws_unlabeled(args):
        parser.error('--unlabeled-imbalance-factor, --unlabeled-per-class: --algorithm supervised has no unlabeled '
                     'images')


def draws_unlabeled(args: argparse.Namespace) -> bool:
    return args.unlabeled_imbalance_factor != 1 or args.unlabeled_per_class is not None


# --- Draws ------------------------------------------------------------------------------------------------------------

def shares(num_classes: int, factor: float) -> np.ndarray:
    """Size of each class in units of the largest one, `[K]` float64."""
    falling = abs(factor) ** (-np.arange(num_classes) / max(num_classes - 1, 1))
    return falling if factor > 0 else falling[::-1]


def class_sizes(largest: int, num_classes: int, factor: float) -> np.ndarray:
    """Sizes `[K]` int64 of classes of which the most frequent one has `largest` images."""
    return np.floor(largest * shares(num_classes, factor) + 1e-9).astype(np.int64)  # 1000 / 10 may give 99.99...


def share_out(total: int, num_classes: int, factor: float) -> np.ndarray:
    """Sizes `[K]` int64 that add up to `total`: what is left by rounding down goes to the largest remainders."""
    share = shares(num_classes, factor)
    ideal = total * share / share.sum()
    sizes = np.floor(ideal + 1e-9).astype(np.int64)
    sizes[np.argsort(sizes - ideal, kind='stable')[:total - sizes.sum()]] += 1
    return sizes


def largest_possible(has: np.ndarray, factor: float) -> int:
    """The largest N1 whose class sizes are no larger than those at hand, `[K]`."""
    # Of class k at most has_k are asked for as long as N1 * share_k is below has_k + 1.
    largest = int(np.ceil((has + 1) / shares(len(has), factor)).min())
    while (class_sizes(largest, len(has), factor) > has).any():
        largest -= 1
    return largest


def labeled_sizes(
        has: np.ndarray,
        factor: float,
        num_labels: int | None = None,
        labels_per_class: int | None = None,
        label_fraction: float | None = None,
) -> tuple[str, np.ndarray]:
    """What was asked for, in words, and how many images of each class that is, `[K]` int64; see the module.

    Args:
        has: Images of each class, `[K]` int64.
        factor: G.
        num_labels: In total, or
        labels_per_class: N1, or
        label_fraction: Share of the largest N1 that there can be. Without any of these it is that.
    """
    asked = f'--imbalance-factor {factor:g}'
    if num_labels is not None:
        return f'--num-labels {num_labels} {asked}', share_out(num_labels, len(has), factor)
    if labels_per_class is not None:
        return f'--labels-per-class {labels_per_class} {asked}', class_sizes(labels_per_class, len(has), factor)
    largest = largest_possible(has, factor)
    if label_fraction is not None:
        asked = f'--label-fraction {label_fraction:g} {asked}'
        largest = int(label_fraction * largest + 0.5)
    return asked, class_sizes(largest, len(has), factor)


def check_sizes(asked: str, wanted: np.ndarray, has: np.ndarray, factor: float, names: list[str] | None) -> None:
    """Raises UsageError if a class gets no image, or more than it has."""
    for label, (number, there) in enumerate(zip(wanted, has)):
        name = names[label] if label < len(names or ()) else label
        if number < 1:
            remedy = 'it has none to draw from' if there < 1 else 'ask for more images, or for a factor nearer to 1'
            raise UsageError(f'{asked}: leaves no image of class {name}; {remedy}')
        if number > there:
            raise UsageError(f'{asked}: asks for {number} images of class {name}, which has {there}; the most frequent '
                             f'class can have {largest_possible(has, factor)} at the most')


def draw(targets: torch.Tensor, wanted: np.ndarray, generator: np.random.Generator) -> torch.Tensor:
    """So many images of each class, without replacement: targets `[N]`, wanted `[K]` -> `[L]` int64, ascending."""
    order = targets.argsort(stable=True).numpy()
    ends = np.cumsum(torch.bincount(targets.clamp(min=-1) + 1, minlength=len(wanted) + 1).numpy())
    drawn = [generator.choice(order[ends[label]:ends[label + 1]], number, replace=False)
             for label, number in enumerate(wanted)]
    return torch.from_numpy(np.sort(np.concatenate(drawn)))


def tell_sizes(sizes: list[int]) -> str:
    """Numbers of images by class, of many classes the first and the last ones."""
    shown = [f'{size:,}' for size in sizes]
    if len(shown) > MOST_SHOWN:
        shown = [*shown[:MOST_SHOWN // 2], '...', *shown[-MOST_SHOWN // 2:]]
    return f'{" ".join(shown)} of class 0 to {len(sizes) - 1}'


def draw_unlabeled(
        args: argparse.Namespace,
        targets: torch.Tensor,
        index: torch.Tensor,
        num_classes: int,
        seed: int,
        names: list[str] | None = None,
) -> torch.Tensor:
    """Draws the unlabeled set by --unlabeled-imbalance-factor and --unlabeled-per-class, and tells it in one line.

    Args:
        args: The run's.
        targets: Labels of the images of the unlabeled split, `[N]` int64; -1: unknown, such images are left out.
        index: Those to draw from, `[U]` int64.
        num_classes: K.
        seed: Of the draw.
        names: Of the classes, for messages.

    Returns:
        Those drawn, `[U']` int64, ascending.

    Raises:
        UsageError: If a class has too few images, or would get none.
    """
    factor, asked = args.unlabeled_imbalance_factor, []
    if factor != 1:
        asked.append(f'--unlabeled-imbalance-factor {factor:g}')
    if args.unlabeled_per_class is not None:
        asked.append(f'--unlabeled-per-class {args.unlabeled_per_class}')
    asked = ' '.join(asked)
    known = targets[index]
    if not (known >= 0).any():
        raise UsageError(f'{asked}: draws by class, and no unlabeled image has a label')
    has = torch.bincount(known[known >= 0], minlength=num_classes).numpy()
    largest = largest_possible(has, factor) if args.unlabeled_per_class is None else args.unlabeled_per_class
    wanted = class_sizes(largest, num_classes, factor)
    check_sizes(asked, wanted, has, factor, names)
    drawn = index[draw(known, wanted, np.random.default_rng(item_seed(seed, 'unlabeled draw')))]
    without = int((known < 0).sum())
    _logger.info(f'{asked}: {len(drawn):,} of {len(index):,} images are the unlabeled set, '
                 f'{tell_sizes(wanted.tolist())}; the others are left out'
                 + (f', {without:,} of them as they have no label to draw by' if without else ''))
    return drawn


def describe_draw(args: argparse.Namespace, labels: torch.Tensor, targets: torch.Tensor | None, index) -> dict:
    """What labels.json says of an unbalanced draw, empty if there was none.

    Args:
        args: The run's.
        labels: Of the labeled images, `[L]` int64.
        targets: Labels of the unlabeled split, `[N]`, or None without one.
        index: Its images that are used, `[U]`, or None.
    """
    about = {}
    if args.imbalance_factor != 1:
        about.update(imbalance_factor=args.imbalance_factor, labeled_by_class=torch.bincount(labels).tolist())
    if draws_unlabeled(args):
        about.update(
            unlabeled_imbalance_factor=args.unlabeled_imbalance_factor,
            unlabeled_by_class=torch.bincount(targets[index]).tolist(),
            unlabeled_index=index.tolist(),
        )
    return about


# --- Evaluation -------------------------------------------------------------------------------------------------------

def rarest_third(labeled: torch.Tensor) -> torch.Tensor | None:
    """The classes with the fewest labeled images, `[n]` int64: a third of all, rounded, at least one.

    Classes that have as many as the largest of these belong to them too.

    Args:
        labeled: Labeled images of each class, `[K]` int64.

    Returns:
        None where the labels are balanced: no two classes differ by more than one.
    """
    if labeled.max() - labeled.min() <= 1:
        return None
    most = labeled.sort().values[max(int(len(labeled) / 3 + 0.5), 1) - 1]
    return (labeled <= most).nonzero().squeeze(1)


def tail_error(report: ClassReport, labeled: torch.Tensor) -> float | None:
    """Error of the rarest third of classes, in percent: the mean of their errors. None if there is no such third."""
    rare = rarest_third(labeled)
    found = torch.tensor(torch.nan) if rare is None else report.recall[rare].nanmean()
    return None if found.isnan() else 100 * (1 - float(found))


def measure(meter: EvalMeter, labeled: torch.Tensor) -> dict[str, float]:
    """`EvalMeter.compute`, and tail_error where the labeled images of each class, `[K]`, are unbalanced."""
    metrics, tail = dict(meter.compute()), tail_error(meter.classes(), labeled)
    return metrics if tail is None else dict(metrics, tail_error=tail)


def tell_tail(metrics: dict[str, float]) -> str:
    """End of a line on an evaluation, empty where there is no rarest third."""
    return f', error of the rarest third of classes {metrics["tail_error"]:.2f} %' if 'tail_error' in metrics else ''


def by_class(meter: EvalMeter, labeled: torch.Tensor) -> dict[str, list]:
    """Lists over the classes for metrics.json: labeled images, then `ClassReport`'s, rates in percent or null."""
    columns = meter.classes()._asdict()
    counts = {key: columns.pop(key).tolist() for key in ('images', 'predicted')}
    rates = {key: [None if value != value else 100 * value for value in column.tolist()]
             for key, column in columns.items()}
    return dict(labeled=labeled.tolist(), **counts, **rates)


# --- Logit adjustment -------------------------------------------------------------------------------------------------

class LogitAdjustment(nn.Module):
    """Logit-adjusted cross-entropy (Menon et al., arXiv 2007.07314, eq. 10): logits + tau log(class frequency).

    A network that is trained so learns logits that are right for equally frequent classes, which are evaluated and
    pseudo-labeled as they are. The labeled and the pseudo-labeled images have frequencies of their own, as their sets
    may differ. Of the labeled set they are known, and counted once. Those of the pseudo-labels are running ones of the
    joined batch: with weights w of the U images, of which m(k) is the mean over those that are put into class k and m
    the sum over k,

        frequency(k) <- frequency(k) + (1 - momentum) * (m(k) - m * frequency(k)),

    so that a batch moves them by as much as it counts in the loss. They start equal. An extra class of the network gets
    the frequency 1 / K, that of an average class.

    Args:
        tau: Factor of the logarithm.
        labeled: Labeled images of each class, `[K]` int64; a class without any counts as having one.
        momentum: Of the running frequencies.
    """

    def __init__(self, tau: float, labeled: torch.Tensor, momentum: float):
        super().__init__()
        self.tau, self.momentum = tau, momentum
        counts = labeled.clamp(min=1)
        self.register_buffer('labeled', (counts.double() / counts.sum()).float(), persistent=False)
        self.register_buffer('pseudo', torch.full((len(labeled),), 1 / len(labeled)))

    def see(self, weak_logits: torch.Tensor, weight: torch.Tensor) -> None:
        """Moves the frequencies of the pseudo-labels by the joined batch: `[U, K]` or more columns, and `[U]`."""
        num_classes = len(self.pseudo)
        weak_logits = weak_logits[:, :num_classes]
        weight = torch.where(weak_logits.isfinite().all(1) & weight.isfinite(), weight, 0)
        counted = F.one_hot(weak_logits.argmax(1), num_classes) * weight[:, None]
        self.pseudo += (1 - self.momentum) * (counted.mean(0) - weight.mean() * self.pseudo)

    def offset(self, frequency: torch.Tensor, columns: int) -> torch.Tensor:
        """What is added to logits of that many columns, `[columns]` float32."""
        num_classes = len(frequency)
        return self.tau * F.pad(frequency, (0, columns - num_classes), value=1 / num_classes).clamp(min=1e-12).log()

    def adjust_labeled(self, logits: torch.Tensor) -> torch.Tensor:
        return logits + self.offset(self.labeled, logits.shape[1])

    def forward(
            self,
            logits: torch.Tensor,
            strong_logits: torch.Tensor,
            weak_logits: torch.Tensor,
            weight: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adjusted logits of a process's own labeled `[B, K]` and strong images `[U, K]`.

        The weak logits and the weights are those of the joined batch, and move the frequencies first.
        """
        self.see(weak_logits, weight)
        return self.adjust_labeled(logits), strong_logits + self.offset(self.pseudo, strong_logits.shape[1])


def adjust(
        adjustment: LogitAdjustment | None,
        logits: torch.Tensor,
        strong_logits: torch.Tensor,
        weak_logits: torch.Tensor,
        weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What an adjustment makes of the logits whose losses a step takes; without one the logits as they are."""
    return (logits, strong_logits) if adjustment is None else adjustment(logits, strong_logits, weak_logits, weight)


def build_adjustment(args: argparse.Namespace, trained: torch.Tensor, num_classes: int) -> LogitAdjustment | None:
    """The logit adjustment, or None if it is off; tells the frequencies of the labels `[L]` that are trained."""
    if not args.logit_adjustment:
        return None
    counts = torch.bincount(trained, minlength=num_classes)[:num_classes]
    adjustment = LogitAdjustment(args.logit_adjustment, counts, running_momentum(args))
    told = '' if args.algorithm == 'supervised' else f'; running ones of pseudo-labels, momentum {args.stat_momentum:g}'
    _logger.info(f'--logit-adjustment {args.logit_adjustment:g} by class frequencies: of labels '
                 f'{adjustment.labeled.min():.3g} to {adjustment.labeled.max():.3g}{told}'
                 + ('; the mixup loss is not adjusted' if args.calibratemix else ''))
    return adjustment
