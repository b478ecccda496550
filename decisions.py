"""When to trust a prediction: confidence thresholds for an accuracy that is asked for, and conformal prediction sets.

validate.py finds both on images with labels that the model was not trained on, and keeps them in the config.json of the
weights, in the block calibration beside the temperature. predict.py decides by them. All probabilities here are those
of `softmax(logits / temperature)`.
"""
from collections import OrderedDict

import numpy as np
import torch

from metrics import wilson_interval

LEVELS = (0.8, 0.9, 0.95, 0.98, 0.99)  # the accuracies and coverages that validate.py keeps unless told otherwise
# RAPS: what each class behind the first RAPS_FREE adds to the score. Those of Angelopoulos et al. for ImageNet.
RAPS_PENALTY, RAPS_FREE = 0.01, 5
SET_SCORES = ('raps', 'aps')


def scaled_probs(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """softmax(logits / temperature), [N, K] float32."""
    return (logits.float() / temperature).softmax(1)


# --- Selective prediction ---------------------------------------------------------------------------------------------

def _reached(right: np.ndarray, kept: np.ndarray, target: float) -> np.ndarray:
    """Whether `kept` images of which `right` are right, and one more that is wrong, are right at the target's rate.

    The image more stands for the next one, of which nothing is known, as in conformal risk control (Angelopoulos et al.
    2022, arXiv 2208.02814). It keeps three lucky images from vouching for 99 %.
    """
    return right >= target * (kept + 1) - 1e-9


def threshold_for_accuracy(confidence: torch.Tensor, correct: torch.Tensor, target: float) -> float | None:
    """The lowest confidence t such that images of a confidence of t or more are right at a given rate.

    Of the n images of confidence t or more, r are right, and t is the lowest one with r / (n + 1) >= target. Images of
    equal confidence are kept or left out together.

    That is an estimate, not a bound. Simulated with calibrated logits of 5 classes and 100 to 1,000 images, new images
    were on average right at no less than the target's rate less 0.02, where most draws found a threshold. Where few
    did, these were lucky: of a network of 53 % accuracy, 300 images vouched for 0.9 in 137 of 300 draws, and 0.86 of
    new ones were right. The interval of the accuracy in `measure_threshold` shows how much is known.

    Args:
        confidence: Top probabilities [N].
        correct: Whether the prediction is right, [N] bool.
        target: Accuracy, in (0, 1).

    Returns:
        t, one of the confidences; None if there is none.
    """
    order = confidence.argsort(descending=True)
    ranked, right = confidence[order].double().numpy(), correct[order].long().cumsum(0).numpy()
    last = np.append(ranked[1:] != ranked[:-1], True)  # of its ties
    places = np.flatnonzero(last & _reached(right, np.arange(1, len(ranked) + 1), target))
    return float(ranked[places[-1]]) if len(places) else None


def threshold_from_confidence(confidence: torch.Tensor, target: float) -> float | None:
    """The lowest confidence t such that the mean confidence of images of t or more is the target or above.

    The accuracy that is to be expected where confidences are calibrated, without labels.

    Args:
        confidence: Top probabilities [N].
        target: Accuracy, in (0, 1).

    Returns:
        t, one of the confidences; None if there is none.
    """
    ranked = confidence.double().sort(descending=True).values
    mean = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1)
    places = (mean >= target).nonzero().flatten()
    return float(ranked[places[-1]]) if len(places) else None


def _interval(values: list[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975], method='nearest')
    return float(low), float(high)


def measure_threshold(
        confidence: torch.Tensor,
        correct: torch.Tensor,
        target: float,
        rounds: int = 1000,
        seed: int = 0,
) -> dict[str, float] | None:
    """`threshold_for_accuracy`, with what it keeps of the images and how sure it is.

    Args:
        confidence: Top probabilities [N].
        correct: Whether the prediction is right, [N] bool.
        target: Accuracy, in (0, 1).
        rounds: Resamplings; 0 leaves out the intervals of the threshold and of the coverage.
        seed: Of a generator of its own.

    Returns:
        threshold; coverage, the share of the images that it keeps; accuracy of these; for each its 95 % interval as
        _low and _high. Those of threshold and coverage are from choosing the threshold again on resampled images (a
        resample without one counts as threshold 1, coverage 0), that of the accuracy is Wilson's. None if no threshold
        reaches the target.
    """
    value = threshold_for_accuracy(confidence, correct, target)
    if value is None:
        return None
    kept = confidence.double() >= value
    right, number = int(correct[kept].sum()), int(kept.sum())
    found = OrderedDict(threshold=value, coverage=number / len(confidence), accuracy=right / number)
    found['accuracy_low'], found['accuracy_high'] = wilson_interval(right, number)
    if rounds:
        ranked, order = confidence.double().sort(descending=True)
        ranked, hits = ranked.numpy(), correct[order].numpy()
        last = np.append(ranked[1:] != ranked[:-1], True)
        generator = np.random.default_rng(seed)
        thresholds, coverages = [], []
        for _ in range(rounds):
            weight = np.bincount(generator.integers(len(ranked), size=len(ranked)), minlength=len(ranked))
            taken = weight.cumsum()
            places = np.flatnonzero(last & (taken > 0) & _reached((weight * hits).cumsum(), taken, target))
            thresholds.append(ranked[places[-1]] if len(places) else 1.)
            coverages.append(taken[places[-1]] / len(ranked) if len(places) else 0.)
        found['threshold_low'], found['threshold_high'] = _interval(thresholds)
        found['coverage_low'], found['coverage_high'] = _interval(coverages)
    return found


# --- Prediction sets --------------------------------------------------------------------------------------------------

def class_scores(probs: torch.Tensor, kind: str = 'raps') -> tuple[torch.Tensor, torch.Tensor]:
    """The classes of each row from the most to the least probable, and what each would add a set up to.

    APS (Romano et al. 2020, arXiv 2006.02544): the probability of all classes before it, `sum_{j before y} p_j`. RAPS
    (Angelopoulos et al. 2021, arXiv 2009.14193) adds `penalty * max(0, rank - free)`, which keeps sets small where
    there are many classes. The first class has 0, so no set is empty; no random number is drawn, so a picture always
    has the same set.

    Args:
        probs: [N, K].
        kind: One of SET_SCORES.

    Returns:
        classes [N, K] int64 and scores [N, K] float64, which do not fall along a row.
    """
    ranked, order = probs.double().sort(dim=1, descending=True, stable=True)
    scores = ranked.cumsum(1) - ranked
    if kind == 'raps':
        rank = torch.arange(1, probs.shape[1] + 1, dtype=torch.float64, device=probs.device)
        scores = scores + RAPS_PENALTY * (rank - RAPS_FREE).clamp(min=0)
    return order, scores.clamp(min=0).cummax(1).values


def conformal_quantile(probs: torch.Tensor, target: torch.Tensor, coverage: float, kind: str = 'raps') -> float | None:
    """The score up to which classes belong to a set, so that it holds the right one with a given probability.

    Split conformal prediction: of the scores of the N right classes, the ceil((N + 1) * coverage)-th smallest. Sets
    then hold the right class of a new image at least at this rate, on average over draws of the images, whatever the
    model, if new images and these are alike.

    Args:
        probs: [N, K].
        target: Right classes [N] int64.
        coverage: In (0, 1).
        kind: One of SET_SCORES.

    Returns:
        The quantile; None if there are too few images, and every class has to be in.
    """
    order, scores = class_scores(probs, kind)
    own = scores.gather(1, (order == target[:, None]).long().argmax(1, keepdim=True)).flatten().sort().values
    place = int(np.ceil((len(own) + 1) * coverage - 1e-9))
    return float(own[place - 1]) if place <= len(own) else None


def set_sizes(scores: torch.Tensor, quantile: float | None) -> torch.Tensor:
    """How many classes, from the most probable on, belong to each row's set: [N] int64, at least 1.

    Args:
        scores: [N, K] of `class_scores`.
        quantile: Of `conformal_quantile`, or without labels the coverage itself: the classes that together have it.
    """
    if quantile is None:
        return torch.full((len(scores),), scores.shape[1], device=scores.device)
    # A score that is summed on another device may differ in its last digits from the one it was calibrated on.
    return (scores <= quantile + 1e-6).sum(1).clamp(min=1)


# --- What is kept -----------------------------------------------------------------------------------------------------

def measure_decisions(
        logits: torch.Tensor,
        target: torch.Tensor,
        temperature: float,
        accuracies: tuple[float, ...] = LEVELS,
        coverages: tuple[float, ...] = LEVELS,
        rounds: int = 1000,
        seed: int = 0,
) -> dict[str, dict]:
    """Thresholds and quantiles, as they are kept beside the temperature.

    Args:
        logits: Of calibration images, [N, K] float32.
        target: Their labels [N] int64.
        temperature: By which the logits are divided.
        accuracies: Targets of the thresholds.
        coverages: Of the prediction sets.
        rounds: As of `measure_threshold`.
        seed: As of `measure_threshold`.

    Returns:
        thresholds: by target accuracy as text the dict of `measure_threshold`, or None; sets: by kind, by coverage as
        text, the quantile and the mean size on these images.
    """
    probs = scaled_probs(logits, temperature)
    confidence, correct = probs.amax(1), logits.argmax(1) == target
    thresholds = {f'{level:g}': measure_threshold(confidence, correct, level, rounds, seed) for level in accuracies}
    sets = {}
    for kind in SET_SCORES:
        scores, sets[kind] = class_scores(probs, kind)[1], {}
        for level in coverages:
            quantile = conformal_quantile(probs, target, level, kind)
            size = float(set_sizes(scores, quantile).double().mean())
            sets[kind][f'{level:g}'] = dict(quantile=quantile, mean_size=size)
    return dict(thresholds=thresholds, sets=sets)


def kept_level(kept: dict[str, dict | None] | None, asked: float) -> str | None:
    """The lowest level that was kept and is not below the one asked for; None if there is none.

    Raises:
        ValueError: If what was kept is no such dict.
    """
    try:
        return min((level for level in kept or {} if float(level) >= asked - 1e-9), key=float, default=None)
    except (TypeError, ValueError) as error:
        raise ValueError(f'levels {kept!r} are not numbers') from error
