#!/usr/bin/env python3
"""Times of the training step and its parts against their targets, paired in one process.

    python benchmark.py            # wide_resnet28_2, batch 64, mu 7, 32 px: over half an hour on a CPU
    python benchmark.py --quick                  # every row on a small network, in a minute
    python benchmark.py --rows complexity --picture complexity.png    # how CalibrateMix's own cost grows
    python benchmark.py --rows operators         # how many small operators a step takes, and who calls them
    python benchmark.py --rows usb               # beside the step of USB, once pip install semilearn has been run
    python benchmark.py --device cuda --amp --channels-last --model resnet50 --img-size 224

Every figure is the median of repeats in which the compared things take turns, so that a busy machine slows them alike;
a ratio is formed within each repeat. Where others keep all cores busy, --processor-time counts only the time that this
process had a core, best with OMP_NUM_THREADS=1. --results-file writes the table as CSV.
"""
import argparse
import csv
import importlib.util
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from timm.models import save_for_hf
from torch.utils._python_dispatch import TorchDispatchMode

import predict
import train_ssl
from backbone import FeaturesAndLogits, build_ema, build_model, load_model
from calibratemix import CalibrateMix, MarginBank, pair_dissimilar
from checkpoint import Run
from data import SMALL, BatchDataset, DataConfig, EndlessBatches, Feed, ViewDataset, create_loader
from figures import complexity_diagram
from methods import ALGORITHMS, num_outputs
from program import ArgumentParser, bfloat16_units, setup_accelerator
from schedule import build_optimizer, build_scheduler
from seeds import seeded
from sources import ArraySource
from views import BatchViews, build_views

NUM_CLASSES = 10
ROWS = ('steps', 'bank', 'pairing', 'views', 'loader', 'predict', 'bfloat16', 'processes')
USB_MODELS = {'wide_resnet28_2': 'wrn_28_2', 'wide_resnet28_8': 'wrn_28_8', 'wide_resnet37_2': 'wrn_var_37_2'}
TARGETS = {  # by row the most that is wanted, or with a minus sign the least
    'CalibrateMix step / FixMatch step, joint': 1.10,
    'CalibrateMix step / FixMatch step, no-grad': 1.13,
    'FixMatch step, no-grad / joint': 0.72,
    'share of the step that is not the network, %': 3.,
    'bank update and lookup, 1.28 million x 1000, 448 rows, ms': 2.,
    'bank update and lookup, 50 thousand x 1000, 448 rows, ms': 2.,
    'pairing 2 x 32 with 2 x 224, 128 features, ms': 0.5,
    'peak memory, CalibrateMix / FixMatch, joint': 1.08,
    'peak memory, CalibrateMix no-grad / FixMatch joint': 0.70,
    'views of tensors / views through PIL, images a second': -3.,
    'predict.py / timm\'s inference, images a second': -0.95,
    'step of 2 processes on half the batch / of 1 on all': 0.60,
    **{f'operators, {method} + {preset}: all of ours': 150
       for method in ('fixmatch', 'flexmatch', 'softmatch', 'freematch') for preset in ('paper', 'steered')},
    'two-pass step / ours, joint': -1.9,
    'two-pass step / ours, no-grad': -2.6,
    'USB / our fixmatch step with the recommended flags': -3.,
}
# Up to what train_ssl.py recommends on a processor with units for bfloat16.
RECOMMENDED = '--amp --channels-last --weak-forward no-grad'
FLAGS = ('plain', '--channels-last', '--amp --channels-last', RECOMMENDED)


# --- Timing -----------------------------------------------------------------------------------------------------------

clock = time.perf_counter


def take_turns(functions: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each function in each of the repeats, in which they take turns, after one round unmeasured."""
    seconds = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            if device.type == 'cuda':
                torch.cuda.synchronize()
            started = clock()
            function()
            if device.type == 'cuda':
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(clock() - started)
    return seconds


def ratios(seconds: dict[str, list[float]], above: str, below: str) -> list[float]:
    return [a / b for a, b in zip(seconds[above], seconds[below])]


def peak_memory(function: Callable, held: int, device: torch.device) -> int:
    """Most bytes alive at once while a function runs: its own tensors, held, and what it allocates.

    Not what else is alive, such as the networks of other runs.
    """
    if device.type == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return held + torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
    return held + max(itertools.accumulate(changes))


# --- Steps ------------------------------------------------------------------------------------------------------------

class Cheap(torch.nn.Module):
    """Stands for the network where all the rest is timed: features of the right size for next to no arithmetic."""

    def __init__(self, num_features: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, num_features) / 10)
        self.head = torch.nn.Linear(num_features, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = x[:, :, 0, 0] @ self.weight
        return features, self.head(features)


def changed(options: argparse.Namespace, **values) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(options), **values})


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """Accelerate for a run beside others: its precision is the process's, and would else have to be that of the first.

    A run holds on to its own: that of its forward pass is fixed when its model is prepared.
    """
    AcceleratorState._reset_state()
    return setup_accelerator(args.device, args.amp, args.amp_dtype)


def create_run(
        options: argparse.Namespace,
        *flags: str,
        cheap: bool = False,
) -> tuple[Run, argparse.Namespace]:
    """What train_ssl.py trains, without its data."""
    argv = ['--model', options.model, '--img-size', str(options.img_size), '-b', str(options.batch_size)]
    argv += ['--mu', str(options.mu), *flags]
    argv += ['--calmix-warmup-epochs', '0', '--device', options.device]
    argv += [flag for flag, given in (('--amp', options.amp), ('--channels-last', options.channels_last)) if given]
    argv += ['--torchcompile'] if options.torchcompile else []
    args = train_ssl._parse_args(argv)
    accelerator = create_accelerator(args)
    torch.manual_seed(0)
    timm_model = build_model(args, num_outputs(args, NUM_CLASSES)).to(accelerator.device)
    if args.channels_last:
        timm_model.to(memory_format=torch.channels_last)
    model = Cheap(timm_model.num_features) if cheap else FeaturesAndLogits(timm_model)
    model.to(accelerator.device)
    if args.torchcompile:
        model = torch.compile(model, backend=args.torchcompile)
    trained = model if cheap else timm_model
    ema = build_ema(trained, args)
    optimizer = build_optimizer(trained, args)
    scheduler = build_scheduler(args, optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    method = ALGORITHMS[args.algorithm](options.num_images, NUM_CLASSES, args).to(accelerator.device)
    calmix = None
    if args.calibratemix:
        calmix = CalibrateMix(options.num_images, options.num_images, NUM_CLASSES, args.calmix_preset, warmup_steps=0,
                              labeled_to_unlabeled=torch.arange(options.num_images))
        calmix.to(accelerator.device)
    monitor = train_ssl.Monitor(accelerator)
    run = Run(
        model, trained, optimizer, scheduler, ema, method, calmix, monitor, accelerator, torch.arange(4), NUM_CLASSES,
        identity=None,  # of no data
    )
    return run, args


def create_batches(options: argparse.Namespace, device: torch.device) -> tuple[dict, dict]:
    """A labeled and an unlabeled batch of random images."""
    generator = torch.Generator().manual_seed(0)

    def images(number):
        shape = (number, 3, options.img_size, options.img_size)
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        return torch.randn(shape, generator=generator).to(device, memory_format=layout)

    def integers(high, number):
        return torch.randint(high, (number,), generator=generator).to(device)

    b, u = options.batch_size, options.batch_size * options.mu
    def index(number):
        return torch.randperm(options.num_images, generator=generator)[:number].to(device)

    labeled = dict(image=images(b), target=integers(NUM_CLASSES, b), index=index(b), repeated=False)
    unlabeled = dict(weak=images(u), strong=images(u), target=integers(NUM_CLASSES, u), index=index(u), repeated=False)
    return labeled, unlabeled


def our_step(options: argparse.Namespace, labeled: dict, unlabeled: dict, *flags: str, cheap: bool = False) -> Callable:
    """One update of train_ssl.py, again and again on the same batch."""
    run, args = create_run(options, *flags, cheap=cheap)
    batches = itertools.repeat(labeled), itertools.repeat(unlabeled)
    step = lambda: train_ssl.train_one_update(run, *batches, args)  # noqa: E731
    step.run = run
    return step


def two_pass_step(options: argparse.Namespace, labeled: dict, unlabeled: dict) -> Callable:
    """The yardstick: CalibrateMix as the authors' code does it. The base losses on one pass over labeled, weak and
    strong images, then again on a pass over the same and the mixed images; partners are looked up image by image.
    """
    run, args = create_run(options, '--calibratemix')
    x, y, i = labeled['image'], labeled['target'], labeled['index']
    weak, strong, j = unlabeled['weak'], unlabeled['strong'], unlabeled['index']

    def base_losses(z, z_weak, z_strong):
        confidence, pseudo_label = z_weak.detach().softmax(1).max(1)
        loss = (F.cross_entropy(z_strong, pseudo_label, reduction='none') * (confidence >= args.threshold)).mean()
        return F.cross_entropy(z, y) + loss, pseudo_label

    def partners(of, among):
        """For each labeled image one of the 15 least similar unlabeled ones, by the cosine of their pixels."""
        found = []
        for row in of.tolist():
            similarity = F.cosine_similarity(x[row].flatten()[None], weak[among].flatten(1))
            least = similarity.argsort()[:15]
            found.append(among[least[random.randrange(len(least))].item()].item())
        return found

    def step():
        sizes = [len(x), len(weak), len(strong)]
        z, z_weak, z_strong = run.model(torch.cat([x, weak, strong]))[1].float().split(sizes)
        loss, pseudo_label = base_losses(z, z_weak, z_strong)
        run.calmix.update(i, y, z, j, pseudo_label, z_weak, run.num_updates)
        aum, apm = run.calmix.aum.lookup(i), run.calmix.apm.lookup(j, pseudo_label)
        images, targets = [], []
        for easy in (True, False):
            of = (aum > aum.median() if easy else aum <= aum.median()).nonzero().squeeze(1)
            among = (apm <= apm.median() if easy else apm > apm.median()).nonzero().squeeze(1)
            for row, partner in zip(of.tolist(), partners(of, among)):
                images.append(0.4 * x[row] + 0.6 * weak[partner])
                target = 0.4 * F.one_hot(y[row], NUM_CLASSES) + 0.6 * F.one_hot(pseudo_label[partner], NUM_CLASSES)
                targets.append(target)
        mixed, target = torch.stack(images), torch.stack(targets)
        z, z_weak, z_strong, z_mixed = run.model(torch.cat([x, weak, strong, mixed]))[1].float().split(
            [*sizes, len(mixed)],
        )
        again, _ = base_losses(z, z_weak, z_strong)
        total = loss + again + F.binary_cross_entropy_with_logits(z_mixed, target)
        run.accelerator.backward(total)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.ema.update(run.timm_model, step=run.num_updates)

    return step


def usb_step(algorithm: str, options: argparse.Namespace, labeled: dict, unlabeled: dict) -> Callable:
    """The peer: an update of USB by its own code. Its trainer runs on GPUs only, so its hooks that update weights and
    averages are called from here, and those that keep time and log are not.
    """
    import semilearn.nets
    from semilearn.algorithms import get_algorithm
    from semilearn.core.hooks import EMAHook, ParamUpdateHook

    args = argparse.Namespace(
        algorithm=algorithm, dataset='none', num_labels=4, num_classes=NUM_CLASSES, data_dir='', save_dir='',
        save_name='', include_lb_to_ulb=True, epoch=1024, num_train_iter=2 ** 20, num_warmup_iter=0,
        num_eval_iter=5120, num_log_iter=256, uratio=options.mu, ulb_loss_ratio=1.0, use_cat=True, amp=options.amp,
        clip_grad=0, resume=False, gpu=None, rank=0, distributed=False, world_size=1, use_pretrain=False,
        pretrain_path='', optim='SGD', lr=0.03, momentum=0.9, weight_decay=5e-4, layer_decay=1.0, ema_m=0.999,
        ema_p=0.999, use_wandb=False, use_aim=False, T=0.5, p_cutoff=0.95, hard_label=True, dist_align=True,
        dist_uniform=True, n_sigma=2, per_class=False,
    )
    usb = get_algorithm(args, getattr(semilearn.nets, USB_MODELS[options.model]), None, None)
    usb.model.to(labeled['image'].device)
    usb.ema_model.to(labeled['image'].device)
    update, average = ParamUpdateHook(), EMAHook()
    average.before_run(usb)
    usb.model.train()

    def step():
        usb.out_dict, usb.log_dict = usb.train_step(
            x_lb=labeled['image'], y_lb=labeled['target'], x_ulb_w=unlabeled['weak'], x_ulb_s=unlabeled['strong'],
        )
        update.after_train_step(usb)
        average.after_train_step(usb)
        usb.it += 1

    return step


# --- Rows -------------------------------------------------------------------------------------------------------------

def step_rows(options: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    labeled, unlabeled = create_batches(options, device)
    no_grad, calmix = ('--weak-forward', 'no-grad'), ('--calibratemix',)
    make = {
        'fixmatch': lambda: our_step(options, labeled, unlabeled),
        'calibratemix': lambda: our_step(options, labeled, unlabeled, *calmix),
        'fixmatch no-grad': lambda: our_step(options, labeled, unlabeled, *no_grad),
        'calibratemix no-grad': lambda: our_step(options, labeled, unlabeled, *calmix, *no_grad),
        'two-pass': lambda: two_pass_step(options, labeled, unlabeled),
        'cheap': lambda: our_step(options, labeled, unlabeled, *calmix, cheap=True),
    }
    steps = {name: function() for name, function in make.items()}
    run = steps['calibratemix'].run
    steps['ema'] = lambda: run.ema.update(run.timm_model, step=run.num_updates)
    seconds = take_turns(steps, options.repeats, device)
    memory = {}
    for name in ('fixmatch', 'calibratemix', 'calibratemix no-grad'):
        tensors = [*run.timm_model.state_dict().values(), *labeled.values(), *unlabeled.values()]
        held = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
        held += sum(buffer.nbytes for buffer in steps[name].run.calmix.buffers()) if 'calib' in name else 0
        memory[name] = peak_memory(steps[name], held, device)
    images = options.batch_size * (1 + options.mu)
    rest = zip(seconds['cheap'], seconds['ema'], seconds['calibratemix'])
    rows = {f'{name} step, s': seconds[name] for name in make if name != 'cheap'}
    rows.update({f'{name}, images a second': [images / s for s in seconds[name]] for name in list(make)[:4]})
    rows.update({
        'CalibrateMix step / FixMatch step, joint': ratios(seconds, 'calibratemix', 'fixmatch'),
        'CalibrateMix step / FixMatch step, no-grad': ratios(seconds, 'calibratemix no-grad', 'fixmatch no-grad'),
        'FixMatch step, no-grad / joint': ratios(seconds, 'fixmatch no-grad', 'fixmatch'),
        'share of the step that is not the network, %': [100 * (cheap + ema) / whole for cheap, ema, whole in rest],
        'peak memory of a FixMatch step, joint, MB': [memory['fixmatch'] / 1e6],
        'peak memory, CalibrateMix / FixMatch, joint': [memory['calibratemix'] / memory['fixmatch']],
        'peak memory, CalibrateMix no-grad / FixMatch joint': [memory['calibratemix no-grad'] / memory['fixmatch']],
        'two-pass step / ours, joint': ratios(seconds, 'two-pass', 'calibratemix'),
        'two-pass step / ours, no-grad': ratios(seconds, 'two-pass', 'calibratemix no-grad'),
    })
    return rows


def usb_rows(options: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Steps of USB and ours on the same batch."""
    labeled, unlabeled = create_batches(options, device)
    steps = {}
    for algorithm in ('fixmatch', 'softmatch'):
        flags = ('--algorithm', algorithm)
        steps[f'USB {algorithm} step'] = usb_step(algorithm, options, labeled, unlabeled)
        steps[f'our {algorithm} step'] = our_step(options, labeled, unlabeled, *flags)
        apart = (*flags, '--weak-forward', 'no-grad')
        steps[f'our {algorithm} no-grad step'] = our_step(options, labeled, unlabeled, *apart)
    if bfloat16_units() and device.type == 'cpu':
        steps['our fixmatch step with the recommended flags'] = flagged_step(options, RECOMMENDED, device)
    else:
        print('the row with the recommended flags is left out: they are for processors with units for bfloat16')
    seconds = take_turns(steps, options.repeats, device)
    rows = {f'{name}, s': values for name, values in seconds.items()}
    for name in steps:
        if name.startswith('our'):
            rows[f'USB / {name}'] = ratios(seconds, f'USB {name.split()[1]} step', name)
    return rows


def flagged_step(options: argparse.Namespace, flags: str, device: torch.device) -> Callable:
    """FixMatch's step with one of FLAGS, on a batch in its memory layout."""
    options = changed(options, amp=False, channels_last='--channels-last' in flags)
    return our_step(options, *create_batches(options, device), *([] if flags == 'plain' else flags.split()))


def bfloat16_rows(options: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """FixMatch's step in float32 and with the flags for bfloat16, of a wide ResNet, a ResNet and a small ViT."""
    rows, others = {}, {'resnet18': 64, 'vit_tiny_patch16_224': 64}
    if options.quick:
        others = {'test_resnet': 32, 'test_vit': 32}
    for model, size in {options.model: options.img_size, **others}.items():
        own = changed(options, model=model, img_size=size)
        seconds = take_turns({flags: flagged_step(own, flags, device) for flags in FLAGS}, options.repeats, device)
        rows.update({f'{model}, {size} px, {flags}: step, s': values for flags, values in seconds.items()})
        for flags in FLAGS[1:]:
            rows[f'{model}, {size} px: plain step / with {flags}'] = ratios(seconds, 'plain', flags)
    return rows


def bank_rows(options: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """A table that was visited all over: a first visit would pay for the memory that the system then hands out."""
    rows = {}
    for name, number in (('1.28 million', 1_281_167), ('50 thousand', 50_000)):
        number = number // 50 if options.quick else number
        bank = MarginBank(number, 1000, smoothing=0.997).to(device)
        bank.value.normal_()
        bank.count.fill_(5)
        logits = torch.randn(448, 1000, device=device)
        label = logits.argmax(1)
        order = itertools.cycle(torch.randperm(number, device=device)[:number // 448 * 448].view(-1, 448))

        def update_and_lookup(bank=bank, logits=logits, label=label, order=order):
            index = next(order)
            bank.update(index, logits, label)
            return bank.lookup(index, label)

        seconds = take_turns({'bank': update_and_lookup}, 10 * options.repeats, device)['bank']
        rows[f'bank update and lookup, {name} x 1000, 448 rows, ms'] = [1e3 * s for s in seconds]
        del bank, update_and_lookup
    return rows


def pairing_rows(options: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    calmix = CalibrateMix(64, 448, NUM_CLASSES)
    features, others = torch.randn(64, 128, device=device), torch.randn(448, 128, device=device)
    allowed = (torch.arange(64, device=device) % 2)[:, None] != torch.arange(448, device=device) % 2

    def pair():
        return pair_dissimilar(calmix._similarity(features, others), allowed, calmix.topk)

    seconds = take_turns({'pair': pair}, 20 * options.repeats, device)['pair']
    return {'pairing 2 x 32 with 2 x 224, 128 features, ms': [1e3 * s for s in seconds]}


def view_rows(options: argparse.Namespace) -> dict[str, list[float]]:
    """Weak and strong views of 32 px images on one core, decoded and in memory for both."""
    number = 64 if options.quick else 448
    pixels = np.random.default_rng(0).integers(0, 256, (number, 8, 8, 3), dtype=np.uint8)
    pictures = [Image.fromarray(p).resize((32, 32), Image.Resampling.BICUBIC) for p in pixels]
    images = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    through_pil = build_views(32, (0.5,) * 3)
    in_batches = BatchViews({'weak': 'weak', 'strong': 'strong'}, 32, (0.5,) * 3)

    def single():
        with seeded(0):
            return [(through_pil['weak'](picture), through_pil['strong'](picture)) for picture in pictures]

    def batched():
        return in_batches(images, torch.rand(number, in_batches.num_numbers))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = take_turns({'pil': single, 'tensors': batched}, 2 * options.repeats, torch.device('cpu'))
    torch.set_num_threads(threads)
    return {
        'views through PIL, images a second and core': [number / s for s in seconds['pil']],
        'views of tensors, images a second and core': [number / s for s in seconds['tensors']],
        'views of tensors / views through PIL, images a second': ratios(seconds, 'pil', 'tensors'),
    }


def loader_rows(options: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """What a step takes longer with batches from the loader than with one that is there already: the wait for it."""
    labeled, unlabeled = create_batches(options, device)
    size, number = options.img_size, min(options.num_images, 2 ** 28 // options.img_size ** 2)
    pixels = np.random.default_rng(0).integers(0, 256, (number, size, size, 3), dtype=np.uint8)
    views, kinds = build_views(size, (0.5,) * 3), {'weak': 'weak', 'strong': 'strong'}
    dataset = ViewDataset(ArraySource(pixels, np.zeros(number), None, 'noise'), {kind: views[kind] for kind in kinds})
    if size <= SMALL:
        batch_views = BatchViews(kinds, size, (0.5,) * 3)
        on_gpu = device.type == 'cuda'
        dataset = BatchDataset(dataset, torch.from_numpy(pixels), torch.arange(number), batch_views, on_gpu)
    config = DataConfig((3, size, size), (0.5,) * 3, (0.5,) * 3, 'bilinear', 1.0)
    batches = EndlessBatches(number, options.batch_size * options.mu)
    loader = create_loader(dataset, batches, options.workers, device=device)
    batches = iter(Feed(loader, config, device, options.channels_last))
    run, args = create_run(options, '--calibratemix')

    def step(unlabeled_batches):
        # Several updates, so that a GPU's queue can hide the loader as it does in training.
        for _ in range(1 if device.type == 'cpu' else 20):
            train_ssl.train_one_update(run, itertools.repeat(labeled), unlabeled_batches, args)

    seconds = take_turns({
        'ready': lambda: step(itertools.repeat(unlabeled)), 'loaded': lambda: step(batches),
    }, options.repeats, device)
    waits = [100 * (1 - ready / loaded) for ready, loaded in zip(seconds['ready'], seconds['loaded'])]
    return {f'wait for the loader with {options.workers} workers, % of the step': waits}


def predict_rows(options: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Files to predictions at 224 px: predict.py, and the loop of timm's inference.py on the same network and files."""
    number = 16 if options.quick else 128
    with tempfile.TemporaryDirectory() as folder:
        root, weights = Path(folder) / 'images', Path(folder) / 'model'
        root.mkdir()
        generator = np.random.default_rng(0)
        for i in range(number):
            pixels = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(root / f'{i}.jpg')
        save_for_hf(timm.create_model('mobilenetv3_small_100'), weights, safe_serialization=True)
        argv = [str(root), '--checkpoint', str(weights), '--device', device.type]
        argv += ['-b', '32', '-j', str(options.workers)]
        args = predict._parse_args(argv + ['--amp'] * options.amp + ['--channels-last'] * options.channels_last)
        accelerator = create_accelerator(args)
        source, (model, config, view) = predict.open_all(args), load_model(args, weights, {})
        model.eval().to(device)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)

        def ours():
            return predict.predict(model, config, view, source, predict.Decisions(), accelerator, args)

        @torch.inference_mode()
        def theirs():
            loader = timm.data.create_loader(
                timm.data.create_dataset('', root),
                batch_size=args.batch_size,
                use_prefetcher=True,
                num_workers=args.workers,
                device=device,
                **timm.data.resolve_data_config(model=model),
            )
            found = []
            for images, _ in loader:
                with accelerator.autocast():
                    output = model(images)
                values, classes = output.float().softmax(-1).topk(1)
                found.append((values.cpu().numpy(), classes.cpu().numpy()))
            return found

        seconds = take_turns({'ours': ours, 'theirs': theirs}, options.repeats, device)
    return {
        'predict.py, images a second': [number / s for s in seconds['ours']],
        'timm\'s inference, images a second': [number / s for s in seconds['theirs']],
        'predict.py / timm\'s inference, images a second': ratios(seconds, 'theirs', 'ours'),
    }


def process_rows(options: argparse.Namespace) -> dict[str, list[float]]:
    """Steps of two processes on half the batch each, over gloo, and of one on the whole, each with one thread."""
    seconds = {}
    for processes in (1, 2):
        batch_size = options.batch_size // processes
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes),
                   __file__, '--steps-only', '--model', options.model, '--img-size', str(options.img_size),
                   '-b', str(batch_size), '--mu', str(options.mu), '--repeats', str(options.repeats)]
        environment = dict(os.environ, OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true')
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f'benchmark.py: error: {processes} process(es) failed:\n{done.stderr[-2000:]}')
        seconds[processes] = json.loads(done.stdout.splitlines()[-1])
    return {'step of 2 processes on half the batch / of 1 on all': ratios(seconds, 2, 1)}


def complexity_rows(options: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """CalibrateMix's own work in a step (banks, split, pairs, mixing, loss) as one size at a time grows."""
    usual = dict(classes=10, ratio=7, rows=50_000, batch=64)
    grids = dict(classes=(10, 100, 1000), ratio=(1, 3, 7, 15), rows=(10 ** 4, 10 ** 5, 10 ** 6, 10 ** 7),
                 batch=(16, 64, 256))
    if options.quick:
        grids['rows'] = grids['rows'][:2]
    rows = {}
    for size, values in grids.items():
        for value in values:
            at = dict(usual, **{size: value})
            b, u, classes = at['batch'], at['batch'] * at['ratio'], at['classes']
            calmix = CalibrateMix(at['rows'], at['rows'], classes, warmup_steps=0).to(device)
            calmix.apm.value.normal_()  # its memory is the system's to hand out at the first touch
            x, weak = (torch.randn(n, 3, 32, 32, device=device) for n in (b, u))
            f, f_weak = torch.randn(b, 128, device=device), torch.randn(u, 128, device=device)
            z, z_weak = torch.randn(b, classes, device=device), torch.randn(u, classes, device=device)
            y, pseudo_label = z.argmax(1), z_weak.argmax(1)

            def step():
                i, j = (torch.randint(at['rows'], (n,), device=device) for n in (b, u))  # noqa: B023
                calmix.update(i, y, z, j, pseudo_label, z_weak, 0)  # noqa: B023
                mixed = calmix.mix(i, y, x, f, j, pseudo_label, weak, f_weak)  # noqa: B023
                return calmix.loss(z, mixed)  # noqa: B023

            seconds = take_turns({'step': step}, 5 * options.repeats, device)['step']
            rows[f'CalibrateMix alone, {size} {value}, ms'] = [1e3 * s for s in seconds]
    return rows


def by_size(rows: dict[str, list[float]]) -> dict[str, dict[int, list[float]]]:
    """The rows of `complexity_rows` by the size that grows, in words, and its value."""
    titles = dict(classes='classes', ratio='unlabeled images per labeled one', rows='images in the set',
                  batch='labeled images in the batch')
    return {
        title: {int(name.split()[3].rstrip(',')): values for name, values in rows.items() if f', {size} ' in name}
        for size, title in titles.items()
    }


OWNERS = {  # of the operators of a step, by the file and the function that they are called from
    ('calibratemix.py', 'update'): 'bank update',
    ('calibratemix.py', 'steer'): 'steered weight',
    ('calibratemix.py', 'for_mask'): 'method',
    ('calibratemix.py', 'find_easy'): 'split',
    ('calibratemix.py', 'pair_dissimilar'): 'pairing',
    ('calibratemix.py', '_similarity'): 'pairing',
    ('calibratemix.py', 'mix'): 'mix',
    ('calibratemix.py', 'loss'): 'mix',
    ('pseudo_labels.py', 'see_labeled'): 'method',
    ('pseudo_labels.py', 'forward'): 'method',
    ('pseudo_labels.py', 'target'): 'method',
    ('pseudo_labels.py', 'further_loss'): 'method',
    ('train_ssl.py', 'add'): 'monitor',
    ('train_ssl.py', 'judge_pseudo_labels'): 'monitor',
    ('model_ema.py', 'update'): 'average',
    ('data.py', '__iter__'): 'feed',
    ('sgd.py', 'step'): 'optimizer',
}
OURS = ('bank update', 'steered weight', 'split', 'pairing', 'mix', 'method', 'monitor', 'average', 'feed')


class OperatorCount(TorchDispatchMode):
    """Counts operators by their owners; views and allocations, which compute nothing, are left out."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        view = any(out.alias_info is not None and not out.alias_info.is_write for out in function._schema.returns)
        name = function._schema.name
        if not view and 'empty' not in name and name not in ('aten::_unsafe_view', 'aten::_local_scalar_dense'):
            frame, owner = sys._getframe(1), None
            while frame is not None and owner is None:
                code = frame.f_code
                owner = OWNERS.get((os.path.basename(code.co_filename), code.co_name))
                frame = frame.f_back
            self.counts[owner or 'losses and network, with backward'] += 1
        return function(*args, **(kwargs or {}))


def operator_rows(options: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Small operators of an update, by who calls them, on a network of two products.

    No image stands twice in the batch. What an update on a GPU launches is the same but for three things: indices are
    not checked by operators there, fields of a batch are copied to it, and several processes cannot know that no image
    stands twice (see `MarginBank.update`).
    """
    config = DataConfig((3, options.img_size, options.img_size), (0.5,) * 3, (0.5,) * 3, 'bilinear', 1.0)

    def feed(batch):
        fields = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        images = {key: (value * 255).byte() for key, value in fields.items() if value.ndim == 4}
        skipped = torch.full_like(fields['index'], -1)
        loader = (dict(fields, **images, skipped=skipped) for _ in itertools.count())
        return iter(Feed(loader, config, device, options.channels_last))

    rows, batches = {}, create_batches(options, device)
    for algorithm in ('fixmatch', 'flexmatch', 'softmatch', 'freematch'):
        for preset in ('', 'paper', 'steered'):
            flags = ['--calibratemix', '--calmix-preset', preset] if preset else []
            run, args = create_run(options, '--algorithm', algorithm, *flags, cheap=True)
            feeds = [feed(batch) for batch in batches]
            for _ in range(2):  # in the first update the optimizer makes its state
                train_ssl.train_one_update(run, *feeds, args)
            with OperatorCount() as counted:
                train_ssl.train_one_update(run, *feeds, args)
            name = f'operators, {algorithm} {preset and "+ " + preset}'.rstrip()
            rows.update((f'{name}: {owner}', [count]) for owner, count in counted.counts.items())
            rows[f'{name}: all of ours'] = [sum(counted.counts[owner] for owner in OURS)]
    return rows


# --- Table ------------------------------------------------------------------------------------------------------------

def summarise(rows: dict[str, list[float]], targets: dict[str, float]) -> list[dict]:
    """Rows of the table: median, least and greatest, target and whether the median meets it."""
    table = []
    for name, values in rows.items():
        target = targets.get(name)
        met = '' if target is None else 'yes' if (median(values) <= target if target > 0 else
                                                  median(values) >= -target) else 'no'
        table.append({
            'row': name, 'value': f'{median(values):.4g}', 'min': f'{min(values):.4g}', 'max': f'{max(values):.4g}',
            'target': '' if target is None else f'{"at most" if target > 0 else "at least"} {abs(target):g}',
            'met': met,
        })
    return table


def describe_machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == 'cuda' else platform.processor() or platform.machine()
    cpuinfo = Path('/proc/cpuinfo')
    if device.type == 'cpu' and cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith('model name')]
        name = f'{len(lines)} cores of {lines[0].partition(": ")[2]}' if lines else name
    units = bfloat16_units() if device.type == 'cpu' else ''
    name += f' with {units}' if units else ''
    allocator = ' '.join(f'{key}={value}' for key, value in os.environ.items() if key.startswith('MALLOC_'))
    return (f'{name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, timm {timm.__version__}, '
            f'python {platform.python_version()}, {allocator or "default allocator"}'
            + (', processor time' if clock is time.process_time else ''))


def create_parser() -> argparse.ArgumentParser:
    flag = argparse.BooleanOptionalAction
    parser = ArgumentParser(description='Times of the training step and its parts.')
    parser.add_argument('--model', metavar='NAME', default=None, help='default: wide_resnet28_2')
    parser.add_argument('--img-size', type=int, metavar='N', default=None, help='pixels (default: 32)')
    parser.add_argument('-b', '--batch-size', type=int, metavar='N', default=None, help='default: 64')
    parser.add_argument('--mu', type=int, metavar='N', default=7, help='default: 7')
    parser.add_argument('--repeats', type=int, metavar='N', default=None, help='measurements of a row (default: 7)')
    parser.add_argument('--quick', action='store_true',
                        help='wide_resnet10_1, batch 8, 16 px and smaller banks: shows that each row works')
    parser.add_argument('--rows', nargs='+', choices=[*ROWS, 'operators', 'complexity', 'usb'], default=ROWS,
                        help='default: all but operators, complexity and usb, which are not times or have no targets')
    parser.add_argument('-j', '--workers', type=int, metavar='N', default=2, help='loading processes (default: 2)')
    parser.add_argument('--picture', metavar='FILE', default='complexity.png', help='of --rows complexity')
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'], help='default: cpu')
    parser.add_argument('--processor-time', action='store_true',
                        help='count the time that this process had a core, not the time on the wall (CPU; loading '
                             'processes, and the row of two processes, do not go with it)')
    parser.add_argument('--amp', action=flag, default=False, help='bfloat16')
    parser.add_argument('--channels-last', action=flag, default=False)
    parser.add_argument('--torchcompile', action=flag, default=False, help='compile the network')
    parser.add_argument('--results-file', metavar='FILE', default=None, help='write the table as CSV')
    parser.add_argument('--steps-only', action='store_true', help=argparse.SUPPRESS)  # a process of process_rows
    parser.set_defaults(num_images=50_000)
    return parser


def main() -> None:
    parser = create_parser()
    options = parser.parse_args()
    for name, full, quick in (('model', 'wide_resnet28_2', 'wide_resnet10_1'), ('img_size', 32, 16),
                              ('batch_size', 64, 8), ('repeats', 7, 3)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    if options.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch finds no CUDA GPU here (torch.cuda.is_available() is False)')
    if 'usb' in options.rows:
        if options.model not in USB_MODELS:
            parser.error(f'--rows usb: --model {options.model} is none of {", ".join(USB_MODELS)}')
        if importlib.util.find_spec('semilearn') is None:
            parser.error('--rows usb: the package semilearn is not installed (pip install semilearn)')
    written = {'--results-file': options.results_file, '--picture': 'complexity' in options.rows and options.picture}
    for flag, path in written.items():
        try:
            if path:
                open(path, 'a').close()  # rather now than after all measurements
        except OSError as error:
            parser.error(f'{flag} {path}: cannot be written: {error.strerror}')
    device = torch.device(options.device)
    if options.processor_time:
        waiting = sorted({'loader', 'predict', 'processes'} & {*options.rows})
        if waiting or device.type != 'cpu':
            parser.error(f'--processor-time: {", ".join(waiting) or "--device cuda"}: their work is not done in this '
                         'process; leave it out, or name other --rows')
        global clock
        clock = time.process_time
    if options.steps_only:
        labeled, unlabeled = create_batches(options, device)
        step = our_step(options, labeled, unlabeled, '--calibratemix')
        seconds = take_turns({'step': step}, options.repeats, device)['step']
        if step.run.accelerator.is_main_process:
            print(json.dumps(seconds))
        return
    rows = {}
    if 'steps' in options.rows:
        rows.update(step_rows(options, device))
    if 'bank' in options.rows:
        rows.update(bank_rows(options, device))
    if 'pairing' in options.rows:
        rows.update(pairing_rows(options, device))
    if 'views' in options.rows:
        rows.update(view_rows(options))
    if 'loader' in options.rows:
        rows.update(loader_rows(options, device))
    if 'operators' in options.rows:
        rows.update(operator_rows(options, device))
    if 'predict' in options.rows:
        rows.update(predict_rows(options, device))
    if 'bfloat16' in options.rows:
        rows.update(bfloat16_rows(options, device))
    if 'usb' in options.rows:
        rows.update(usb_rows(options, device))
    if 'complexity' in options.rows:
        grown = complexity_rows(options, device)
        complexity_diagram(by_size(grown), options.picture)
        rows.update(grown)
    if 'processes' in options.rows and device.type == 'cpu':
        rows.update(process_rows(options))
    table = summarise(rows, {} if options.quick else TARGETS)  # which are for the full sizes
    print(f'{options.model}, batch {options.batch_size}, mu {options.mu}, {options.img_size} px; '
          f'{describe_machine(device)}')
    width = max(len(row['row']) for row in table)
    print(f'{"":{width}}  {"median":>9}  {"min":>9}  {"max":>9}  target')
    for row in table:
        met = {'yes': ', met', 'no': ', MISSED', '': ''}[row['met']]
        print(f'{row["row"]:{width}}  {row["value"]:>9}  {row["min"]:>9}  {row["max"]:>9}  {row["target"]}{met}')
    if options.results_file:
        with open(options.results_file, 'w', newline='') as file:
            writer = csv.DictWriter(file, table[0], lineterminator='\n')
            writer.writeheader()
            writer.writerows(table)


if __name__ == '__main__':
    main()
