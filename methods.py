"""The base methods by name, and their arguments. A new one is a class in pseudo_labels.py or consistency.py."""
import argparse
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from calibratemix import PRESETS
from consistency import VAT, MeanTeacher, MixMatch, PiModel, ReMixMatch
from program import ArgumentParser
from pseudo_labels import (
    FULL_SCHEDULE,
    UDA,
    AdaMatch,
    Dash,
    DeFixMatch,
    FixMatch,
    FlexMatch,
    FreeMatch,
    MarginMatch,
    Method,
    PseudoLabel,
    SoftMatch,
)
from schedule import has_momentum, needs_warmup, newest_share

ALGORITHMS = {
    'supervised': None,
    'pseudo_label': PseudoLabel,
    'fixmatch': FixMatch,
    'flexmatch': FlexMatch,
    'softmatch': SoftMatch,
    'freematch': FreeMatch,
    'marginmatch': MarginMatch,
    'uda': UDA,
    'adamatch': AdaMatch,
    'dash': Dash,
    'defixmatch': DeFixMatch,
    'pi_model': PiModel,
    'meanteacher': MeanTeacher,
    'vat': VAT,
    'mixmatch': MixMatch,
    'remixmatch': ReMixMatch,
}


# Arguments that only some methods look at, or with True all but the supervised one.
LOOKED_AT_BY = {
    'mu': True,
    'lambda_u': True,
    'lambda_u_warmup': True,
    'weak_forward': True,
    'threshold': ('pseudo_label', 'fixmatch', 'flexmatch', 'marginmatch', 'uda', 'adamatch', 'defixmatch'),
    'temperature': ('uda', 'dash', 'mixmatch', 'remixmatch'),
    'mixmatch_alpha': ('mixmatch', 'remixmatch'),
    'vat_eps': ('vat',),
    'stat_momentum': ('softmatch', 'freematch', 'adamatch', 'remixmatch'),
    'softmatch_align': ('softmatch',),
    'softmatch_usb_stats': ('softmatch',),
    'freematch_fairness': ('freematch',),
    'freematch_max_threshold': ('freematch',),
}


def published(algorithm: str, dataset: str = '') -> dict:
    """Arguments that a method's published recipe has for a data set, by name."""
    method = ALGORITHMS[algorithm] or Method
    name = dataset.rpartition('/')[2].partition(':')[0].lower()  # hfds/OWNER/NAME:CONFIGURATION
    return {**Method.published, **method.published, **method.published_for.get(name, {})}


def fit_to_method(args: argparse.Namespace) -> None:
    """Sets the arguments of `published` where they are not given."""
    for name, value in published(args.algorithm, args.dataset).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def without_defaults(entries: dict, given: Iterable[str]) -> dict:
    """A run's arguments by name, without those that it took from `published` and that another method may not have, and
    without averages as they fit its length, if the length is another now.

    And with those that it took from the presets of an older version, as it would else be another run.

    Args:
        entries: The arguments, from a file.
        given: Names of the arguments that the command line gives.
    """
    if 'calmix_preset' not in given:
        entries = {**entries, **older_presets(entries)}
    if {'epochs', 'train_steps_per_epoch', 'model_ema_decay'} & set(given):
        fitted = fitted_averages(entries)
        entries = {name: value for name, value in entries.items() if name not in fitted or value != fitted[name]}
    if not {'algorithm', 'dataset'} & set(given) or entries.get('algorithm', 'fixmatch') not in ALGORITHMS:
        return entries
    own = published(entries.get('algorithm', 'fixmatch'), entries.get('dataset') or '')
    return {name: value for name, value in entries.items() if name not in own or value != own[name]}


def fitted_averages(entries: dict) -> dict:
    """What `backbone.fit_to_length` and `fit_batch_norm` set for a run of this length, by name; empty if that is not
    known."""
    try:
        updates, decay = entries['epochs'] * entries['train_steps_per_epoch'], entries['model_ema_decay']
    except KeyError:
        return {}
    share = newest_share(updates)
    return dict(stat_momentum=1 - share, bn_momentum=share, model_ema_warmup=needs_warmup(updates, decay))


def older_presets(entries: dict) -> dict:
    """What an older run had by its preset, by argument: the presets have changed since.

    Args:
        entries: The run's arguments, all of them. A file written by hand has fewer, and means today's presets.
    """
    if 'calmix_apm_in_warmup' not in entries or not entries['calibratemix']:
        return {}
    preset, older = entries['calmix_preset'], {}
    if 'calmix_mixed_statistics' not in entries and preset != 'authors-code':
        weight = entries['calmix_weight']
        older = dict(calmix_mixed_statistics=True, calmix_weight=1. if weight is None else weight)
    if 'calmix_mask_scale' not in entries and preset == 'steered':
        older['calmix_mask_scale'] = 1.
    return older


def tell_published(name: str) -> str:
    """The default of an argument, and which methods and data sets have another."""
    others, usual = {}, Method.published[name]
    for algorithm in ALGORITHMS:
        for dataset in ('', *getattr(ALGORITHMS[algorithm], 'published_for', ())):
            value = published(algorithm, dataset)[name]
            if value != published(algorithm)[name] or (not dataset and value != usual):
                others.setdefault(value, []).append(f'{algorithm} on {dataset}' if dataset else algorithm)
    return '; '.join([f'{usual:g}', *(f'{value:g} with {", ".join(names)}' for value, names in others.items())])


def add_method_arguments(group: argparse._ArgumentGroup) -> None:
    """The arguments of base methods."""
    flag = argparse.BooleanOptionalAction
    group.add_argument('--mu', type=int, metavar='N', default=None,
                       help=f'unlabeled images per labeled image in a step (default: {tell_published("mu")})')
    group.add_argument('--lambda-u', type=float, metavar='X', default=None,
                       help=f'factor of the unlabeled loss (default: {tell_published("lambda_u")})')
    group.add_argument('--threshold', type=float, metavar='P', default=None,
                       help='confidence from which a pseudo-label counts; with adamatch relative to the mean one of '
                            f'labeled images (default: {tell_published("threshold")})')
    group.add_argument('--lambda-u-warmup', type=float, metavar='SHARE', default=None,
                       help='share of the training over which the unlabeled loss grows from 0 (default: '
                            f'{tell_published("lambda_u_warmup")})')
    group.add_argument('--temperature', type=float, metavar='X', default=None,
                       help='of the soft pseudo-labels of uda, dash, mixmatch and remixmatch (default: '
                            f'{tell_published("temperature")})')
    group.add_argument('--mixmatch-alpha', type=float, metavar='X', default=None,
                       help='mixmatch and remixmatch mix by draws from Beta(X, X) (default: '
                            f'{tell_published("mixmatch_alpha")})')
    group.add_argument('--vat-eps', type=float, metavar='X', default=None,
                       help='length of vat\'s perturbations, in normalised pixels (default: '
                            f'{tell_published("vat_eps")})')
    group.add_argument('--stat-momentum', type=float, metavar='X', default=None,
                       help='of the running statistics of softmatch, freematch, adamatch and remixmatch (default: '
                            '0.999, in short runs 1 - 100 / updates, at least 0.9)')
    group.add_argument('--softmatch-align', action=flag, default=True,
                       help='uniform alignment of the confidence (default: yes)')
    group.add_argument('--softmatch-usb-stats', action=flag, default=False,
                       help='mean and variance of the aligned confidence, as the published code takes them, instead of '
                            'the plain one')
    group.add_argument('--freematch-fairness', type=float, metavar='X', default=0.001,
                       help='factor of the fairness term (default: 0.001, as in the published configurations)')
    group.add_argument('--freematch-max-threshold', type=float, metavar='P', default=None,
                       help='bound of the global threshold (default: '
                            f'{tell_published("freematch_max_threshold")})')
    group.add_argument('--logit-margin-penalty', type=float, metavar='X', default=0.,
                       help='factor of a penalty on unlabeled logits that lie further below the top one than '
                            '--logit-margin, a calibration baseline (arXiv 2403.15567, which has 0.1; default: 0, off)')
    group.add_argument('--logit-margin-rows', default='all', choices=['all', 'agreeing'],
                       help='whose logits: of all unlabeled images, or as in the authors\' code of those with weight 1 '
                            'whose strong view is predicted as the pseudo-label (default: all)')
    group.add_argument('--logit-margin', type=float, metavar='X', default=10., help='see there (default: 10)')
    group.add_argument('--label-smoothing', type=float, metavar='X', default=0.,
                       help='of the labeled loss, a calibration baseline (default: 0)')
    group.add_argument('--weak-forward', default='joint', choices=['joint', 'no-grad'],
                       help='joint: one pass over labeled, weak and strong images, batch-norm statistics over all of '
                            'them (the published protocol). no-grad: the weak images pass first and without a graph, '
                            'which saves a third of the arithmetic; they and the rest then have batch-norm statistics '
                            'of their own, and the running ones move twice a step')


def check_method(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with status 2 where the method cannot be combined with other arguments."""
    method = ALGORITHMS[args.algorithm] or Method
    if args.calibratemix and args.algorithm == 'supervised':
        parser.error('--calibratemix needs pseudo-labels: choose a semi-supervised --algorithm')
    if args.aum_threshold_samples is not None and method.virtual_class:
        parser.error(f'--aum-threshold-samples: {args.algorithm} has its own extra class; choose another --algorithm')
    parser.above_zero(args, 'temperature')
    if args.weak_forward == 'no-grad' and not method.weak_apart:
        parser.error(f'--weak-forward no-grad: with {args.algorithm} there is no pass over weak and strong images that '
                     'it could part; leave it out')
    if args.logit_margin_penalty and not method.trains_on_views:
        parser.error(f'--logit-margin-penalty: {args.algorithm} trains on mixed images, and has no unlabeled logits of '
                     'its own to press down; leave it out')
    if args.logit_adjustment and method.own_losses:
        parser.error(f'--logit-adjustment: {args.algorithm} has no plain pseudo-labeled loss to adjust; leave it out, '
                     'or choose another --algorithm')
    if args.calibratemix and args.batch_size == args.mu == 1 and args.calmix_split in (None, 'batch'):
        parser.error('--calibratemix: with -b 1 --mu 1 a batch never has an easy and a hard image to mix; give a '
                     'larger --mu')
    if method.takes_average and not args.model_ema:
        parser.error(f'--no-model-ema: {args.algorithm} needs the averaged network; choose another --algorithm')


def mixing(args: dict) -> dict:
    """CalibrateMix's options by name, those of the preset where none is given."""
    preset = PRESETS.get(args['calmix_preset'], {})
    return {name: preset[name] if args.get(f'calmix_{name}') is None else args[f'calmix_{name}'] for name in preset}


# Options of CalibrateMix that a run looks at only where others have some values.
MIXING_LOOKED_AT_BY = {
    'calmix_topk': lambda options: options['pairing'] != 'random',
    'calmix_similarity': lambda options: options['pairing'] != 'random' and options['topk'] > 0,
    'calmix_space': lambda options: options['pairing'] != 'random' and options['topk'] > 0,
    'calmix_split': lambda options: options['pairing'] != 'random',
}


def looks_at(key: str, args: dict) -> bool:
    """Whether a run looks at an argument: CalibrateMix's own counts only with it, a method's only with the method.

    Of CalibrateMix's, --save-margins alone looks at the bank's. Logit adjustment moves its means by the momentum of the
    methods' statistics.
    """
    algorithm, methods = args['algorithm'], LOOKED_AT_BY.get(key)
    if key == 'calmix_mask_scale' and getattr(ALGORITHMS.get(algorithm), 'own_losses', False):
        return False
    if key in MIXING_LOOKED_AT_BY and args['calibratemix'] and not MIXING_LOOKED_AT_BY[key](mixing(args)):
        return False
    if key.startswith('calmix_'):
        return args['calibratemix'] or (key.startswith('calmix_bank') and args.get('save_margins', False))
    if methods is None or (key == 'stat_momentum' and args.get('logit_adjustment')):
        return True
    return algorithm != 'supervised' if methods is True else algorithm in methods


# Arguments that a run looks at only beside another: their default, when it does, and why it else does not.
LOOKED_AT_BESIDE = {
    'min_lr': (0, lambda args: args.sched in ('cosine', 'tanh', 'poly'), 'with --sched {sched}'),
    'decay_epochs': (90, lambda args: args.sched == 'step', 'with --sched {sched}'),
    'decay_rate': (0.1, lambda args: args.sched in ('step', 'poly'), 'with --sched {sched}'),
    'warmup_lr': (1e-5, lambda args: args.warmup_epochs, 'without --warmup-epochs'),
    'clip_mode': ('norm', lambda args: args.clip_grad is not None, 'without --clip-grad'),
    'momentum': (0.9, lambda args: has_momentum(args.opt), 'with --opt {opt}'),
    'amp_dtype': ('bfloat16', lambda args: args.amp, 'without --amp'),
    'torchcompile_mode': (None, lambda args: args.torchcompile, 'without --torchcompile'),
    'logit_margin': (10, lambda args: args.logit_margin_penalty, 'without --logit-margin-penalty'),
    'logit_margin_rows': ('all', lambda args: args.logit_margin_penalty, 'without --logit-margin-penalty'),
    'model_ema_decay': (0.999, lambda args: args.model_ema, 'with --no-model-ema'),
    'val_seed': (0, lambda args: args.val_fraction is not None, 'without --val-fraction'),
    'extra_val_dir': (None, lambda args: args.extra_val, 'without --extra-val'),
    'no_resume_opt': (False, lambda args: args.resume, 'without --resume'),
    'wandb_project': ('calibratemix', lambda args: args.log_wandb, 'without --log-wandb'),
    'wandb_tags': ([], lambda args: args.log_wandb, 'without --log-wandb'),
    'wandb_resume_id': ('', lambda args: args.log_wandb, 'without --log-wandb'),
}


def tell_idle(args: argparse.Namespace) -> str:
    """Arguments that were given and that this run does not look at, in a line, or nothing.

    The end of warmup is left out: launchers give it to all runs of a table.
    """
    usual = dict(published(args.algorithm, args.dataset), calmix_preset='paper', calmix_bank_dtype='float32')
    idle = []
    for name, value in vars(args).items():
        own = name in usual or (name.startswith('calmix_') and name != 'calmix_warmup_epochs')
        if own and value not in (None, usual.get(name)) and not looks_at(name, vars(args)):
            alone = name.startswith('calmix_') and not args.calibratemix
            why = 'without --calibratemix' if alone else f'with {args.algorithm}'
            if name in MIXING_LOOKED_AT_BY and args.calibratemix:
                why = f'as pairs are drawn at random or without ranking, --calmix-preset {args.calmix_preset}'
            idle.append(f'--{name.replace("_", "-")} {value} ({why})')
    for name, (default, looked_at, why) in LOOKED_AT_BESIDE.items():
        value = getattr(args, name)
        if value != default and not looked_at(args):
            told = '' if value is True else f' {" ".join(value) if isinstance(value, list) else value}'
            idle.append(f'--{name.replace("_", "-")}{told} ({why.format(**vars(args))})')
    return f'Without effect in this run: {", ".join(idle)}' if idle else ''


def num_outputs(args: argparse.Namespace, num_classes: int) -> int:
    """Outputs of the network: the classes, an extra one, and further ones of the method's own."""
    return num_classes + has_extra_class(args) + getattr(ALGORITHMS[args.algorithm], 'further_outputs', 0)


def has_extra_class(args: argparse.Namespace) -> bool:
    """Whether the network has an extra class K, which is no pseudo-label, and neither evaluated nor saved."""
    return getattr(ALGORITHMS[args.algorithm], 'virtual_class', False) or args.aum_threshold_samples is not None


def lambda_u(num_updates: int, args: argparse.Namespace) -> float:
    """Factor of the unlabeled loss: grows from 0 over --lambda-u-warmup, then --lambda-u."""
    share = args.lambda_u_warmup
    if share is None:  # in a checkpoint of an earlier version
        share = published(args.algorithm, args.dataset)['lambda_u_warmup']
    warmup = share * args.epochs * args.train_steps_per_epoch
    return args.lambda_u * min(1, num_updates / warmup) if warmup else args.lambda_u


def logit_margin_penalty(
        strong_logits: torch.Tensor,
        pseudo_label: torch.Tensor,
        weight: torch.Tensor,
        accelerator: Accelerator,
        args: argparse.Namespace,
) -> torch.Tensor:
    """Mean of what the top logit exceeds the others by beyond --logit-margin (arXiv 2403.15567), without its factor.

    Of all a process's own rows `[U, K]`, or with --logit-margin-rows agreeing, as in the authors' code, of those of all
    processes whose weight `[U]` is 1 and whose top class is the pseudo-label `[U]`. Without such a row it is 0.
    """
    excess = F.relu(strong_logits.amax(1, keepdim=True) - strong_logits - args.logit_margin).mean(1)
    if args.logit_margin_rows == 'all':
        return excess.mean()
    rows = ((weight == 1) & (strong_logits.argmax(1) == pseudo_label)).float()
    # The gradients are averaged over the processes; so is the number of rows, which differs between them.
    number = accelerator.reduce(rows.sum(), 'mean')
    return (excess * rows).sum() / number.clamp(min=1 / accelerator.num_processes)


def warmup_updates(args: argparse.Namespace) -> float:
    """Updates of the base method alone, before CalibrateMix mixes; infinite without it."""
    if not args.calibratemix:
        return math.inf
    if args.calmix_warmup_epochs is not None:
        return round(args.calmix_warmup_epochs * args.train_steps_per_epoch)
    share = PRESETS[args.calmix_preset]['warmup_steps'] / FULL_SCHEDULE
    return round(share * args.epochs * args.train_steps_per_epoch)
