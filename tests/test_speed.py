"""What is promised about speed and can be tested without a clock."""
import copy
import csv
import ctypes
import os
import resource
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import forget_accelerator
from images import noise, noise_source
from PIL import Image
from test_methods import batches_for
from test_train import Toy, assert_same_run, rewind, step_args, take_step, toy_batches
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import benchmark
import data
import imbalance
import methods
import program
import train_ssl
from calibratemix import PRESETS, CalibrateMix
from sources import ImageError
from views import BatchViews

NO_GPU = 'torch finds no CUDA GPU (torch.cuda.is_available() is False)'

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
    calmix = CalibrateMix(6, 12, 4, warmup_steps=0, topk=1e-9, weight=1)  # the one least similar candidate: no draw
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
        if copied is not None and out.device.type != 'cpu' and args[copied].device.type == 'cpu':
            assert kwargs.get('non_blocking') or args[2:3] == (True,), 'a copy to the GPU waits for it'
        return out


class TwoProcesses:
    """What a step takes of Accelerate, on the second of two processes whose batches are equal."""
    num_processes, process_index = 2, 1

    def gather(self, tensors):
        return tuple(torch.cat([tensor, tensor]) for tensor in tensors)

    def reduce(self, tensor, reduction):
        return 2 * tensor if reduction == 'sum' else tensor


ADJUSTED = [name for name, method in methods.ALGORITHMS.items() if not (method and method.own_losses)]


@pytest.mark.parametrize('flags', [
    *(['--calmix-preset', preset] for preset in PRESETS),
    ['--calmix-split', 'bank', '--calmix-gamma-dist', 'beta-pair'],
    ['--calmix-pairing', 'random', '--weak-forward', 'no-grad', '--label-smoothing', '0.1'],
    ['--calmix-min-confidence', '0.9', '--calmix-similarity', 'euclidean', '--calmix-bank-dtype', 'float16'],
    ['--calmix-split', 'joined', '--calmix-bank-shards', '--calmix-preset', 'steered', '--logit-adjustment', '1'],
    ['--algorithm', 'freematch', '--calmix-split', 'joined', '--logit-margin-penalty', '1', '--logit-margin-rows',
     'agreeing'],
    ['--algorithm', 'softmatch', '--softmatch-usb-stats', '--aum-threshold-samples', '2', '--save-margins'],
    *(['--algorithm', name] for name in methods.ALGORITHMS),
    *(['--algorithm', name, '--logit-adjustment', '1'] for name in ADJUSTED),
], ids=' '.join)
def test_no_step_waits_for_a_gpu(flags, monkeypatch):
    """A tensor without content cannot be read: `.item()`, `bool()` or a boolean index would raise. Nor are there copies
    to the GPU that wait. Where the joined batch is split, one of two processes takes the step.
    """
    with_calmix = [] if 'supervised' in flags else ['--calibratemix', '--calmix-warmup-epochs', '0']
    args = train_ssl._parse_args([*with_calmix, '--device', 'cpu', *flags])
    accelerator = TwoProcesses() if args.calmix_split == 'joined' else Accelerator(cpu=True)
    model = Toy(methods.num_outputs(args, 4))
    datasets = data.Datasets(range(10), range(40), None, None, torch.arange(10), None, None, None)
    method = methods.ALGORITHMS[args.algorithm] and methods.ALGORITHMS[args.algorithm](40, 4, args)
    calmix = train_ssl.build_calmix(args, datasets, 4, accelerator)
    adjustment = imbalance.build_adjustment(args, torch.arange(10) % 4, 4)
    monitor = train_ssl.Monitor(Accelerator(cpu=True))
    # VAT takes a gradient within the step, for which torch's engine wants a real GPU.
    monkeypatch.setattr(torch.autograd, 'grad', lambda output, x: (torch.ones_like(x) * output.detach(),))
    moments = dict(  # just before the end of Dash's warmup and after it; MarginMatch draws images, and draws none
        dash=(2047, 5000), marginmatch=(80_000, 80_001), supervised=(5000,),
    ).get(args.algorithm, (5000,))
    with FakeTensorMode():
        def images(number):
            return torch.randn(number, 3, 8, 8, device='cuda')

        def integers(high, number):
            return torch.randint(high, (number,), device='cuda')

        for module in filter(None, (model, method, calmix, adjustment)):
            on_fake_gpu(module)
        monitor.sums, monitor.bad = torch.zeros(8, device='cuda'), torch.zeros(9, device='cuda')
        monitor.one = torch.ones((), device='cuda')
        views = (method.labeled_views, method.views) if method else (dict(image='weak'), {})
        labeled = dict({name: images(6) for name in views[0]}, target=integers(4, 6), index=integers(10, 6))
        unlabeled = dict({name: images(12) for name in views[1]}, target=integers(4, 12), index=integers(40, 12))
        for num_updates in moments:
            with NoBlockingCopies():
                if method is None:
                    terms = train_ssl.supervised_step(model, labeled, calmix, accelerator, args, adjustment)
                else:
                    terms = train_ssl.semi_supervised_step(
                        model, labeled, unlabeled, method, calmix, num_updates, accelerator, args, adjustment,
                        average=model if method.takes_average else None,
                    )
                monitor.add(terms, 5)
        assert terms['loss'].is_cuda and monitor.sums.is_cuda and (calmix is None or calmix.apm.value.is_cuda)
        with pytest.raises(DataDependentOutputException):
            terms['loss'].item()
        for copy_number in (terms['loss'].new_tensor, lambda x: monitor.sums.__setitem__(0, x)):
            with pytest.raises(AssertionError, match='waits'), NoBlockingCopies():
                copy_number(1.)


@pytest.mark.parametrize('kinds', [dict(weak='weak', strong='strong'), None], ids=['views', 'evaluation'])
def test_no_batch_waits_for_a_gpu(kinds):
    """Numbers on the CPU, and pixels on a device whose tensors have no content."""
    pixels = torch.zeros((12, 8, 8, 3) if kinds else (12, 3, 8, 8), dtype=torch.uint8)
    config = data.DataConfig((3, 8, 8), (0.5,) * 3, (0.5,) * 3, '', 1.0)
    views = kinds and BatchViews(kinds, 8, (.5,) * 3)
    dataset = data.BatchDataset(data.ViewDataset(noise_source(12), {}), pixels, torch.arange(12), views, defer=True)
    feed = data.Feed(data.create_loader(dataset, [[*range(12)]]), config, torch.device('meta'), False)
    with NoBlockingCopies():
        batch, = feed
    names = kinds or ['image']
    assert all(batch[name].is_meta and batch[name].shape == (12, 3, 8, 8) for name in names)


@pytest.mark.skipif(not torch.cuda.is_available(), reason=f'{NO_GPU}, and this asks whether a real one is waited for')
@pytest.mark.parametrize('algorithm', [name for name in methods.ALGORITHMS if name != 'supervised'])
def test_no_update_waits_for_a_real_gpu(algorithm):
    options = benchmark.create_parser().parse_args(['--device', 'cuda', '--model', 'wide_resnet10_1', '-b', '8'])
    options.img_size = 16
    forget_accelerator()
    batches = batches_for(algorithm, options, 'cuda')
    step = benchmark.our_step(options, *batches, '--calibratemix', '--algorithm', algorithm)
    step()
    torch.cuda.set_sync_debug_mode('error')
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert step.run.num_updates == 2


# --- Batches on a stream of their own ---------------------------------------------------------------------------------

class Stream:
    """Stands for a CUDA stream: tells a log what it is asked."""

    def __init__(self, name: str, log: list):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f'{self.name} waits for {other.name}')

    def record_event(self):
        self.log.append('event')
        return self.log.count('event') - 1

    def wait_event(self, event):
        self.log.append(f'{self.name} waits for event {event}')


@pytest.fixture
def aside(monkeypatch) -> list:
    """Lets every Feed work on the CPU as it does on a GPU; the log of what its streams are asked."""
    log = []
    streams, create, prepare = [Stream('main', log)], data.Feed.__init__, data.Feed._prepare

    @contextmanager
    def within(stream):
        streams.append(stream)
        yield
        streams.pop()

    def created(self, *args):
        create(self, *args)
        self.stream = Stream('aside', log)

    def prepared(self, batch):
        log.append(f'prepare {batch["index"][0]} {streams[-1].name}')
        return prepare(self, batch)

    monkeypatch.setattr(torch.cuda, 'stream', within)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: streams[-1])
    monkeypatch.setattr(torch.Tensor, 'record_stream', lambda self, stream: log.append(f'in use by {stream.name}'))
    monkeypatch.setattr(data.Feed, '__init__', created)
    monkeypatch.setattr(data.Feed, '_prepare', prepared)
    return log


def loaded(index: int, skipped: int = -1) -> dict:
    """A batch as a loader gives it."""
    return dict(image=torch.full((2, 3, 4, 4), index, dtype=torch.uint8), index=torch.tensor([index, 9]),
                skipped=torch.tensor([-1, skipped]), target=torch.zeros(2).long())


CONFIG = data.DataConfig((3, 4, 4), (0.5,) * 3, (0.5,) * 3, '', 1.0)


def test_the_next_batch_is_prepared_on_its_own_stream_before_the_current_one_is_waited_for(aside):
    for batch in data.Feed([loaded(0), loaded(1), loaded(2)], CONFIG, 'cpu', False):
        aside.append(f'step {batch["index"][0]}')
    in_use = ['in use by main'] * 4
    assert aside == [
        'aside waits for main', 'prepare 0 aside', 'event',
        'prepare 1 aside', 'event', 'main waits for event 0', *in_use,
        'step 0', 'prepare 2 aside', 'event', 'main waits for event 1', *in_use,
        'step 1', 'main waits for event 2', *in_use,
        'step 2',
    ]


def test_a_batch_that_was_prepared_early_tells_of_its_broken_images_in_its_turn(aside):
    class Loader(list):
        dataset = SimpleNamespace(stream='unlabeled')

    loader, seen = Loader([loaded(0), loaded(1, 7), loaded(2, 8), ImageError('broken')]), []
    feed = data.Feed(loader, CONFIG, 'cpu', False)
    with pytest.raises(ImageError, match='broken'):
        for batch in feed:
            seen.append((batch['index'][0].item(), sorted(feed.skipped)))
    assert seen == [(0, []), (1, [7]), (2, [7, 8])]


def test_batches_prepared_early_change_no_run_and_a_resume_begins_with_the_first_one_not_trained_on(
        train, tmp_path, request,
):
    flags = ('--calibratemix', '--calmix-warmup-epochs', 1, '--recovery-interval', 1, '--checkpoint-hist', 99)
    plain = train('plain', *flags)
    log = request.getfixturevalue('aside')
    early = train('early', *flags)
    assert_same_run(plain, early)
    assert log.count('event') > 16
    rewind(early, tmp_path / 'resumed', 3)
    assert_same_run(plain, train('resumed', *flags, '--resume', 'auto'))


def test_memory_is_pinned_for_a_gpu_unless_asked_otherwise():
    dataset = data.ViewDataset(noise_source(2), {})

    def pinned(device, asked=None):
        return data.create_loader(dataset, [[0]], 0, asked, torch.device(device)).pin_memory

    assert [pinned('cuda'), pinned('cpu'), pinned('cuda', False), pinned('cpu', True)] == [True, False, False, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason=f'{NO_GPU}, and this compares its batches with a CPU\'s')
def test_batches_on_a_gpu_are_those_on_a_cpu():
    keys, kinds = [[(k, i) for i in range(12)] for k in range(5)], dict(weak='weak', strong='strong')
    pixels = torch.from_numpy(noise(12, 16))
    for defer in (False, True):
        dataset = data.BatchDataset(data.ViewDataset(noise_source(12), {}), pixels, torch.arange(12),
                                    BatchViews(kinds, 16, (0.5,) * 3), defer)
        feeds = [data.Feed(data.create_loader(dataset, keys, device=device), CONFIG, device, False)
                 for device in (torch.device('cpu'), torch.device('cuda'))]
        assert feeds[1].loader.pin_memory and not feeds[0].loader.pin_memory
        for ours, other in zip(*feeds):
            for key in ours.keys() - {'repeated'}:
                assert other[key].is_cuda
                off = (other[key].cpu() - ours[key]).abs() > 1e-6
                # A strong view's pixels are rounded differently where sines and sums of the two devices differ.
                assert off.float().mean() <= (0.02 if key == 'strong' and defer else 0), key


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


def test_the_peak_memory_of_a_step_leaves_out_what_other_runs_hold_on_a_gpu(monkeypatch):
    gpu = dict(alive=5000, peak=9000)  # of which a thousand are the run's own

    def step():
        gpu['peak'] = max(gpu['peak'], gpu['alive'] + 300)

    for name, function in (('synchronize', lambda: None), ('memory_allocated', lambda: gpu['alive']),
                           ('reset_peak_memory_stats', lambda: gpu.update(peak=gpu['alive'])),
                           ('max_memory_allocated', lambda: gpu['peak'])):
        monkeypatch.setattr(torch.cuda, name, function)
    assert benchmark.peak_memory(step, 1000, torch.device('cuda')) == 1300


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
    (['--device', 'cuda'], '--device cuda: torch finds no CUDA GPU here'),
])
def test_rows_that_cannot_be_measured_here_are_refused_in_a_line(flags, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', '--rows', 'usb', *flags])
    monkeypatch.setattr(benchmark.importlib.util, 'find_spec', lambda name: None)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
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
    for _ in range(4):  # what ran before may have left a piece of the heap that is a little too small
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2 ** 26, dtype=torch.uint8).fill_(1)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(faults[1:]) < 100, f'{faults} page faults in turn'
    monkeypatch.setenv('MALLOC_TRIM_THRESHOLD_', '131072')
    monkeypatch.setattr(ctypes, 'CDLL', lambda *args: pytest.fail('the environment is not obeyed'))
    program.keep_freed_memory()
