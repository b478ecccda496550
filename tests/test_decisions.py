"""Thresholds for an accuracy and conformal prediction sets: right values, and what they promise on other images."""
import json
import math

import numpy as np
import pytest
import torch

from decisions import (
    RAPS_FREE,
    RAPS_PENALTY,
    class_scores,
    conformal_quantile,
    kept_level,
    measure_decisions,
    measure_threshold,
    scaled_probs,
    set_sizes,
    threshold_for_accuracy,
    threshold_from_confidence,
)


def calibrated(n, num_classes, seed, sharpness=2.5):
    """Logits of a calibrated model, and labels drawn from its own probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(n, num_classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()


def sure_and_right(n, seed):
    """Confidence between 0.5 and 1, and answers that are right at just that rate."""
    rng = np.random.default_rng(seed)
    confidence = 0.5 + 0.5 * rng.beta(4, 1, n)
    return torch.tensor(confidence), torch.tensor(rng.random(n) < confidence)


@pytest.mark.parametrize('target', [0.6, 0.9])
def test_the_threshold_is_the_lowest_one_that_reaches_the_target_with_one_more_wrong_image(target):
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 40, 200):
        confidence = torch.tensor(rng.integers(50, 60, n) / 60)  # with many ties
        correct = torch.tensor(rng.random(n) < 0.85)
        best = None
        for t in sorted(set(confidence.tolist()), reverse=True):
            kept = [bool(c) for p, c in zip(confidence.tolist(), correct) if p >= t]
            if sum(kept) / (len(kept) + 1) >= target - 1e-12:
                best = t
        assert threshold_for_accuracy(confidence, correct, target) == best


def test_a_few_lucky_images_do_not_vouch_for_a_high_accuracy():
    assert threshold_for_accuracy(torch.tensor([0.9, 0.8, 0.7]), torch.ones(3, dtype=torch.bool), 0.99) is None
    assert threshold_for_accuracy(torch.linspace(0.5, 1, 99), torch.ones(99, dtype=torch.bool), 0.99) == 0.5


@pytest.mark.parametrize('target', [0.9, 0.95, 0.98])
def test_the_target_accuracy_is_met_on_images_that_the_threshold_was_not_chosen_on(target):
    inside, accuracies = 0, []
    for seed in range(100):
        confidence, correct = sure_and_right(4000, seed)
        threshold = threshold_for_accuracy(confidence[:2000], correct[:2000], target)
        kept = [part >= threshold for part in confidence.split(2000)]
        accuracy = correct[2000:][kept[1]].double().mean()
        accuracies.append(float(accuracy))
        # Both halves are samples: the one that the threshold was chosen on, and the one that it is tried on.
        spread = math.sqrt(target * (1 - target) * (1 / int(kept[0].sum()) + 1 / int(kept[1].sum())))
        inside += abs(accuracy - target) <= 1.96 * spread or (kept[0].all() and accuracy > target)
    assert inside >= 95
    assert np.mean(accuracies) >= target - 0.002  # choosing the best of many thresholds would promise too much


def test_the_interval_of_the_accuracy_is_one_and_the_bootstrap_is_seeded():
    confidence, correct = sure_and_right(1000, 0)
    found = measure_threshold(confidence, correct, 0.96, rounds=200)
    kept = confidence >= found['threshold']
    assert found['coverage'] == pytest.approx(float(kept.double().mean()))
    assert found['accuracy'] == pytest.approx(float(correct[kept].double().mean()))
    for name in ('threshold', 'coverage', 'accuracy'):
        assert found[f'{name}_low'] <= found[name] <= found[f'{name}_high']
        assert found[f'{name}_low'] < found[f'{name}_high']
    assert found == measure_threshold(confidence, correct, 0.96, rounds=200)
    assert found != measure_threshold(confidence, correct, 0.96, rounds=200, seed=1)
    thresholds = [threshold_for_accuracy(*sure_and_right(1000, seed), 0.96) for seed in range(1, 101)]
    width, real = found['threshold_high'] - found['threshold_low'], np.ptp(np.quantile(thresholds, [0.025, 0.975]))
    assert 0.5 < width / real < 2


def test_without_labels_the_threshold_is_where_the_mean_confidence_is_the_target():
    confidence = torch.tensor([0.5, 0.99, 0.9, 0.7])
    assert threshold_from_confidence(confidence, 0.94) == pytest.approx(0.9)  # (0.99 + 0.9) / 2 = 0.945
    assert threshold_from_confidence(confidence, 0.5) == 0.5
    assert threshold_from_confidence(confidence, 0.999) is None
    assert threshold_from_confidence(torch.zeros(0), 0.5) is None


@pytest.mark.parametrize('kind', ['aps', 'raps'])
def test_scores_and_sets_are_those_of_a_loop(kind):
    probs = calibrated(50, 12, 3)[0].softmax(1)
    order, scores = class_scores(probs, kind)
    for row, classes, found in zip(probs.double().tolist(), order.tolist(), scores.tolist()):
        ranked = sorted(range(12), key=lambda k: -row[k])
        assert classes == ranked
        mass = 0.
        for rank, k in enumerate(ranked, 1):
            extra = RAPS_PENALTY * max(0, rank - RAPS_FREE) if kind == 'raps' else 0
            assert found[rank - 1] == pytest.approx(mass + extra, abs=1e-9)
            mass += row[k]
    sizes = set_sizes(scores, 0.9).tolist()
    assert sizes == [sum(score <= 0.9 for score in row) for row in scores.tolist()]
    assert set_sizes(scores, 0.).tolist() == [1] * 50
    assert set_sizes(scores, None).tolist() == [12] * 50


@pytest.mark.parametrize('kind', ['aps', 'raps'])
@pytest.mark.parametrize('sharper', [1., 3.])
def test_prediction_sets_hold_the_right_class_as_often_as_promised(kind, sharper):
    """Also with a model that claims three times too much."""
    inside, covered = 0, []
    for seed in range(100):
        logits, target = calibrated(2000, 10, seed)
        probs = (sharper * logits).softmax(1)
        quantile = conformal_quantile(probs[:1000], target[:1000], 0.9, kind)
        order, scores = class_scores(probs[1000:], kind)
        place = (order == target[1000:, None]).long().argmax(1)
        held = float((place < set_sizes(scores, quantile)).double().mean())
        covered.append(held)
        inside += abs(held - 0.9) <= 1.96 * math.sqrt(0.9 * 0.1 * (1 / 1000 + 1 / 1000))
    assert inside >= 95 - (sharper > 1)
    assert np.mean(covered) == pytest.approx(0.9, abs=0.005)


def test_too_few_images_put_every_class_in():
    probs, target = torch.full((8, 3), 1 / 3), torch.zeros(8, dtype=torch.int64)
    assert conformal_quantile(probs, target, 0.9) is None  # the 9th smallest of 8
    assert conformal_quantile(torch.cat([probs, probs[:1]]), torch.zeros(9, dtype=torch.int64), 0.9) is not None


def test_what_is_kept_is_json_and_comes_back_the_same():
    logits, target = calibrated(500, 5, 0)
    kept = measure_decisions(logits, target, 1.5, (0.9, 0.999), (0.8, 0.9), rounds=20)
    assert json.loads(json.dumps(kept)) == kept
    assert kept['thresholds']['0.999'] is None
    probs = scaled_probs(logits, 1.5)
    assert kept['sets']['aps']['0.8']['quantile'] == conformal_quantile(probs, target, 0.8, 'aps')
    assert set(kept['sets']) == {'aps', 'raps'}


def test_the_next_higher_level_stands_in_for_one_that_was_not_kept():
    kept = {'0.9': {}, '0.95': {}, '0.8': None}
    assert [kept_level(kept, asked) for asked in (0.8, 0.85, 0.9, 0.93, 0.99)] == ['0.8', '0.9', '0.9', '0.95', None]
    assert kept_level(None, 0.9) is None
    with pytest.raises(ValueError, match='not numbers'):
        kept_level({'high': {}}, 0.9)
