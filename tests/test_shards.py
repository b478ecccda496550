import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from calibratemix import CalibrateMix, MarginBank, Mixed
from shards import BankShard, find_easy, joined_weight, load_whole, whole_bank


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def visit(bank, index, logits):
    bank.update(index, logits, logits.nan_to_num().argmax(1))


# --- A bank in parts --------------------------------------------------------------------------------------------------

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(3, 12), st.integers(1, 3), st.integers(0, 2 ** 31), st.booleans())
def test_a_bank_in_parts_is_the_whole_bank(parts, num_samples, steps, seed, half):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float16 if half else torch.float32
    whole = MarginBank(num_samples, 4, 0.997, dtype)
    banks = [BankShard(num_samples, 4, (r, parts), 0.997, dtype) for r in range(parts)]
    assert sum(bank.value.numel() for bank in banks) == whole.value.numel()
    for _ in range(steps):
        index = torch.randint(num_samples, (9,), generator=generator)
        logits = torch.randn(9, 4, generator=generator)
        logits[0, 0] = torch.nan
        for bank in (whole, *banks):
            visit(bank, index, logits)
    for name in ('value', 'count', 'label'):
        for r, bank in enumerate(banks):
            assert torch.equal(getattr(bank, name), getattr(whole, name)[r::parts])
    index, label = torch.arange(num_samples).repeat(2), torch.randint(4, (2 * num_samples,), generator=generator)
    assert torch.equal(sum(bank.lookup(index, label) for bank in banks), whole.lookup(index, label))


def test_a_part_of_a_bank_checks_its_arguments():
    for part in ((2, 2), (-1, 2)):
        with pytest.raises(ValueError, match=r'part: expected \(r, n\) with r from 0 to n - 1, got'):
            BankShard(10, 4, part)
    with pytest.raises(ValueError, match='bank_shards: expected a sample for each of the 11 parts, got 10'):
        BankShard(10, 4, (0, 11))
    bank = BankShard(10, 4, (1, 2))
    for index in (-1, 10, 11):
        with pytest.raises(IndexError, match=f'index {index} is outside of the bank of 10 samples'):
            visit(bank, torch.tensor([3, index]), torch.zeros(2, 4))
        with pytest.raises(IndexError, match=f'index {index} is outside'):
            bank.lookup(torch.tensor([3, index]), torch.tensor([0, 0]))
    assert bank.count.sum() == 0
    with pytest.raises(TypeError, match='index: expected an int64 tensor, got list'):
        bank.lookup([3], torch.tensor([0]))


def test_a_part_on_a_gpu_reads_no_value():
    """Tensors without content, which believe to be on a GPU: shapes that depend on values would raise."""
    bank = BankShard(10, 4, (1, 2))
    with FakeTensorMode():
        for name, buffer in list(bank.named_buffers()):
            setattr(bank, name, torch.empty(buffer.shape, dtype=buffer.dtype, device='cuda'))
        index, label = torch.zeros(6, dtype=torch.long, device='cuda'), torch.zeros(6, dtype=torch.long, device='cuda')
        bank.update(index, torch.randn(6, 4, device='cuda'), label)
        assert bank.lookup(index, label).is_cuda


def test_a_part_takes_the_place_of_the_whole_bank_under_the_same_keys_and_at_its_share_of_the_memory():
    whole, shard = CalibrateMix(4, 9, 3), CalibrateMix(4, 9, 3, apm=BankShard(9, 3, (1, 2), 0.997))
    assert list(shard.state_dict()) == list(whole.state_dict())
    assert {name: len(table) for name, table in shard.state_dict().items()} == {
        f'{bank}.{name}': rows for bank, rows in (('aum', 4), ('apm', 4)) for name in ('value', 'count', 'label')}
    assert sum(1 for module in shard.modules() if isinstance(module, MarginBank)) == 2


def test_the_split_by_the_whole_banks_median_is_refused_where_a_process_holds_a_part():
    bank = BankShard(9, 3, (0, 2))
    with pytest.raises(ValueError, match=r'split: bank needs the median of the whole bank, .* part \(0, 2\) of it'):
        CalibrateMix(4, 9, 3, split='bank', apm=bank)
    for split in ('batch', 'joined'):
        assert CalibrateMix(4, 9, 3, split=split, apm=bank).apm is bank


def filled(num_samples=9, parts=2, **options):
    """A CalibrateMix with the whole bank, and one for each part, after the same steps."""
    calmixes = [CalibrateMix(6, num_samples, 3, **options)]
    calmixes += [CalibrateMix(6, num_samples, 3, apm=BankShard(num_samples, 3, (r, parts), 0.997), **options)
                 for r in range(parts)]
    for step in range(5):
        index, unlabeled = torch.randint(6, (4,)), torch.randint(num_samples, (7,))
        logits, weak = torch.randn(4, 3), torch.randn(7, 3)
        for calmix in calmixes:
            calmix.update(index, index % 3, logits, unlabeled, weak.argmax(1), weak, step)
    return calmixes


def test_each_part_takes_its_own_rows_of_a_whole_state_dict():
    whole, *shards = filled()
    other, *others = filled()
    for calmix in (other, *others):
        load_whole(calmix, whole.state_dict())
    for calmix, expected in zip((other, *others), (whole, *shards)):
        for name, table in expected.state_dict().items():
            assert torch.equal(calmix.state_dict()[name], table)


def test_a_whole_bank_is_its_own_whole():
    bank = MarginBank(9, 3)
    assert whole_bank(bank, None) is bank


# --- The split of the joined batch ------------------------------------------------------------------------------------

def processes(number, lookups=()):
    """What `find_easy` takes of Accelerate, on each of a number of processes."""
    return [SimpleNamespace(num_processes=number, process_index=r, reduce=lambda x, how: sum(lookups))
            for r in range(number)]


@pytest.mark.parametrize('split', ['batch', 'joined'])
def test_processes_with_parts_split_as_one_with_the_whole_bank_does(split):
    whole, *shards = filled(split=split)
    index, unlabeled = torch.randint(6, (8,)), torch.randint(9, (12,))
    pseudo_label = torch.randint(3, (12,))
    lookups = [calmix.apm.lookup(unlabeled, pseudo_label) for calmix in shards]
    halves = list(zip(index.chunk(2), unlabeled.chunk(2), pseudo_label.chunk(2)))
    joined = whole.find_easy(index, unlabeled, pseudo_label)
    for r, accelerator in enumerate(processes(2, lookups)):
        expected = whole.find_easy(*halves[r])
        if split == 'joined':
            expected = [easy.chunk(2)[r] for easy in joined]
        got = find_easy(shards[r], index, unlabeled, pseudo_label, accelerator)
        assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_a_whole_bank_and_a_split_by_process_take_no_other_process():
    whole, *_ = filled(split='batch')
    index = torch.arange(4)
    assert find_easy(whole, index, index, index % 3, processes(2)[0]) is None
    joined = copy.copy(whole)
    joined.split = 'joined'
    assert find_easy(joined, index, index, index % 3, processes(2)[0]) is not None


@pytest.mark.parametrize('number', [2, 3])
def test_joined_weights_averaged_over_processes_are_those_of_the_joined_batch(number):
    easy, paired = torch.rand(number, 8) < 0.3, torch.rand(number, 8) < 0.8
    easy[1], paired[0] = False, True
    loss, total = torch.randn(number, 8), 0.
    groups = [torch.stack([e & p, ~e & p]).float().sum(1, keepdim=True) for e, p in zip(easy, paired)]
    for r in range(number):
        mixed = Mixed(None, None, None, None, paired[r], easy[r], None)
        accelerator = SimpleNamespace(num_processes=number, reduce=lambda x, how: sum(groups))
        total += float((joined_weight(mixed, accelerator) * loss[r]).sum()) / number
    expected = float(loss[easy & paired].mean() + loss[~easy & paired].mean())
    assert total == pytest.approx(expected, abs=1e-5)
