"""Calibration metrics: numbers only. figures.py draws them.

Everything starts from logits, in float32 softmax, or from probabilities that are checked to be such: a function that
takes `probs` never guesses, it raises when rows do not sum to 1. `softmax32` is the way from one to the other.

Plain functions return fractions; `EvalMeter.compute` and `calibration_report` return percent for rates, as timm's
programs do, and raw values for the negative log-likelihood and the Brier score. Of equal logits the lower class is the
prediction. An empty input raises ValueError.

`EvalMeter` streams and adds up over processes; the other functions take whole arrays. The order of rows never matters.
"""
from collections import OrderedDict
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F

# One unit of a fixed-point sum: confidence is stored in 1/2^32, Brier scores (at most 2) in 1/2^31, and the
# negative log-likelihood as its whole part and a fraction in 1/2^32. Each value is thus at most 2^32, so that
# MAX_COUNT of them fit in an int64. Float32 confidences from 2^-9 up are multiples of 2^-32: they are stored exactly.
CONFIDENCE_UNIT = 2 ** 32
BRIER_UNIT = 2 ** 31
MAX_COUNT = 2 ** 31 - 1
MAX_NLL = 2 ** 31


# ---------------------------------------------------------------------------------------------------------------------
# Logits, probabilities, bins


def _require_rows(values: torch.Tensor, name: str) -> None:
    if len(values) == 0:
        raise ValueError(f'{name} is empty: there is nothing to measure')


def _check_target(target: torch.Tensor, num_rows: int, num_classes: int, first_row: int = 0) -> torch.Tensor:
    """The target as int64 [N] in main memory; an error names row `first_row + n`."""
    target = torch.as_tensor(target).detach().cpu()
    if target.ndim != 1 or len(target) != num_rows:
        raise ValueError(f'target has shape {list(target.shape)}; expected [{num_rows}], one class per row')
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f'target has dtype {target.dtype}; expected integer class indices')
    target = target.long()
    wrong = ((target < 0) | (target >= num_classes)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f'target of row {first_row + row} is {int(target[row])}; expected 0 to {num_classes - 1}')
    return target


def _check_logits(logits: torch.Tensor, first_row: int = 0, allow_empty: bool = False) -> torch.Tensor:
    """The logits as finite float32 [N, K] in main memory; an error names row `first_row + n`."""
    logits = torch.as_tensor(logits).detach().cpu().float().contiguous()
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f'logits have shape {list(logits.shape)}; expected [rows, classes]')
    if not allow_empty:
        _require_rows(logits, 'logits')
    finite = logits.isfinite().all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f'logits of row {first_row + row} are not finite in float32 (NaN or inf)')
    return logits


def _check_probs(probs: torch.Tensor) -> torch.Tensor:
    """The probabilities [N, K] in main memory; float16 and bfloat16 become float32."""
    probs = torch.as_tensor(probs).detach().cpu()
    if probs.ndim != 2 or probs.shape[1] == 0:
        raise ValueError(f'probs have shape {list(probs.shape)}; expected [rows, classes]')
    _require_rows(probs, 'probs')
    probs = probs if probs.dtype == torch.float64 else probs.float()
    total = probs.double().sum(dim=1)
    # NaN fails both comparisons.
    good = (probs >= 0).all(dim=1) & ((total - 1).abs() <= 1e-3)
    if not good.all():
        row = int((~good).nonzero()[0])
        raise ValueError(
            f'row {row} of probs is no distribution (smallest {float(probs[row].min()):.4g}, '
            f'sum {float(total[row]):.4g}); pass softmax32(logits) if these are logits'
        )
    return probs


def softmax32(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities [N, K], float32, of logits [N, K] in any floating precision.

    Raises:
        ValueError: A row holds NaN or inf; the message names it.
    """
    return F.softmax(_check_logits(logits), dim=1)


def bin_edges(n_bins: int) -> torch.Tensor:
    """The edges [n_bins + 1] of equal-width bins: the float32 values nearest to k / n_bins."""
    if n_bins < 1:
        raise ValueError(f'n_bins is {n_bins}; expected at least 1')
    return (torch.arange(n_bins + 1, dtype=torch.float64) / n_bins).float()


def _equal_width_index(confidence: torch.Tensor, n_bins: int, closed: str) -> torch.Tensor:
    if closed not in ('right', 'left'):
        raise ValueError(f"closed is {closed!r}; expected 'right' or 'left'")
    # Float32 comparisons against float32 edges: 0.3 lies on the edge 3/10 in either precision, and so does
    # the float64 product 3 * 0.1, which is not the float64 nearest to 3/10.
    inner = bin_edges(n_bins)[1:-1]
    return torch.bucketize(confidence.float().contiguous(), inner.contiguous(), right=closed == 'left')


def _bin_sums(confidence: torch.Tensor, correct: torch.Tensor, index: torch.Tensor, n_bins: int) -> torch.Tensor:
    """Per bin the count, the number right and the sum of confidence in CONFIDENCE_UNIT: [3, n_bins] int64.

    Integers, so that neither the order of the rows nor their distribution over batches and processes matters.
    """
    fixed_point = (confidence.double() * CONFIDENCE_UNIT).round().long()
    values = torch.stack([torch.ones_like(index), correct.long(), fixed_point])
    return torch.zeros(3, n_bins, dtype=torch.int64).index_add_(1, index, values)


class ReliabilityBins(NamedTuple):
    """What a reliability diagram shows. Empty bins have count, accuracy and confidence 0.

    Attributes:
        count: Samples per bin, [n] int64.
        accuracy: Share of right predictions per bin, [n] float64.
        confidence: Mean confidence per bin, [n] float64.
        edges: [n + 1], ascending.
    """
    count: torch.Tensor
    accuracy: torch.Tensor
    confidence: torch.Tensor
    edges: torch.Tensor

    @property
    def gap(self) -> torch.Tensor:
        """Confidence minus accuracy per bin, [n] float64: positive where the model is overconfident."""
        return self.confidence - self.accuracy

    @property
    def weight(self) -> torch.Tensor:
        """Share of all samples per bin, [n] float64."""
        return self.count.double() / self.count.sum()

    @property
    def ece(self) -> float:
        """Expected calibration error, `sum_b n_b/N |acc_b - conf_b|` (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
        return float((self.weight * self.gap.abs()).sum())

    @property
    def mce(self) -> float:
        """Maximum calibration error: the largest gap of a bin that holds samples (Guo et al. 2017, eq. 5)."""
        return float(self.gap.abs().max())

    @property
    def rms(self) -> float:
        """RMS calibration error, `sqrt(sum_b n_b/N (acc_b - conf_b)^2)` (Hendrycks et al. 2019, arXiv 1812.04606)."""
        return float((self.weight * self.gap ** 2).sum().sqrt())

    @property
    def debiased_rms(self) -> float:
        """RMS calibration error less what chance alone adds (Kumar et al. 2019, arXiv 1909.10155, section 4).

        From each bin's squared gap the variance of its accuracy is subtracted, `acc_b (1 - acc_b) / (n_b - 1)`. A bin
        of one sample has no variance estimate and counts 0, as in the authors' code. A negative total becomes 0.
        """
        noise = self.accuracy * (1 - self.accuracy) / (self.count - 1).clamp(min=1)
        squared = torch.where(self.count > 1, self.gap ** 2 - noise, 0.0)
        return float((self.weight * squared).sum().clamp(min=0).sqrt())


def _bins_from_sums(sums: torch.Tensor, edges: torch.Tensor) -> ReliabilityBins:
    count, correct, confidence = sums
    per_row = count.clamp(min=1).double()
    return ReliabilityBins(count, correct / per_row, confidence.double() / CONFIDENCE_UNIT / per_row, edges)


def check_pairs(confidence: torch.Tensor, correct: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidences [N] in [0, 1] and right or wrong [N] bool, in main memory, sorted by both."""
    confidence = torch.as_tensor(confidence).detach().cpu()
    correct = torch.as_tensor(correct).detach().cpu()
    if confidence.ndim != 1 or confidence.shape != correct.shape:
        raise ValueError(
            f'confidence has shape {list(confidence.shape)} and correct {list(correct.shape)}; expected [N] for both'
        )
    _require_rows(confidence, 'confidence')
    inside = (confidence >= 0) & (confidence <= 1)
    if not inside.all():
        row = int((~inside).nonzero()[0])
        raise ValueError(f'confidence of row {row} is {float(confidence[row])}; expected 0 to 1')
    binary = (correct == 0) | (correct == 1)
    if not binary.all():
        row = int((~binary).nonzero()[0])
        raise ValueError(f'correct of row {row} is {correct[row].item()}; expected 0 or 1')
    confidence = confidence if confidence.dtype == torch.float64 else confidence.float()
    order = correct.long().argsort(stable=True)
    order = order[confidence[order].argsort(stable=True)]
    return confidence[order], correct[order].bool()


def reliability_bins(
        confidence: torch.Tensor,
        correct: torch.Tensor,
        n_bins: int = 15,
        closed: str = 'right',
) -> ReliabilityBins:
    """Equal-width bins of the top confidence.

    An edge is the float32 value nearest to k / n_bins, and confidences are compared as float32, so that a confidence of
    0.3 or 3 * 0.1 lies on the edge 3/10 in any precision.

    Args:
        confidence: Top probabilities [N], in [0, 1].
        correct: Whether the prediction is right, [N], bool or 0/1.
        n_bins: Number of bins.
        closed: 'right' for bins (lo, hi] with 0 in the first; 'left' for [lo, hi) with 1 in the last (what the
            evaluation of the CalibrateMix authors does, with 10 bins).

    Raises:
        ValueError: Empty input, unequal lengths, or a confidence outside [0, 1]; the message names the row.
    """
    edges = bin_edges(n_bins)
    confidence, correct = check_pairs(confidence, correct)
    return _bins_from_sums(
        _bin_sums(confidence, correct, _equal_width_index(confidence, n_bins, closed), n_bins),
        edges,
    )


def equal_mass_bins(confidence: torch.Tensor, correct: torch.Tensor, n_bins: int = 15) -> ReliabilityBins:
    """Bins of the top confidence that hold equally many samples (Nguyen and O'Connor 2015, arXiv 1508.05154).

    Bins are right-closed; the upper edge of bin j = 1..n is the sorted confidence number `ceil(j N / n)`. Without
    ties, counts differ by at most 1. Equal confidences always share a bin, so ties (or fewer rows than bins) leave
    some bins empty. The lowest edge is the smallest confidence. Arguments and errors as in `reliability_bins`.
    """
    if n_bins < 1:
        raise ValueError(f'n_bins is {n_bins}; expected at least 1')
    confidence, correct = check_pairs(confidence, correct)
    last = -(-torch.arange(n_bins + 1) * len(confidence) // n_bins) - 1
    edges = confidence[last.clamp(min=0)]
    index = torch.bucketize(confidence, edges[1:-1].contiguous())
    return _bins_from_sums(_bin_sums(confidence, correct, index, n_bins), edges)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics of whole arrays


def _rank_of_target(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """How many classes come before the target, [N]; of equal logits the lower class comes first, as in argmax."""
    own = logits.gather(1, target[:, None])
    lower_class = torch.arange(logits.shape[1]) < target[:, None]
    return ((logits > own) | ((logits == own) & lower_class)).sum(dim=1)


def _nll_rows(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, target, reduction='none').clamp(min=0, max=MAX_NLL)


def _brier_rows(probs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Brier scores in BRIER_UNIT, [N] int64. Summed as integers: the order of a float sum depends on the shape."""
    square = (probs - F.one_hot(target, probs.shape[1])) ** 2
    return ((square * 2 ** 50).round().long().sum(dim=1) + 2 ** 18) >> 19


def accuracy(logits: torch.Tensor, target: torch.Tensor, k: int = 1) -> float:
    """Share of rows whose target is among the k largest logits (of equal logits the lower class counts as larger).

    Args:
        logits: [N, K], any floating precision.
        target: Class indices [N].
        k: How many guesses are allowed; more than K means K.
    """
    logits = _check_logits(logits)
    target = _check_target(target, *logits.shape)
    return float((_rank_of_target(logits, target) < k).double().mean())


def nll(logits: torch.Tensor, target: torch.Tensor) -> float:
    """Mean negative log-likelihood (cross-entropy, natural logarithm) of logits [N, K] and target [N]."""
    logits = _check_logits(logits)
    return float(_nll_rows(logits, _check_target(target, *logits.shape)).double().mean())


def brier(logits: torch.Tensor, target: torch.Tensor) -> float:
    """Mean Brier score `sum_k (p_k - [k = target])^2` of logits [N, K] and target [N]: 0 best, 2 worst (Brier 1950)."""
    probs = softmax32(logits)
    rows = _brier_rows(probs, _check_target(target, *probs.shape))
    return int(rows.sum()) / (BRIER_UNIT * len(rows))


def expected_calibration_error(
        probs: torch.Tensor,
        target: torch.Tensor,
        n_bins: int = 15,
        closed: str = 'right',
) -> float:
    """ECE of probabilities [N, K] and class indices [N]; a fraction. See `reliability_bins` for the bins.

    Raises:
        ValueError: Empty input, or a row of `probs` that does not sum to 1 (within 1e-3), as logits seldom do.
    """
    probs = _check_probs(probs)
    target = _check_target(target, *probs.shape)
    confidence = probs.amax(dim=1).clamp(max=1)
    return reliability_bins(confidence, probs.argmax(dim=1) == target, n_bins, closed).ece


class EvalMeter:
    """Evaluation metrics as a stream of batches, whose state adds up exactly over batches and processes.

    The state is int64 throughout (counts and fixed-point sums), so two halves added together give the very same digits
    as the whole, in any order. It holds up to 2^31 - 1 samples. Batches are measured in main memory, in float32, so
    the digits do not depend on the device either. A sample's negative log-likelihood counts as at most 2^31.

    Args:
        num_classes: K; the logits must have that many columns.
        device: Where `sync` puts the state tensors for the collective (NCCL wants the GPU).
    """

    def __init__(self, num_classes: int, device: str = 'cpu'):
        self.num_classes = num_classes
        self.device = torch.device(device)
        # Count, right, right in five, Brier score, whole and fractional part of the negative log-likelihood.
        self.totals = torch.zeros(6, dtype=torch.int64)
        self.class_bins = torch.zeros(3, 15 * num_classes, dtype=torch.int64)  # 15 for each class that is predicted
        self.class_images = torch.zeros(num_classes, dtype=torch.int64)
        self.bins_10 = torch.zeros(3, 10, dtype=torch.int64)

    @property
    def bins_15(self) -> torch.Tensor:
        return self.class_bins.view(3, -1, 15).sum(dim=1)

    def update(self, logits: torch.Tensor, target: torch.Tensor) -> None:
        """Adds a batch.

        Args:
            logits: [B, K], any floating precision, any device. B may be 0.
            target: Class indices [B].

        Raises:
            ValueError: NaN or inf in a row (named by its position among all that this meter has seen), a target
                that is no class, or a wrong shape. The batch is then not counted.
        """
        seen = int(self.totals[0])
        logits = _check_logits(logits, seen, allow_empty=True)
        if logits.shape[1] != self.num_classes:
            raise ValueError(f'logits have {logits.shape[1]} classes; this meter was made for {self.num_classes}')
        target = _check_target(target, *logits.shape, seen)
        probs = F.softmax(logits, dim=1)
        confidence = probs.amax(dim=1)
        rank = _rank_of_target(logits, target)
        losses = _nll_rows(logits, target).double()
        self.totals += torch.stack([
            torch.tensor(len(target)),
            (rank < 1).sum(),
            (rank < 5).sum(),
            _brier_rows(probs, target).sum(),
            losses.floor().long().sum(),
            (losses.frac() * CONFIDENCE_UNIT).round().long().sum(),
        ])
        index = logits.argmax(dim=1) * 15 + _equal_width_index(confidence, 15, 'right')
        self.class_bins += _bin_sums(confidence, rank < 1, index, 15 * self.num_classes)
        self.class_images += torch.bincount(target, minlength=self.num_classes)
        self.bins_10 += _bin_sums(confidence, rank < 1, _equal_width_index(confidence, 10, 'left'), 10)

    def sync(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces the state by its sum over processes; call it once, after the last batch.

        Args:
            reduce: Returns the sum of an int64 tensor over all processes. Called four times, always in this order.
        """
        for name in ('totals', 'class_bins', 'class_images', 'bins_10'):
            setattr(self, name, reduce(getattr(self, name).to(self.device)).cpu())

    def _require_samples(self) -> None:
        count = int(self.totals[0])
        if count == 0:
            raise ValueError('no sample was evaluated: EvalMeter needs at least one update with rows')
        if count > MAX_COUNT:
            raise ValueError(f'{count} samples were evaluated; the sums are exact up to {MAX_COUNT}')

    def bins(self, n_bins: int = 15) -> ReliabilityBins:
        """The bins of a reliability diagram: 15 right-closed (default) or 10 left-closed ones."""
        if n_bins not in (10, 15):
            raise ValueError(f'n_bins is {n_bins}; expected 15 or 10, which is what the meter keeps')
        self._require_samples()
        return _bins_from_sums(self.bins_15 if n_bins == 15 else self.bins_10, bin_edges(n_bins))

    def bin_lists(self) -> dict[str, list]:
        """The 15 bins by the names of `ReliabilityBins`, as a file holds them."""
        return {key: value.tolist() for key, value in self.bins()._asdict().items()}

    def classes(self) -> 'ClassReport':
        """Figures by class of all samples so far."""
        self._require_samples()
        count, right, conf = self.class_bins.view(3, -1, 15)
        images, predicted, hits = self.class_images, count.sum(dim=1), right.sum(dim=1).double()
        gap = (conf - right * CONFIDENCE_UNIT).abs().sum(dim=1).double() / CONFIDENCE_UNIT
        return ClassReport(
            images=images,
            predicted=predicted,
            recall=hits / images,
            precision=hits / predicted,
            f1=2 * hits / (images + predicted),
            confidence=conf.sum(dim=1).double() / CONFIDENCE_UNIT / predicted,
            ece=gap / predicted,
        )

    def compute(self) -> 'OrderedDict[str, float]':
        """The metrics of all samples so far.

        Returns:
            count; loss and nll (the same number: timm's name and the field's); top1, error, top5 in percent (five or,
            with fewer classes, all); brier (0 to 2); ece (15 right-closed bins), ece_10 (10 left-closed bins), mce (15
            bins), mean confidence, and the parts of ece from overconfident and from underconfident bins, which add up
            to it, all in percent; so too balanced_accuracy, macro_f1 and ece_balanced, those of `ClassReport`.

        Raises:
            ValueError: No sample was seen, or more than 2^31 - 1.
        """
        self._require_samples()
        count, correct, correct_5, brier_sum, nll_whole, nll_part = self.totals.tolist()
        # Python integers from here on: each metric is rounded once, in its division.
        unit = CONFIDENCE_UNIT * count
        gaps = [conf - right * CONFIDENCE_UNIT for _, right, conf in self.bins_15.T.tolist()]
        gaps_10 = [conf - right * CONFIDENCE_UNIT for _, right, conf in self.bins_10.T.tolist()]
        over = sum(gap for gap in gaps if gap > 0)
        under = -sum(gap for gap in gaps if gap < 0)
        largest = max(abs(gap) / n for gap, n in zip(gaps, self.bins_15[0].tolist()) if n)
        loss = (nll_whole * CONFIDENCE_UNIT + nll_part) / unit
        classes = self.classes()
        return OrderedDict(
            count=count,
            loss=loss,
            nll=loss,
            top1=100 * correct / count,
            error=100 * (count - correct) / count,
            top5=100 * correct_5 / count,
            brier=brier_sum / (BRIER_UNIT * count),
            ece=100 * (over + under) / unit,
            ece_10=100 * sum(map(abs, gaps_10)) / unit,
            mce=100 * largest / CONFIDENCE_UNIT,
            confidence=100 * sum(self.bins_15[2].tolist()) / unit,
            overconfidence=100 * over / unit,
            underconfidence=100 * under / unit,
            balanced_accuracy=100 * classes.balanced_accuracy,
            macro_f1=100 * classes.macro_f1,
            ece_balanced=100 * classes.balanced_ece,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Calibration beyond one binning, and its uncertainty


def confidence_and_correct(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Top probabilities [N] float32 and whether the prediction is right [N] bool, of logits [N, K] and target [N]."""
    logits = _check_logits(logits)
    target = _check_target(target, *logits.shape)
    return F.softmax(logits, dim=1).amax(dim=1), logits.argmax(dim=1) == target


def classwise_errors(probs: torch.Tensor, target: torch.Tensor, n_bins: int = 15) -> torch.Tensor:
    """ECE of each class's probability against its occurrence: probs [N, K], target [N] -> [K] float64.

    The probability of class k, in all N rows, is binned as `reliability_bins` does (right-closed). A class without a
    label is measured like any other: its probabilities should be small.
    """
    probs = _check_probs(probs).clamp(max=1)
    target = _check_target(target, *probs.shape)
    errors = []
    for k, column in enumerate(probs.unbind(dim=1)):
        index = _equal_width_index(column, n_bins, 'right')
        errors.append(_bins_from_sums(_bin_sums(column, target == k, index, n_bins), bin_edges(n_bins)).ece)
    return torch.tensor(errors, dtype=torch.float64)


def classwise_ece(probs: torch.Tensor, target: torch.Tensor, n_bins: int = 15) -> float:
    """Class-wise (static) calibration error: the mean of `classwise_errors` over the K classes.

    Nixon et al. 2019 (arXiv 1904.01685), SCE; Kull et al. 2019 (arXiv 1910.12656), classwise-ECE.
    """
    return float(classwise_errors(probs, target, n_bins).mean())


def smooth_ece(confidence: torch.Tensor, correct: torch.Tensor) -> float:
    """Smooth ECE, free of bins (Blasiok and Nakkiran 2023, arXiv 2309.12236).

    With K_s the Gaussian kernel of standard deviation s, reflected at 0 and 1,

        smECE_s = integral over t in [0, 1] of | 1/N sum_i K_s(t, conf_i) (correct_i - conf_i) |

    falls as s grows, and the smooth ECE is where it equals s. The reflected kernel is diagonal in the cosine basis,
    with eigenvalue exp(-(pi m s)^2 / 2) at frequency m, so one Fourier transform serves every s. Residuals are shared
    linearly between the two nearest of 4096 cells, which limits the resolution to about 1e-4.

    Args:
        confidence: Top probabilities [N], in [0, 1].
        correct: Whether the prediction is right, [N], bool or 0/1.
    """
    cells = 4096
    confidence, correct = check_pairs(confidence, correct)
    confidence = confidence.double()
    residual = (correct.double() - confidence) / len(confidence)
    place = (confidence * cells - 0.5).clamp(0, cells - 1)
    low = place.floor().long().clamp(max=cells - 2)
    upper_share = place - low
    density = (
        torch.bincount(low, residual * (1 - upper_share), minlength=cells)
        + torch.bincount(low + 1, residual * upper_share, minlength=cells)
    )
    spectrum = torch.fft.rfft(torch.cat([density, density.flip(0)]))
    frequency = torch.pi * torch.arange(cells + 1, dtype=torch.float64)

    lo, hi = 0.0, 1.0
    for _ in range(40):
        sigma = (lo + hi) / 2
        smoothed = torch.fft.irfft(spectrum * torch.exp(-(frequency * sigma) ** 2 / 2), n=2 * cells)[:cells]
        if float(smoothed.abs().sum()) > sigma:
            lo = sigma
        else:
            hi = sigma
    return hi


def brier_decomposition(probs: torch.Tensor, target: torch.Tensor, n_bins: int = 15) -> 'OrderedDict[str, float]':
    """The Brier score in three parts: `brier = reliability - resolution + uncertainty`.

    The score is the sum over classes of binary scores of p_k against [target = k]. Each is split over right-closed
    equal-width bins of p_k (Murphy 1973), with frequency o_b and mean probability f_b in bin b and o overall:

        reliability  sum_b n_b/N (f_b - o_b)^2, the calibration part: 0 is best
        uncertainty  o (1 - o), a property of the labels alone
        resolution   sum_b n_b/N (o_b - o)^2 - var + 2 cov, how far the probabilities tell samples apart

    where var and cov are the mean variance of p_k, and its covariance with the occurrence, within bins. With these two
    (Stephenson, Coelho and Jolliffe 2008: generalised resolution) the parts add up to the score of the very
    probabilities given; without them they would add up to the score of probabilities rounded to their bin's mean.

    Args:
        probs: [N, K], rows that sum to 1.
        target: Class indices [N].
        n_bins: Bins per class.

    Returns:
        brier, reliability, resolution, uncertainty, raw.
    """
    probs = _check_probs(probs).clamp(max=1)
    target = _check_target(target, *probs.shape)
    parts = torch.zeros(4, dtype=torch.float64)
    for k, column in enumerate(probs.unbind(dim=1)):
        index = _equal_width_index(column, n_bins, 'right')
        p, y = column.double(), (target == k).double()
        rows = torch.stack([torch.ones_like(p), p, y, p * p, p * y])
        count, p_sum, y_sum, pp_sum, py_sum = torch.zeros(5, n_bins, dtype=torch.float64).index_add_(1, index, rows)
        share = count / len(p)
        count = count.clamp(min=1)
        p_mean, y_mean, base = p_sum / count, y_sum / count, y.mean()
        variance = pp_sum / count - p_mean ** 2
        covariance = py_sum / count - p_mean * y_mean
        parts += torch.stack([
            ((p - y) ** 2).mean(),
            (share * (p_mean - y_mean) ** 2).sum(),
            (share * ((y_mean - base) ** 2 - variance + 2 * covariance)).sum(),
            base * (1 - base),
        ])
    return OrderedDict(zip(('brier', 'reliability', 'resolution', 'uncertainty'), parts.tolist()))


def wilson_interval(hits: int, number: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a rate from `hits` of `number` (Wilson 1927), which is not of width 0 where it is 0 or 1."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    rate, spread = hits / number, z * z / number
    centre = rate + spread / 2
    half = (spread * (rate * (1 - rate) + spread / 4)) ** 0.5
    return max(0., (centre - half) / (1 + spread)), min(1., (centre + half) / (1 + spread))


def bootstrap_intervals(
        confidence: torch.Tensor,
        correct: torch.Tensor,
        rounds: int = 1000,
        level: float = 0.95,
        seed: int = 0,
) -> 'OrderedDict[str, tuple[float, float]]':
    """Intervals for the error and for ECE (15 right-closed bins) over test sets of this size.

    The error gets Wilson's interval. For ECE samples are drawn with replacement. A resampled ECE is too large by about
    as much as ECE itself is, since chance adds to every |gap|: percentiles would count that twice (in our simulations
    of slightly miscalibrated models they missed the true value in most runs). So ECE gets the basic interval
    [2 ECE - upper quantile, 2 ECE - lower quantile], cut at 0 and widened where needed to hold ECE; it held the truth
    in 85 to 94 % of runs at 500 to 10,000 samples, and in half of them where the true ECE was exactly 0.

    Args:
        confidence: Top probabilities [N], in [0, 1].
        correct: Whether the prediction is right, [N], bool or 0/1.
        rounds: Resamplings.
        level: Coverage aimed at, between 0 and 1.
        seed: Of a generator of its own; the global random state is left alone.

    Returns:
        error and ece, each (low, high), fractions.
    """
    if rounds < 1:
        raise ValueError(f'rounds is {rounds}; expected at least 1')
    if not 0 < level < 1:
        raise ValueError(f'level is {level}; expected between 0 and 1')
    confidence, correct = check_pairs(confidence, correct)
    n = len(confidence)
    index = _equal_width_index(confidence, 15, 'right')
    gap = confidence.double() - correct.double()
    generator = torch.Generator().manual_seed(seed)

    def ece_of(rows):
        return torch.bincount(index[rows], gap[rows], minlength=15).abs().sum() / n

    ece = float(ece_of(torch.arange(n)))
    resampled = torch.stack([ece_of(torch.randint(n, (n,), generator=generator)) for _ in range(rounds)])
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = resampled.quantile(tails).tolist()
    return OrderedDict(
        error=wilson_interval(int((~correct).sum()), n, level),
        ece=(max(0.0, min(ece, 2 * ece - high)), max(ece, 2 * ece - low)),
    )


def ece_difference_interval(
        first: tuple[torch.Tensor, torch.Tensor],
        other: tuple[torch.Tensor, torch.Tensor],
        rounds: int,
        seed: int,
) -> tuple[float, float]:
    """95 % interval of the ECE (15 right-closed bins) of one model less that of another on the same images.

    Both are resampled together, so that what the images have in common cancels. The interval is the basic one, as that
    of ECE in `bootstrap_intervals`, for the same reason.

    Args:
        first: Confidence [N] and correct [N] of the model that is subtracted.
        other: Of the other model, in the same order.
        rounds: Resamplings, at least 1.
        seed: Of a generator of its own.

    Returns:
        low, high; fractions.
    """
    inner = bin_edges(15)[1:-1].contiguous()
    sides = [(torch.bucketize(conf, inner), conf.double() - correct.double()) for conf, correct in (first, other)]
    n = len(first[0])

    def difference(rows):
        a, b = (torch.bincount(index[rows], gap[rows], minlength=15).abs().sum() / n for index, gap in sides)
        return b - a

    generator = torch.Generator().manual_seed(seed)
    value = float(difference(torch.arange(n)))
    drawn = torch.stack([difference(torch.randint(n, (n,), generator=generator)) for _ in range(rounds)])
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return min(value, 2 * value - high), max(value, 2 * value - low)


# ---------------------------------------------------------------------------------------------------------------------
# Classes


def confusion_matrix(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Numbers of images of each class (row) that are put into each class (column): logits [N, K] -> [K, K] int64."""
    logits = _check_logits(logits)
    target = _check_target(target, *logits.shape)
    num_classes = logits.shape[1]
    return torch.bincount(target * num_classes + logits.argmax(dim=1), minlength=num_classes ** 2).view(-1, num_classes)


class ClassReport(NamedTuple):
    """Each class's share in the result, all [K]. A share of nothing is NaN.

    Confidence and ECE are those of the images that were put into the class, as precision is: it is the number that the
    confidence claims. Of the images that are of the class no calibrated model claims its recall.

    Attributes:
        images: How many are of the class, int64.
        predicted: How many are put into it, int64.
        recall: Share of its images that are put into it, float64.
        precision: Share of the images put into it that are of it, float64.
        f1: Harmonic mean of both, float64; 0 if none is right, NaN if the class occurs in neither way.
        confidence: Mean top probability of the images put into it, float64.
        ece: Their ECE (15 right-closed bins), float64.
    """
    images: torch.Tensor
    predicted: torch.Tensor
    recall: torch.Tensor
    precision: torch.Tensor
    f1: torch.Tensor
    confidence: torch.Tensor
    ece: torch.Tensor

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that have images."""
        return float(self.recall.nanmean())

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that have images or are predicted."""
        return float(self.f1.nanmean())

    @property
    def balanced_ece(self) -> float:
        """Mean ECE of the classes that are predicted, each as one, however many images are put into it.

        Where a class gets few images chance alone adds to its ECE, and so to this.
        """
        return float(self.ece.nanmean())


def class_report(logits: torch.Tensor, target: torch.Tensor) -> ClassReport:
    """Figures by class, fractions, of logits [N, K] and target [N]."""
    meter = EvalMeter(_check_logits(logits).shape[1])
    meter.update(logits, target)
    return meter.classes()


# ---------------------------------------------------------------------------------------------------------------------
# Ranking: misclassification and out-of-distribution detection


def _ranking_counts(score: torch.Tensor, positive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positives and negatives with at least each distinct score, from the highest down: two [D] float64."""
    score = torch.as_tensor(score).detach().cpu()
    positive = torch.as_tensor(positive).detach().cpu().bool()
    if score.ndim != 1 or score.shape != positive.shape:
        raise ValueError(f'score has shape {list(score.shape)}, positive {list(positive.shape)}; expected [N] for both')
    _require_rows(score, 'score')
    if score.isnan().any():
        raise ValueError(f'score of row {int(score.isnan().nonzero()[0])} is NaN')
    if positive.all() or not positive.any():
        kind = 'positive' if positive.all() else 'negative'
        raise ValueError(f'all {len(positive)} rows are {kind}; both kinds are needed')
    _, group = score.unique(return_inverse=True)
    hits = torch.bincount(group, positive.double()).flip(0).cumsum(0)
    alarms = torch.bincount(group, (~positive).double()).flip(0).cumsum(0)
    return hits, alarms


def auroc(score: torch.Tensor, positive: torch.Tensor) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    Args:
        score: [N], higher = more likely positive.
        positive: [N] bool; both kinds must occur.
    """
    hits, alarms = _ranking_counts(score, positive)
    return float(torch.trapezoid(F.pad(hits / hits[-1], (1, 0)), F.pad(alarms / alarms[-1], (1, 0))))


def average_precision(score: torch.Tensor, positive: torch.Tensor) -> float:
    """Area under the precision-recall curve as `sum (recall step) * precision`, equal scores being one step."""
    hits, alarms = _ranking_counts(score, positive)
    steps = F.pad(hits, (1, 0)).diff() / hits[-1]
    return float((steps * hits / (hits + alarms)).sum())


def fpr_at_tpr(score: torch.Tensor, positive: torch.Tensor, tpr: float = 0.95) -> float:
    """Share of negatives at or above the highest threshold that keeps at least `tpr` of the positives."""
    hits, alarms = _ranking_counts(score, positive)
    first = int((hits / hits[-1] >= tpr).nonzero()[0])
    return float(alarms[first] / alarms[-1])


def risk_coverage(confidence: torch.Tensor, correct: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Error rate among the most confident i samples, for i = 1..N (El-Yaniv and Wiener 2010).

    Samples of equal confidence have no order: each counts as its tie's mean error (the expectation over random orders).

    Args:
        confidence: Top probabilities [N], in [0, 1].
        correct: Whether the prediction is right, [N], bool or 0/1.

    Returns:
        coverage i/N and risk, both [N] float64.
    """
    confidence, correct = check_pairs(confidence, correct)
    _, group = confidence.unique(return_inverse=True)
    tie_error = torch.bincount(group, (~correct).double()) / torch.bincount(group)
    taken = torch.arange(1, len(confidence) + 1, dtype=torch.float64)
    return taken / len(confidence), tie_error[group].flip(0).cumsum(0) / taken


def aurc(confidence: torch.Tensor, correct: torch.Tensor) -> float:
    """Area under the risk-coverage curve: the mean of its N risks (Geifman et al. 2019, arXiv 1805.08206)."""
    return float(risk_coverage(confidence, correct)[1].mean())


def accuracy_at_coverage(confidence: torch.Tensor, correct: torch.Tensor, coverage: float) -> float:
    """Share of right ones among this share (above 0, up to 1) of the samples, rounded up, the most confident ones.

    Arguments and ties as in `risk_coverage`.
    """
    if not 0 < coverage <= 1:
        raise ValueError(f'coverage is {coverage}; expected above 0 and up to 1')
    risk = risk_coverage(confidence, correct)[1]
    left_out = int((1 - coverage) * len(risk) + 1e-6)
    return 1 - float(risk[len(risk) - left_out - 1])


def coverage_at_accuracy(confidence: torch.Tensor, correct: torch.Tensor, accuracy: float) -> float:
    """Largest share of the samples, those of at least some confidence, of which at least this share is right.

    0 if no threshold does it. Samples of equal confidence are kept or left together. The threshold is chosen with the
    labels that are measured, so that this is what the ranking allows, and not what a threshold from elsewhere will do.
    """
    confidence, correct = check_pairs(confidence, correct)
    _, size = confidence.flip(0).unique_consecutive(return_counts=True)
    taken = size.cumsum(0)
    right = correct.flip(0).long().cumsum(0)[taken - 1]
    enough = taken[right.double() / taken >= accuracy]
    return int(enough[-1]) / len(confidence) if len(enough) else 0.


def ood_scores(logits: torch.Tensor, kind: str = 'msp') -> torch.Tensor:
    """Scores [N] float32 of logits [N, K], higher = more like the training data.

    Args:
        logits: Any floating precision; finite.
        kind: 'msp', the maximum softmax probability p (Hendrycks and Gimpel 2017, arXiv 1610.02136), given as
            `log(p / (1 - p))`: the same ranking, but without ties where p is 1 in float32. 'energy', the
            logarithm of the summed exponentials (Liu et al. 2020, arXiv 2010.03759, negative energy at T = 1).
            'margin', the largest logit less the second largest.
    """
    logits = _check_logits(logits)
    if logits.shape[1] < 2:
        raise ValueError('out-of-distribution scores need at least 2 classes; logits have 1')
    if kind == 'msp':
        first, top = logits.max(dim=1)
        return first - logits.scatter(1, top[:, None], -torch.inf).logsumexp(dim=1)
    if kind == 'energy':
        return logits.logsumexp(dim=1)
    if kind == 'margin':
        first, second = logits.topk(2, dim=1).values.unbind(dim=1)
        return first - second
    raise ValueError(f"kind is {kind!r}; expected 'msp', 'energy' or 'margin'")


def ood_metrics(score_in: torch.Tensor, score_out: torch.Tensor) -> 'OrderedDict[str, float]':
    """How well scores tell in-distribution [N] from out-of-distribution samples [M]; fractions.

    Returns:
        auroc; fpr95, the share of out-of-distribution samples accepted when 95 % of the others are; aupr_in and
        aupr_out, the average precision with the one and the other as positive.
    """
    score = torch.cat([torch.as_tensor(score_in).detach().cpu(), torch.as_tensor(score_out).detach().cpu()])
    inside = torch.arange(len(score)) < len(score_in)
    return OrderedDict(
        auroc=auroc(score, inside),
        fpr95=fpr_at_tpr(score, inside),
        aupr_in=average_precision(score, inside),
        aupr_out=average_precision(-score, ~inside),
    )


def calibration_report(
        logits: torch.Tensor,
        target: torch.Tensor,
        bootstrap: int = 0,
        seed: int = 0,
) -> 'OrderedDict[str, float | None]':
    """All metrics of one model on one labeled set.

    Args:
        logits: [N, K], any floating precision.
        target: Class indices [N].
        bootstrap: Resamplings for the intervals of error and ece (95 %); 0 leaves them out.
        seed: Of the resampling.

    Returns:
        What `EvalMeter.compute` returns, then brier_reliability, brier_resolution and brier_uncertainty (raw);
        ece_equal_mass, ece_classwise, ece_smooth, rms and rms_debiased (both over 15 equal-mass bins); auroc,
        aupr_right and aupr_wrong of confidence telling right from wrong predictions, and aurc, in percent. The first
        three of these are None if all predictions are right, or all wrong. Then coverage_at_95 and coverage_at_99
        (percent of accuracy), accuracy_at_80 and accuracy_at_90 (percent of coverage), in percent. With `bootstrap`,
        also error_low, error_high, ece_low and ece_high, in percent.
    """
    probs = softmax32(logits)
    confidence, correct = confidence_and_correct(logits, target)
    meter = EvalMeter(probs.shape[1])
    meter.update(logits, target)
    report = meter.compute()
    parts = brier_decomposition(probs, target)
    report.update((f'brier_{name}', parts[name]) for name in ('reliability', 'resolution', 'uncertainty'))

    equal_mass = equal_mass_bins(confidence, correct)
    ranked = bool(correct.any()) and not bool(correct.all())
    rates = OrderedDict(
        ece_equal_mass=equal_mass.ece,
        ece_classwise=classwise_ece(probs, target),
        ece_smooth=smooth_ece(confidence, correct),
        rms=equal_mass.rms,
        rms_debiased=equal_mass.debiased_rms,
        auroc=auroc(confidence, correct) if ranked else None,
        aupr_right=average_precision(confidence, correct) if ranked else None,
        aupr_wrong=average_precision(-confidence, ~correct) if ranked else None,
        aurc=aurc(confidence, correct),
        **{f'coverage_at_{level}': coverage_at_accuracy(confidence, correct, level / 100) for level in (95, 99)},
        **{f'accuracy_at_{level}': accuracy_at_coverage(confidence, correct, level / 100) for level in (80, 90)},
    )
    if bootstrap:
        for name, (low, high) in bootstrap_intervals(confidence, correct, rounds=bootstrap, seed=seed).items():
            rates[f'{name}_low'], rates[f'{name}_high'] = low, high
    report.update((name, None if value is None else 100 * value) for name, value in rates.items())
    return report
