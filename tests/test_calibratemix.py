import ast
import inspect
import math
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import calibratemix
from calibratemix import PRESETS, CalibrateMix, MarginBank, margin, margins, pair_dissimilar, split_easy_hard

ROOT = Path(calibratemix.__file__).parent
INF, NAN = math.inf, math.nan
quick = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def loop_margins(row):
    return [z - max(v for j, v in enumerate(row) if j != c) for c, z in enumerate(row)]


def loop_bank(n, k, smoothing, visits):
    """METHOD's recursion in float64, one visit after the other: tables of value, count and label."""
    value, count, label = np.zeros((n, k)), np.zeros(n, int), np.full(n, -1)
    for i, row, y in visits:
        m = np.array(loop_margins(row))
        if not np.isfinite(m).all():
            continue
        d = smoothing / (1 + count[i])
        value[i] = m * d + value[i] * (1 - d)
        count[i] += 1
        label[i] = y
    return value, count, label


# ---------------------------------------------------------------------------------------------------------------------
# Margins


def test_margins_equal_a_loop_over_the_definition():
    logits = torch.randn(40, 7)
    expected = torch.tensor([loop_margins(row) for row in logits.double().tolist()])
    torch.testing.assert_close(margins(logits), expected.float(), rtol=0, atol=1e-6)
    label = torch.randint(7, (40,))
    torch.testing.assert_close(margin(logits, label), expected[range(40), label].float(), rtol=0, atol=1e-6)


def test_margins_of_tied_top_logits_are_zero_for_both():
    assert margins(torch.tensor([[2., 5., 5., 1.]])).tolist() == [[-3, 0, 0, -4]]
    assert margins(torch.full((1, 3), 0.7)).tolist() == [[0, 0, 0]]
    assert margins(torch.tensor([[1., 3.]])).tolist() == [[-2, 2]]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_the_margins_of_their_float32_upcast(dtype):
    logits = (30 * torch.randn(64, 10)).to(dtype)
    expected = margins(logits.float())
    bank, bank32 = MarginBank(64, 10), MarginBank(64, 10)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(margins(logits), expected)
        bank.update(torch.arange(64), logits, logits.argmax(1))
    assert torch.equal(margins(logits), expected) and expected.dtype == torch.float32
    bank32.update(torch.arange(64), logits.float(), logits.argmax(1))
    assert torch.equal(bank.value, bank32.value)
    # Differences taken in half precision are others, or this test could not fail.
    assert not torch.equal((logits[:, :1] - logits[:, 1:]).float(), logits[:, :1].float() - logits[:, 1:].float())


@pytest.mark.parametrize('shape', [(3,), (4, 1), (2, 3, 4)])
def test_margins_reject_what_is_not_rows_of_two_or_more_classes(shape):
    with pytest.raises(ValueError, match=r'logits: expected \[B, K\] with K >= 2, got \['):
        margins(torch.zeros(shape))


# ---------------------------------------------------------------------------------------------------------------------
# Margin bank


def test_aum_is_the_mean_of_logit_margins_not_of_probabilities():
    bank = MarginBank(4)
    for row, expected in (([2., 1, 0], 1), ([0., 3, 1], -1)):
        bank.update(torch.tensor([3]), torch.tensor([row]), torch.tensor([0]))
        assert bank.lookup(torch.tensor([3])).tolist() == [expected]
    assert margin(torch.tensor([[2., 1, 0], [0, 3, 1]]), torch.tensor([0, 0])).tolist() == [1, -3]


def test_aum_equals_the_aum_package_on_a_random_history(tmp_path):
    aum = pytest.importorskip('aum')
    calculator = aum.AUMCalculator(str(tmp_path))
    bank, label = MarginBank(50), torch.randint(10, (50,))
    for _ in range(20):
        for index in torch.randperm(50).split(8):
            logits = 4 * torch.randn(len(index), 10)
            calculator.update(logits, label[index], index.tolist())
            bank.update(index, logits, label[index])
    expected = torch.tensor([calculator.sums[i] / calculator.counts[i] for i in range(50)])
    torch.testing.assert_close(bank.lookup(torch.arange(50)), expected, rtol=0, atol=1e-5)
    assert bank.count.tolist() == [20] * 50


def test_apm_is_the_weighted_mean_of_one_class_through_changing_pseudo_labels():
    bank, index = MarginBank(2, 3, smoothing=0.997), torch.tensor([1])
    bank.update(index, torch.tensor([[3., 1, 0]]), torch.tensor([0]))
    bank.update(index, torch.tensor([[1., 4, 0]]), torch.tensor([1]))
    d = 0.997
    expected = 3 * d / 2 + (-2 * d) * (1 - d / 2)  # class 1 alone; with one number a sample the first would be +2
    assert float(bank.lookup(index, torch.tensor([1]))) == pytest.approx(expected, abs=1e-6)
    assert bank.label.tolist() == [-1, 1]


@pytest.mark.parametrize('num_classes', [None, 5])
def test_first_visit_stores_the_smoothed_margin(num_classes):
    bank = MarginBank(3, num_classes, smoothing=0.9)
    bank.update(torch.tensor([2]), torch.tensor([[1., 0, 5, 0, 0]]), torch.tensor([2]))
    assert float(bank.lookup(torch.tensor([2]), torch.tensor([2]))) == pytest.approx(0.9 * 4)
    assert bank.lookup(torch.tensor([0, 1]), torch.tensor([0, 0])).tolist() == [-INF, -INF]


@pytest.mark.parametrize('broken', [0, 0.3, 1])
@pytest.mark.parametrize('smoothing', [1.0, 0.997])
def test_bank_equals_a_loop_with_repeated_indices_and_overflowed_rows(smoothing, broken):
    n, k = 6, 4
    aum, apm, visits = MarginBank(n, smoothing=smoothing), MarginBank(n, k, smoothing=smoothing), []
    own_label = torch.randint(k, (n,))
    for size in (20, 1, 0, 7, 33, 2):
        index, logits = torch.randint(n - 1, (size,)), 3 * torch.randn(size, k)  # the last sample is never visited
        bad = torch.rand(size) < broken
        logits[bad] = torch.tensor([NAN, INF, -INF])[torch.randint(3, (size, k))][bad]
        pseudo = torch.randint(k, (size,))
        apm.update(index, logits, pseudo)
        visits += zip(index.tolist(), logits.double().tolist(), pseudo.tolist())
        # A row without a finite margin of its own label is no visit to the AUM either.
        aum.update(index, torch.where(bad[:, None], NAN, logits), own_label[index])
    value, count, label = loop_bank(n, k, smoothing, visits)
    np.testing.assert_allclose(apm.value, value, rtol=0, atol=1e-5)
    np.testing.assert_allclose(aum.value, value[range(n), own_label], rtol=0, atol=1e-5)
    assert apm.count.tolist() == aum.count.tolist() == count.tolist()
    assert apm.label.tolist() == label.tolist()
    assert broken == 1 or max(count) > 5


@pytest.mark.parametrize('num_classes', [None, 4])
def test_a_batch_without_repeated_indices_gives_the_same_tables_whether_that_is_known_or_not(num_classes):
    banks = [MarginBank(9, num_classes, 0.997) for _ in range(3)]
    for _ in range(4):
        index, logits = torch.randperm(9)[:6], torch.randn(6, 4)
        logits[0] = NAN
        for bank, repeated in zip(banks, (None, False, True)):
            bank.update(index, logits, index % 4, repeated)
    for bank in banks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(bank.buffers(), banks[0].buffers()))


def test_a_repeated_index_is_two_visits_one_after_the_other():
    logits, label = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    together, apart = MarginBank(1, 3, smoothing=0.5), MarginBank(1, 3, smoothing=0.5)
    together.update(torch.zeros(5, dtype=torch.long), logits, label)
    for b in range(5):
        apart.update(torch.zeros(1, dtype=torch.long), logits[b:b + 1], label[b:b + 1])
    torch.testing.assert_close(together.value, apart.value, rtol=0, atol=1e-6)
    backwards = MarginBank(1, 3, smoothing=0.5)
    backwards.update(torch.zeros(5, dtype=torch.long), logits.flip(0), label.flip(0))
    assert not torch.allclose(together.value, backwards.value)
    assert together.count.tolist() == [5] and together.label.tolist() == [0]


@pytest.mark.parametrize('logits', [[NAN, 1, 2], [INF, 1, 2], [INF, INF, 2], [-INF, 1, 2], [3e38, -3e38, -3e38]])
@pytest.mark.parametrize('num_classes', [None, 3])
def test_rows_that_are_not_finite_are_never_stored(num_classes, logits):
    bank = MarginBank(2, num_classes)
    bank.update(torch.tensor([0, 1]), torch.tensor([[1., 2, 4], [1., 2, 4]]), torch.tensor([2, 2]))
    before = {name: table.clone() for name, table in bank.state_dict().items()}
    bank.update(torch.tensor([1, 1]), torch.tensor([logits, logits]), torch.tensor([0, 0]))
    assert all(torch.equal(table, before[name]) for name, table in bank.state_dict().items())


def test_margins_whose_difference_overflows_store_neither_inf_nor_nan():
    bank = MarginBank(1, 2)
    for logits in ([[2e38, 0.]], [[0., 2e38], [2e38, 0.]], [[1., 0.]]):
        bank.update(torch.zeros(len(logits), dtype=torch.long), torch.tensor(logits), torch.zeros(len(logits)).long())
        assert bank.value.isfinite().all()
    assert bank.value.tolist() == [[1, -1]] and bank.count.tolist() == [1]


def test_a_hundred_thousand_visits_stay_close_to_float64():
    banks = [(MarginBank(1, 3, d, dtype), tolerance) for d in (1.0, 0.997)
             for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 5e-2))]
    logits = torch.tensor([2., 0, -1]) + torch.randn(100_000, 3)
    for rows in logits.split(200):
        for bank, _ in banks:
            bank.update(torch.zeros(200, dtype=torch.long), rows, rows.argmax(1))
    value, d = np.zeros((2, 3)), np.array([[1.0], [0.997]])
    for t, m in enumerate(margins(logits).double().numpy()):
        value = m * d / (1 + t) + value * (1 - d / (1 + t))
    for i, (bank, tolerance) in enumerate(banks):
        assert bank.count.tolist() == [100_000]
        np.testing.assert_allclose(bank.value[0].float(), value[i // 2], rtol=0, atol=tolerance)


def test_float16_storage_computes_in_float32_and_rounds_once_an_update():
    half, full = MarginBank(20, 5, dtype=torch.float16), MarginBank(20, 5)
    for _ in range(10):
        index, logits = torch.randint(20, (64,)), 5 * torch.randn(64, 5)
        full.value.copy_(half.value)
        for bank in (half, full):
            bank.update(index, logits, logits.argmax(1))
        assert torch.equal(half.value, full.value.half())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_banks_of_a_module_that_is_cast_take_updates_in_their_new_storage(dtype):
    torch.manual_seed(0)
    plain, cast = MarginBank(20, 5), MarginBank(20, 5).to(dtype)
    for _ in range(3):
        visits = torch.randint(20, (8,)), torch.randn(8, 5), torch.randint(5, (8,))
        plain.update(*visits)
        cast.update(*visits)
    assert cast.value.dtype == dtype and torch.allclose(cast.value.float(), plain.value, atol=0.05)
    assert torch.equal(cast.label, plain.label) and cast.median().isfinite()


def test_float16_storage_never_holds_inf():
    bank = MarginBank(1, 3, dtype=torch.float16)
    for _ in range(2):
        bank.update(torch.tensor([0]), torch.tensor([[3e5, 0, -1]]), torch.tensor([0]))
        assert bank.value.tolist() == [[65504, -65504, -65504]]
    bank.update(torch.tensor([0]), torch.tensor([[0., 0, 0]]), torch.tensor([0]))
    assert bank.value[0, 0] == pytest.approx(65504 * 2 / 3, rel=1e-3)


@pytest.mark.parametrize('num_classes', [None, 4])
@pytest.mark.parametrize('index', [-1, 5])
def test_an_index_outside_of_the_bank_raises_and_changes_nothing(num_classes, index):
    bank, label = MarginBank(5, num_classes), torch.tensor([1, 1])
    with pytest.raises(IndexError, match=f'index {index} is outside of the bank of 5 samples'):
        bank.update(torch.tensor([0, index]), torch.randn(2, 4), label)
    with pytest.raises(IndexError, match=f'index {index} is outside'):
        bank.lookup(torch.tensor([0, index]), label)
    assert bank.count.sum() == 0 and bank.value.abs().sum() == 0


def test_bank_rejects_rows_or_classes_that_do_not_fit():
    bank = MarginBank(5, 4)
    with pytest.raises(ValueError, match='index, logits, label: 2, 3 and 2 rows'):
        bank.update(torch.tensor([0, 1]), torch.randn(3, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match='logits: expected 4 classes, got 3'):
        bank.update(torch.tensor([0, 1]), torch.randn(2, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize('wrong', [[0, 1], torch.tensor([0, 1]).int(), torch.tensor([0., 1])])
def test_an_index_or_label_that_is_no_int64_tensor_is_named_and_changes_nothing(wrong):
    got = getattr(wrong, 'dtype', 'list')
    right, logits = torch.tensor([0, 1]), torch.randn(2, 3)
    for bank in (MarginBank(5, 3), MarginBank(5)):
        for name in ('index', 'label'):
            with pytest.raises(TypeError, match=f'^{name}: expected an int64 tensor, got {got}$'):
                bank.update(**{**dict(index=right, logits=logits, label=right), name: wrong})
        with pytest.raises(TypeError, match='^index: expected an int64 tensor'):
            bank.lookup(wrong, right)
        assert bank.count.sum() == 0
    calmix, step = batch(num_labeled=2, num_unlabeled=2)
    counts = calmix.aum.count.clone(), calmix.apm.count.clone()
    update = dict(index=right, label=right, logits=torch.randn(2, 5), unlabeled_index=right, pseudo_label=right,
                  unlabeled_logits=torch.randn(2, 5), step=0)
    for name in ('index', 'label', 'unlabeled_index', 'pseudo_label'):
        for function, arguments in ((calmix.update, update), (calmix.mix, step)):
            with pytest.raises(TypeError, match=f'^{name}: expected an int64 tensor, got {got}$'):
                function(**{**arguments, name: wrong})
    assert torch.equal(calmix.aum.count, counts[0]) and torch.equal(calmix.apm.count, counts[1])
    with pytest.raises(TypeError, match='^labeled_to_unlabeled: expected an int64 tensor'):
        CalibrateMix(2, 6, 3, labeled_to_unlabeled=wrong)


def test_an_index_is_one_image_however_often_it_stands_in_a_list():
    """Ten images, repeated to a list of 40: with the image's own index there is one running margin for each."""
    bank, order = MarginBank(10), torch.randperm(40)
    logits = torch.randn(40, 3)
    for rows in order.split(8):
        bank.update(rows % 10, logits[rows], torch.zeros(8).long())
    expected = margin(logits, torch.zeros(40).long()).view(4, 10).mean(0)
    torch.testing.assert_close(bank.lookup(torch.arange(10)), expected, rtol=0, atol=1e-6)
    assert bank.count.tolist() == [4] * 10


@pytest.mark.parametrize('options, message', [
    (dict(num_samples=-1), 'num_samples: expected 0 or more, got -1'),
    (dict(num_classes=1), 'num_classes: expected None or at least 2, got 1'),
    (dict(smoothing=0), r'smoothing: expected a number in \(0, 1\], got 0'),
    (dict(smoothing=1.01), r'smoothing: .* got 1.01'),
    (dict(smoothing=NAN), r'smoothing: .* got nan'),
    (dict(dtype=torch.bfloat16), 'dtype: expected torch.float32 or torch.float16, got torch.bfloat16'),
])
def test_bank_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        MarginBank(**dict(dict(num_samples=3), **options))


@pytest.mark.parametrize('num_classes', [None, 3])
def test_bank_median_is_over_the_seen_samples_at_their_last_label(num_classes):
    bank = MarginBank(9, num_classes)
    assert bank.median().isnan()
    for _ in range(3):
        index = torch.randint(1, 8, (6,))
        bank.update(index, torch.randn(6, 3), torch.randint(3, (6,)) if num_classes else index % 3)
    seen = bank.count.nonzero().squeeze(1)
    assert 0 < len(seen) < 9
    values = bank.lookup(seen, bank.label[seen].long())
    assert float(bank.median()) == statistics.median_low(values.tolist())


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_bank_survives_state_dict_safetensors_and_pickle_free_saving(dtype, tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    calmix = CalibrateMix(4, 9, 3, bank_dtype=dtype)
    calmix.update(torch.tensor([0, 2]), torch.tensor([1, 2]), torch.randn(2, 3),
                  torch.tensor([8, 8, 1]), torch.tensor([0, 1, 2]), torch.randn(3, 3), step=0)
    safetensors.save_file(calmix.state_dict(), tmp_path / 'bank.safetensors')
    other = CalibrateMix(4, 9, 3, bank_dtype=dtype)
    other.load_state_dict(safetensors.load_file(tmp_path / 'bank.safetensors'))
    for name in ('aum', 'apm'):
        for table in ('value', 'count', 'label'):
            a, b = (getattr(getattr(module, name), table) for module in (calmix, other))
            assert torch.equal(a, b) and a.dtype == b.dtype and a.any()
    with pytest.raises(RuntimeError, match='size mismatch'):
        CalibrateMix(4, 10, 3).load_state_dict(calmix.state_dict())


def test_to_moves_every_tensor_and_nothing_is_a_parameter():
    calmix = CalibrateMix(4, 9, 3, labeled_to_unlabeled=torch.arange(4)).to('meta')
    tensors = [v for m in calmix.modules() for v in [*vars(m).values(), *m.buffers()] if isinstance(v, torch.Tensor)]
    assert len(tensors) >= 7 and all(t.is_meta for t in tensors)
    assert not list(calmix.parameters())


def test_an_update_leaves_its_arguments_and_no_graph():
    bank = MarginBank(4, 3)
    index, logits, label = torch.tensor([1, 1, 3]), torch.randn(3, 3, requires_grad=True), torch.tensor([0, 1, 2])
    copies = index.clone(), logits.detach().clone(), label.clone()
    bank.update(index, logits, label)
    assert all(torch.equal(a, b) for a, b in zip((index, logits, label), copies))
    assert not bank.value.requires_grad and not bank.lookup(index, label).requires_grad
    assert not margins(logits).requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Split


scores = st.lists(st.sampled_from([-INF, -2.0, -1.0, 0.0, 0.5, 3.0]), max_size=65)


@quick
@given(scores)
def test_median_split_halves_differ_by_at_most_one_and_easy_is_never_below_hard(score):
    easy = split_easy_hard(torch.tensor(score))
    assert easy.dtype == torch.bool and len(easy) == len(score)
    num_easy = int(easy.sum())
    assert num_easy == len(score) // 2  # so the halves hold every sample once, and an odd one is hard
    if num_easy:
        assert min(s for s, e in zip(score, easy) if e) >= max(s for s, e in zip(score, easy) if not e)


@pytest.mark.parametrize('size', [1, 2, 3, 64])
def test_median_split_of_equal_margins_does_not_fall_on_one_side(size):
    assert int(split_easy_hard(torch.zeros(size)).sum()) == size // 2
    assert int(split_easy_hard(torch.full((size,), -INF)).sum()) == size // 2


def test_median_split_ties_at_the_median_go_by_position():
    assert split_easy_hard(torch.tensor([0., 1, 0, 0, 2, 0])).tolist() == [True, True, False, False, True, False]


def test_a_sample_never_seen_is_the_hardest():
    assert split_easy_hard(torch.tensor([-INF, -9e9, 5, -INF])).tolist() == [False, True, True, False]
    assert split_easy_hard(torch.tensor([-INF, 1.]), torch.tensor(0.)).tolist() == [False, True]


@quick
@given(scores, st.sampled_from([-2.0, -1.0, 0.0, 0.5, 0.7]))
def test_threshold_split_halves_the_ties_and_only_the_ties(score, threshold):
    easy = split_easy_hard(torch.tensor(score), torch.tensor(threshold)).tolist()
    assert all(e == (s > threshold) for s, e in zip(score, easy) if s != threshold)
    ties = [e for s, e in zip(score, easy) if s == threshold]
    assert sum(ties) == len(ties) // 2


@pytest.mark.parametrize('threshold', [None, torch.tensor(0.)])
def test_a_nan_margin_is_an_error_that_names_its_position(threshold):
    with pytest.raises(ValueError, match='NaN at position 2'):
        split_easy_hard(torch.tensor([0., 1, NAN, 2, NAN]), threshold)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


@pytest.mark.parametrize('share', [0.025, 0.05, 0.067, 15 / 224, 0.075, 0.1, 0.15, 1.0])
def test_k_is_the_rounded_share_of_the_candidates_and_at_least_one(share, monkeypatch):
    n = torch.arange(1, 501)
    allowed = torch.arange(500) < n[:, None]
    similarity = torch.arange(500.).repeat(500, 1)  # column c is the c-th least similar
    rand = torch.rand
    for number, pick in ((0, lambda k: 0), (1 - 2 ** -24, lambda k: k - 1)):  # the least and the largest of torch.rand
        monkeypatch.setattr(torch, 'rand', lambda *size, _x=number, **kwargs: rand(*size, **kwargs).fill_(_x))
        partner, paired = pair_dissimilar(similarity, allowed, share)
        assert paired.all()
        assert partner.tolist() == [pick(max(1, round(share * i))) for i in range(1, 501)]


def test_the_papers_k_is_11_of_224_and_the_authors_15():
    assert round(PRESETS['paper']['topk'] * 224) == 11
    assert round(PRESETS['authors-code']['topk'] * 224) == 15


@pytest.mark.parametrize('share', [0, 0.05, 0.25, 1.0])
def test_partners_are_uniform_among_the_k_least_similar(share):
    rows, num = 4000, 48
    allowed = torch.arange(num) % 6 != 1  # 40 candidates, in all of which the order of columns tells nothing
    similarity = torch.randn(num)
    ranked = [c for c in similarity.argsort().tolist() if allowed[c]]
    k = max(1, round(share * 40)) if share else 40
    partner, paired = pair_dissimilar(similarity.repeat(rows, 1), allowed.repeat(rows, 1), share)
    counts = torch.bincount(partner, minlength=num)
    assert paired.all() and counts[ranked[k:]].sum() == 0 and counts[~allowed].sum() == 0
    sigma = math.sqrt(rows / k * (1 - 1 / k))
    assert (counts[ranked[:k]] - rows / k).abs().max() <= 5 * sigma


@quick
@given(st.integers(0, 6), st.integers(0, 40), st.sampled_from([0, 0.05, 0.1, 0.5, 1.0]), st.integers(0, 99))
def test_a_partner_is_always_allowed_and_among_the_k_least_similar(rows, num, share, seed):
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randint(12, (rows, num), generator=generator).float()  # with ties
    allowed = torch.rand(rows, num, generator=generator) < torch.rand(1, generator=generator)
    partner, paired = pair_dissimilar(similarity, allowed, share)
    assert partner.shape == paired.shape == (rows,) and partner.dtype == torch.int64
    for row in range(rows):
        candidates = sorted(float(similarity[row, c]) for c in range(num) if allowed[row, c])
        assert paired[row] == bool(candidates)
        if candidates:
            k = max(1, round(share * len(candidates))) if share else len(candidates)
            assert allowed[row, partner[row]]
            assert similarity[row, partner[row]] <= candidates[k - 1]


@pytest.mark.parametrize('value', [NAN, INF, -INF])
@pytest.mark.parametrize('share', [0, 0.05, 1.0])
def test_overflowed_similarities_never_bring_in_a_column_that_is_not_allowed(share, value):
    allowed = torch.arange(8).repeat(200, 1) % 4 == 2
    partner, _ = pair_dissimilar(torch.full((200, 8), value), allowed, share)
    assert set(partner.tolist()) <= {2, 6}
    mixed = torch.tensor([[NAN, 0.9, 0.1, 0.5]])
    assert pair_dissimilar(mixed, torch.tensor([[True, True, True, False]]), 0.05)[0].tolist() == [2]


def batch(num_labeled=12, num_unlabeled=40, k=5, seed=0, **options):
    """A CalibrateMix with random margins in its banks, and the keyword arguments of a step of `mix`."""
    g = torch.Generator().manual_seed(seed)
    calmix = CalibrateMix(20, 60, k, **options)
    index, unlabeled = torch.randperm(20, generator=g), torch.randperm(60, generator=g)
    calmix.update(index, index % k, torch.randn(20, k, generator=g),
                  unlabeled, unlabeled % k, torch.randn(60, k, generator=g), step=10 ** 6)
    index, unlabeled = index[:num_labeled], unlabeled[:num_unlabeled]
    return calmix, dict(
        index=index,
        label=index % k,
        images=torch.rand(num_labeled, 3, 4, 4, generator=g),
        features=torch.randn(num_labeled, 16, generator=g),
        unlabeled_index=unlabeled,
        pseudo_label=torch.randint(k, (num_unlabeled,), generator=g),
        unlabeled_images=torch.rand(num_unlabeled, 3, 4, 4, generator=g),
        unlabeled_features=torch.randn(num_unlabeled, 16, generator=g),
    )


def loop_easy(values):
    """Positions of the easier half."""
    return set(sorted(range(len(values)), key=lambda i: -values[i])[:len(values) // 2])


SIMILARITY = {
    'cosine': lambda a, b: np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b),
    'euclidean': lambda a, b: -np.linalg.norm(a - b),
    'dot': np.dot,
}


@pytest.mark.parametrize('sizes', [(12, 40), (7, 4), (5, 0), (0, 5), (1, 1), (1, 2), (2, 1), (3, 3)])
def test_every_pair_has_one_labeled_parent_and_joins_easy_with_hard(sizes):
    calmix, step = batch(*sizes)
    mixed = calmix.mix(**step)
    easy = loop_easy(calmix.aum.lookup(step['index']).tolist())
    unlabeled_easy = loop_easy(calmix.apm.lookup(step['unlabeled_index'], step['pseudo_label']).tolist())
    num_hard = sizes[1] - len(unlabeled_easy)
    assert len(mixed.images) == (sizes[0] if sizes[1] else 0)
    for row in range(len(mixed.images)):
        assert bool(mixed.easy[row]) == (row in easy)
        assert bool(mixed.paired[row]) == (num_hard > 0 if row in easy else len(unlabeled_easy) > 0)
        expected = step['images'][row]
        if mixed.paired[row]:
            partner = int(mixed.partner[row])
            assert (partner in unlabeled_easy) == (row not in easy)
            expected = 0.4 * expected + 0.6 * step['unlabeled_images'][partner]
        torch.testing.assert_close(mixed.images[row], expected, rtol=0, atol=1e-6)
    logits = torch.randn(len(mixed.images), 5, requires_grad=True)
    loss = calmix.loss(logits, mixed)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    assert bool(loss > 0) == bool(mixed.paired.any())


@pytest.mark.parametrize('similarity', ['cosine', 'euclidean', 'dot'])
@pytest.mark.parametrize('space', ['feature', 'pixel'])
def test_partners_are_among_the_k_least_similar_of_the_other_side(space, similarity):
    share = 0.15  # 3 of 20 candidates
    calmix, step = batch(topk=share, similarity=similarity, space=space)
    a, b = ('features', 'unlabeled_features') if space == 'feature' else ('images', 'unlabeled_images')
    a, b = step[a].flatten(1).double().numpy(), step[b].flatten(1).double().numpy()
    easy = loop_easy(calmix.apm.lookup(step['unlabeled_index'], step['pseudo_label']).tolist())
    seen = [set() for _ in range(12)]
    for _ in range(60):
        mixed = calmix.mix(**step)
        for row, partner in enumerate(mixed.partner.tolist()):
            seen[row].add(partner)
    for row in range(12):
        others = [j for j in range(40) if (j in easy) != bool(mixed.easy[row])]
        ranked = sorted(others, key=lambda j: SIMILARITY[similarity](a[row], b[j]))
        assert seen[row] == set(ranked[:3])


def test_the_pixel_similarity_reads_no_features_and_the_feature_one_no_pixels():
    calmix, step = batch(space='pixel', topk=0.05)
    partner = calmix.mix(**step).partner
    assert torch.equal(calmix.mix(**dict(step, features=None, unlabeled_features=None)).partner, partner)
    empty = dict(unlabeled_index=partner[:0], pseudo_label=partner[:0], unlabeled_images=step['unlabeled_images'][:0])
    assert len(calmix.mix(**dict(step, features=None, unlabeled_features=None, **empty)).images) == 0
    calmix, step = batch(topk=0.05)
    partner = calmix.mix(**step).partner
    assert torch.equal(calmix.mix(**dict(step, images=torch.rand(12, 3, 4, 4))).partner, partner)


def test_similarities_are_float32_under_autocast():
    calmix, step = batch(topk=0.05)  # one candidate, so no randomness
    close = torch.randn(1, 16).repeat(40, 1) + 1e-4 * torch.randn(40, 16)  # bfloat16 could not tell them apart
    partner = calmix.mix(**dict(step, unlabeled_features=close)).partner
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(calmix.mix(**dict(step, unlabeled_features=close)).partner, partner)


def test_one_candidate_is_taken_and_without_candidates_the_image_stays_as_it_is():
    calmix, step = batch(num_labeled=2, num_unlabeled=1)  # an odd image counts as hard
    mixed = calmix.mix(**step)
    assert mixed.paired.tolist() == mixed.easy.tolist() and mixed.easy.sum() == 1
    alone, pair = int((~mixed.easy).nonzero()), int(mixed.easy.nonzero())
    assert mixed.partner[pair] == 0 and mixed.gamma[alone] == 1 and mixed.weight.tolist()[alone] == 0
    assert torch.equal(mixed.images[alone], step['images'][alone])
    assert torch.equal(mixed.target[alone], F.one_hot(step['label'][alone], 5).float())
    logits = torch.randn(2, 5)
    expected = -(mixed.target[pair] * logits[pair].log_softmax(0)).sum()
    assert float(calmix.loss(logits, mixed)) == pytest.approx(float(expected))


@pytest.mark.parametrize('share', [0, 1.0])
def test_a_labeled_image_is_never_mixed_with_itself(share):
    where = torch.full((20,), -1)
    where[:10] = torch.arange(10, 20)
    calmix, step = batch(topk=share, labeled_to_unlabeled=where, pairing='random')
    # Each labeled image that is in the unlabeled set stands in this batch, twice; image 10 and beyond are not in it.
    step['index'] = torch.arange(12)
    step['unlabeled_index'] = torch.cat([torch.arange(10, 20), torch.arange(10, 20), torch.arange(40, 60)])
    own = other = 0
    for _ in range(100):
        mixed = calmix.mix(**step)
        met = step['unlabeled_index'][mixed.partner]
        own += int((mixed.paired & (met == where[:12])).sum())
        other += int((mixed.paired & (met < 20)).sum())
        assert mixed.paired.all()
    assert own == 0 and other > 300
    same = dict(step, unlabeled_index=torch.full((40,), 13))  # the only candidate is image 3 itself
    assert calmix.mix(**same).paired.tolist() == [i != 3 for i in range(12)]


def test_an_image_that_is_its_own_least_similar_candidate_is_still_left_out():
    where = torch.arange(20) + 5
    calmix, step = batch(topk=0.05, similarity='dot', labeled_to_unlabeled=where)
    step['features'] = -step['features'].abs()
    step['unlabeled_index'] = torch.arange(40)
    step['unlabeled_features'][where[step['index']]] = 100  # by far the most dissimilar of all
    mixed = calmix.mix(**step)
    assert mixed.paired.all() and not (mixed.partner == where[step['index']]).any()


def test_random_pairing_ignores_the_banks_and_the_features():
    calmix, step = batch(pairing='random', topk=0.05)
    empty = CalibrateMix(20, 60, 5, pairing='random')
    easy, partners = torch.zeros(12), torch.zeros(12, 40)
    for seed in range(300):
        torch.manual_seed(seed)
        mixed = calmix.mix(**step)
        assert int(mixed.easy.sum()) == 6 and mixed.paired.all()
        easy += mixed.easy
        partners[torch.arange(12), mixed.partner] += 1
        if seed < 5:
            torch.manual_seed(seed)
            again = empty.mix(**dict(step, features=None, unlabeled_features=None))
            assert torch.equal(again.partner, mixed.partner) and torch.equal(again.easy, mixed.easy)
    assert (easy - 150).abs().max() < 5 * math.sqrt(300 / 4)  # every image is on either side half of the time
    assert (partners.sum(0) - 90).abs().max() < 5 * math.sqrt(90)  # and every candidate is drawn alike


def test_unlabeled_images_below_the_confidence_are_no_candidates():
    calmix, step = batch(topk=1.0, min_confidence=0.7)
    confidence = torch.rand(40)
    confidence[0] = 0.7
    drawn = set()
    for _ in range(200):
        mixed = calmix.mix(**step, confidence=confidence)
        drawn |= set(mixed.partner[mixed.paired].tolist())
    assert drawn == set((confidence >= 0.7).nonzero().squeeze(1).tolist())
    mixed = calmix.mix(**step, confidence=torch.zeros(40))
    assert not mixed.paired.any() and torch.equal(mixed.images, step['images'])
    logits = torch.randn(12, 5, requires_grad=True)
    calmix.loss(logits, mixed).backward()
    assert logits.grad.eq(0).all()
    with pytest.raises(ValueError, match='confidence: needed with min_confidence=0.7'):
        calmix.mix(**step)


def test_the_bank_split_compares_with_the_median_of_the_whole_bank():
    calmix, step = batch(split='bank', topk=0)
    calmix.apm.value.sub_(1.5)
    step['index'] = calmix.aum.value.argsort(descending=True)[:12]
    aum = calmix.aum.value.tolist()
    apm = [float(calmix.apm.value[i, calmix.apm.label[i]]) for i in range(60)]
    easy = [aum[i] > statistics.median_low(aum) for i in step['index']]
    assert sum(easy) == 10  # the batch's own median: 6
    now = calmix.apm.value[step['unlabeled_index'], step['pseudo_label']].tolist()
    unlabeled_easy = {j for j in range(40) if now[j] > statistics.median_low(apm)}
    partners = {True: set(), False: set()}
    for _ in range(200):
        mixed = calmix.mix(**step)
        assert mixed.easy.tolist() == easy and mixed.paired.all()
        for side, partner in zip(easy, mixed.partner.tolist()):
            partners[side].add(partner)
    assert partners == {True: set(range(40)) - unlabeled_easy, False: unlabeled_easy}


def test_a_split_of_a_larger_batch_is_taken_as_it_is():
    """Two halves of a batch, each mixed by the easy and hard of the whole; alone, each has its own halves."""
    calmix, step = batch(num_labeled=12, num_unlabeled=40, split='joined', topk=0)
    names = ('index', 'unlabeled_index', 'pseudo_label')
    easy, unlabeled_easy = calmix.find_easy(*(step[name] for name in names))
    aum = calmix.aum.lookup(step['index'])
    assert set(easy.nonzero().squeeze(1).tolist()) == loop_easy(aum.tolist())
    halves = [slice(0, 6), slice(6, 12)], [slice(0, 20), slice(20, 40)]
    uneven = 0
    for rows, unlabeled_rows in zip(*halves):
        own = {key: value[unlabeled_rows if 'label' in key and key != 'label' else rows] for key, value in step.items()}
        mixed = calmix.mix(**own, easy=(easy[rows], unlabeled_easy[unlabeled_rows]))
        assert torch.equal(mixed.easy, easy[rows])
        assert torch.equal(unlabeled_easy[unlabeled_rows][mixed.partner], ~mixed.easy)
        uneven += int(mixed.easy.sum()) != 3
        assert int(calmix.mix(**own).easy.sum()) == 3
    assert uneven == 2


def test_the_bank_split_of_equal_margins_still_pairs():
    calmix, step = batch(split='bank')
    calmix.aum.value.zero_()
    calmix.apm.value.zero_()
    mixed = calmix.mix(**step)
    assert mixed.paired.all() and int(mixed.easy.sum()) == 6


def test_an_index_outside_of_the_set_raises_in_mix():
    calmix, step = batch()
    for name, bad in (('index', -1), ('index', 20), ('unlabeled_index', -1), ('unlabeled_index', 60)):
        index = step[name].clone()
        index[2] = bad
        with pytest.raises(IndexError, match=f'index {bad} is outside'):
            calmix.mix(**{**step, name: index})


# ---------------------------------------------------------------------------------------------------------------------
# Mixup and its loss


MIXING = [dict(), dict(gamma_dist='beta-batch'), dict(gamma_dist='beta-pair'), dict(pairing='random'), dict(topk=0),
          dict(split='bank'), dict(preset='authors-code')]


@pytest.mark.parametrize('sizes', [(12, 40), (7, 4), (1, 1), (5, 0), (0, 5)])
@pytest.mark.parametrize('options', MIXING)
def test_pixels_and_targets_are_mixed_with_the_same_partner_and_weight(options, sizes):
    calmix, step = batch(*sizes, **options)
    step['images'] = step['label'].float().view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()
    step['unlabeled_images'] = step['pseudo_label'].float().view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()
    before = {name: value.clone() for name, value in step.items()}
    mixed = calmix.mix(**step)
    mean = (mixed.target * torch.arange(5)).sum(1)
    torch.testing.assert_close(mixed.images, mean.view(-1, 1, 1, 1).expand_as(mixed.images), rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed.target.sum(1), torch.ones(len(mean)), rtol=0, atol=1e-6)
    for row in range(len(mean)):
        target = [0.] * 5
        target[step['label'][row]] += float(mixed.gamma[row])
        target[step['pseudo_label'][mixed.partner[row]]] += 1 - float(mixed.gamma[row])
        assert mixed.target[row].tolist() == pytest.approx(target, abs=1e-6)
    assert all(torch.equal(step[name], before[name]) for name in step)
    assert mixed.target.dtype == mixed.gamma.dtype == torch.float32


def test_the_fixed_weight_is_that_of_the_labeled_image():
    calmix, step = batch(gamma=0.25)
    step['images'], step['unlabeled_images'] = torch.ones(12, 3, 4, 4), torch.zeros(40, 3, 4, 4)
    mixed = calmix.mix(**step)
    assert mixed.images.unique().tolist() == [0.25] and mixed.gamma.tolist() == [0.25] * 12


@pytest.mark.parametrize('loss', ['ce', 'bce'])
def test_weight_one_gives_the_labeled_images_and_the_plain_loss_exactly(loss):
    calmix, step = batch(num_labeled=2, num_unlabeled=9, gamma=1, loss=loss)  # one row in each group
    mixed, logits = calmix.mix(**step), torch.randn(2, 5)
    assert mixed.paired.all()
    assert torch.equal(mixed.images, step['images'])
    onehot = F.one_hot(step['label'], 5).float()
    assert torch.equal(mixed.target, onehot)
    if loss == 'ce':
        assert torch.equal(calmix.loss(logits, mixed), F.cross_entropy(logits, step['label'], reduction='sum'))
    else:
        expected = sum(F.binary_cross_entropy_with_logits(z, t) for z, t in zip(logits, onehot))
        torch.testing.assert_close(calmix.loss(logits, mixed), expected)


@pytest.mark.parametrize('options', MIXING)
@pytest.mark.parametrize('loss', ['ce', 'bce'])
def test_the_loss_is_the_sum_of_the_two_groups_means(loss, options):
    calmix, step = batch(num_labeled=11, **dict(options, loss=loss))  # groups of unequal size
    mixed, logits = calmix.mix(**step), 3 * torch.randn(11, 5)
    groups = {True: [], False: []}
    for row in range(11):
        g, y, pseudo = float(mixed.gamma[row]), step['label'][row], step['pseudo_label'][mixed.partner[row]]
        if loss == 'ce':
            value = g * F.cross_entropy(logits[row], y) + (1 - g) * F.cross_entropy(logits[row], pseudo)
        else:
            target = g * F.one_hot(y, 5) + (1 - g) * F.one_hot(pseudo, 5)
            value = F.binary_cross_entropy_with_logits(logits[row], target)
        groups[bool(mixed.easy[row])].append(float(value))
    expected = statistics.mean(groups[True]) + statistics.mean(groups[False])
    assert float(calmix.loss(logits, mixed)) == pytest.approx(expected, abs=1e-5)
    assert len(groups[True]) != len(groups[False])


def test_the_factor_of_the_total_is_left_to_the_training_loop():
    (one, step), (two, _) = batch(weight=1), batch(weight=2.5)
    mixed, logits = one.mix(**step), torch.randn(12, 5)
    assert torch.equal(one.loss(logits, mixed), two.loss(logits, mixed)) and two.weight == 2.5


@pytest.mark.parametrize('classes, ratio', [(10, 0.17), (100, 0.05), (1000, 0.016)])
def test_the_gradient_of_the_bce_variant_is_weaker_as_published(classes, ratio):
    label = torch.tensor([0])
    mixed = calibratemix.Mixed(None, F.one_hot(label, classes).float(), None, None, None, None, torch.ones(1))
    norms = []
    for loss in ('bce', 'ce'):
        logits = torch.zeros(1, classes, requires_grad=True)
        CalibrateMix(1, 1, classes, loss=loss).loss(logits, mixed).backward()
        norms.append(float(logits.grad.norm()))
    assert norms[0] / norms[1] == pytest.approx(ratio, rel=0.05)


def test_the_loss_is_float32_under_autocast_and_on_half_precision_logits():
    calmix, step = batch()
    mixed, logits = calmix.mix(**step), (20 * torch.randn(12, 5)).bfloat16()
    expected = calmix.loss(logits.float(), mixed)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = calmix.loss(logits, mixed)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


@pytest.mark.parametrize('loss', ['ce', 'bce'])
@pytest.mark.parametrize('sizes', [(5, 0), (0, 5), (1, 1)])
def test_without_a_pair_the_loss_is_zero_and_has_a_graph(sizes, loss):
    calmix, step = batch(*sizes, loss=loss)
    net = torch.nn.Linear(48, 5)
    mixed = calmix.mix(**step)
    value = calmix.loss(net(mixed.images.flatten(1)), mixed)
    value.backward()
    assert value == 0 and net.weight.grad.eq(0).all()


def test_no_gradient_reaches_bank_split_or_pairing():
    calmix, step = batch()
    leaves = {name: step[name].requires_grad_() for name in step if step[name].is_floating_point()}
    logits, weak = torch.randn(12, 5, requires_grad=True), torch.randn(40, 5, requires_grad=True)
    calmix.update(step['index'], step['label'], logits, step['unlabeled_index'], step['pseudo_label'], weak, step=0)
    mixed = calmix.mix(**step)
    assert not any(t.requires_grad for t in [*mixed, *calmix.buffers()])
    net = torch.nn.Linear(48, 5)
    calmix.loss(net(mixed.images.flatten(1)), mixed).backward()
    assert net.weight.grad.abs().sum() > 0
    assert all(t.grad is None for t in [*leaves.values(), logits, weak])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_mixed_images_keep_their_dtype_and_are_computed_in_float32(dtype):
    calmix, step = batch(topk=0.05)
    expected = calmix.mix(**step).images
    low = dict(step, images=step['images'].to(dtype), unlabeled_images=step['unlabeled_images'].to(dtype))
    mixed = calmix.mix(**low)
    rounded = dict(low, images=low['images'].float(), unlabeled_images=low['unlabeled_images'].float())
    assert mixed.images.dtype == dtype and mixed.target.dtype == torch.float32
    if dtype != torch.float64:
        expected = calmix.mix(**rounded).images.to(dtype)
        assert torch.equal(mixed.images, expected)  # so the weights are those of the targets, not rounded ones
    torch.testing.assert_close(mixed.images.float(), expected.float())


def test_integer_images_are_refused_instead_of_losing_the_weight():
    calmix, step = batch()
    with pytest.raises(ValueError, match='images: expected floating dtypes, got torch.uint8 and torch.float32'):
        calmix.mix(**dict(step, images=(255 * step['images']).byte()))


def test_channels_last_images_stay_channels_last():
    calmix, step = batch()
    last = {name: step[name].to(memory_format=torch.channels_last) for name in ('images', 'unlabeled_images')}
    images = calmix.mix(**dict(step, **last)).images
    assert images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()


def draws(gamma_dist, times=400):
    calmix, step = batch(gamma_dist=gamma_dist, gamma=0.4)
    torch.manual_seed(1)
    mixed = calmix.mix(**step)
    return mixed.easy, torch.stack([mixed.gamma, *(calmix.mix(**step).gamma for _ in range(times - 1))])


def test_beta_per_batch_draws_one_weight_per_group_and_step():
    easy, gamma = draws('beta-batch')
    for side in (easy, ~easy):
        assert (gamma[:, side] == gamma[:, side][:, :1]).all()
    assert (gamma[:, easy][:, 0] != gamma[:, ~easy][:, 0]).all()
    assert len(gamma[:, 0].unique()) > 390


def test_beta_per_pair_draws_one_weight_per_pair_and_step():
    _, gamma = draws('beta-pair')
    assert len(gamma.unique()) > 0.98 * gamma.numel()


@pytest.mark.parametrize('gamma_dist', ['beta-batch', 'beta-pair'])
def test_beta_weights_follow_beta_0_4_and_are_not_folded(gamma_dist):
    easy, gamma = draws(gamma_dist)
    values = gamma.flatten() if gamma_dist == 'beta-pair' else torch.cat([gamma[:, easy][:, 0], gamma[:, ~easy][:, 0]])
    oracle = np.random.default_rng(0).beta(0.4, 0.4, 100_000)
    for x in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        expected = (oracle <= x).mean()
        sigma = math.sqrt(expected * (1 - expected) / len(values))
        assert float((values <= x).float().mean()) == pytest.approx(expected, abs=4 * sigma)


@pytest.mark.parametrize('options', MIXING)
def test_the_seed_governs_every_draw(options):
    calmix, step = batch(**{'topk': 0.25, **options})
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(calmix.mix(**step))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1]))
    assert not torch.equal(results[0].images, results[2].images)


# ---------------------------------------------------------------------------------------------------------------------
# The weight that is steered


def steer(calmix, index, confidence, pseudo_label, step=0, dtype=torch.float32, label=0):
    """A step of two classes with weak views of these confidences and pseudo-labels."""
    sign = torch.tensor([1. if k == 0 else -1. for k in pseudo_label])
    logits = torch.stack([sign, -sign], 1) * torch.tensor(confidence).logit()[:, None] / 2
    calmix.update(torch.tensor([0]), torch.tensor([label]), torch.randn(1, 2), torch.tensor(index),
                  torch.tensor(pseudo_label), logits.to(dtype), step)
    return float(calmix.weight)


@pytest.mark.parametrize('dtype, close', [(torch.float32, 1e-6), (torch.float16, 1e-4)])
def test_the_weight_moves_by_the_gap_computed_by_hand_on_three_images(dtype, close):
    calmix = CalibrateMix(1, 3, 2, 'steered', weight_rate=0.5, warmup_steps=1)
    assert steer(calmix, [0, 1, 2], [.9, .8, .7], [0, 1, 0], 0, dtype) == 0  # in warmup: labels are kept, no more
    # 0 and 1 keep their labels, 2 changes: gaps of -0.1, -0.4 and -0.2 + 1.2, times 0.5 / 3.
    assert steer(calmix, [0, 1, 2], [.9, .6, .8], [0, 1, 1], 1, dtype) == pytest.approx(0.25 / 3, abs=close)
    # No label changes, two images: -0.2 and -0.1, times 0.5 / 2.
    assert steer(calmix, [2, 0], [.8, .9], [1, 0], 2, dtype) == pytest.approx(0.25 / 3 - 0.075, abs=close)
    assert steer(calmix, [1], [.6], [0], 3, dtype) == pytest.approx(0.25 / 3 - 0.075 + 0.5 * 0.8, abs=close)
    edge = CalibrateMix(1, 3, 2, 'steered', weight_rate=9, weight=2, warmup_steps=0)
    assert steer(edge, [0, 1], [.6, .6], [0, 0]) == 0  # no image was visited before
    assert steer(edge, [0, 1], [.6, .6], [0, 0]) == 0  # not below 0
    assert steer(edge, [0, 1], [.6, .6], [1, 1]) == 2  # nor above `weight`


def test_the_weight_of_a_batch_divides_by_all_images_and_sums_over_those_visited_before():
    calmix = CalibrateMix(1, 4, 2, 'steered', weight_rate=0.5, warmup_steps=0)
    steer(calmix, [0], [.9], [0])
    assert steer(calmix, [0, 1, 2, 3], [.8] * 4, [1] * 4) == pytest.approx(0.5 / 4 * 1)


def test_rows_that_are_not_finite_are_no_visits_to_the_steered_weight_and_a_later_row_is_the_label_that_counts():
    calmix = CalibrateMix(1, 3, 2, 'steered', warmup_steps=0)
    assert steer(calmix, [0, 1, 1, 2], [.9, .9, .9, .9], [0, 0, 1, 1]) == 0
    # Both rows of image 1 are compared with the label 1 that its last row had, not with one another.
    weight = steer(calmix, [1, 1], [.7, .7], [0, 0])
    assert weight == pytest.approx(0.1 * (1.2 - 0.3))
    calmix.update(torch.tensor([0]), torch.tensor([0]), torch.randn(1, 2), torch.tensor([2, 0]), torch.tensor([0, 0]),
                  torch.tensor([[NAN, 1.], [INF, 0.]]), 1)
    assert float(calmix.weight) == weight
    # Image 2 still has label 1: neither of the rows below is a change.
    assert steer(calmix, [2, 0], [.8, .8], [1, 0]) == pytest.approx(weight - 0.1 * 0.2)


def test_the_weight_depends_on_no_label_and_a_state_goes_on_as_it_was():
    other, calmix = (CalibrateMix(1, 3, 2, 'steered', warmup_steps=0) for _ in range(2))
    for module, label in ((calmix, 0), (other, 1)):
        steer(module, [0, 1, 2], [.9, .8, .7], [0, 1, 0], label=label)
        steer(module, [0, 1, 2], [.6, .8, .7], [1, 1, 0], label=label)
    assert torch.equal(calmix.weight, other.weight) and torch.equal(calmix.last_label, other.last_label)
    assert calmix.weight.shape == () and calmix.weight > 0 and "weight=1.0, weight_rate=0.1" in repr(calmix)
    resumed = CalibrateMix(1, 3, 2, 'steered', warmup_steps=0)
    resumed.load_state_dict(calmix.state_dict())
    assert steer(resumed, [1, 2], [.7, .7], [0, 0]) == steer(calmix, [1, 2], [.7, .7], [0, 0]) > float(other.weight)
    assert isinstance(CalibrateMix(1, 3, 2).weight, float) and 'weight' not in CalibrateMix(1, 3, 2).state_dict()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_the_mask_sees_logits_times_its_scale_in_float32_after_warmup_and_else_the_very_logits(dtype):
    calmix, logits = CalibrateMix(1, 3, 2, 'steered', warmup_steps=2), torch.tensor([[60000., 1.]], dtype=dtype)
    assert calmix.for_mask(logits, 1) is logits and CalibrateMix(1, 3, 2).for_mask(logits, 200_000) is logits
    scaled = calmix.for_mask(logits, 2)
    assert scaled.dtype == torch.float32 and torch.equal(scaled, logits.float() * 1.5)


def test_an_index_outside_of_the_set_changes_no_label_of_the_steered_weight():
    calmix = CalibrateMix(1, 3, 2, 'steered', apm_in_warmup=False)  # the bank does not look at it then
    for index in (-1, 3):
        with pytest.raises((RuntimeError, IndexError)):
            steer(calmix, [index], [.9], [0])
    assert (calmix.last_label == 2).all()


# ---------------------------------------------------------------------------------------------------------------------
# Options and presets


def test_presets_hold_the_values_of_the_paper_of_the_authors_code_and_ours():
    paper = dict(gamma=0.4, gamma_dist='fixed', topk=0.05, similarity='cosine', space='feature', loss='ce', weight=0.5,
                 weight_rate=0, mask_scale=1, split='batch', pairing='targeted', min_confidence=0,
                 warmup_steps=102_400, apm_in_warmup=True, mixed_statistics=False)
    authors = dict(paper, gamma_dist='beta-batch', topk=15 / 224, space='pixel', loss='bce', warmup_steps=150_000,
                   apm_in_warmup=False, mixed_statistics=True)
    ours = dict(paper, gamma=0.5, topk=0)
    steered = dict(ours, pairing='random', weight=1, weight_rate=0.1, mask_scale=1.5)
    assert PRESETS == {'paper': paper, 'authors-code': authors, 'ours': ours, 'steered': steered}
    parameters = inspect.signature(CalibrateMix).parameters
    assert parameters['preset'].default == 'paper'
    unset = {name for name, p in parameters.items() if p.default is None} - {'labeled_to_unlabeled', 'apm'}
    assert unset == set(paper)
    for name, values in PRESETS.items():
        calmix = CalibrateMix(2, 2, 2, name)
        assert calmix.options == values
        kept = dict(values, weight=0) if values['weight_rate'] else values  # steered: it starts at 0
        assert {key: getattr(calmix, 'loss_type' if key == 'loss' else key) for key in values} == kept
    assert CalibrateMix(2, 2, 2).apm.smoothing == 0.997 and CalibrateMix(2, 2, 2).aum.smoothing == 1


@pytest.mark.parametrize('preset', PRESETS)
def test_a_given_option_overrides_the_preset_even_if_it_is_zero_or_false(preset):
    options = dict(gamma=0.5, gamma_dist='beta-pair', topk=0, similarity='dot', space='pixel', loss='bce', weight=0,
                   weight_rate=0, mask_scale=2, split='bank', pairing='random', min_confidence=0.5, warmup_steps=0,
                   apm_in_warmup=False, mixed_statistics=False)
    calmix = CalibrateMix(2, 2, 2, preset, **options)
    assert {key: getattr(calmix, 'loss_type' if key == 'loss' else key) for key in options} == options
    assert "topk=0" in repr(calmix) and "loss='bce'" in repr(calmix)


@pytest.mark.parametrize('apm_in_warmup, expected', [(True, [1, 2, 3]), (False, [0, 0, 1])])
def test_apm_counts_from_the_first_step_or_only_after_warmup(apm_in_warmup, expected):
    calmix, index = CalibrateMix(3, 3, 2, warmup_steps=2, apm_in_warmup=apm_in_warmup), torch.arange(3)
    for step in range(3):
        calmix.update(index, index % 2, torch.randn(3, 2), index, index % 2, torch.randn(3, 2), step)
        assert calmix.apm.count.tolist() == [expected[step]] * 3
        assert calmix.aum.count.tolist() == [step + 1] * 3


@pytest.mark.parametrize('options, message', [
    (dict(preset='papers'), "preset: expected one of paper, authors-code, ours, steered, got 'papers'"),
    (dict(gamma_dist='beta'), "gamma_dist: expected one of fixed, beta-batch, beta-pair, got 'beta'"),
    (dict(similarity='l2'), "similarity: expected one of cosine, euclidean, dot, got 'l2'"),
    (dict(space='features'), "space: expected one of feature, pixel, got 'features'"),
    (dict(loss='mse'), "loss: expected one of ce, bce, got 'mse'"),
    (dict(split='median'), "split: expected one of batch, joined, bank, got 'median'"),
    (dict(pairing=''), "pairing: expected one of targeted, random, got ''"),
    (dict(topk=5), r'topk: expected a number in \[0, 1\], got 5'),
    (dict(topk=NAN), r'topk: expected a number in \[0, 1\], got nan'),
    (dict(min_confidence=-0.1), r'min_confidence: expected a number in \[0, 1\], got -0.1'),
    (dict(gamma=1.2), r'gamma: expected a number in \[0, 1\], got 1.2'),
    (dict(gamma=0, gamma_dist='beta-pair'), 'gamma: expected a positive number, got 0'),
    (dict(gamma=INF, gamma_dist='beta-pair'), 'gamma: expected a positive number, got inf'),
    (dict(weight=-1), 'weight: expected 0 or more, got -1'),
    (dict(weight_rate=-1), 'weight_rate: expected 0 or more, got -1'),
    (dict(mask_scale=0), 'mask_scale: expected a positive number, got 0'),
    (dict(mask_scale=NAN), 'mask_scale: expected a positive number, got nan'),
    (dict(warmup_steps=-5), 'warmup_steps: expected 0 or more, got -5'),
    (dict(num_labeled=-2), 'num_labeled: expected 0 or more, got -2'),
    (dict(num_unlabeled=-2), 'num_unlabeled: expected 0 or more, got -2'),
    (dict(num_classes=1), 'num_classes: .*at least 2, got 1'),
    (dict(apm_smoothing=0), r'smoothing: expected a number in \(0, 1\], got 0'),
    (dict(bank_dtype=torch.int8), 'dtype: expected torch.float32 or torch.float16, got torch.int8'),
    (dict(labeled_to_unlabeled=torch.zeros(5).long()), r'labeled_to_unlabeled: expected \[4\], got \[5\]'),
    (dict(labeled_to_unlabeled=torch.tensor([0, 1, 2, 6])), r'labeled_to_unlabeled: expected .* below 6, got \[6\]'),
    (dict(labeled_to_unlabeled=torch.tensor([0, 1, 2, -2])), r'labeled_to_unlabeled: expected .* got \[-2\]'),
    (dict(apm=MarginBank(5, 3)), 'apm: expected 6 samples, got 5'),
])
def test_a_wrong_argument_is_named_with_its_value_and_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        CalibrateMix(**dict(dict(num_labeled=4, num_unlabeled=6, num_classes=3), **options))


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match='top_k'):
        CalibrateMix(4, 6, 3, top_k=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# A file that stands alone


def example():
    lines = calibratemix.__doc__.split('\n')
    first = next(i for i, line in enumerate(lines) if line.startswith('    '))
    end = next(i for i in range(first, len(lines)) if lines[i] and not lines[i].startswith('    '))
    return textwrap.dedent('\n'.join(lines[first:end])).strip() + '\n'


def test_the_docstring_example_runs_as_it_stands_with_torch_and_the_standard_library(tmp_path):
    assert len(example().splitlines()) < 25
    (tmp_path / 'example.py').write_text(example())
    # torch itself can do without these.
    code = '''
import runpy, sys
blocked = ['numpy', 'timm', 'torchvision', 'accelerate', 'datasets', 'safetensors', 'PIL', 'scipy', 'sklearn', 'pandas']
sys.modules.update(dict.fromkeys(blocked))  # None: an import raises
after = runpy.run_path('example.py')
assert not any(sys.modules[name] for name in blocked)
print(after['step'], int(after['calmix'].aum.count.sum()), int(after['calmix'].apm.count.sum()),
      bool(after['loss'].isfinite()), len(after['mixed'].images))
'''
    run = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', f'import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}'],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ['19', str(20 * 8), str(20 * 56), 'True', '8']


def test_the_module_imports_torch_and_the_standard_library_only_and_has_no_collectives_or_globals():
    tree = ast.parse(Path(calibratemix.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split('.')[0] for name in imported} <= {'torch', *sys.stdlib_module_names}
    assert not any('distributed' in ast.unparse(node) and 'torch.distributions' not in ast.unparse(node)
                   for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree))


def newer_than_3_8(source):
    """What in a file needs a later Python than 3.8, but for annotations, which it does not evaluate."""
    try:
        tree = ast.parse(source, feature_version=(3, 8))
    except SyntaxError as error:
        return [error.msg]
    annotations = set()
    for node in ast.walk(tree):
        for annotation in (getattr(node, 'annotation', None), getattr(node, 'returns', None)):
            if annotation is not None:
                annotations |= set(ast.walk(annotation))
    types = {'bool', 'dict', 'float', 'frozenset', 'int', 'list', 'set', 'str', 'tuple', 'type'}
    found = []
    for node in set(ast.walk(tree)) - annotations:
        if isinstance(node, ast.Subscript):  # list[int]
            newer = isinstance(node.value, ast.Name) and node.value.id in types
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):  # int | None, {} | {}, dict() | dict()
            newer = any(isinstance(side, (ast.Constant, ast.Dict)) or ast.unparse(side).split('(')[0] in types
                        for side in (node.left, node.right))
        elif isinstance(node, ast.Attribute):
            newer = node.attr in ('removeprefix', 'removesuffix', 'bit_count')
        elif isinstance(node, ast.ImportFrom):
            newer = node.module == 'functools' and any(alias.name == 'cache' for alias in node.names)
        else:  # zip(a, b, strict=True)
            newer = isinstance(node, ast.Call) and any(keyword.arg == 'strict' for keyword in node.keywords)
        if newer:
            found.append(ast.unparse(node))
    return found


def test_the_file_needs_python_3_8_alone():
    source = Path(calibratemix.__file__).read_text()
    assert 'from __future__ import annotations\n' in source
    assert newer_than_3_8(source) == []
    for newer in ('x: int = list[int]()', 'x = int | None', 'x = dict(a=1) | y', 'zip(a, b, strict=True)',
                  'match x:\n    case 1: pass', "'ab'.removeprefix('a')", 'def f(x=tuple[int]): pass',
                  'from functools import cache'):
        assert newer_than_3_8(newer), newer
    assert newer_than_3_8('def f(x: int | None) -> list[int]: y: dict[str, int] = {}') == []
