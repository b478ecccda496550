"""The optimizer, and its learning rate over the updates of a run."""
import argparse
import math

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from program import UsageError


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
    )
    return scheduler


def step_scheduler(scheduler: Scheduler, num_updates: int, args: argparse.Namespace) -> None:
    """Sets the learning rate that belongs to the updates done so far, whether the schedule counts these or epochs."""
    scheduler.step_update(num_updates)
    scheduler.step(num_updates // args.train_steps_per_epoch)
