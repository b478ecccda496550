import ast
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import metrics
from metrics import EvalMeter

STATE = ('totals', 'class_bins', 'class_images', 'bins_10')
quick = settings(max_examples=25, deadline=None, derandomize=True)
# Few distinct values, so that ties and edges are common.
pairs = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.2, 0.3, 1 / 3, 0.5, 0.8, 0.95, 1.0]), st.booleans()),
    min_size=1,
    max_size=40,
)


def random_logits(n=500, k=10, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, k, generator=generator)
    noisy = logits + 2 * scale * torch.rand(n, k, generator=generator)
    return logits, noisy.argmax(dim=1)


def meter_of(logits, target, num_classes=None):
    meter = EvalMeter(num_classes or logits.shape[1])
    meter.update(logits, target)
    return meter


def loop_ece(confidence, correct, n_bins, closed='right', norm=1):
    """Bins by counting edges, one row after the other."""
    edges = (np.arange(n_bins + 1) / n_bins).astype(np.float32)
    bins = [[] for _ in range(n_bins)]
    for c, right in zip(np.asarray(confidence), np.asarray(correct)):
        below = sum(e < np.float32(c) if closed == 'right' else e <= np.float32(c) for e in edges)
        bins[min(max(below - 1, 0), n_bins - 1)].append((float(c), float(right)))
    gaps = [(len(b), abs(np.mean([c for c, _ in b]) - np.mean([r for _, r in b]))) for b in bins if b]
    if norm == math.inf:
        return max(gap for _, gap in gaps)
    return (sum(n * gap ** norm for n, gap in gaps) / len(confidence)) ** (1 / norm)


# ---------------------------------------------------------------------------------------------------------------------
# Equal-width bins


@pytest.mark.parametrize('closed', ['right', 'left'])
@pytest.mark.parametrize('n_bins', [1, 2, 10, 15])
def test_ece_equals_a_plain_loop(n_bins, closed):
    logits, target = random_logits()
    confidence, correct = metrics.confidence_and_correct(logits, target)
    bins = metrics.reliability_bins(confidence, correct, n_bins, closed)
    assert bins.ece == pytest.approx(loop_ece(confidence, correct, n_bins, closed), abs=1e-9)
    assert bins.rms == pytest.approx(loop_ece(confidence, correct, n_bins, closed, 2), abs=1e-9)
    assert bins.mce == pytest.approx(loop_ece(confidence, correct, n_bins, closed, math.inf), abs=1e-9)
    assert int(bins.count.sum()) == len(target)
    probs = metrics.softmax32(logits)
    assert metrics.expected_calibration_error(probs, target, n_bins, closed) == bins.ece


@pytest.mark.parametrize('norm, name', [('l1', 'ece'), ('l2', 'rms'), ('max', 'mce')])
def test_calibration_errors_equal_torchmetrics_on_random_inputs(norm, name):
    calibration = pytest.importorskip('torchmetrics.functional.classification')
    logits, target = random_logits(seed=3)
    probs = metrics.softmax32(logits)
    expected = calibration.multiclass_calibration_error(probs, target, num_classes=10, n_bins=15, norm=norm)
    bins = metrics.reliability_bins(*metrics.confidence_and_correct(logits, target))
    assert getattr(bins, name) == pytest.approx(float(expected), abs=1e-6)


def test_ece_equals_netcal_on_random_inputs():
    netcal = pytest.importorskip('netcal.metrics')
    logits, target = random_logits(seed=4)
    probs = metrics.softmax32(logits)
    expected = netcal.ECE(bins=15).measure(probs.numpy(), target.numpy())
    assert metrics.expected_calibration_error(probs, target) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('confidence', [
    np.array([k / 10 for k in range(11)]),
    np.array([k * 0.1 for k in range(11)]),
    np.array([k / 10 for k in range(11)], dtype=np.float32),
    np.linspace(0, 1, 11),
], ids=['float64', 'product', 'float32', 'linspace'])
def test_a_confidence_on_an_edge_lies_in_one_known_bin(confidence):
    correct = np.zeros(11)
    right = metrics.reliability_bins(confidence, correct, n_bins=10)
    left = metrics.reliability_bins(confidence, correct, n_bins=10, closed='left')
    assert right.count.tolist() == [2] + [1] * 9
    assert left.count.tolist() == [1] * 9 + [2]
    # 15 bins: k/10 is an edge for k = 0, 2, 4, 6, 8, 10 only.
    fifteen = metrics.reliability_bins(confidence, correct)
    assert fifteen.count.tolist() == [1, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1]
    assert right.ece == pytest.approx(np.mean(confidence), abs=1e-7)


@pytest.mark.parametrize('n_bins', range(1, 41))
def test_every_edge_belongs_to_the_bin_below_or_above(n_bins):
    edges = metrics.bin_edges(n_bins)
    right = metrics.reliability_bins(edges[1:], torch.ones(n_bins), n_bins)
    left = metrics.reliability_bins(edges[:-1], torch.ones(n_bins), n_bins, 'left')
    assert right.count.tolist() == left.count.tolist() == [1] * n_bins
    above = torch.nextafter(edges[1:-1], torch.tensor(2.0))
    next_bins = metrics.reliability_bins(torch.cat([edges[:1], above]), torch.ones(n_bins), n_bins)
    assert next_bins.count.tolist() == [1] * n_bins


@pytest.mark.parametrize('closed', ['right', 'left'])
def test_confidence_one_shares_the_last_bin(closed):
    bins = metrics.reliability_bins([0.95, 1.0], [True, False], 15, closed)
    assert bins.ece == pytest.approx(0.475, abs=1e-7)
    assert bins.count.tolist() == [0] * 14 + [2]


def test_one_right_row_at_0_8_has_ece_0_2():
    assert metrics.reliability_bins([0.8], [1]).ece == pytest.approx(0.2, abs=1e-7)
    assert metrics.expected_calibration_error([[0.8, 0.2]], [0]) == pytest.approx(0.2, abs=1e-7)
    assert metrics.smooth_ece([0.8], [1]) == pytest.approx(0.2, abs=1e-4)


def test_logits_are_never_taken_for_probabilities():
    logits = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    target = torch.tensor([0, 0])
    assert meter_of(logits, target).compute()['ece'] == pytest.approx(33.2, abs=0.05)
    assert metrics.expected_calibration_error(metrics.softmax32(logits), target) == pytest.approx(0.332, abs=5e-4)
    # The same rows do sum to 1, so that they are probabilities when given as such.
    assert metrics.expected_calibration_error(logits, target) == pytest.approx(0.15, abs=1e-6)


@pytest.mark.parametrize('row', [[0.9, 0.2], [2.0, -1.0], [float('nan'), 1.0], [0.5, 0.4]])
@pytest.mark.parametrize('function', [
    metrics.expected_calibration_error, metrics.classwise_ece, metrics.brier_decomposition,
])
def test_rows_that_are_no_probabilities_raise_with_their_number(function, row):
    with pytest.raises(ValueError, match=r'row 1 .*softmax32'):
        function(torch.tensor([[0.5, 0.5], row]), [0, 0])


def test_probabilities_in_half_precision_are_accepted():
    logits, target = random_logits(50, 1000)
    exact = metrics.expected_calibration_error(metrics.softmax32(logits), target)
    half = metrics.expected_calibration_error(metrics.softmax32(logits).half(), target)
    assert half == pytest.approx(exact, abs=1e-3)


@quick
@given(pairs, st.randoms(use_true_random=False), st.sampled_from([1, 2, 10, 15]))
def test_row_order_changes_no_digit(rows, random, n_bins):
    shuffled = rows[:]
    random.shuffle(shuffled)
    results = []
    for confidence, correct in (zip(*rows), zip(*shuffled)):
        confidence, correct = np.array(confidence), np.array(correct)
        bins = [
            metrics.reliability_bins(confidence, correct, n_bins),
            metrics.reliability_bins(confidence, correct, n_bins, 'left'),
            metrics.equal_mass_bins(confidence, correct, n_bins),
        ]
        assert all(int(b.count.sum()) == len(rows) for b in bins)
        assert all(math.isfinite(v) for b in bins for v in (b.ece, b.mce, b.rms, b.debiased_rms))
        results.append([
            *(t.tolist() for b in bins for t in b),
            metrics.smooth_ece(confidence, correct),
            metrics.aurc(confidence, correct),
            metrics.bootstrap_intervals(confidence, correct, rounds=5),
        ])
    assert results[0] == results[1]


@quick
@given(pairs, st.sampled_from([1, 7, 15]), st.sampled_from(['right', 'left']))
def test_ece_with_ties_edges_and_empty_bins_equals_the_loop(rows, n_bins, closed):
    confidence, correct = np.array([c for c, _ in rows]), np.array([r for _, r in rows])
    expected = loop_ece(confidence, correct, n_bins, closed)
    assert metrics.reliability_bins(confidence, correct, n_bins, closed).ece == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize('call, message', [
    (lambda: metrics.reliability_bins([0.5, 1.2], [1, 1]), 'row 1 is 1.2'),
    (lambda: metrics.reliability_bins([float('nan')], [1]), 'row 0 is nan'),
    (lambda: metrics.reliability_bins([0.5], [2]), 'correct of row 0 is 2'),
    (lambda: metrics.reliability_bins([0.5, 0.5], [1]), r'\[2\] and correct \[1\]'),
    (lambda: metrics.reliability_bins([0.5], [1], closed='both'), "'both'"),
    (lambda: metrics.reliability_bins([0.5], [1], n_bins=0), 'n_bins is 0'),
    (lambda: metrics.equal_mass_bins([0.5], [1], n_bins=0), 'n_bins is 0'),
    (lambda: metrics.expected_calibration_error([[0.5, 0.5]], [2]), 'target of row 0 is 2'),
    (lambda: metrics.expected_calibration_error([[0.5, 0.5]], [0, 1]), r'target has shape \[2\]'),
    (lambda: metrics.nll([[0.5, 0.5]], [0.0]), 'float32'),
    (lambda: metrics.softmax32([1.0, 2.0]), r'shape \[2\]'),
    (lambda: metrics.bootstrap_intervals([0.5], [1], rounds=0), 'rounds is 0'),
    (lambda: metrics.bootstrap_intervals([0.5], [1], level=95), 'level is 95'),
    (lambda: metrics.auroc([0.5, 0.6], [True, True]), 'all 2 rows are positive'),
    (lambda: metrics.auroc([0.5, float('nan')], [True, False]), 'row 1 is NaN'),
    (lambda: metrics.ood_scores([[1.0]]), 'at least 2 classes'),
    (lambda: metrics.ood_scores([[1.0, 2.0]], 'mps'), "'mps'"),
])
def test_mistakes_raise_and_say_where(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize('function', [
    metrics.accuracy, metrics.nll, metrics.brier, metrics.expected_calibration_error, metrics.classwise_ece,
    metrics.brier_decomposition, metrics.calibration_report, metrics.confidence_and_correct, metrics.class_report,
    metrics.confusion_matrix,
])
def test_empty_input_of_logits_raises(function):
    with pytest.raises(ValueError, match='is empty'):
        function(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize('function', [
    metrics.reliability_bins, metrics.equal_mass_bins, metrics.smooth_ece, metrics.bootstrap_intervals,
    metrics.auroc, metrics.average_precision, metrics.fpr_at_tpr, metrics.aurc,
    lambda c, r: metrics.accuracy_at_coverage(c, r, 0.5), lambda c, r: metrics.coverage_at_accuracy(c, r, 0.5),
])
def test_empty_input_of_confidences_raises(function):
    with pytest.raises(ValueError, match='is empty'):
        function(torch.zeros(0), torch.zeros(0))


# ---------------------------------------------------------------------------------------------------------------------
# EvalMeter

THREE_PROBS = torch.tensor([[0.70, 0.20, 0.10], [0.61, 0.29, 0.10], [0.50, 0.25, 0.25]])
THREE_TARGETS = torch.tensor([0, 1, 2])


def test_meter_by_hand_on_three_samples():
    result = meter_of(THREE_PROBS.log(), THREE_TARGETS).compute()
    expected = {
        'count': 3,
        'loss': -(math.log(0.7) + math.log(0.29) + math.log(0.25)) / 3,
        'nll': -(math.log(0.7) + math.log(0.29) + math.log(0.25)) / 3,
        'top1': 100 / 3,
        'error': 200 / 3,
        'top5': 100,
        'brier': ((0.09 + 0.04 + 0.01) + (0.3721 + 0.5041 + 0.01) + (0.25 + 0.0625 + 0.5625)) / 3,
        # Three bins: gaps of -0.3, 0.61 and 0.5.
        'ece': 141 / 3,
        'ece_10': 141 / 3,
        'mce': 61,
        'confidence': 181 / 3,
        'overconfidence': 111 / 3,
        'underconfidence': 30 / 3,
        # All three are put into class 0: recalls of 1, 0 and 0, F1 of 2 / 4, 0 and 0, one class with an ECE.
        'balanced_accuracy': 100 / 3,
        'macro_f1': 50 / 3,
        'ece_balanced': 141 / 3,
    }
    assert list(result) == list(expected)
    assert dict(result) == pytest.approx(expected, abs=1e-4)


def test_meter_agrees_with_the_plain_functions():
    logits, target = random_logits()
    result = meter_of(logits, target).compute()
    probs = metrics.softmax32(logits)
    assert result['top1'] == pytest.approx(100 * metrics.accuracy(logits, target))
    assert result['top5'] == pytest.approx(100 * metrics.accuracy(logits, target, k=5))
    assert result['nll'] == pytest.approx(metrics.nll(logits, target), abs=1e-9)
    assert result['nll'] == pytest.approx(float(F.cross_entropy(logits.double(), target)), abs=1e-6)
    assert result['brier'] == pytest.approx(metrics.brier(logits, target), abs=1e-9)
    square = (logits.double().softmax(1) - F.one_hot(target, 10)) ** 2
    assert result['brier'] == pytest.approx(float(square.sum(1).mean()), abs=1e-6)
    assert result['ece'] == pytest.approx(100 * metrics.expected_calibration_error(probs, target))
    assert result['ece_10'] == pytest.approx(100 * metrics.expected_calibration_error(probs, target, 10, 'left'))
    assert result['confidence'] == pytest.approx(100 * float(probs.amax(1).double().mean()), abs=1e-7)
    expected = metrics.reliability_bins(*metrics.confidence_and_correct(logits, target))
    assert all(torch.equal(a, b) for a, b in zip(meter_of(logits, target).bins(), expected))
    assert meter_of(logits, target).bins(10).count.sum() == 500


def test_top5_equals_scikit_learn():
    sklearn_metrics = pytest.importorskip('sklearn.metrics')
    logits, target = random_logits(200, 20)
    expected = sklearn_metrics.top_k_accuracy_score(target.numpy(), logits.numpy(), k=5, labels=range(20))
    assert metrics.accuracy(logits, target, k=5) == pytest.approx(expected)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 60), st.sampled_from([1, 2, 3, 10, 1000]))
def test_parts_in_any_order_and_any_process_add_up_to_the_whole_bitwise(data, n, k):
    logits, target = random_logits(n, k, seed=n)
    whole = meter_of(logits, target)
    order = torch.tensor(data.draw(st.permutations(range(n))))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=6)))
    meters = [EvalMeter(k) for _ in range(3)]
    for number, rows in enumerate(order.tensor_split(cuts)):
        meters[number % 3].update(logits[rows], target[rows])

    others = [getattr(other, name) for name in STATE for other in meters[1:]]
    meters[0].sync(lambda tensor: tensor + others.pop(0) + others.pop(0))
    assert all(torch.equal(getattr(meters[0], name), getattr(whole, name)) for name in STATE)
    assert meters[0].compute() == whole.compute()


@quick
@given(st.integers(1, 50), st.sampled_from([2, 4, 10]), st.floats(0.01, 30))
def test_over_and_underconfidence_add_up_to_ece_and_nothing_is_nan(n, k, scale):
    result = meter_of(*random_logits(n, k, seed=n, scale=scale)).compute()
    assert result['overconfidence'] + result['underconfidence'] == pytest.approx(result['ece'], abs=1e-12)
    assert result['top1'] + result['error'] == pytest.approx(100, abs=1e-12)
    assert all(math.isfinite(value) for value in result.values())
    assert result['ece'] <= result['mce'] + 1e-9


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_give_the_digits_of_their_float32_copy(dtype):
    logits, target = random_logits()
    logits = logits.to(dtype)
    assert meter_of(logits, target).compute() == meter_of(logits.float(), target).compute()
    assert metrics.softmax32(logits).dtype == torch.float32


def test_non_contiguous_logits_give_the_same_digits():
    logits, target = random_logits(40, 7)
    assert meter_of(logits.T.contiguous().T, target).compute() == meter_of(logits, target).compute()


def test_a_billion_samples_do_not_overflow():
    logits, target = random_logits(100)
    small = meter_of(logits, target)
    expected = small.compute()
    for name in STATE:
        setattr(small, name, getattr(small, name) * 10 ** 7)
    result = small.compute()
    assert result.pop('count') == 10 ** 9
    assert expected.pop('count') == 100
    assert result == pytest.approx(expected, rel=1e-12)


def test_the_largest_values_fit_as_often_as_the_meter_allows():
    # Wrong with confidence 1 and an endless loss: each field is at its largest.
    worst = meter_of(torch.tensor([[3e38, -3e38]]), torch.tensor([1]))
    right = meter_of(torch.tensor([[3e38, -3e38]]), torch.tensor([0]))
    for meter in (worst, right):
        assert all(int(getattr(meter, name).max()) * metrics.MAX_COUNT < 2 ** 63 for name in STATE)
        for name in STATE:
            setattr(meter, name, getattr(meter, name) * metrics.MAX_COUNT)
    assert worst.compute()['brier'] == 2
    assert worst.compute()['nll'] == metrics.MAX_NLL
    assert worst.compute()['ece'] == worst.compute()['overconfidence'] == 100
    assert right.compute()['error'] == right.compute()['ece'] == right.compute()['nll'] == 0
    worst.totals[0] += 1
    with pytest.raises(ValueError, match='exact up to 2147483647'):
        worst.compute()


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_a_non_finite_logit_raises_with_its_place_in_all_that_was_seen(bad):
    logits, target = random_logits(10, 3)
    meter = EvalMeter(3)
    meter.update(logits[:6], target[:6])
    before = meter.compute()
    broken = logits[6:].clone()
    broken[2, 1] = bad
    with pytest.raises(ValueError, match='row 8 are not finite'):
        meter.update(broken, target[6:])
    assert meter.compute() == before
    with pytest.raises(ValueError, match='row 2 are not finite'):
        metrics.calibration_report(broken, target[6:])


def test_float16_overflow_is_not_finite_and_float64_beyond_float32_neither():
    with pytest.raises(ValueError, match='row 0 are not finite'):
        meter_of(torch.tensor([[70000.0, 0.0]]).half(), torch.tensor([0]))
    with pytest.raises(ValueError, match='row 0 are not finite'):
        meter_of(torch.tensor([[1e300, 0.0]], dtype=torch.float64), torch.tensor([0]))


def test_wrong_targets_and_shapes_raise():
    meter = meter_of(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match='target of row 5 is 3; expected 0 to 2'):
        meter.update(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match='target of row 4 is -1'):
        meter.update(torch.zeros(1, 3), torch.tensor([-1]))
    with pytest.raises(ValueError, match='4 classes; this meter was made for 3'):
        meter.update(torch.zeros(1, 4), torch.tensor([0]))
    with pytest.raises(ValueError, match='15 or 10'):
        meter.bins(20)
    assert meter.compute()['count'] == 4


def test_an_empty_meter_raises_and_empty_batches_count_nothing():
    meter = EvalMeter(3)
    meter.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    for call in (meter.compute, meter.bins):
        with pytest.raises(ValueError, match='no sample'):
            call()


def test_one_class_and_one_sample_are_measured():
    result = meter_of(torch.tensor([[2.0]]), torch.tensor([0])).compute()
    assert result['top1'] == result['top5'] == result['confidence'] == 100
    assert result['ece'] == result['nll'] == result['brier'] == 0


def test_of_equal_logits_the_lower_class_is_predicted():
    logits = torch.zeros(10, 10)
    result = meter_of(logits, torch.arange(10)).compute()
    assert result['top1'] == pytest.approx(10)
    assert result['top5'] == pytest.approx(50)
    assert metrics.confidence_and_correct(logits, torch.arange(10))[1].tolist() == [True] + [False] * 9


# ---------------------------------------------------------------------------------------------------------------------
# Other views of calibration


def test_equal_mass_bins_split_sorted_rows_evenly():
    generator = np.random.default_rng(0)
    confidence, correct = generator.permutation(100) / 100, generator.random(100) < 0.5
    bins = metrics.equal_mass_bins(confidence, correct, 7)
    order = np.argsort(confidence)
    # Bin j ends with row ceil(100 j / 7) of the sorted ones.
    parts = np.split(order, [15, 29, 43, 58, 72, 86])
    assert bins.count.tolist() == [len(part) for part in parts]
    expected = sum(abs(np.sum(confidence[part] - correct[part])) for part in parts) / 100
    assert bins.ece == pytest.approx(expected, abs=1e-9)


@quick
@given(pairs, st.integers(1, 20))
def test_equal_confidences_share_an_equal_mass_bin(rows, n_bins):
    confidence, correct = torch.tensor([c for c, _ in rows]), torch.tensor([r for _, r in rows])
    bins = metrics.equal_mass_bins(confidence, correct, n_bins)
    assert int(bins.count.sum()) == len(rows)
    assert bool((bins.edges.diff() >= 0).all())
    # Bins are unions of whole ties: some run of the ties' sizes adds up to each count.
    sizes = iter(torch.unique(confidence, return_counts=True)[1].tolist())
    for count in bins.count.tolist():
        while count > 0:
            count -= next(sizes)
        assert count == 0


def test_equal_mass_bins_with_fewer_rows_than_bins_and_all_rows_equal():
    assert metrics.equal_mass_bins([0.4, 0.6], [0, 1]).ece == pytest.approx(0.4, abs=1e-7)
    equal = metrics.equal_mass_bins([0.7] * 10, [1] * 5 + [0] * 5)
    assert equal.count.tolist() == [10] + [0] * 14
    assert equal.ece == pytest.approx(0.2, abs=1e-7)


def test_classwise_ece_equals_a_loop_also_for_a_class_without_label():
    logits, target = random_logits(200, 5)
    target[target == 3] = 0
    probs = metrics.softmax32(logits)
    expected = [loop_ece(probs[:, k], target == k, 15) for k in range(5)]
    assert metrics.classwise_errors(probs, target).tolist() == pytest.approx(expected, abs=1e-9)
    assert expected[3] > 0
    assert metrics.classwise_ece(probs, target) == pytest.approx(np.mean(expected), abs=1e-9)


def test_classwise_ece_by_hand_on_three_samples():
    # Two classes: p_0 is 0.9, 0.9, 0.2 with labels 0, 1, 1, so both classes have bins with gaps 0.4 (twice) and 0.2.
    probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8]])
    assert metrics.classwise_ece(probs, [0, 1, 1]) == pytest.approx((0.4 * 2 + 0.2) / 3, abs=1e-7)


def test_debiased_rms_equals_a_loop_and_is_near_zero_for_a_calibrated_model():
    generator = np.random.default_rng(1)
    confidence = generator.random(3000)
    correct = generator.random(3000) < confidence
    bins = metrics.equal_mass_bins(confidence, correct, 100)
    total = 0
    for n, a, c in zip(*(field.tolist() for field in bins[:3])):
        total += n / 3000 * ((a - c) ** 2 - a * (1 - a) / (n - 1))
    assert bins.debiased_rms == pytest.approx(math.sqrt(max(total, 0)), abs=1e-9)
    assert bins.rms > 0.06
    assert bins.debiased_rms < 0.03


def test_debiased_rms_by_hand_on_three_samples():
    # One bin, two of three right at 0.95: (0.95 - 2/3)^2 - (2/9) / 2 is negative, so 0. At 0.1: (2/3 - 0.1)^2 - 1/9.
    assert metrics.reliability_bins([0.95] * 3, [1, 1, 0]).debiased_rms == 0
    expected = math.sqrt((2 / 3 - 0.1) ** 2 - 1 / 9)
    assert metrics.reliability_bins([0.1] * 3, [1, 1, 0]).debiased_rms == pytest.approx(expected, abs=1e-7)
    assert metrics.reliability_bins([0.1], [1]).debiased_rms == 0


def smooth_ece_by_quadrature(confidence, correct):
    """The definition: mirror images of the Gaussian, a fine grid, and a search for the fixed point."""
    t = (np.arange(20000) + 0.5) / 20000

    def error(sigma):
        total = 0
        for c, right in zip(confidence, correct):
            images = [s * c + 2 * k for s in (1, -1) for k in range(-4, 5)]
            kernel = sum(np.exp(-((t - image) / sigma) ** 2 / 2) for image in images) / (sigma * math.sqrt(2 * math.pi))
            total = total + kernel * (right - c) / len(confidence)
        return np.abs(total).mean()

    low, high = 1e-3, 1.0
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if error(middle) > middle else (low, middle)
    return (low + high) / 2


@pytest.mark.parametrize('confidence, correct', [
    ([0.6, 0.7, 0.9], [1, 0, 1]),
    ([0.0, 0.5, 1.0], [1, 1, 0]),
    ([0.3, 0.35, 0.99], [1, 0, 0]),
    ([0.97, 0.98, 0.99, 1.0], [1, 1, 0, 1]),
])
def test_smooth_ece_equals_its_definition(confidence, correct):
    expected = smooth_ece_by_quadrature(confidence, correct)
    assert metrics.smooth_ece(confidence, correct) == pytest.approx(expected, abs=3e-4)


def test_smooth_ece_is_the_mean_gap_where_all_gaps_have_one_sign_and_0_where_there_is_none():
    generator = np.random.default_rng(2)
    confidence = generator.random(200)
    assert metrics.smooth_ece(confidence, np.zeros(200)) == pytest.approx(confidence.mean(), abs=1e-6)
    assert metrics.smooth_ece([1.0, 0.0, 1.0], [1, 0, 1]) < 1e-6


def test_smooth_ece_does_not_jump_where_binned_ece_does():
    correct = [1, 0] * 50
    below, above = [0.599, 0.601] * 50, [0.6, 0.6] * 50
    assert metrics.reliability_bins(below, correct, 5).ece > 0.4
    assert metrics.reliability_bins(above, correct, 5).ece == pytest.approx(0.1, abs=1e-6)
    assert abs(metrics.smooth_ece(below, correct) - metrics.smooth_ece(above, correct)) < 2e-3


@pytest.mark.parametrize('n, k', [(1, 1), (1, 3), (3, 2), (200, 2), (200, 7)])
def test_brier_parts_add_up_to_the_brier_score(n, k):
    logits, target = random_logits(n, k)
    target[target == k - 1] = 0
    parts = metrics.brier_decomposition(metrics.softmax32(logits), target)
    total = parts['reliability'] - parts['resolution'] + parts['uncertainty']
    assert total == pytest.approx(parts['brier'], abs=1e-12)
    assert parts['brier'] == pytest.approx(metrics.brier(logits, target), abs=1e-6)
    assert parts['reliability'] >= 0 and parts['uncertainty'] >= 0


def test_brier_score_equals_scikit_learn():
    sklearn_metrics = pytest.importorskip('sklearn.metrics')
    logits, target = random_logits(300, 2)
    probs = metrics.softmax32(logits)
    expected = 2 * sklearn_metrics.brier_score_loss(target.numpy(), probs[:, 1].double().numpy())
    assert metrics.brier(logits, target) == pytest.approx(expected, abs=1e-6)


def test_brier_parts_by_hand_where_probabilities_are_equal_within_bins():
    # Class 0: at 0.9 half are right, at 0.2 none: reliability (2 * 0.4^2 + 0.2^2) / 3, base rate 1/3. Class 1 is alike.
    parts = metrics.brier_decomposition(torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8]]), [0, 1, 1])
    assert parts['reliability'] == pytest.approx(2 * (2 * 0.16 + 0.04) / 3, abs=1e-6)
    assert parts['resolution'] == pytest.approx(2 * (2 * (1 / 6) ** 2 + (1 / 3) ** 2) / 3, abs=1e-6)
    assert parts['uncertainty'] == pytest.approx(2 * 2 / 9, abs=1e-9)
    assert parts['brier'] == pytest.approx(2 * (0.01 + 0.81 + 0.04) / 3, abs=1e-6)


def test_bootstrap_is_seeded_and_leaves_the_global_random_state_alone():
    confidence, correct = metrics.confidence_and_correct(*random_logits())
    state = torch.get_rng_state()
    first = metrics.bootstrap_intervals(confidence, correct, rounds=50, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert first == metrics.bootstrap_intervals(confidence, correct, rounds=50, seed=1)
    assert first != metrics.bootstrap_intervals(confidence, correct, rounds=50, seed=2)


@pytest.mark.parametrize('wrong, number', [(0, 1), (1, 1), (0, 3), (3, 50), (120, 656)])
def test_the_error_interval_is_scipy_s_wilson_one_also_where_all_or_none_are_right(wrong, number):
    confidence, correct = torch.full((number,), 0.9), torch.arange(number) >= wrong
    for level in (0.95, 0.5):
        low, high = metrics.bootstrap_intervals(confidence, correct, rounds=1, level=level)['error']
        expected = scipy.stats.binomtest(wrong, number).proportion_ci(level, method='wilson')
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12) and high - low > 0.01


def test_the_error_interval_is_the_binomial_one_and_both_hold_what_was_measured():
    confidence, correct = metrics.confidence_and_correct(*random_logits(2000))
    intervals = metrics.bootstrap_intervals(confidence, correct)
    error = 1 - float(correct.double().mean())
    half_width = 1.96 * math.sqrt(error * (1 - error) / 2000)
    assert intervals['error'] == pytest.approx((error - half_width, error + half_width), abs=3e-3)
    ece = metrics.reliability_bins(confidence, correct).ece
    assert intervals['ece'][0] <= ece <= intervals['ece'][1]
    narrow = metrics.bootstrap_intervals(confidence, correct, level=0.5)
    assert narrow['error'][1] - narrow['error'][0] < 0.6 * (intervals['error'][1] - intervals['error'][0])


def test_the_ece_interval_mostly_holds_the_true_ece_of_a_slightly_overconfident_model():
    # Percentiles of the resampled ECE miss 0.02 in every one of these runs.
    generator = np.random.default_rng(3)
    held = 0
    for _ in range(30):
        confidence = 0.2 + 0.8 * generator.beta(5, 1.2, 500)
        correct = generator.random(500) < confidence - 0.02
        low, high = metrics.bootstrap_intervals(confidence, correct, rounds=100)['ece']
        held += low <= 0.02 <= high
    assert held >= 20


def test_a_difference_of_ece_has_an_interval_of_paired_images():
    generator = torch.Generator().manual_seed(0)
    confidence = 0.5 + 0.5 * torch.rand(2000, generator=generator)
    correct = torch.rand(2000, generator=generator) < confidence - 0.2
    same = (confidence, correct)
    assert metrics.ece_difference_interval(same, same, 30, 0) == (0., 0.)
    low, high = metrics.ece_difference_interval((confidence - 0.2, correct), same, 100, 0)
    assert 0.1 < low < 0.2 < high + 0.02 < 0.25
    mirrored = metrics.ece_difference_interval(same, (confidence - 0.2, correct), 100, 0)
    assert mirrored == pytest.approx((-high, -low))


# ---------------------------------------------------------------------------------------------------------------------
# Ranking


@pytest.mark.parametrize('decimals', [1, 2, 8])
def test_ranking_metrics_equal_scikit_learn_with_and_without_ties(decimals):
    sklearn_metrics = pytest.importorskip('sklearn.metrics')
    generator = np.random.default_rng(0)
    score = generator.random(300).round(decimals)
    positive = generator.random(300) < score
    assert metrics.auroc(score, positive) == pytest.approx(sklearn_metrics.roc_auc_score(positive, score))
    expected = sklearn_metrics.average_precision_score(positive, score)
    assert metrics.average_precision(score, positive) == pytest.approx(expected)
    fpr, tpr, _ = sklearn_metrics.roc_curve(positive, score, drop_intermediate=False)
    assert metrics.fpr_at_tpr(score, positive) == pytest.approx(fpr[np.argmax(tpr >= 0.95)])


def test_ranking_by_hand_on_three_samples():
    confidence, correct = [0.9, 0.8, 0.7], [True, False, True]
    assert metrics.auroc(confidence, correct) == pytest.approx(0.5)
    assert metrics.average_precision(confidence, correct) == pytest.approx((1 + 2 / 3) / 2)
    coverage, risk = metrics.risk_coverage(confidence, correct)
    assert coverage.tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3])
    assert metrics.aurc(confidence, correct) == pytest.approx(5 / 18)
    assert metrics.auroc([0.5, 0.5, 0.5], correct) == 0.5


def test_risk_coverage_with_ties_is_the_mean_over_their_orders():
    confidence, correct = [0.9, 0.7, 0.7, 0.7, 0.2], [False, True, False, True, True]
    curves = []
    for order in itertools.permutations(range(1, 4)):
        wrong = [not correct[i] for i in (0, *order, 4)]
        curves.append(np.cumsum(wrong) / np.arange(1, 6))
    assert metrics.risk_coverage(confidence, correct)[1].tolist() == pytest.approx(np.mean(curves, axis=0).tolist())


def test_ood_scores_are_what_their_names_say():
    logits, _ = random_logits(50)
    assert torch.allclose(metrics.ood_scores(logits).sigmoid(), logits.softmax(1).amax(1))
    assert torch.allclose(metrics.ood_scores(logits, 'energy'), logits.exp().sum(1).log(), atol=1e-5)
    ordered = logits.sort(dim=1).values
    assert torch.allclose(metrics.ood_scores(logits, 'margin'), ordered[:, -1] - ordered[:, -2])
    # Probabilities of both are 1 in float32; the ranking still tells them apart.
    sure = metrics.ood_scores(torch.tensor([[30.0, 0.0], [40.0, 0.0]]))
    assert sure[0] < sure[1]


def test_ood_metrics_equal_scikit_learn():
    sklearn_metrics = pytest.importorskip('sklearn.metrics')
    inside = metrics.ood_scores(random_logits(200, scale=3)[0])
    outside = metrics.ood_scores(random_logits(120, scale=2)[0])
    result = metrics.ood_metrics(inside, outside)
    score, label = torch.cat([inside, outside]).numpy(), np.arange(320) < 200
    assert result['auroc'] == pytest.approx(sklearn_metrics.roc_auc_score(label, score))
    assert result['aupr_in'] == pytest.approx(sklearn_metrics.average_precision_score(label, score))
    assert result['aupr_out'] == pytest.approx(sklearn_metrics.average_precision_score(~label, -score))
    with pytest.raises(ValueError, match='both kinds'):
        metrics.ood_metrics(inside, outside[:0])


def test_fpr95_by_hand():
    # 19 of 20 are kept at the threshold 2: of four outside scores two reach it.
    assert metrics.ood_metrics(np.arange(1, 21), np.array([0.5, 1.5, 2.0, 30.0]))['fpr95'] == pytest.approx(0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Classes and selective prediction


def test_figures_by_class_equal_a_plain_loop_and_sklearn():
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score

    logits, target = random_logits(300, 8)
    target[target == 2] = 3  # no image of class 2
    logits[:, 5] = -50  # nothing is put into class 5
    logits[:, 7], target[target == 7] = -50, 1  # class 7 does not occur at all
    predicted, probs = logits.argmax(1).tolist(), logits.softmax(1)
    matrix, found = metrics.confusion_matrix(logits, target), metrics.class_report(logits, target)
    assert (matrix.numpy() == confusion_matrix(target, predicted, labels=range(8))).all()
    for k in range(8):
        rows = [i for i, p in enumerate(predicted) if p == k]
        images = [i for i, t in enumerate(target.tolist()) if t == k]
        hits = len(set(rows) & set(images))
        expected = dict(
            images=len(images),
            predicted=len(rows),
            recall=hits / len(images) if images else math.nan,
            precision=hits / len(rows) if rows else math.nan,
            f1=2 * hits / (len(images) + len(rows)) if images or rows else math.nan,
            confidence=float(probs[rows, k].double().mean()),
            ece=loop_ece(probs[rows, k], target[rows] == k, 15) if rows else math.nan,
        )
        assert {name: float(v[k]) for name, v in found._asdict().items()} == pytest.approx(expected, nan_ok=True)
    assert found.macro_f1 == pytest.approx(f1_score(target, predicted, average='macro'))
    with pytest.warns(UserWarning, match='not in y_true'):  # class 2, which has no recall
        assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(target, predicted))


@quick
@given(pairs, st.sampled_from([0.5, 0.75, 0.95, 0.99, 1.0]))
def test_coverage_at_an_accuracy_is_the_best_that_a_loop_over_thresholds_finds(rows, level):
    best = 0
    for threshold, _ in rows:
        kept = [right for confidence, right in rows if confidence >= threshold]
        if sum(kept) / len(kept) >= level:
            best = max(best, len(kept))
    confidence, correct = torch.tensor([c for c, _ in rows]), torch.tensor([r for _, r in rows])
    assert metrics.coverage_at_accuracy(confidence, correct, level) == best / len(rows)


@quick
@given(pairs, st.sampled_from([0.1, 0.5, 0.8, 0.9, 1.0]))
def test_accuracy_at_a_coverage_is_the_mean_over_random_orders_of_equal_confidences(rows, coverage):
    wanted = next(n for n in range(1, len(rows) + 1) if n >= round(coverage * len(rows), 9))
    edge = sorted((c for c, _ in rows), reverse=True)[wanted - 1]
    surely = [right for confidence, right in rows if confidence > edge]
    tied = [right for confidence, right in rows if confidence == edge]
    expected = (sum(surely) + (wanted - len(surely)) * sum(tied) / len(tied)) / wanted
    confidence, correct = torch.tensor([c for c, _ in rows]), torch.tensor([r for _, r in rows])
    assert metrics.accuracy_at_coverage(confidence, correct, coverage) == pytest.approx(expected)


@pytest.mark.parametrize('coverage', [0., 1.01, math.nan])
def test_a_coverage_that_is_none_raises(coverage):
    with pytest.raises(ValueError, match='above 0 and up to 1'):
        metrics.accuracy_at_coverage([0.5], [1], coverage)


# ---------------------------------------------------------------------------------------------------------------------
# Report


def test_the_report_gathers_the_functions_in_percent():
    logits, target = random_logits()
    probs, (confidence, correct) = metrics.softmax32(logits), metrics.confidence_and_correct(logits, target)
    report = metrics.calibration_report(logits, target)
    meter = meter_of(logits, target).compute()
    assert list(report)[:len(meter)] == list(meter)
    parts = metrics.brier_decomposition(probs, target)
    equal_mass = metrics.equal_mass_bins(confidence, correct)
    expected = {
        **meter,
        'brier_reliability': parts['reliability'],
        'brier_resolution': parts['resolution'],
        'brier_uncertainty': parts['uncertainty'],
        'ece_equal_mass': 100 * equal_mass.ece,
        'ece_classwise': 100 * metrics.classwise_ece(probs, target),
        'ece_smooth': 100 * metrics.smooth_ece(confidence, correct),
        'rms': 100 * equal_mass.rms,
        'rms_debiased': 100 * equal_mass.debiased_rms,
        'auroc': 100 * metrics.auroc(confidence, correct),
        'aupr_right': 100 * metrics.average_precision(confidence, correct),
        'aupr_wrong': 100 * metrics.average_precision(-confidence, ~correct),
        'aurc': 100 * metrics.aurc(confidence, correct),
        'coverage_at_95': 100 * metrics.coverage_at_accuracy(confidence, correct, 0.95),
        'coverage_at_99': 100 * metrics.coverage_at_accuracy(confidence, correct, 0.99),
        'accuracy_at_80': 100 * metrics.accuracy_at_coverage(confidence, correct, 0.8),
        'accuracy_at_90': 100 * metrics.accuracy_at_coverage(confidence, correct, 0.9),
    }
    assert dict(report) == pytest.approx(expected)
    longer = metrics.calibration_report(logits, target, bootstrap=20, seed=5)
    intervals = metrics.bootstrap_intervals(confidence, correct, rounds=20, seed=5)
    assert list(longer)[len(report):] == ['error_low', 'error_high', 'ece_low', 'ece_high']
    assert longer['error_low'] == 100 * intervals['error'][0]
    assert longer['ece_high'] == 100 * intervals['ece'][1]


@quick
@given(st.integers(1, 12), st.sampled_from([1, 2, 6]), st.integers(0, 3))
def test_the_report_is_finite_for_small_inputs_and_none_only_where_all_are_right_or_wrong(n, k, seed):
    logits, target = random_logits(n, k, seed)
    report = metrics.calibration_report(logits, target, bootstrap=3)
    one_sided = report['error'] in (0, 100)
    assert {name for name, value in report.items() if value is None} == (
        {'auroc', 'aupr_right', 'aupr_wrong'} if one_sided else set()
    )
    assert all(math.isfinite(value) for value in report.values() if value is not None)
    brier = report['brier_reliability'] - report['brier_resolution'] + report['brier_uncertainty']
    assert brier == pytest.approx(report['brier'], abs=1e-6)


def test_importing_metrics_needs_torch_alone():
    tree = ast.parse(Path(metrics.__file__).read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition('.')[0] for name in modules} - sys.stdlib_module_names == {'torch'}
