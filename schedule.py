"""The optimizer, and its learning rate over the updates of a run."""
import argparse
import math
from collections.abc import Sequence

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import dispatch_clip_grad
from torch import nn

from program import ArgumentParser, ParseKwargs, UsageError


def newest_share(updates: int) -> float:
    """What the newest batch counts in a running average, as the default for a run of so many updates.

    An average whose newest value counts s looks back over 1/s updates. That has to be a small part of the run, or what
    is evaluated at its end is a network of long ago: here a hundredth. Published runs have 0.001 (1,000 of 2^20
    updates), which stands from 100,000 updates on. Nothing counts more than 0.1, or single batches would show.
    """
    return min(max(100 / updates, 0.001), 0.1)


def needs_warmup(updates: int, decay: float) -> bool:
    """Whether averaged weights of this decay look back over more than a hundredth of a run, by default."""
    return round(updates * (1 - decay), 6) < 100


def running_momentum(args: argparse.Namespace) -> float:
    """--stat-momentum, which is by update, for running means that move with each of an update's batches."""
    return args.stat_momentum ** (1 / args.grad_accum_steps)


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The arguments of optimizer and schedule; returns their group, to which those of the length are added."""
    flag = argparse.BooleanOptionalAction
    group = parser.add_argument_group('Optimizer and schedule')
    group.add_argument('--opt', metavar='NAME', default='sgd', help='timm optimizer (default: sgd, which is Nesterov)')
    group.add_argument('--opt-eps', type=float, metavar='X', default=None, help='epsilon (default: the optimizer\'s)')
    group.add_argument('--opt-betas', type=float, nargs='+', metavar='X', default=None, help='likewise')
    group.add_argument('--opt-kwargs', nargs='*', action=ParseKwargs, default={}, metavar='K=V',
                       help='further arguments of the optimizer, such as fused=True for torch\'s fused form (default: '
                            'none; torch then takes its multi-tensor form on a GPU)')
    group.add_argument('--momentum', type=float, metavar='X', default=0.9, help='default: 0.9')
    group.add_argument('--weight-decay', type=float, metavar='X', default=5e-4,
                       help='not on norms and biases (default: 5e-4; the paper has 1e-3 for CIFAR-100)')
    group.add_argument('--clip-grad', type=float, metavar='X', default=None, help='gradient clipping (default: none)')
    group.add_argument('--clip-mode', default='norm', choices=['norm', 'value', 'agc'],
                       help='default: norm; agc leaves the classifier as it is')
    group.add_argument('--lr', type=float, metavar='X', default=0.03, help='learning rate (default: 0.03)')
    group.add_argument('--sched', default='cosine-7-16',
                       choices=['cosine-7-16', 'cosine', 'tanh', 'step', 'poly', 'constant'],
                       help='cosine-7-16: lr * cos(7 pi s / (16 S)), the paper\'s (default); else timm\'s')
    group.add_argument('--sched-on-updates', action=flag, default=True,
                       help='step the schedule with every update, else with every epoch (default: yes)')
    group.add_argument('--min-lr', type=float, metavar='X', default=0., help='for timm\'s schedules (default: 0)')
    group.add_argument('--decay-epochs', type=float, metavar='N', default=90, help='of --sched step (default: 90)')
    group.add_argument('--decay-rate', type=float, metavar='X', default=0.1,
                       help='factor of --sched step, exponent of poly (default: 0.1)')
    group.add_argument('--warmup-lr', type=float, metavar='X', default=1e-5, help='start of a warmup (default: 1e-5)')
    group.add_argument('--warmup-epochs', type=int, metavar='N', default=0, help='of the learning rate (default: 0)')
    return group


def check_optimizer(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with status 2 where timm has no such optimizer, no optimizer can have such numbers, or the schedule does
    not fit the length of the run.
    """
    names = ('lr', 'weight_decay', 'opt_eps', 'min_lr', 'warmup_lr', 'warmup_epochs', 'decay_rate')
    parser.at_least(args, **dict.fromkeys(names, 0))
    parser.shares(args, 'momentum', 'opt_betas', below=True)
    parser.above_zero(args, 'clip_grad')
    if args.opt.lower().removeprefix('lookahead_') not in list_optimizers():
        parser.error(f'--opt {args.opt}: unknown; timm has {", ".join(list_optimizers())}, and each as lookahead_NAME')
    if args.warmup_epochs and args.warmup_epochs >= args.epochs:
        parser.error(f'--warmup-epochs {args.warmup_epochs}: expected less than --epochs {args.epochs}')
    if args.sched == 'step' and not 0 < args.decay_epochs < args.epochs:
        parser.error(f'--decay-epochs {args.decay_epochs:g}: --sched step would not lower the learning rate in '
                     f'{args.epochs} epochs')


def has_momentum(name: str) -> bool:
    """Whether timm passes --momentum to an optimizer."""
    return get_optimizer_info(name.lower().removeprefix('lookahead_')).has_momentum


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    asked = {key: value for key, value in (('eps', args.opt_eps), ('betas', args.opt_betas)) if value is not None}
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=args.opt,
            lr=args.lr,
            weight_decay=args.weight_decay,
            momentum=args.momentum,
            **asked,
            **args.opt_kwargs,
        )
    except (ValueError, IndexError, TypeError, ImportError, RuntimeError) as error:
        raise UsageError(f'--opt {args.opt}: {" ".join(str(error).split())}') from error
    for key in asked.keys() - optimizer.defaults.keys():  # timm leaves out what the optimizer does not take
        raise UsageError(f'--opt-{key}: {args.opt} has no {key}')
    if getattr(optimizer, 'is_second_order', False):
        raise UsageError(f'--opt {args.opt}: needs second derivatives, which are not computed here')
    if args.amp and args.amp_dtype == 'float16' and getattr(optimizer, '_step_supports_amp_scaling', False):
        # It skips an update by itself and on the device, and the schedule and the averaged weights would go on.
        raise UsageError(f'--opt {args.opt} --opt-kwargs {" ".join(f"{k}={v}" for k, v in args.opt_kwargs.items())}: '
                         'with --amp-dtype float16 a fused optimizer does not tell which updates it skipped; leave it '
                         'out, or take bfloat16')
    return optimizer


class SevenSixteenthsCosine(Scheduler):
    """lr * cos(7 pi s / (16 S)) (FixMatch, arXiv 2001.07685), in updates or epochs, after an optional linear warmup."""

    def __init__(
            self,
            optimizer: torch.optim.Optimizer,
            length: int,
            warmup: int = 0,
            warmup_lr: float = 0.,
            t_in_epochs: bool = False,
    ):
        super().__init__(optimizer, 'lr', t_in_epochs=t_in_epochs)
        self.length, self.warmup, self.warmup_lr = length, warmup, warmup_lr

    def _get_lr(self, t: int) -> list[float]:
        if t < self.warmup:
            return [self.warmup_lr + (lr - self.warmup_lr) * t / self.warmup for lr in self.base_values]
        return [lr * math.cos(7 * math.pi * t / (16 * self.length)) for lr in self.base_values]


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> Scheduler:
    steps = args.train_steps_per_epoch
    if args.sched == 'cosine-7-16':
        unit = steps if args.sched_on_updates else 1
        return SevenSixteenthsCosine(
            optimizer, args.epochs * unit, args.warmup_epochs * unit, args.warmup_lr, not args.sched_on_updates,
        )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        min_lr=args.min_lr,
        warmup_lr=args.warmup_lr,
        warmup_epochs=args.warmup_epochs,
        step_on_epochs=not args.sched_on_updates,
        updates_per_epoch=steps,
        decay_epochs=args.decay_epochs,
        decay_rate=args.decay_rate,
    )
    return scheduler


def clip_gradients(model: nn.Module, args: argparse.Namespace) -> None:
    """Clips as --clip-grad and --clip-mode say; adaptive clipping leaves the classifier as it is (arXiv 2102.06171)."""
    parameters = [*model.parameters()]
    if args.clip_mode == 'agc':
        head = {id(parameter) for parameter in model.get_classifier().parameters()}
        parameters = [parameter for parameter in parameters if id(parameter) not in head]
    dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)


def step_scheduler(scheduler: Scheduler, num_updates: int, args: argparse.Namespace) -> None:
    """Sets the learning rate that belongs to the updates done so far, whether the schedule counts these or epochs."""
    scheduler.step_update(num_updates)
    scheduler.step(num_updates // args.train_steps_per_epoch)


def learning_rate(groups: Sequence[dict]) -> float:
    """The schedule's value, of an optimizer's groups: --opt-kwargs layer_decay=X gives each a share of it."""
    group = max(groups, key=lambda group: group.get('lr_scale', 1.))
    return group['lr'] / group.get('lr_scale', 1.)
