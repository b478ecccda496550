"""A run's folder: its lock, arguments, checkpoints, weights, summary and margins; saving and resuming."""
import argparse
import copy
import csv
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from calibratemix import CalibrateMix, MarginBank, split_easy_hard
from data import DataConfig, Datasets, Feed, check_classes_left
from digests import MOST_DIGESTS, digest_pictures, spread, to_text
from imbalance import describe_draw
from labels import label_seed, write_labels
from methods import lambda_u, older_presets, warmup_updates
from program import RunError, UsageError, mend_folder, replace_file, replace_folder
from schedule import learning_rate, step_scheduler
from shards import load_whole, whole_bank
from sources import Source, unlabeled_split
from splits import Identity, Sources, use_bits

_logger = logging.getLogger('train')

TRAIN_COLUMNS = (
    'loss', 'loss_labeled', 'loss_unlabeled', 'loss_mixup', 'mask_rate', 'pseudo_label_accuracy', 'skipped_updates',
    'skipped_images',
)
EVAL_COLUMNS = ('loss', 'nll', 'top1', 'error', 'top5', 'brier', 'ece', 'ece_10', 'mce', 'confidence',
                'balanced_accuracy', 'macro_f1', 'ece_balanced')
LOWER_IS_BETTER = {'error', 'loss', 'nll', 'brier', 'ece', 'ece_10', 'mce', 'overconfidence', 'underconfidence',
                   'ece_balanced'}
SUMMARY_COLUMNS = (
    'epoch', 'num_updates', *(f'train_{c}' for c in TRAIN_COLUMNS), *(f'eval_{c}' for c in EVAL_COLUMNS),
    'eval_tail_error', 'lr', 'calmix_weight',  # tail_error is empty where the labels are balanced
)


# --- The folder -------------------------------------------------------------------------------------------------------

def open_run_folder(args: argparse.Namespace, accelerator: Accelerator, img_size: int) -> tuple:
    """The run folder, the checkpoint to go on from, and on the main process the lock to keep while the run goes on."""
    found, lock = [None], None
    if accelerator.is_main_process:
        name = args.experiment or '-'.join([datetime.now().strftime('%Y%m%d-%H%M%S'), args.model, str(img_size)])
        folder = Path(args.output) / name.replace('/', '_')
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(folder)
            for name in ('best', 'last'):
                mend_folder(folder / name)
            goes_on = args.resume == 'auto' or (args.resume and Path(args.resume).parent.resolve() == folder.resolve())
            if not goes_on and (folder / 'args.yaml').exists():
                if holds_results(folder):
                    raise UsageError(f'{folder} holds a run already: go on with --resume auto, or choose another '
                                     '--experiment')
                _logger.info(f'{folder} is of a run that ended before it saved anything: starting anew there')
            checkpoint = newest_intact(folder) if args.resume == 'auto' else Path(args.resume) if args.resume else None
            found = [(folder, checkpoint)]
        except OSError as error:
            found = [UsageError(f'--output {args.output}: {folder} cannot be written: {error.strerror}')]
        except (UsageError, RunError) as error:
            found = [error]
    broadcast_object_list(found)  # what the first process found, also that it cannot go on
    if isinstance(found[0], Exception):
        raise found[0]
    return *found[0], lock


def holds_results(folder: Path) -> bool:
    """Whether a run's folder has more than what is written before the first update."""
    kinds = ('*.safetensors', 'summary.csv', 'margins.parquet', 'last', 'best')
    return any(True for kind in kinds for _ in folder.glob(kind))


def lock_folder(folder: Path) -> TextIO:
    """Keeps other runs out of a folder while this process lives; returns the open file, which the caller has to keep.

    The kernel releases the lock however the process ends. It is a POSIX record lock, which data workers do not inherit:
    a killed run's orphans, alive for some more seconds, cannot keep its resume out. Over NFS it holds between hosts.
    Where a file system has no locks (Lustre mounted without `flock`), nothing but a warning keeps two runs apart.

    Raises:
        UsageError: If another process holds the lock.
    """
    file = open(folder / '.lock', 'a+')
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise UsageError(f'{folder} is in use by {file.read() or "another process"}: wait for it, or choose another '
                         '--experiment') from error
    except OSError as error:
        _logger.warning(f'{folder} cannot be locked ({error.strerror}): see that no other run uses it')
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}')
    file.flush()
    return file


def newest_intact(folder: Path) -> Path | None:
    for path in list_checkpoints(folder):
        try:
            read_checkpoint(path)
            return path
        except UsageError as error:
            _logger.warning(f'{error}; trying an older one')
    return None


def write_args(path: Path, args: argparse.Namespace) -> None:
    """Writes the arguments as --config takes them."""
    replayable = {key: value for key, value in vars(args).items() if key not in ('config', 'resume')}
    if args.global_batch_size is not None:
        replayable['batch_size'] = None  # follows from it
    text = yaml.safe_dump(replayable, sort_keys=False)
    replace_file(path, lambda part: part.write_text(text))


def start_trackers(accelerator: Accelerator, folder: Path, args: argparse.Namespace) -> None:
    wandb = dict(name=folder.name, dir=str(folder), tags=args.wandb_tags)
    if args.wandb_resume_id:
        wandb.update(id=args.wandb_resume_id, resume='must')
    plain = (bool, int, float, str)
    config = {key: value if isinstance(value, plain) else str(value) for key, value in vars(args).items()}
    accelerator.project_configuration.logging_dir = str(folder)
    accelerator.init_trackers(args.wandb_project, config=config, init_kwargs={'wandb': wandb})


def read_args(path: Path) -> dict:
    """A run's args.yaml; raises UsageError if it cannot be read or is no mapping."""
    try:
        run = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f'{path}: {" ".join(str(error).split())}') from error
    if not isinstance(run, dict):
        raise UsageError(f'{path}: expected a mapping of argument names to values')
    return run


def read_run(checkpoint: Path) -> dict:
    """The arguments of the run that a checkpoint belongs to, empty if none are found one level above it.

    Raises:
        UsageError: If there is no such checkpoint, or its args.yaml is no mapping.
    """
    if not checkpoint.exists():
        raise UsageError(f'--checkpoint {checkpoint}: no such file or folder')
    if checkpoint.is_dir() and not (checkpoint / 'config.json').exists():
        inside = ' or '.join(str(checkpoint / name) for name in ('best', 'last') if (checkpoint / name).is_dir())
        raise UsageError(f'--checkpoint {checkpoint}: no config.json in it' + (f'; give {inside}' if inside else ''))
    if checkpoint.is_file() and (checkpoint.parent / 'config.json').exists():
        raise UsageError(f'--checkpoint {checkpoint}: give its folder, which says what model it is')
    if checkpoint.is_file() and checkpoint.suffix == '.safetensors' and checkpoint.name.startswith('checkpoint-'):
        raise UsageError(f'--checkpoint {checkpoint}: this is a state to resume from; weights are in best/ and last/')
    path = checkpoint.parent / 'args.yaml'
    return read_args(path) if path.exists() else {}


def use_kept_bits(checkpoint: Path | None, sources: Iterable[Source | None]) -> None:
    """Takes deep greyscale as the run of a checkpoint folder took it, whatever these pictures hold."""
    if checkpoint is None or not checkpoint.is_dir():
        return
    file = checkpoint / 'config.json'
    try:
        bits = json.loads(file.read_text()).get('grey_bits', 8)
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f'{file}: cannot be read: {" ".join(str(error).split())}') from error
    if not isinstance(bits, int) or not 8 <= bits <= 32:
        raise UsageError(f'{file}: grey_bits is {bits}; expected a whole number from 8 to 32')
    for source in sources:
        if source is not None and len(source):
            use_bits(source, bits)


# --- Checkpoints ------------------------------------------------------------------------------------------------------

@dataclass
class Run:
    """What changes while a run goes on, and all that a checkpoint holds."""
    model: nn.Module  # what Accelerate made of it: features and logits, perhaps compiled, perhaps DDP
    timm_model: nn.Module  # the network itself
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    ema: ModelEmaV3 | None
    method: nn.Module | None
    calmix: CalibrateMix | None
    monitor: Any  # train_ssl.Monitor, whose sums are those of the epoch so far
    accelerator: Accelerator
    labels: torch.Tensor  # [2, L] int64, the labeled images' positions in the training split and their targets
    num_classes: int  # K, without an extra class
    identity: Identity  # of the data
    num_updates: int = 0
    num_draws: int = 0  # batches drawn from each loader; ahead of the updates by skipped ones and by accumulation
    skipped_updates: int = 0
    skipped_images: tuple[set[int], set[int]] = field(default_factory=lambda: (set(), set()))  # labeled, unlabeled
    told_images: set[str] = field(default_factory=set)  # names of skipped images that are in the log
    recorded: int = 0  # updates at the last end of an epoch whose evaluation is done and logged
    best_metric: float | None = None
    not_better: int = 0  # evaluations in a row without a better metric
    adjustment: nn.Module | None = None  # of the logits, by class frequencies

    @property
    def labeled_by_class(self) -> torch.Tensor:
        """How many labeled images are trained as each class, `[K]` int64."""
        return torch.bincount(self.labels[1], minlength=self.num_classes)[:self.num_classes]

    @property
    def eval_model(self) -> nn.Module:
        return self.ema.module if self.ema is not None else self.timm_model


def pack(value, tensors: dict[str, torch.Tensor], name: str = ''):
    """JSON form of a nested state: its tensors go to `tensors`, and their names take their places."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {'tensor': name}
    if isinstance(value, dict):  # as pairs: JSON keys would turn an optimizer's integers into strings
        return {'dict': [[key, pack(item, tensors, f'{name}.{key}')] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [pack(item, tensors, f'{name}.{i}') for i, item in enumerate(value)]
        return items if isinstance(value, list) else {'tuple': items}
    return {'dtype': str(value).removeprefix('torch.')} if isinstance(value, torch.dtype) else value


def unpack(value, tensors: dict[str, torch.Tensor]):
    """Inverse of `pack`; tuples of older checkpoints come back as lists."""
    if isinstance(value, dict):
        if 'tensor' in value:
            return tensors[value['tensor']]
        if 'dtype' in value:
            return getattr(torch, value['dtype'])
        if 'tuple' in value:
            return tuple(unpack(item, tensors) for item in value['tuple'])
        return {key: unpack(item, tensors) for key, item in value['dict']}
    return [unpack(item, tensors) for item in value] if isinstance(value, list) else value


def join_skipped(skipped: Sequence[set[int]], accelerator: Accelerator, args: argparse.Namespace) -> list[set[int]]:
    """Each set joined over the processes, all of which take part."""
    if not args.skip_bad_images:
        return [set() for _ in skipped]
    return [set().union(*gather_object([part])) for part in skipped]


def tell_skipped(run: Run, feeds: Sequence[Feed], args: argparse.Namespace) -> int:
    """Logs by name each image that could not be decoded and was not told before; returns how many there are so far.

    An image counts once, in however many of the sets it is. All processes take part.

    Raises:
        ImageError: If a class has lost all of its labeled images.
    """
    names, told = {}, len(run.told_images)
    for feed, skipped in zip(feeds, join_skipped([feed.skipped for feed in feeds], run.accelerator, args)):
        dataset = feed.loader.dataset
        check_classes_left(dataset, skipped)
        names.update(dict.fromkeys(dataset.source.where(index) for index in sorted(skipped)))
    for name in names:
        if name not in run.told_images:
            run.told_images.add(name)
            _logger.warning(f'--skip-bad-images: {name} cannot be decoded, and is stepped over')
    if len(run.told_images) > told:
        _logger.warning(f'--skip-bad-images: {len(names)} images in all cannot be decoded')
    return len(names)


def save_checkpoint(run: Run, folder: Path, args: argparse.Namespace) -> None:
    """Writes `checkpoint-<updates>.safetensors`, and removes older ones beyond `--checkpoint-hist`.

    One file, renamed into place: there is no moment at which the newest checkpoint is incomplete.
    """
    run.monitor.check()
    calmix = None
    if run.calmix is not None:
        calmix = run.calmix.state_dict()
        bank = whole_bank(run.calmix.apm, run.accelerator)
        calmix.update((f'apm.{name}', table) for name, table in bank.state_dict().items())
    state = dict(
        format=CHECKPOINT_FORMAT,
        model=run.timm_model.state_dict(),
        optimizer=run.optimizer.state_dict(),
        ema=run.ema.module.state_dict() if run.ema is not None else None,
        method=run.method.state_dict() if run.method is not None else None,
        calmix=calmix,
        adjustment=run.adjustment.state_dict() if run.adjustment is not None else None,
        scaler=run.accelerator.scaler.state_dict() if run.accelerator.scaler is not None else None,
        sums=run.accelerator.gather(run.monitor.sums[None]),
        labels=run.labels,
        identity=run.identity.state(),
        num_updates=run.num_updates,
        num_draws=run.num_draws,
        skipped_updates=run.skipped_updates,
        skipped_images=[sorted(skipped) for skipped in join_skipped(run.skipped_images, run.accelerator, args)],
        told_images=sorted(run.told_images),
        recorded=run.recorded,
        best_metric=run.best_metric,
        not_better=run.not_better,
        num_processes=run.accelerator.num_processes,
        args=vars(args),
    )
    if not run.accelerator.is_main_process:
        return
    tensors = {}
    metadata = {'state': json.dumps(pack(state, tensors))}
    tensors = {key: value.clone() for key, value in tensors.items()}  # safetensors refuses shared memory
    path = folder / f'checkpoint-{run.num_updates}.safetensors'
    replace_file(path, lambda part: save_file(tensors, part, metadata))
    for old in list_checkpoints(folder)[args.checkpoint_hist:]:
        old.unlink()


def retire_checkpoints(folder: Path, num_updates: int) -> None:
    """Renames checkpoints of more updates than the run goes on from, to `abandoned-<updates>.safetensors`.

    They are of a course that the run leaves, or broken. --resume auto must not go back to them, and new ones, which
    have smaller numbers, must not count as older.
    """
    for path in list_checkpoints(folder):
        if int(path.stem.split('-')[1]) > num_updates:
            path.rename(path.with_name(path.name.replace('checkpoint-', 'abandoned-')))
            _logger.warning(f'{path} is ahead of the run, at update {num_updates}: renamed to abandoned-...')


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run folder, newest first."""
    found = [path for path in folder.glob('checkpoint-*.safetensors') if path.stem.split('-')[1].isdigit()]
    return sorted(found, key=lambda path: int(path.stem.split('-')[1]), reverse=True)


def read_checkpoint(path: Path) -> dict:
    """The state in a checkpoint, tensors on the CPU. Nothing in the file is executed.

    Raises:
        UsageError: If it is missing, truncated or none of ours.
    """
    try:
        with safe_open(path, 'pt') as file:
            state = json.loads(file.metadata()['state'])
            return unpack(state, {key: file.get_tensor(key) for key in file.keys()})
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f'--resume {path}: no intact checkpoint of this script ({error})') from error


CHECKPOINT_FORMAT = 3  # goes up when the contents of a checkpoint take another form or meaning

# Differences that would attach a margin or a table to another image or class.
FIXED_ARGS = ('dataset', 'train_split', 'unlabeled_split', 'unlabeled_dir', 'exclude_labeled', 'val_fraction',
              'val_seed', 'algorithm', 'calibratemix', 'model', 'num_classes', 'model_ema', 'opt',
              'calmix_bank_dtype', 'aum_threshold_samples', 'freeze', 'unlabeled_imbalance_factor',
              'unlabeled_per_class')
# Differences that nobody needs to be told of.
FREE_ARGS = ('config', 'resume', 'output', 'experiment', 'workers', 'pin_mem', 'log_interval', 'device', 'labels_file',
             'num_labels', 'label_seed', 'label_noise', 'imbalance_factor', 'dist_timeout', 'calmix_bank_shards')
# Arguments that an optimizer keeps in its groups, by the names there; from a checkpoint it would take the old values.
OPTIMIZER_ARGS = dict(weight_decay='weight_decay', momentum='momentum', opt_eps='eps', opt_betas='betas')


def check_same_run(run: Run, state: dict, path: Path, args: argparse.Namespace) -> dict[str, tuple]:
    """Arguments that differ from those of a checkpoint, by name: the old value and the new one. Tells them.

    Raises:
        UsageError: If the checkpoint belongs to other data, labels, classes, another method or version of this script.
    """
    if state.get('format') != CHECKPOINT_FORMAT:
        raise UsageError(f'--resume {path}: another version of this script made the checkpoint, of format '
                         f'{state.get("format", "0")} where this one reads {CHECKPOINT_FORMAT}; resume with that one')
    before = {**state['args'], **older_presets(state['args'])}
    changed = {key: (old, getattr(args, key)) for key, old in before.items()
               if key not in FREE_ARGS and hasattr(args, key) and getattr(args, key) != old}
    if args.global_batch_size is not None:
        changed.pop('batch_size', None)  # follows from the other, and from the number of processes
    told = ', '.join(f'--{key.replace("_", "-")} {old} -> {new}' for key, (old, new) in changed.items())
    if changed.keys() & {*FIXED_ARGS} - ({'opt'} if args.no_resume_opt else set()):
        raise UsageError(f'--resume {path}: the checkpoint was made with other arguments: {told}')
    run.identity.check(state['identity'], f'--resume {path}', torch.equal(state['labels'][0], run.labels[0]))
    if not torch.equal(state['labels'], run.labels):
        raise UsageError(f'--resume {path}: the checkpoint was made with other labeled images or labels; give its '
                         'labels.json as --labels-file')
    if run.calmix is not None and state['calmix'] is None:
        raise UsageError(f'--resume {path}: the checkpoint holds no margins; --save-margins keeps them from the start')
    if run.adjustment is not None and state.get('adjustment') is None:  # nor do older checkpoints
        raise UsageError(f'--resume {path}: the checkpoint holds no class frequencies; --logit-adjustment has to be '
                         'given from the start')
    if told:
        _logger.warning(f'Resuming with changed arguments: {told}')
    return changed


def tell_schedule(run: Run, state: dict, args: argparse.Namespace) -> None:
    """Tells what moves at the place of a resume, as the schedules are stretched over another length of the run."""
    done, old = run.num_updates, argparse.Namespace(**{**vars(args), **state['args']})
    step_scheduler(run.scheduler, run.num_updates, args)
    rates = [learning_rate(groups) for groups in (state['optimizer']['param_groups'], run.optimizer.param_groups)]
    moves = [f'the learning rate from {rates[0]:.4g} to {rates[1]:.4g}'] if rates[0] != rates[1] else []
    warmups = warmup_updates(old), warmup_updates(args)
    if warmups[0] != warmups[1]:
        then, now = (done >= warmup for warmup in warmups)
        mixing = '' if then == now else ', so that mixing starts' if now else ', so that mixing stops until then'
        moves.append(f'the end of CalibrateMix\'s warmup from update {warmups[0]} to {warmups[1]}{mixing}')
    if run.method is not None:
        factors = lambda_u(done, old), lambda_u(done, args)
        if factors[0] != factors[1]:
            moves.append(f'the factor of the unlabeled loss from {factors[0]:.4g} to {factors[1]:.4g}')
        before = run.method.schedule(old)
        moves += [f'{name} from {before[name]} to {value}' for name, value in run.method.schedule(args).items()
                  if value != before[name]]
    if moves and done < args.epochs * args.train_steps_per_epoch:
        _logger.warning(f'With the changed arguments move, at update {done}: {"; ".join(moves)}')


def resume(run: Run, state: dict, path: Path, args: argparse.Namespace) -> None:
    """Puts a run where the checkpoint was.

    Raises:
        UsageError: If the checkpoint belongs to other data, labels, classes, another method or version of this script.
    """
    changed = check_same_run(run, state, path, args)
    world, old_world = run.accelerator.num_processes, state['num_processes']
    step, old_step = args.batch_size * world, state['args']['batch_size'] * old_world  # labeled images a step
    if world != old_world:
        joined, old_joined = step * args.grad_accum_steps, old_step * state['args']['grad_accum_steps']
        kept = f'stays {joined}' if joined == old_joined else f'changes from {old_joined} to {joined}'
        _logger.warning(
            f'Resuming on {world} instead of {old_world} process(es): the joined batch {kept} labeled images, and '
            'random partners are drawn anew'
        )
    try:
        run.timm_model.load_state_dict(state['model'])
        if not args.no_resume_opt:
            asked = {key for name, key in OPTIMIZER_ARGS.items() if name in changed}
            asked |= args.opt_kwargs.keys() | state['args'].get('opt_kwargs', {}).keys()  # not in older checkpoints
            for old, group in zip(state['optimizer']['param_groups'], run.optimizer.param_groups):
                old.update((key, group[key]) for key in asked & group.keys())
            run.optimizer.load_state_dict(state['optimizer'])
        if run.ema is not None:
            run.ema.module.load_state_dict(state['ema'])
        if run.method is not None:
            run.method.load_state_dict(state['method'])
        if run.calmix is not None:
            load_whole(run.calmix, state['calmix'])
        if run.adjustment is not None:
            run.adjustment.load_state_dict(state['adjustment'])
        for key in ('num_updates', 'num_draws', 'skipped_updates', 'recorded', 'best_metric'):
            setattr(run, key, state[key])
        run.not_better = state.get('not_better', 0)  # not in checkpoints of before --patience
        run.told_images.update(state.get('told_images', ()))  # not in older checkpoints
        for skipped, saved in zip(run.skipped_images, state['skipped_images']):
            skipped.update(saved)
        run.num_draws = -(-run.num_draws * old_step // step)  # the same place in the data, in batches of the new size
    except (RuntimeError, ValueError, KeyError) as error:
        raise UsageError(f'--resume {path}: {" ".join(str(error).split())}') from error
    if run.accelerator.scaler is not None and state['scaler']:
        run.accelerator.scaler.load_state_dict(state['scaler'])
    tell_schedule(run, state, args)
    if 'eval_metric' in changed:
        old, new = changed['eval_metric']
        run.best_metric, run.not_better = None, 0
        _logger.warning(f'--eval-metric {old} -> {new}: best starts anew, and the next evaluation replaces best/, '
                        f'which was chosen by {old}')
    other = run.identity.evaluates_other(state['identity'])
    if other:
        run.best_metric, run.not_better = None, 0
        _logger.warning(f'--resume {path}: the evaluation set {other}: best starts anew, and the next evaluation '
                        'replaces best/, which was chosen on the old one')
    sums = state['sums'].to(run.accelerator.device)
    if len(sums) != run.accelerator.num_processes:  # the first process takes them all
        sums = F.pad(sums.sum(0, keepdim=True), (0, 0, 0, run.accelerator.num_processes - 1))
    run.monitor.sums, run.monitor.seen = sums[run.accelerator.process_index].clone(), sums.sum(0)


# --- The best and the last evaluation ---------------------------------------------------------------------------------

def _compare(run: Run, metrics: dict[str, float], args: argparse.Namespace) -> tuple[bool, int]:
    """Whether an evaluation is the best so far by --eval-metric, and how many in a row are then not better."""
    value = metrics[args.eval_metric]
    sign = -1 if args.eval_metric in LOWER_IS_BETTER else 1
    best = run.best_metric is None or sign * value > sign * run.best_metric
    # What CalibrateMix does to the metric shows only after its warmup.
    waits = args.calibratemix and run.num_updates <= run.calmix.warmup_steps
    return best, 0 if best or waits else run.not_better + 1


def judge(run: Run, metrics: dict[str, float], args: argparse.Namespace) -> bool:
    """Whether an evaluation is the best so far by --eval-metric; counts those in a row that are not."""
    best, run.not_better = _compare(run, metrics, args)
    run.best_metric = metrics[args.eval_metric] if best else run.best_metric
    return best


def ends_patience(run: Run, metrics: dict[str, float], args: argparse.Namespace) -> bool:
    """Whether the run will end by this evaluation, which `judge` has not seen yet."""
    return args.patience is not None and _compare(run, metrics, args)[1] >= args.patience


def out_of_patience(run: Run, args: argparse.Namespace) -> bool:
    return args.patience is not None and run.not_better >= args.patience


def finished_metrics(folder: Path, checkpoint: Path, args: argparse.Namespace) -> dict[str, float]:
    """The last evaluation's metrics of a run that has nothing left to do."""
    written = folder / 'last' / 'metrics.json'
    if not written.exists():
        patience = '' if args.patience is None else f', or of its --patience {args.patience}'
        raise UsageError(f'--resume {checkpoint}: it is at the end of its {args.epochs} epochs{patience}; raise '
                         f'--epochs{patience and " or --patience"}')
    _logger.info(f'{folder} is finished')
    found = json.loads(written.read_text())
    return {key: value for key, value in found.items() if isinstance(value, float) or key == 'count'}


# --- What a run leaves ------------------------------------------------------------------------------------------------

def start_folder(folder: Path, run: Run, sources: Sources, datasets: Datasets, args: argparse.Namespace) -> None:
    """Writes what is known of a run before its first update; on the main process."""
    retire_checkpoints(folder, run.num_updates)
    write_args(folder / 'args.yaml', args)
    held_out = {}
    if sources.held_out is not None:
        rows = spread(len(sources.held_out), MOST_DIGESTS)
        held_out = dict(held_out=sources.held_out.tolist(), held_out_rows=rows.tolist(),
                        held_out_digests=to_text(digest_pictures(sources.train, sources.held_out[rows])))
    replace_file(folder / 'labels.json', lambda part: write_labels(
        part,
        datasets.labels.index,
        datasets.labels.label,
        datasets.labels.original,
        dataset=args.dataset,
        split=args.train_split,
        num_classes=run.num_classes,
        class_names=run.identity.class_names,
        num_images=len(sources.train),
        seed=label_seed(args),
        **describe_draw(args, datasets.labels.label, sources.unlabeled.targets,
                        None if datasets.unlabeled is None else datasets.unlabeled.index),
        **held_out,
        digest_rows=run.identity.rows.tolist(),
        digests=to_text(run.identity.digests),
    ))


def exportable(run: Run) -> nn.Module:
    """Copy of the evaluated network as timm loads it: contiguous weights, without further outputs, tied ones twice."""
    model = copy.deepcopy(run.eval_model).to('cpu', memory_format=torch.contiguous_format)
    for key in ('label_names', 'label_descriptions'):  # of the classes that the weights were made for at first
        model.pretrained_cfg.pop(key, None)
    if model.num_classes > run.num_classes:
        wide = model.get_classifier()
        model.reset_classifier(run.num_classes)
        with torch.no_grad():
            for name, parameter in model.get_classifier().named_parameters():
                parameter.copy_(getattr(wide, name)[:run.num_classes])

    def untie(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: dict) -> None:
        seen = set()
        for name, value in state.items():  # safetensors refuses two names of one tensor
            state[name] = value.clone() if value.data_ptr() in seen else value
            seen.add(value.data_ptr())

    model.register_state_dict_post_hook(untie)
    return model


def write_weights(run: Run, folder: Path, data_config: DataConfig, metrics: dict) -> None:
    """Weights and metrics to a folder that `timm.create_model('local-dir:<folder>', pretrained=True)` takes.

    The folder is replaced as a whole, so that a kill never leaves the weights of one epoch beside metrics of another.
    """
    names = run.identity.class_names
    if names and len(names) < run.num_classes:  # timm's form where not every class has a name
        names = dict(enumerate(names))
    about = dict(label_names=names) if names else {}
    if run.identity.bits > 8:
        about['grey_bits'] = run.identity.bits  # timm passes over it

    def write(part: Path) -> None:
        save_for_hf(
            exportable(run),
            part,
            model_config=about or None,
            safe_serialization=True,
            data_config=dict(vars(data_config)),
        )
        (part / 'metrics.json').write_text(json.dumps(metrics, indent=1) + '\n')

    replace_folder(folder, write)


def write_summary(path: Path, row: dict) -> None:
    """Appends a row to summary.csv, and drops rows of this epoch or later that a run left which was then resumed."""
    rows = []
    if path.exists():
        with open(path, newline='') as file:
            rows = [old for old in csv.DictReader(file) if int(old['epoch']) < row['epoch']]

    def write(part):
        with open(part, 'w', newline='') as file:
            writer = csv.DictWriter(file, SUMMARY_COLUMNS, lineterminator='\n')
            writer.writeheader()
            writer.writerows([*rows, row])

    replace_file(path, write)


def write_margins(run: Run, path: Path, datasets: Datasets, args: argparse.Namespace) -> None:
    """Writes a table of all labeled, then all unlabeled images.

    Columns: set (labeled, unlabeled); index (position in the training or the unlabeled split); label (that of a labeled
    image, else the last pseudo-label, -1 if never seen); margin (its AUM or APM, of a threshold sample that of the
    extra class, null if never seen); visits; easy (of the upper half of its set, by rank; null if never seen); and of
    labeled images digest (of the picture's content), threshold_sample, and where labels were flipped on purpose flipped
    and true_label.
    """
    def rows(name: str, bank: MarginBank, index: torch.Tensor, label: torch.Tensor, **known: torch.Tensor) -> pa.Table:
        last = bank.label.long().clamp(min=0)
        value = bank.lookup(torch.arange(len(last), device=last.device), last).cpu()
        seen = bank.count.cpu() > 0
        easy = torch.zeros_like(seen).masked_scatter(seen, split_easy_hard(value[seen]))
        return pa.table(dict(
            set=pa.array([name] * len(index)),
            index=index.numpy(),
            label=label.cpu().long().numpy(),
            margin=pa.array(value.numpy(), mask=~seen.numpy()),
            visits=bank.count.cpu().numpy(),
            easy=pa.array(easy.numpy(), mask=~seen.numpy()),
            **{key: column.numpy() for key, column in known.items()},
        ))

    known, noise = dict(threshold_sample=datasets.labeled.targets == run.num_classes), 0.
    if datasets.labels.original is not None:
        known.update(flipped=datasets.labels.label != datasets.labels.original, true_label=datasets.labels.original)
        noise = float(known['flipped'].double().mean())
    apm = whole_bank(run.calmix.apm, run.accelerator)
    if not run.accelerator.is_main_process:
        return
    labeled = rows('labeled', run.calmix.aum, datasets.labels.index, datasets.labels.label, **known)
    digest = np.full(len(labeled), None)
    digest[run.identity.rows.numpy()] = to_text(run.identity.digests)
    parts = [labeled.append_column('digest', pa.array(digest, pa.string()))]
    if datasets.unlabeled is not None:
        parts.append(rows('unlabeled', apm, datasets.unlabeled.index, apm.label))
    schema = pa.schema(dict(
        set=pa.string(), index=pa.int64(), label=pa.int64(), margin=pa.float32(), visits=pa.int32(), easy=pa.bool_(),
        digest=pa.string(), threshold_sample=pa.bool_(), flipped=pa.bool_(), true_label=pa.int64(),
    ), metadata=dict(
        dataset=args.dataset or args.data_dir,
        split=args.train_split,
        unlabeled_split=unlabeled_split(args),
        label_noise=str(noise),
        label_seed=str(label_seed(args)),
        seed=str(args.seed),
        num_updates=str(run.num_updates),
        class_names=json.dumps(run.identity.class_names),
    ))
    table = pa.concat_tables([schema.empty_table(), *parts], promote_options='default')
    replace_file(path, lambda part: pq.write_table(table, part))
