"""What is promised about speed and can be tested without a clock."""
import copy
import csv
import ctypes
import os
import resource
import sys

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from test_train import Toy, step_args, take_step, toy_batches
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import benchmark
import data
import methods
import program
import train_ssl
from calibratemix import CalibrateMix

# --- The plain step ---------------------------------------------------------------------------------------------------

def plain_margin(row, label):
    return (row[label] - max(z for k, z in enumerate(row) if k != label)).item()


def halves(scores):
    """Positions of the easy and of the hard half by rank, the odd one hard, ties by position."""
    order = sorted(range(len(scores)), key=lambda k: (-scores[k], k))
    return order[:len(scores) // 2], order[len(scores) // 2:]


def plain_step(model, labeled, unlabeled, visits, threshold):
    """FixMatch and CalibrateMix as METHOD tells them, image by image: total loss, mixup loss and the banks.

    `visits` holds each unlabeled image's margins per class at its earlier visits, each labeled one's of its label.
    """
    x, y = labeled['image'], labeled['target'].tolist()
    features, logits = model(torch.cat([x, unlabeled['weak'], unlabeled['strong']]))
    b, u = len(x), len(unlabeled['weak'])
    z, z_weak, z_strong = logits[:b], logits[b:b + u], logits[b + u:]
    pseudo = [int(row.argmax()) for row in z_weak]
    loss = sum(-row.log_softmax(0)[k] for row, k in zip(z, y)) / b
    for weak, strong, k in zip(z_weak, z_strong, pseudo):
        if weak.softmax(0).max() >= threshold:
            loss = loss - strong.log_softmax(0)[k] / u

    aum, apm = [], []
    for i, (row, k) in enumerate(zip(z, y)):
        visits['labeled'].setdefault(i, []).append(plain_margin(row, k))
        aum.append(sum(visits['labeled'][i]) / len(visits['labeled'][i]))
    for j, (row, k) in enumerate(zip(z_weak, pseudo)):
        table = visits['unlabeled'].setdefault(j, [0.] * len(row))
        t = visits['times'].get(j, 0)
        rate = 0.997 / (1 + t)
        for c in range(len(row)):
            table[c] = plain_margin(row, c) * rate + table[c] * (1 - rate)
        visits['times'][j] = t + 1
        apm.append(table[k])

    (easy, hard), (easy_u, hard_u) = halves(aum), halves(apm)
    images, targets, groups = [None] * b, [None] * b, [0] * b
    for group, (of, among) in enumerate([(easy, hard_u), (hard, easy_u)]):
        for i in of:
            similarity = [F.cosine_similarity(features[i], features[b + j], dim=0).item() for j in among]
            j = among[similarity.index(min(similarity))]
            images[i] = 0.4 * x[i] + 0.6 * unlabeled['weak'][j]
            targets[i] = 0.4 * F.one_hot(torch.tensor(y[i]), 4) + 0.6 * F.one_hot(torch.tensor(pseudo[j]), 4)
            groups[i] = group
    mixed = model(torch.stack(images))[1]
    losses = [-(target * row.log_softmax(0)).sum() for target, row in zip(targets, mixed)]
    mixup = sum(sum(loss for loss, g in zip(losses, groups) if g == group) / groups.count(group) for group in (0, 1))
    return loss + mixup, mixup, aum


def test_the_step_equals_a_plain_one_image_by_image_in_losses_bank_and_gradients():
    torch.manual_seed(0)
    ours, (labeled, unlabeled) = Toy().train(), toy_batches()
    plain = copy.deepcopy(ours)
    calmix = CalibrateMix(6, 12, 4, warmup_steps=0, topk=1e-9)  # the one least similar candidate: nothing is drawn
    visits = dict(labeled={}, unlabeled={}, times={})
    args = step_args(threshold=0.74)
    for step in range(3):
        for batch, names in ((labeled, ['image']), (unlabeled, ['weak', 'strong'])):
            for name in names:
                batch[name] = torch.randn_like(batch[name])
        terms = take_step(ours, labeled, unlabeled, args, calmix, step)
        total, mixup, aum = plain_step(plain, labeled, unlabeled, visits, args.threshold)
        assert step or 0 < terms['mask_rate'] < 1
        assert torch.allclose(terms['loss'], total, atol=1e-5) and torch.allclose(terms['loss_mixup'], mixup, atol=1e-5)
        assert torch.allclose(calmix.aum.value, torch.tensor(aum), atol=1e-5)
        expected = torch.tensor([visits['unlabeled'][j] for j in range(12)])
        assert torch.allclose(calmix.apm.value, expected, atol=1e-5)
        for model, loss in ((ours, terms['loss']), (plain, total)):
            model.zero_grad()
            loss.backward()
        for one, other in zip(ours.parameters(), plain.parameters()):
            assert torch.allclose(one.grad, other.grad, atol=1e-5)
            with torch.no_grad():
                one -= 0.1 * one.grad
                other.copy_(one)


# --- No waiting for the device ----------------------------------------------------------------------------------------

def on_fake_gpu(module: nn.Module) -> nn.Module:
    """Puts tensors without content, which believe to be on a GPU, in the place of a module's own."""
    for part in module.modules():
        for name, value in part._parameters.items():
            part._parameters[name] = nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device='cuda'))
        for name, value in part._buffers.items():
            part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device='cuda')
    return module


class NoBlockingCopies(TorchDispatchMode):
    """Raises at a copy from main memory to the GPU that waits for it, as that of a Python number by `new_tensor`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        copied = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}.get(function)
        if copied is not None and out.is_cuda and not args[copied].is_cuda:
            assert kwargs.get('non_blocking') or args[2:3] == (True,), 'a copy to the GPU waits for it'
        return out


@pytest.mark.parametrize('flags', [
    ['--algorithm', 'fixmatch'],
    ['--algorithm', 'fixmatch', '--calmix-split', 'bank', '--calmix-gamma-dist', 'beta-pair'],
    ['--algorithm', 'fixmatch', '--calmix-pairing', 'random', '--weak-forward', 'no-grad'],
    ['--algorithm', 'fixmatch', '--calmix-preset', 'authors-code', '--calmix-warmup-epochs', '0'],
    ['--algorithm', 'fixmatch', '--calmix-min-confidence', '0.9', '--calmix-similarity', 'euclidean'],
    # VAT takes a gradient within the step, for which torch's engine wants a real GPU.
    *(['--algorithm', name] for name in methods.ALGORITHMS if name not in ('supervised', 'fixmatch', 'vat')),
], ids=' '.join)
def test_no_step_waits_for_a_gpu(flags):
    """A tensor without content cannot be read: `.item()`, `bool()` or a boolean index would raise. Nor are there copies
    to the GPU that wait.
    """
    args = train_ssl._parse_args(['--calibratemix', '--calmix-warmup-epochs', '0', '--device', 'cpu', *flags])
    accelerator = Accelerator(cpu=True)
    model = Toy(methods.num_outputs(args, 4))
    method = methods.ALGORITHMS[args.algorithm](40, 4, args)
    datasets = data.Datasets(range(10), range(40), None, None, torch.arange(10), None, None, None)
    calmix = train_ssl.build_calmix(args, datasets, 4, accelerator)
    monitor = train_ssl.Monitor(accelerator)
    with FakeTensorMode():
        def images(number):
            return torch.randn(number, 3, 8, 8, device='cuda')

        def integers(high, number):
            return torch.randint(high, (number,), device='cuda')

        for module in (model, method, calmix):
            on_fake_gpu(module)
        monitor.sums, monitor.bad = torch.zeros(8, device='cuda'), torch.zeros(9, device='cuda')
        monitor.one = torch.ones((), device='cuda')
        labeled = dict({name: images(6) for name in method.labeled_views}, target=integers(4, 6), index=integers(10, 6))
        unlabeled = dict({name: images(12) for name in method.views}, target=integers(4, 12), index=integers(40, 12))
        with NoBlockingCopies():
            terms = train_ssl.semi_supervised_step(
                model, labeled, unlabeled, method, calmix, 5000, accelerator, args,
                average=model if method.takes_average else None,
            )
            monitor.add(terms, 5)
        assert terms['loss'].is_cuda and calmix.apm.value.is_cuda and monitor.sums.is_cuda
        with pytest.raises(DataDependentOutputException):
            terms['loss'].item()
        for copy_number in (terms['loss'].new_tensor, lambda x: monitor.sums.__setitem__(0, x)):
            with pytest.raises(AssertionError, match='waits'), NoBlockingCopies():
                copy_number(1.)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('algorithm', [name for name in methods.ALGORITHMS if name != 'supervised'])
def test_no_update_waits_for_a_real_gpu(algorithm):
    options = benchmark.create_parser().parse_args(['--device', 'cuda', '--model', 'wide_resnet10_1', '-b', '8'])
    options.img_size = 16
    labeled, unlabeled = benchmark.create_batches(options, torch.device('cuda'))
    method = methods.ALGORITHMS[algorithm]
    for batch, image, views in ((labeled, 'image', method.labeled_views), (unlabeled, 'weak', method.views)):
        images = {name: torch.randn_like(batch[image]) for name in views}
        batch.pop('strong', None)
        batch.update(images)
    step = benchmark.our_step(options, labeled, unlabeled, '--calibratemix', '--algorithm', algorithm)
    step()
    torch.cuda.set_sync_debug_mode('error')
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert step.run.num_updates == 2


# --- benchmark.py -----------------------------------------------------------------------------------------------------

def test_the_quick_benchmark_measures_every_row_and_writes_them_as_csv(tmp_path, monkeypatch):
    file = tmp_path / 'rows.csv'
    rows = [*benchmark.ROWS[:-1], 'operators', 'complexity']  # the row of two processes takes 20 s
    flags = ['--quick', '--repeats', '1', '--results-file', file, '--picture', tmp_path / 'picture.png']
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', *map(str, flags), '--rows', *rows])
    benchmark.main()
    with open(file, newline='') as opened:
        table = list(csv.DictReader(opened))
    assert list(table[0]) == ['row', 'value', 'min', 'max', 'target', 'met']
    assert {row['row'] for row in table} >= benchmark.TARGETS.keys() - {
        'step of 2 processes on half the batch / of 1 on all', 'USB / our fixmatch step with the recommended flags'}
    for preset in ('paper', 'steered'):  # does not depend on the size
        name = f'operators, fixmatch + {preset}: all of ours'
        assert [float(row['value']) <= 150 for row in table if row['row'] == name] == [True]
    assert Image.open(tmp_path / 'picture.png').width > 1000
    assert all(float(row['min']) <= float(row['value']) <= float(row['max']) for row in table)


def test_steps_of_two_precisions_in_one_process_compute_each_in_its_own():
    """Else a ratio of float32 and bfloat16 would be near 1, and look like a slow machine."""
    options = benchmark.create_parser().parse_args(['--model', 'wide_resnet10_1', '-b', '2', '--mu', '1'])
    options.img_size, steps, seen = 8, {}, {}
    for flags in ('plain', benchmark.RECOMMENDED, '--channels-last', '--amp --channels-last'):
        step = steps[flags] = benchmark.flagged_step(options, flags, torch.device('cpu'))
        step.run.timm_model.conv1.register_forward_hook(
            lambda _, given, out, flags=flags: seen.setdefault(flags, []).append((out.dtype, given[0])))
    for flags, step in steps.items():
        step()
        assert {dtype for dtype, _ in seen[flags]} == {torch.bfloat16 if '--amp' in flags else torch.float32}
        assert all(x.is_contiguous(memory_format=torch.channels_last) == ('last' in flags) for _, x in seen[flags])
        assert len(seen[flags]) == (2 if 'no-grad' in flags else 1)


def test_the_recommended_flags_stand_beside_usb_s_step_where_the_processor_has_units(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, 'usb_step', lambda *_: lambda: None)  # its package is not there
    options = benchmark.create_parser().parse_args(['--model', 'wide_resnet10_1', '-b', '2', '--mu', '1'])
    options.img_size, options.repeats, row = 8, 1, 'USB / our fixmatch step with the recommended flags'
    for units in ('', 'amx_bf16'):
        monkeypatch.setattr(benchmark, 'bfloat16_units', lambda units=units: units)
        found = benchmark.usb_rows(options, torch.device('cpu'))
        assert benchmark.TARGETS.keys() & found == ({row} if units else set())
    assert capsys.readouterr().out.count('left out') == 1


def test_processor_time_is_refused_for_what_other_processes_do(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', '--processor-time', '--rows', 'pairing', 'processes'])
    with pytest.raises(SystemExit, match='2'):
        benchmark.main()
    assert '--processor-time: processes: their work is not done in this process' in capsys.readouterr().err


def test_targets_are_upper_bounds_or_with_a_minus_sign_lower_ones():
    rows = {'FixMatch step, no-grad / joint': [.5, .7, .9], 'two-pass step / ours, joint': [1., 1.8, 5.], 'x': [3.]}
    table = benchmark.summarise(rows, benchmark.TARGETS)
    assert [(row['value'], row['min'], row['max'], row['target'], row['met']) for row in table] == [
        ('0.7', '0.5', '0.9', 'at most 0.72', 'yes'), ('1.8', '1', '5', 'at least 1.9', 'no'), ('3', '3', '3', '', ''),
    ]


def test_a_table_that_cannot_be_written_is_told_before_the_measurements(tmp_path, monkeypatch, capsys):
    table = str(tmp_path / 'none' / 'table.csv')
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', '--quick', '--results-file', table])
    with pytest.raises(SystemExit) as exit_:
        benchmark.main()
    assert exit_.value.code == 2
    assert 'table.csv: cannot be written: No such file or directory' in capsys.readouterr().err


@pytest.mark.parametrize(('flags', 'told'), [
    ([], 'the package semilearn is not installed'), (['--quick'], '--model wide_resnet10_1 is none of wide_resnet28_2'),
])
def test_usb_s_step_is_refused_where_usb_cannot_run(flags, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', '--rows', 'usb', *flags])
    monkeypatch.setattr(benchmark.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        benchmark.main()
    assert exit_.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'mallopt'), reason='this C library is not glibc')
def test_memory_freed_on_a_cpu_is_kept_for_the_next_step_unless_the_environment_says_otherwise(monkeypatch):
    for name in [name for name in os.environ if name.startswith('MALLOC_')]:
        monkeypatch.delenv(name)
    program.keep_freed_memory()
    faults = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2 ** 26, dtype=torch.uint8).fill_(1)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert faults[1] < 100, f'{faults} page faults in turn'
    monkeypatch.setenv('MALLOC_TRIM_THRESHOLD_', '131072')
    monkeypatch.setattr(ctypes, 'CDLL', lambda *args: pytest.fail('the environment is not obeyed'))
    program.keep_freed_memory()
