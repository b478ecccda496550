#!/usr/bin/env python3
"""Semi-supervised training of any timm classifier, with CalibrateMix.

    python train_ssl.py --dataset digits --num-labels 20 --model wide_resnet10_1 --calibratemix
    accelerate launch train_ssl.py --dataset torch/cifar10 --data-dir DIR --num-labels 250 --model wide_resnet28_2

A run writes `<output>/<experiment>/`: args.yaml (replay it with --config), labels.json, summary.csv (a row per
evaluation), best/ and last/ (averaged weights as safetensors with timm's config.json, and metrics.json),
checkpoint-<updates>.safetensors (everything that --resume needs) and with --save-margins margins.parquet.

Exit status: 0 when finished, 2 for a mistake in the arguments, 1 for a fault, 75 when SIGTERM, SIGINT or SIGUSR1 asked
to stop: the update is finished and a checkpoint saved, from which --resume auto goes on to the very same end. A second
signal ends the run at once.

Every random number is a function of the seed and a position: the order of the data of (seed, pass), a view of
(seed, pass, index), the random numbers of a step of (seed, process, step). So a resume needs no random state, and
neither workers nor the number of processes change the data.
"""
import argparse
import copy
import csv
import difflib
import fcntl
import importlib.util
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    broadcast,
    broadcast_object_list,
    gather_object,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import resolve_model_input_args, save_for_hf
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, ParseKwargs, dispatch_clip_grad, setup_default_logging
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import wide_resnet  # noqa: F401  registers wide_resnet28_2 and others with timm
from calibratemix import CHOICES, PRESETS, CalibrateMix, MarginBank, split_easy_hard
from data import (
    BatchDataset,
    EndlessBatches,
    ImageError,
    RunError,
    Source,
    UsageError,
    ViewDataset,
    create_loader,
    create_source,
    decode_all,
    draw_threshold_samples,
    evaluation_batches,
    flip_labels,
    item_seed,
    known_facts,
    locate,
    match_classes,
    read_fold,
    read_labels,
    select_labeled,
    write_labels,
)
from metrics import EvalMeter
from shards import BankShard, find_easy, joined_weight, load_whole, whole_bank
from views import BatchViews, build_views

_logger = logging.getLogger('train')

FULL_SCHEDULE = 1024 * 1024  # updates of the published recipe, which the presets' warmups are counted in
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED = 75  # exit status, EX_TEMPFAIL of sysexits.h: not done, go on later
MAX_SKIPPED_UPDATES = 100  # float16 overflows in a row after which a run is given up
LOWER_IS_BETTER = {'error', 'loss', 'nll', 'brier', 'ece', 'ece_10', 'mce', 'overconfidence', 'underconfidence'}
TRAIN_COLUMNS = (
    'loss', 'loss_labeled', 'loss_unlabeled', 'loss_mixup', 'mask_rate', 'pseudo_label_accuracy', 'skipped_updates',
    'skipped_images',
)
EVAL_COLUMNS = ('loss', 'nll', 'top1', 'error', 'top5', 'brier', 'ece', 'ece_10', 'mce', 'confidence')
SUMMARY_COLUMNS = (
    'epoch', 'num_updates', *(f'train_{c}' for c in TRAIN_COLUMNS), *(f'eval_{c}' for c in EVAL_COLUMNS), 'lr',
)


# --- Arguments --------------------------------------------------------------------------------------------------------

def create_parser() -> argparse.ArgumentParser:
    flag = argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(
        description='Semi-supervised training of any timm classifier, with CalibrateMix.',
        epilog=f'Exit status: 0 finished, 2 a mistake in the arguments, 1 a fault, {STOPPED} stopped by SIGTERM, '
               'SIGINT or SIGUSR1 after the update at hand, with a checkpoint that --resume auto goes on from. A '
               'second signal ends the run at once.',
        allow_abbrev=False,
    )
    parser.add_argument('-c', '--config', metavar='FILE', default=None,
                        help='YAML file of arguments, such as a run\'s args.yaml; the command line wins over it')

    group = parser.add_argument_group('Dataset')
    group.add_argument('--dataset', metavar='NAME', default='',
                       help='digits (bundled); cifar10, cifar100, svhn, stl10, imagenet (from --data-dir if given, '
                            'else from the hub); webvision, webvision-mini (from --data-dir); hfds/<hub name or '
                            'folder>[:config]; torch/<torchvision\'s name>; a folder with <split>/<class>/<image> or '
                            'parquet files; a .parquet file or glob (default: the folder --data-dir)')
    group.add_argument('--data-dir', metavar='DIR', default=None,
                       help='where the files of --dataset lie; cache folder of hfds/')
    group.add_argument('--dataset-download', action=flag, default=False, help='let torchvision download (torch/)')
    group.add_argument('--train-split', metavar='NAME', default='train', help='training split (default: train)')
    group.add_argument('--val-split', metavar='NAME', default=None,
                       help='evaluation split (default: the first of validation, val, valid, test that exists)')
    group.add_argument('--unlabeled-split', metavar='NAME', default=None,
                       help='split of the unlabeled images; a+b joins two (default: the training split; stl10: '
                            'train+unlabeled)')
    group.add_argument('--extra-val', metavar='NAME', default=None,
                       help='second evaluation set, such as imagenet for webvision: logged, and kept in metrics.json; '
                            'of its images those count that show a class of the training set')
    group.add_argument('--extra-val-dir', metavar='DIR', default=None, help='as --data-dir, for --extra-val')
    group.add_argument('--input-key', metavar='COLUMN', default=None, help='image column (hub, parquet, arrow)')
    group.add_argument('--target-key', metavar='COLUMN', default=None, help='label column (hub, parquet, arrow)')
    group.add_argument('--class-map', metavar='FILE', default='', help='timm\'s class map (image folders)')
    group.add_argument('--skip-missing', action=flag, default=False,
                       help='leave out images of WebVision\'s lists that are not there, instead of stopping')
    group.add_argument('--skip-bad-images', action=flag, default=False,
                       help='step over images that cannot be decoded, and count them, instead of stopping')

    group = parser.add_argument_group('Model')
    group.add_argument('--model', metavar='NAME', default='wide_resnet28_2',
                       help='any timm model with forward_features and forward_head (default: wide_resnet28_2)')
    group.add_argument('--pretrained', action=flag, default=False, help='start from timm\'s pretrained weights')
    group.add_argument('--initial-checkpoint', metavar='FILE', default='', help='start from the weights of this file')
    group.add_argument('--num-classes', type=int, metavar='N', default=None, help='default: the data set\'s')
    group.add_argument('--in-chans', type=int, metavar='N', default=3, help='image channels, 3 or 1 (default: 3)')
    group.add_argument('--img-size', type=int, metavar='N', default=None,
                       help='image side in pixels (default: the data set\'s, else the model\'s)')
    group.add_argument('--input-size', type=int, nargs=3, metavar=('C', 'H', 'W'), default=None,
                       help='sets --in-chans and --img-size; H and W are equal')
    group.add_argument('--crop-pct', type=float, metavar='X', default=None, help='centre crop of evaluation images')
    group.add_argument('--interpolation', metavar='NAME', default='',
                       help='bilinear, bicubic, ... (default: the model\'s)')
    group.add_argument('--mean', type=float, nargs='+', metavar='X', default=None,
                       help='channel means (default: the model\'s if pretrained, else the data set\'s where known)')
    group.add_argument('--std', type=float, nargs='+', metavar='X', default=None, help='likewise')
    group.add_argument('--drop', type=float, metavar='P', default=0., help='dropout rate (default: 0)')
    group.add_argument('--drop-path', type=float, metavar='P', default=None, help='stochastic depth rate')
    group.add_argument('--bn-momentum', type=float, metavar='X', default=None,
                       help='batch-norm momentum. The wide ResNets have 0.001, made for 2^20 updates: their running '
                            'statistics lag in runs of less than some 10,000 updates, which want 0.01 to 0.1')
    group.add_argument('--model-kwargs', nargs='*', action=ParseKwargs, default={}, metavar='K=V',
                       help='further arguments of the model\'s constructor')
    group.add_argument('--grad-checkpointing', action=flag, default=False,
                       help='less memory for more arithmetic; running batch-norm statistics then move twice a step')

    group = parser.add_argument_group('Device and loading')
    group.add_argument('--device', default=None, choices=['cpu', 'cuda', 'mps'],
                       help='default: what Accelerate finds. cpu is obeyed; the others must be what it finds')
    group.add_argument('--amp', action=flag, default=False, help='mixed precision (margins and losses stay float32)')
    group.add_argument('--amp-dtype', default='bfloat16', choices=['float16', 'bfloat16'],
                       help='of --amp (default: bfloat16; timm\'s is float16)')
    group.add_argument('--torchcompile', nargs='?', const='inductor', default=None, metavar='BACKEND',
                       help='compile the network (default backend: inductor)')
    group.add_argument('--torchcompile-mode', default=None, metavar='MODE', help='of torch.compile')
    group.add_argument('--channels-last', action=flag, default=False, help='channels-last memory layout')
    group.add_argument('--sync-bn', action=flag, default=False, help='batch-norm over all processes (GPUs only)')
    group.add_argument('--dist-bn', default='reduce', choices=['broadcast', 'reduce'],
                       help='running batch-norm statistics after each update: the mean over the processes, or those of '
                            'the first (default: reduce)')
    group.add_argument('--dist-timeout', type=float, metavar='SECONDS', default=1800.,
                       help='how long to wait for a process that does not answer, or does not start (default: 1800); '
                            'one that died is noticed at once')
    group.add_argument('-j', '--workers', type=int, metavar='N', default=4,
                       help='loading processes of the unlabeled set, per process (default: 4)')
    group.add_argument('--aug-device', default='auto', choices=['auto', 'pil', 'cpu', 'cuda'],
                       help='where views are made: image by image through PIL, or, if the images are small and of one '
                            'size, as batches of tensors in the loading processes (cpu) or on the GPU. auto: as '
                            'tensors where possible, on the GPU if there is one (default: auto)')
    group.add_argument('--pin-mem', action=flag, default=False, help='pin memory for faster copies to a GPU')

    group = parser.add_argument_group('Optimizer and schedule')
    group.add_argument('--opt', metavar='NAME', default='sgd', help='timm optimizer (default: sgd, which is Nesterov)')
    group.add_argument('--opt-eps', type=float, metavar='X', default=None, help='epsilon (default: the optimizer\'s)')
    group.add_argument('--opt-betas', type=float, nargs='+', metavar='X', default=None, help='likewise')
    group.add_argument('--momentum', type=float, metavar='X', default=0.9, help='default: 0.9')
    group.add_argument('--weight-decay', type=float, metavar='X', default=5e-4,
                       help='not on norms and biases (default: 5e-4; the paper has 1e-3 for CIFAR-100)')
    group.add_argument('--clip-grad', type=float, metavar='X', default=None, help='gradient clipping (default: none)')
    group.add_argument('--clip-mode', default='norm', choices=['norm', 'value', 'agc'], help='default: norm')
    group.add_argument('--lr', type=float, metavar='X', default=0.03, help='learning rate (default: 0.03)')
    group.add_argument('--sched', default='cosine-7-16',
                       choices=['cosine-7-16', 'cosine', 'tanh', 'step', 'poly', 'constant'],
                       help='cosine-7-16: lr * cos(7 pi s / (16 S)), the paper\'s (default); else timm\'s')
    group.add_argument('--sched-on-updates', action=flag, default=True,
                       help='step the schedule with every update, else with every epoch (default: yes)')
    group.add_argument('--min-lr', type=float, metavar='X', default=0., help='for timm\'s schedules (default: 0)')
    group.add_argument('--warmup-lr', type=float, metavar='X', default=1e-5, help='start of a warmup (default: 1e-5)')
    group.add_argument('--warmup-epochs', type=int, metavar='N', default=0, help='of the learning rate (default: 0)')
    group.add_argument('--epochs', type=int, metavar='N', default=1024, help='default: 1024')
    group.add_argument('--train-steps-per-epoch', type=int, metavar='N', default=1024,
                       help='updates an epoch, an epoch being no pass over the data (default: 1024)')
    batch = group.add_mutually_exclusive_group()
    batch.add_argument('-b', '--batch-size', type=int, metavar='N', default=None,
                       help='labeled images a step and process (default: 64)')
    batch.add_argument('--global-batch-size', type=int, metavar='N', default=None,
                       help='labeled images an update over all processes: sets --batch-size to N / (processes x '
                            '--grad-accum-steps), so that another number of processes keeps the recipe')
    group.add_argument('-vb', '--validation-batch-size', type=int, metavar='N', default=None,
                       help='per process (default: 4 times --batch-size)')
    group.add_argument('--grad-accum-steps', type=int, metavar='N', default=1, help='steps an update (default: 1)')

    group = parser.add_argument_group('Semi-supervised learning')
    group.add_argument('--algorithm', default='fixmatch', choices=ALGORITHMS,
                       help='base method; supervised sees the labeled images only, pseudo_label no strong views '
                            '(default: fixmatch)')
    draw = group.add_mutually_exclusive_group()
    draw.add_argument('--num-labels', type=int, metavar='N', default=None,
                      help='labeled images in total, drawn balanced over the classes (default: all that have a label)')
    draw.add_argument('--labels-per-class', type=int, metavar='N', default=None, help='labeled images of every class')
    draw.add_argument('--label-fraction', type=float, metavar='SHARE', default=None,
                      help='share of every class that is labeled, at least one image')
    draw.add_argument('--label-fold', type=int, metavar='N', default=None,
                      help='one of STL-10\'s ten predefined folds of 1,000 labeled images')
    group.add_argument('--labels-file', metavar='FILE', default=None,
                       help='take the labeled images from a run\'s labels.json instead of drawing them')
    group.add_argument('--label-seed', type=int, metavar='N', default=None,
                       help='seed of the draw of the labeled images (default: --seed)')
    group.add_argument('--label-noise', type=float, metavar='SHARE', default=0.,
                       help='flip this share of the labels to another class; labels.json keeps the original ones too '
                            '(default: 0)')
    group.add_argument('--exclude-labeled', action=flag, default=False,
                       help='leave the labeled images out of the unlabeled set; the published protocol keeps them in')
    group.add_argument('--mu', type=int, metavar='N', default=7,
                       help='unlabeled images per labeled image in a step (default: 7)')
    group.add_argument('--lambda-u', type=float, metavar='X', default=1.0,
                       help='factor of the unlabeled loss (default: 1)')
    group.add_argument('--threshold', type=float, metavar='P', default=0.95,
                       help='confidence from which a pseudo-label counts (default: 0.95)')
    group.add_argument('--lambda-u-warmup', type=float, metavar='SHARE', default=None,
                       help='share of the training over which the unlabeled loss grows from 0 (default: 0.4 with '
                            'pseudo_label, else 0)')
    group.add_argument('--stat-momentum', type=float, metavar='X', default=0.999,
                       help='of the running statistics of softmatch and freematch (default: 0.999; short runs want '
                            'less)')
    group.add_argument('--softmatch-align', action=flag, default=True,
                       help='uniform alignment of the confidence (default: yes)')
    group.add_argument('--softmatch-usb-stats', action=flag, default=False,
                       help='mean and variance of the aligned confidence, as the published code takes them, instead of '
                            'the plain one')
    group.add_argument('--freematch-fairness', type=float, metavar='X', default=0.01,
                       help='factor of the fairness term (default: 0.01)')
    group.add_argument('--logit-margin-penalty', type=float, metavar='X', default=0.,
                       help='factor of a penalty on unlabeled logits that lie further below the top one than '
                            '--logit-margin, a calibration baseline (arXiv 2403.15567; default: 0)')
    group.add_argument('--logit-margin', type=float, metavar='X', default=10., help='see there (default: 10)')
    group.add_argument('--label-smoothing', type=float, metavar='X', default=0.,
                       help='of the labeled loss, a calibration baseline (default: 0)')
    group.add_argument('--weak-forward', default='joint', choices=['joint', 'no-grad'],
                       help='joint: one pass over labeled, weak and strong images, batch-norm statistics over all of '
                            'them (the published protocol). no-grad: the weak images pass first and without a graph, '
                            'which saves a third of the arithmetic; they and the rest then have batch-norm statistics '
                            'of their own, and the running ones move twice a step')
    group.add_argument('--hflip', type=float, metavar='P', default=None,
                       help='probability of mirroring a training image (default: 0.5; 0 for svhn and the sets of '
                            'digits)')

    group = parser.add_argument_group('CalibrateMix', 'Options that are not given take the value of the preset.')
    group.add_argument('--calibratemix', action=flag, default=False, help='add CalibrateMix to the base method')
    group.add_argument('--calmix-preset', default='paper', choices=PRESETS,
                       help='paper: arXiv 2511.12964; authors-code: their public code, which differs; ours: the '
                            'paper\'s with equal weights and without ranking (default: paper)')
    group.add_argument('--calmix-gamma', type=float, metavar='X', default=None,
                       help='weight of the labeled image (fixed), or the parameter of Beta(X, X) (ours: 0.5, '
                            'the others: 0.4)')
    group.add_argument('--calmix-gamma-dist', default=None, choices=CHOICES['gamma_dist'],
                       help='a fixed weight, one draw per group and step, or one per pair (paper, ours: fixed, '
                            'authors-code: beta-batch). A fixed weight calibrates best in short runs')
    group.add_argument('--calmix-topk', type=float, metavar='SHARE', default=None,
                       help='draw the partner among this share of the least similar candidates; 0: among all '
                            '(paper: 0.05, authors-code: 15/224, ours: 0)')
    group.add_argument('--calmix-similarity', default=None, choices=CHOICES['similarity'], help='presets: cosine')
    group.add_argument('--calmix-space', default=None, choices=CHOICES['space'],
                       help='similarity of penultimate features or of pixels (paper: feature, authors-code: '
                            'pixel; ours does not compare)')
    group.add_argument('--calmix-loss', default=None, choices=CHOICES['loss'],
                       help='soft cross-entropy, or binary cross-entropy averaged over the classes, whose gradient '
                            'shrinks as classes grow in number (paper, ours: ce, authors-code: bce)')
    group.add_argument('--calmix-weight', type=float, metavar='X', default=None,
                       help='factor of the mixup loss (presets: 1)')
    group.add_argument('--calmix-split', default=None, choices=CHOICES['split'],
                       help='easy and hard by the median of the batch of a process, of the joined batch of all '
                            'processes, or of the whole bank (presets: batch)')
    group.add_argument('--calmix-pairing', default=None, choices=CHOICES['pairing'],
                       help='random: split and partners drawn at random, the random-mixup baseline (presets: targeted)')
    group.add_argument('--calmix-min-confidence', type=float, metavar='P', default=None,
                       help='mix only unlabeled images of at least this confidence (presets: 0, all)')
    group.add_argument('--calmix-warmup-epochs', type=float, metavar='N', default=None,
                       help='epochs of the base method alone (paper, ours: 100 of 1024, authors-code: 146.5; by '
                            'default the same share of --epochs). Too short a warmup costs accuracy')
    group.add_argument('--calmix-apm-in-warmup', action=flag, default=None,
                       help='unlabeled margins count from the first step on (paper, ours: yes, authors-code: no)')
    group.add_argument('--calmix-bank-dtype', default='float32', choices=['float32', 'float16'],
                       help='storage of the unlabeled margins, images x classes numbers (default: float32)')
    group.add_argument('--calmix-bank-shards', action=flag, default=None,
                       help='each process holds a part of the unlabeled margins instead of all; the results are the '
                            'same (default: above 1 GiB)')

    group = parser.add_argument_group('Margins')
    group.add_argument('--save-margins', action=flag, default=False,
                       help='keep the margins (AUM, APM), also without --calibratemix, and write margins.parquet at '
                            'each evaluation; mislabeled.py finds wrong labels in it')
    group.add_argument('--aum-threshold-samples', type=int, choices=[1, 2], default=None,
                       help='train one in K+1 of the labeled images as an extra class, whose AUM tells mislabeled.py '
                            'below which a label is wrong (arXiv 2001.10528, section 3.2). 1 and 2 are disjoint '
                            'draws: a run with each, and all other arguments alike, judge all images')

    group = parser.add_argument_group('Weight averaging')
    group.add_argument('--model-ema', action=flag, default=True,
                       help='evaluate and save an exponential moving average of the weights (default: yes)')
    group.add_argument('--model-ema-decay', type=float, metavar='X', default=0.999, help='default: 0.999')
    group.add_argument('--model-ema-warmup', action=flag, default=False,
                       help='let the decay grow from 0; without it a run of less than some 5,000 updates still holds '
                            'its initial weights')

    group = parser.add_argument_group('Misc')
    group.add_argument('--seed', type=int, metavar='N', default=0, help='default: 0')
    group.add_argument('--output', metavar='DIR', default='output/train', help='default: output/train')
    group.add_argument('--experiment', metavar='NAME', default='',
                       help='run folder below --output (default: date, model and image size)')
    group.add_argument('--resume', metavar='FILE', default='',
                       help='checkpoint to go on from, or auto: the newest intact one of the run folder, if any')
    group.add_argument('--no-resume-opt', action='store_true', default=False,
                       help='leave the optimizer state of the checkpoint out')
    group.add_argument('--start-epoch', type=int, metavar='N', default=None, help='first epoch, overriding the resumed')
    group.add_argument('--log-tensorboard', action=flag, default=False, help='log evaluations to TensorBoard')
    group.add_argument('--log-wandb', action=flag, default=False, help='log evaluations to Weights & Biases')
    group.add_argument('--wandb-project', metavar='NAME', default='calibratemix', help='default: calibratemix')
    group.add_argument('--wandb-tags', nargs='+', metavar='TAG', default=[], help='tags of the run')
    group.add_argument('--wandb-resume-id', metavar='ID', default='', help='go on logging to this run')
    group.add_argument('--log-interval', type=int, metavar='N', default=50,
                       help='updates between progress lines, the only waits for the device (default: 50)')
    group.add_argument('--val-interval', type=int, metavar='N', default=1,
                       help='epochs between evaluations (default: 1)')
    group.add_argument('--recovery-interval', type=int, metavar='N', default=0,
                       help='updates between checkpoints within an epoch (default: 0, only at its end)')
    group.add_argument('--checkpoint-hist', type=int, metavar='N', default=2,
                       help='checkpoints to keep for --resume (default: 2)')
    group.add_argument('--eval-metric', default='top1', choices=EVAL_COLUMNS,
                       help='by which best/ is chosen, on the evaluation split (default: top1)')
    return parser


def _parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line over --config over defaults.

    The file's entries become arguments in front of the command line's, so that argparse checks them alike.
    """
    parser = create_parser()
    argv = sys.argv[1:] if argv is None else argv
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument('-c', '--config', default=None)
    path = config.parse_known_args(argv)[0].config
    if path is None:
        return _check_args(parser, parser.parse_args(argv))
    try:
        entries = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f'--config {path}: {" ".join(str(error).split())}')
    if not isinstance(entries, dict):
        parser.error(f'--config {path}: expected a mapping of argument names to values')
    actions = {action.dest: action for action in parser._actions}
    unknown = sorted(str(key) for key in entries if key not in actions)
    if unknown:
        parser.error(f'--config {path}: unknown {", ".join(unknown)}')
    # Of arguments that exclude each other, the command line's puts the file's out.
    given = create_parser()
    for action in given._actions:
        action.default = argparse.SUPPRESS
    given = vars(given.parse_args(argv)).keys()
    for group in parser._mutually_exclusive_groups:
        names = {action.dest for action in group._group_actions}
        if names & given:
            entries = {key: value for key, value in entries.items() if key not in names}
    front = []
    for key, value in entries.items():
        action = actions[key]
        if value is None or value in ([], {}) or key == 'config':
            continue
        if action.nargs == 0:
            if not isinstance(value, bool):
                parser.error(f'--config {path}: {key} must be true or false, not {value!r}')
            front += action.option_strings[0 if value else 1:][:1]  # a plain flag has no second, negative form
        elif isinstance(value, dict):
            front += [action.option_strings[-1], *(f'{k}={v!r}' for k, v in value.items())]
        elif isinstance(value, list):
            front += [action.option_strings[-1], *map(str, value)]
        else:
            front.append(f'{action.option_strings[-1]}={value}')
    return _check_args(parser, parser.parse_args(front + argv))


def _check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Ranges that argparse does not check; exits with status 2."""
    if args.batch_size is None and args.global_batch_size is None:
        args.batch_size = 64
    for name in ('epochs', 'train_steps_per_epoch', 'batch_size', 'global_batch_size', 'validation_batch_size',
                 'grad_accum_steps', 'mu', 'log_interval', 'val_interval', 'checkpoint_hist', 'dist_timeout'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} {getattr(args, name)}: expected 1 or more')
    for name in ('workers', 'recovery_interval', 'lambda_u', 'lr', 'weight_decay', 'warmup_epochs', 'seed',
                 'logit_margin_penalty', 'logit_margin', 'freematch_fairness'):
        if not getattr(args, name) >= 0:
            parser.error(f'--{name.replace("_", "-")} {getattr(args, name)}: expected 0 or more')
    for name in ('threshold', 'label_smoothing', 'model_ema_decay', 'drop', 'hflip'):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) <= 1:
            parser.error(f'--{name.replace("_", "-")} {getattr(args, name)}: expected a number in [0, 1]')
    if args.input_size is not None:
        if args.input_size[1] != args.input_size[2] or args.img_size not in (None, args.input_size[1]):
            parser.error(f'--input-size {args.input_size}: expected one square size, as --img-size if both are given')
        args.in_chans, args.img_size, args.input_size = args.input_size[0], args.input_size[1], None
    if args.start_epoch is not None and not 0 <= args.start_epoch < args.epochs:
        parser.error(f'--start-epoch {args.start_epoch}: expected 0 to {args.epochs - 1}')
    for name in ('lambda_u_warmup', 'stat_momentum', 'label_noise'):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} {getattr(args, name)}: expected a number in [0, 1)')
    if args.opt.lower() not in list_optimizers():
        parser.error(f'--opt {args.opt}: unknown; timm has {", ".join(list_optimizers())}')
    if args.torchcompile and args.torchcompile not in torch._dynamo.list_backends(exclude_tags=()):
        parser.error(f'--torchcompile {args.torchcompile}: unknown; there are '
                     f'{", ".join(torch._dynamo.list_backends())}')
    if args.calibratemix and args.algorithm == 'supervised':
        parser.error('--calibratemix needs pseudo-labels: choose a semi-supervised --algorithm')
    if args.label_noise and args.labels_file:
        parser.error(f'--label-noise {args.label_noise} would flip the labels of --labels-file, which may be flipped '
                     'already: give --label-noise 0')
    if args.aum_threshold_samples is not None and not args.save_margins:
        parser.error('--aum-threshold-samples: their margins go to margins.parquet; add --save-margins')
    if args.aum_threshold_samples is not None and args.algorithm == 'marginmatch':
        parser.error('--aum-threshold-samples: marginmatch has an extra class of its own; choose another --algorithm')
    if args.resume == 'auto' and not args.experiment:
        parser.error('--resume auto: the default run folder is named by the time and always new; add --experiment')
    if args.calmix_warmup_epochs is not None and args.calibratemix and args.calmix_warmup_epochs >= args.epochs:
        parser.error(f'--calmix-warmup-epochs {args.calmix_warmup_epochs:g}: not below --epochs {args.epochs}, so that '
                     'CalibrateMix would never run')
    return args


# --- Set-up -----------------------------------------------------------------------------------------------------------

class FeaturesAndLogits(nn.Module):
    """A timm model that returns its pre-logits features `[B, D]` beside its logits `[B, K]`, from one pass.

    The wrapper is what Accelerate prepares: DDP sees one forward call, and features need no second pass.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.model.forward_head(self.model.forward_features(x), pre_logits=True)
        return features, self.model.get_classifier()(features)


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


def setup_accelerator(args: argparse.Namespace) -> Accelerator:
    # The argument's new name is not yet one that Accelerate passes on.
    warnings.filterwarnings('ignore', message='`broadcast_buffers` is deprecated', category=FutureWarning)
    precision = {'bfloat16': 'bf16', 'float16': 'fp16'}[args.amp_dtype] if args.amp else 'no'
    trackers = [name for name in ('tensorboard', 'wandb') if getattr(args, f'log_{name}')]
    missing = [name for name in trackers if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f'--log-{missing[0]}: needs the package {missing[0]} (pip install {missing[0]})')
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=trackers or None,
        project_dir=args.output,
        cpu=args.device == 'cpu',
        # The script divides the loss itself; the plugin keeps ACCELERATE_GRADIENT_ACCUMULATION_STEPS from doing so too.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # Two forward passes precede a backward pass. Broadcasting buffers in the second would overwrite what the
        # first one's graph needs; share_batch_norm does it after the update.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=args.dist_timeout)),
        ],
    )
    found = accelerator.device.type
    if args.device and found != args.device:
        raise UsageError(f'--device {args.device}: not available here; Accelerate found {found}')
    if args.sync_bn and found != 'cuda':
        raise UsageError(f'--sync-bn: needs GPUs, and the device is {found}')
    if args.amp and not accelerator.native_amp:
        raise UsageError(f'--amp-dtype {args.amp_dtype}: not available on the device {found}; bfloat16 may be')
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise UsageError(f'Accelerate is configured for {accelerator.distributed_type.value}, which this script does '
                         'not support: launch it with --multi_gpu, or change the configuration (accelerate config)')
    return accelerator


def has_extra_class(args: argparse.Namespace) -> bool:
    """Whether the network has an extra, virtual class K, which is no pseudo-label, and neither evaluated nor saved."""
    return args.algorithm == 'marginmatch' or args.aum_threshold_samples is not None


def share_batch(args: argparse.Namespace, num_processes: int) -> None:
    """Sets --batch-size where --global-batch-size is given."""
    if args.global_batch_size is not None:
        parts = num_processes * args.grad_accum_steps
        if args.global_batch_size % parts:
            raise UsageError(f'--global-batch-size {args.global_batch_size}: not divisible by {num_processes} '
                             f'process(es) x --grad-accum-steps {args.grad_accum_steps}')
        args.batch_size = args.global_batch_size // parts


def build_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """timm model; one of a fixed image size is built for --img-size."""
    if ':' not in args.model and not timm.is_model(args.model):
        close = difflib.get_close_matches(args.model, timm.list_models(), 3)
        raise UsageError(f'--model {args.model}: timm has no such model; close are {", ".join(close) or "none"}')
    if args.initial_checkpoint and not Path(args.initial_checkpoint).is_file():
        raise UsageError(f'--initial-checkpoint {args.initial_checkpoint}: no such file')
    try:
        model = timm.create_model(**resolve_model_input_args(
            args.model,
            dict(img_size=args.img_size, in_chans=args.in_chans),
            pretrained=args.pretrained,
            num_classes=num_classes,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            checkpoint_path=args.initial_checkpoint,
            **args.model_kwargs,
        ))
    except (RuntimeError, TypeError, ValueError, FileNotFoundError) as error:
        raise UsageError(f'--model {args.model}: {" ".join(str(error).split())}') from error
    if args.bn_momentum is not None:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = args.bn_momentum
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AttributeError, AssertionError) as error:
            raise UsageError(f'--grad-checkpointing: {args.model} does not support it') from error
    return model


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
        )
    except (ValueError, IndexError, TypeError, ImportError) as error:
        raise UsageError(f'--opt {args.opt}: {" ".join(str(error).split())}') from error
    for key in asked.keys() - optimizer.defaults.keys():  # timm leaves out what the optimizer does not take
        raise UsageError(f'--opt-{key}: {args.opt} has no {key}')
    return optimizer


@torch.no_grad()
def check_head(model: nn.Module, args: argparse.Namespace, input_size: tuple[int, int, int]) -> None:
    """Raises UsageError unless `classifier(forward_head(x, pre_logits=True))` is the model's own output."""
    mode = model.training
    model.eval()
    x = torch.rand(2, *input_size, generator=torch.Generator().manual_seed(0))
    try:
        features, logits = FeaturesAndLogits(model)(x)
        same = torch.allclose(logits, model(x), atol=1e-4)
    except (AttributeError, TypeError, RuntimeError, AssertionError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise UsageError(f'--model {args.model} does not take {input_size[1]} px images, or has no '
                         f'forward_features and forward_head(pre_logits=True): {reason}') from error
    if has_extra_class(args) and not isinstance(model.get_classifier(), nn.Linear):
        raise UsageError(f'--model {args.model}: an extra class (marginmatch, --aum-threshold-samples) needs a linear '
                         'classifier')
    if not same or features.ndim != 2:
        raise UsageError(f'--model {args.model}: its classifier is not a layer on top of its pre-logits features')
    if args.drop:  # a few heads drop out behind the pre-logits, which the split head would leave out without a word
        trial = copy.deepcopy(model).train()  # a copy, since its statistics move
        maps = trial.forward_features(x)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            whole = trial.forward_head(maps)
            torch.manual_seed(0)
            split = trial.get_classifier()(trial.forward_head(maps, pre_logits=True))
        if not torch.allclose(whole, split, atol=1e-4):
            raise UsageError(f'--drop {args.drop}: {args.model} drops out behind its pre-logits features')
    model.train(mode)


@dataclass
class DataConfig:
    """What evaluation of the run's weights needs to know."""
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float


def resolve_data(args: argparse.Namespace, model: nn.Module) -> DataConfig:
    """Image size and normalisation: the command line's, else the model's if pretrained, else the data set's."""
    known = known_facts(args.dataset)
    asked = dict(vars(args), interpolation=args.interpolation or None)
    if not args.pretrained:
        for key in ('mean', 'std'):
            if asked[key] is None and key in known:
                asked[key] = known[key][:args.in_chans]
    if args.img_size is None and not model.pretrained_cfg.get('fixed_input_size'):
        asked['img_size'] = known.get('img_size')
    try:
        config = resolve_data_config(asked, model=model)
    except AssertionError as error:
        raise UsageError(f'--mean, --std: expected {args.in_chans} numbers or one') from error
    input_size = (args.in_chans, *config['input_size'][1:])
    return DataConfig(
        input_size=input_size,
        mean=tuple(config['mean'])[:args.in_chans],
        std=tuple(config['std'])[:args.in_chans],
        interpolation=config['interpolation'],
        crop_pct=config['crop_pct'] if args.crop_pct or args.pretrained else 1.0,
    )


@dataclass
class Datasets:
    """Sets of a run with their views, and what the bank must know of them."""
    labeled: ViewDataset
    unlabeled: ViewDataset | None
    evaluation: ViewDataset
    extra: ViewDataset | None  # second evaluation set
    labeled_to_unlabeled: torch.Tensor | None
    source_index: torch.Tensor  # [L] int64, the labeled images' positions in the training split
    label: torch.Tensor  # [L] int64, their labels; labeled.targets has K in place of those of threshold samples
    original: torch.Tensor | None  # [L] int64, their labels before --label-noise


def label_seed(args: argparse.Namespace) -> int:
    return args.seed if args.label_seed is None else args.label_seed


def build_datasets(
        args: argparse.Namespace,
        sources: tuple,
        num_classes: int,
        data_config: DataConfig,
        views_on_gpu: bool = False,
) -> Datasets:
    """Draws or reads the labels, and wraps the sources in their views."""
    train, unlabeled, evaluation = sources
    original = None
    if args.labels_file:
        index, target, original = read_labels(args.labels_file, train.targets, num_classes)
        if args.num_labels not in (None, len(index)):
            raise UsageError(f'--num-labels {args.num_labels}: --labels-file {args.labels_file} has {len(index)}')
    elif args.label_fold is not None:
        index = read_fold(args.data_dir, args.label_fold, len(train))
        target = train.targets[index]
    elif (args.num_labels, args.labels_per_class, args.label_fraction) == (None, None, None):
        index = (train.targets >= 0).nonzero().squeeze(1)
        target = train.targets[index]
    else:
        index = select_labeled(
            train.targets, args.num_labels, num_classes, label_seed(args), args.labels_per_class, args.label_fraction,
        )
        target = train.targets[index]
        if args.num_labels and args.num_labels % num_classes:
            _logger.info(f'{args.num_labels} labels over {num_classes} classes: some classes get one more than others')
    if args.label_noise:
        original, target = target, flip_labels(target, args.label_noise, num_classes, label_seed(args))
    trained = target
    if args.aum_threshold_samples is not None:
        rows = draw_threshold_samples(len(target), num_classes, label_seed(args), args.aum_threshold_samples)
        trained = target.index_fill(0, rows, num_classes)
    recipe = dict(
        img_size=data_config.input_size[1],
        mean=data_config.mean,
        in_chans=args.in_chans,
        hflip=known_facts(args.dataset).get('hflip', 0.5) if args.hflip is None else args.hflip,
    )
    views = build_views(interpolation=data_config.interpolation, crop_pct=data_config.crop_pct, **recipe)

    def with_views(kinds, source, index=None, targets=None, stream=''):
        """A set with views of the named kinds, as batches of tensors where that can be done."""
        own = {name: views[kind] for name, kind in kinds.items()}
        evaluate = 'eval' in kinds.values()
        least = None if evaluate else data_config.input_size[1]  # evaluation is to be timm's to the pixel
        dataset = ViewDataset(source, own, index, targets, args.seed, stream, args.skip_bad_images, least)
        if args.aug_device == 'pil':
            return dataset
        decoded = decode_all(dataset, views['eval' if evaluate else 'resize'])
        if decoded is None:
            return dataset
        return BatchDataset(dataset, *decoded, None if evaluate else BatchViews(kinds, **recipe), views_on_gpu)

    labeled_set = with_views({'image': 'weak'}, train, index, trained, 'labeled')
    evaluation_set = with_views({'image': 'eval'}, evaluation)
    extra_set = None
    if args.extra_val:
        extra = create_source(args.extra_val, args.extra_val_dir, None)
        extra_set = with_views({'image': 'eval'}, extra, *match_classes(extra, train.class_names, num_classes))
    if args.algorithm == 'supervised':
        return Datasets(labeled_set, None, evaluation_set, extra_set, None, index, target, original)
    unlabeled_index = torch.arange(len(unlabeled))
    position = locate(train, unlabeled)[index]
    if args.exclude_labeled:
        if (position < 0).all():
            _logger.warning(f'--exclude-labeled: no labeled image is known to be in split {unlabeled_split(args)}, and '
                            'none is left out')
        unlabeled_index = unlabeled_index[~torch.isin(unlabeled_index, position)]
        position = None
    if not len(unlabeled_index):
        raise UsageError('no unlabeled image is left: every image is labeled, and --exclude-labeled leaves those out')
    kinds = {'weak': 'weak', 'strong': 'strong'}
    if args.algorithm == 'pseudo_label':
        del kinds['strong']
    unlabeled_set = with_views(kinds, unlabeled, unlabeled_index, stream='unlabeled')
    return Datasets(labeled_set, unlabeled_set, evaluation_set, extra_set, position, index, target, original)


class Feed:
    """Batches on the device: images as normalised float32, by timm's way of doing that there and not in the workers."""

    def __init__(
            self,
            loader,
            data_config: DataConfig,
            device: torch.device,
            channels_last: bool,
            skipped: set[int] | None = None,
    ):
        self.loader, self.device = loader, device
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.mean, self.std = (
            torch.tensor(v, device=device).mul(255).view(-1, 1, 1) for v in (data_config.mean, data_config.std)
        )
        # Indices in the source of images that this process could not decode.
        self.skipped = set() if skipped is None else skipped

    def __iter__(self):
        for batch in self.loader:
            if isinstance(batch, ImageError):
                raise batch
            self.skipped.update(batch['skipped'][batch['skipped'] >= 0].tolist())
            numbers = batch.pop('numbers', None)
            batch = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
            if numbers is not None:
                batch.update(self.loader.dataset.batch_views(batch.pop('pixels'), numbers))
            for key in batch.keys() & {'image', 'weak', 'strong'}:
                image = batch[key].to(torch.float32, memory_format=self.memory_format)
                batch[key] = image.sub_(self.mean).div_(self.std)
            yield batch


# --- Methods ----------------------------------------------------------------------------------------------------------

# Each method weighs the unlabeled images of a step: logits of the weak view `[U, K]` float32 and indices `[U]`, both
# joined over the processes, and the updates so far, to weights `[U]` in [0, 1]. Running statistics are buffers, so they
# are the same on all processes and part of the checkpoint. The pseudo-label is the weak view's top class everywhere.

class FixMatch(nn.Module):
    """1 where the confidence reaches the threshold, else 0 (arXiv 2001.07685, eq. 4)."""

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__()
        self.threshold = args.threshold

    def forward(self, logits: torch.Tensor, index: torch.Tensor, num_updates: int) -> torch.Tensor:
        return (logits.softmax(1).amax(1) >= self.threshold).float()


class FlexMatch(nn.Module):
    """FixMatch with a threshold for each class that grows as the class is learned (arXiv 2110.08263).

    The table holds each image's last prediction that passed the fixed threshold, -1 before there is one. The images
    still at -1 count in the denominator, which warms the thresholds up.
    """

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__()
        self.threshold, self.num_classes = args.threshold, num_classes
        self.register_buffer('selected', torch.full((num_unlabeled,), -1, dtype=torch.int32))

    def class_thresholds(self) -> torch.Tensor:
        """Current thresholds `[K]`."""
        counts = torch.zeros(self.num_classes + 1, device=self.selected.device)
        counts.scatter_add_(0, self.selected.long() + 1, counts.new_ones(()).expand(len(self.selected)))
        unused, learned = counts[0], counts[1:]
        beta = learned / torch.maximum(learned.max(), unused)
        return self.threshold * beta / (2 - beta)

    def forward(self, logits: torch.Tensor, index: torch.Tensor, num_updates: int) -> torch.Tensor:
        confidence, label = logits.softmax(1).max(1)
        weight = (confidence >= self.class_thresholds()[label]).float()
        # The table moves by the fixed threshold. Of an index that stands twice in the batch the later row wins.
        row = torch.arange(len(index), device=index.device)
        passed = (index[:, None] == index) & (confidence >= self.threshold)
        last = torch.where(passed, row, -1).amax(1)
        new = torch.where(last >= 0, label[last.clamp(min=0)].int(), self.selected.gather(0, index))
        self.selected.scatter_(0, index, new)
        return weight


class SoftMatch(nn.Module):
    """Truncated Gaussian of the confidence, with uniform alignment (arXiv 2301.10921).

    1 above the running mean of the confidence; below it falls off with half the running deviation (n_sigma = 2). The
    statistics are those of the plain confidence, as in the paper; the published code takes the aligned one's.
    """

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__()
        self.momentum, self.align = args.stat_momentum, args.softmatch_align
        self.aligned_stats = args.softmatch_usb_stats
        self.register_buffer('mean', torch.tensor(1 / num_classes))
        self.register_buffer('var', torch.tensor(1.))
        self.register_buffer('class_mean', torch.full((num_classes,), 1 / num_classes))

    def forward(self, logits: torch.Tensor, index: torch.Tensor, num_updates: int) -> torch.Tensor:
        probs = logits.softmax(1)
        plain = confidence = probs.amax(1)
        if self.align:
            self.class_mean.lerp_(probs.mean(0), 1 - self.momentum)
            aligned = probs / self.class_mean
            confidence = (aligned / aligned.sum(1, keepdim=True)).amax(1)
        seen = confidence if self.aligned_stats else plain
        self.mean.lerp_(seen.mean(), 1 - self.momentum)
        self.var.lerp_(seen.var(unbiased=len(seen) > 1), 1 - self.momentum)  # one row has no unbiased variance
        below = (confidence - self.mean).clamp(max=0)
        return torch.exp(-below ** 2 / (2 * self.var.clamp(min=1e-12) / 4))


class FreeMatch(nn.Module):
    """Thresholds from the running confidence, global and by class (arXiv 2205.07246); a fairness term."""

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__()
        self.momentum, self.num_classes = args.stat_momentum, num_classes
        self.register_buffer('tau', torch.tensor(1 / num_classes))
        self.register_buffer('class_mean', torch.full((num_classes,), 1 / num_classes))
        self.register_buffer('class_share', torch.full((num_classes,), 1 / num_classes))

    def forward(self, logits: torch.Tensor, index: torch.Tensor, num_updates: int) -> torch.Tensor:
        probs = logits.softmax(1)
        confidence, label = probs.max(1)
        self.tau.lerp_(confidence.mean(), 1 - self.momentum)
        self.class_mean.lerp_(probs.mean(0), 1 - self.momentum)
        self.class_share.lerp_(F.one_hot(label, self.num_classes).float().mean(0), 1 - self.momentum)
        thresholds = self.class_mean / self.class_mean.max() * self.tau
        return (confidence >= thresholds[label]).float()

    def fairness(self, strong_logits: torch.Tensor, weight: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
        """Fairness term, from a process's own strong logits `[U, K]` and weights `[U]`: scalar.

        Its batch means are those of all processes. The gradient of a mean flows through the own part of it alone, and
        averaging the gradients over the processes then gives that of the joined batch.
        """
        probs = strong_logits.softmax(1)
        own = torch.cat([
            (probs * weight[:, None]).sum(0),
            (F.one_hot(probs.argmax(1), self.num_classes) * weight[:, None]).sum(0),
            weight.sum()[None],
        ])
        others = accelerator.reduce(own.detach(), 'sum') - own.detach()
        sums = (own * accelerator.num_processes - own.detach() * (accelerator.num_processes - 1)) + others
        number = sums[-1].detach().clamp(min=1)
        mean, share = sums[:self.num_classes] / number, sums[self.num_classes:-1] / number
        # A class that no strong view is counted for has no ratio; as in the published code it then weighs nothing.
        ratio = torch.where(share > 0, mean / share.clamp(min=1e-12), 0)
        ratio = ratio / ratio.sum().clamp(min=1e-12)
        target = self.class_mean / self.class_share.clamp(min=1e-12)
        return (target / target.sum() * torch.log(ratio + 1e-12)).sum() * (sums[-1].detach() > 0)


class MarginMatch(nn.Module):
    """FlexMatch with a second threshold, on the APM: that of images known to be wrong (CVPR 2023, section 3).

    The network has an extra, virtual class. Now and then a few unlabeled images are drawn to be trained as that class;
    what they reach there, at the 95th percentile, is the APM below which a pseudo-label counts as wrong. As in the
    authors' code there is no such threshold in the first 80,000 of 2^20 updates, the images are drawn anew every
    50,000, and none are wrong in the last tenth.
    """

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__()
        self.flexmatch = FlexMatch(num_unlabeled, num_classes, args)
        self.num_classes, self.seed = num_classes, args.seed
        updates = args.epochs * args.train_steps_per_epoch
        self.first = round(80_000 / FULL_SCHEDULE * updates)
        self.every = max(1, round(50_000 / FULL_SCHEDULE * updates))
        self.last = round(0.9 * updates)
        self.num_wrong = max(1, min(num_unlabeled // 100, num_unlabeled // (num_classes + 1)))
        self.apm = MarginBank(num_unlabeled, num_classes + 1, smoothing=0.997)
        self.wrong_apm = MarginBank(self.num_wrong, smoothing=0.997)
        self.register_buffer('slot', torch.full((num_unlabeled,), -1))  # position among the wrong images, -1: none

    def is_wrong(self, index: torch.Tensor) -> torch.Tensor:
        """Which images `[U]` are now trained as the virtual class."""
        return self.slot.gather(0, index) >= 0

    def redraw(self, num_updates: int) -> None:
        """Draws the wrong images where that is due, without memory of the last ones."""
        if num_updates == self.last:
            self.slot.fill_(-1)
        elif self.first <= num_updates < self.last and (num_updates - self.first) % self.every == 0:
            generator = torch.Generator().manual_seed(item_seed(self.seed, 'marginmatch', num_updates))
            drawn = torch.randperm(len(self.slot), generator=generator)[:self.num_wrong].to(self.slot.device)
            self.slot.fill_(-1).scatter_(0, drawn, torch.arange(self.num_wrong, device=self.slot.device))
            for table in self.wrong_apm.buffers():
                table.zero_()

    def forward(self, logits: torch.Tensor, index: torch.Tensor, num_updates: int) -> torch.Tensor:
        self.redraw(num_updates)
        slot, wrong = self.slot.gather(0, index), self.is_wrong(index)
        label = logits[:, :self.num_classes].argmax(1)
        # A row of NaN is no visit, and below no confident prediction: shapes stay fixed, and nothing waits.
        right_rows, wrong_rows = (logits.masked_fill(rows[:, None], torch.nan) for rows in (wrong, ~wrong))
        self.apm.update(index, right_rows, label)
        self.wrong_apm.update(slot.clamp(min=0), wrong_rows, torch.full_like(label, self.num_classes))
        seen = torch.where(self.wrong_apm.count > 0, self.wrong_apm.value, torch.nan)
        threshold = seen.nanquantile(0.95)
        weight = self.flexmatch(right_rows[:, :self.num_classes], index, num_updates)
        weight = weight * ((self.apm.lookup(index, label) >= threshold) | threshold.isnan())
        # The wrong images count as much as an average other one.
        return torch.where(wrong, weight.sum() / (~wrong).sum().clamp(min=1), weight)


ALGORITHMS = {
    'supervised': None,
    'pseudo_label': FixMatch,  # the same weights; what differs is that the weak view itself is the student's
    'fixmatch': FixMatch,
    'flexmatch': FlexMatch,
    'softmatch': SoftMatch,
    'freematch': FreeMatch,
    'marginmatch': MarginMatch,
}


def logit_margin_penalty(logits: torch.Tensor, margin: float) -> torch.Tensor:
    """Mean over `[U, K]` of what the top logit exceeds the others by beyond the margin (arXiv 2403.15567)."""
    return F.relu(logits.amax(1, keepdim=True) - logits - margin).mean()


def supervised_step(
        model: nn.Module,
        labeled: dict,
        calmix: CalibrateMix | None,
        accelerator: Accelerator,
        args: argparse.Namespace,
) -> dict[str, torch.Tensor]:
    """Cross-entropy on the labeled images alone."""
    logits = model(labeled['image'])[1].float()
    if calmix is not None:
        calmix.aum.update(*accelerator.gather((labeled['index'], logits.detach(), labeled['target'])))
    loss = F.cross_entropy(logits, labeled['target'], label_smoothing=args.label_smoothing)
    return dict(loss=loss, loss_labeled=loss)


def forward_views(
        model: nn.Module,
        image: torch.Tensor,
        weak: torch.Tensor,
        strong: torch.Tensor | None,
        weak_forward: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One pass over labeled, weak and strong images, or with 'no-grad' one for the weak ones and one for the rest.

    Without strong images the weak ones take their place, in the one pass and with their gradient (Pseudo-Label).

    Returns:
        Features of labeled and weak images, then logits (float32) of labeled, weak (detached) and strong images.
    """
    if strong is None:
        sizes = [len(image), len(weak)]
        features, logits = model(torch.cat([image, weak]))
        (f, f_weak), (z, z_weak) = features.split(sizes), logits.float().split(sizes)
        z_strong = z_weak
    elif weak_forward == 'joint':
        sizes = [len(image), len(weak), len(strong)]
        features, logits = model(torch.cat([image, weak, strong]))
        (f, f_weak, _), (z, z_weak, z_strong) = features.split(sizes), logits.float().split(sizes)
    else:
        with torch.no_grad():
            f_weak, z_weak = model(weak)
        sizes = [len(image), len(strong)]
        features, logits = model(torch.cat([image, strong]))
        (f, _), (z, z_strong) = features.split(sizes), logits.float().split(sizes)
    return f.detach(), f_weak.detach(), z, z_weak.detach().float(), z_strong


def semi_supervised_step(
        model: nn.Module,
        labeled: dict,
        unlabeled: dict,
        method: nn.Module,
        calmix: CalibrateMix | None,
        num_updates: int,
        accelerator: Accelerator,
        args: argparse.Namespace,
) -> dict[str, torch.Tensor]:
    """Losses of a step: the base method's, and after warmup the mixup loss from a second pass over mixed images only.

    Args:
        model: Returns features and logits.
        labeled: image `[B, C, S, S]`, target `[B]`, index `[B]`.
        unlabeled: weak and strong `[U, C, S, S]`, target `[U]` (for monitoring only; -1: unknown), index `[U]`.
        method: One of ALGORITHMS.
        calmix: None for the base method alone.
        num_updates: Updates done so far.

    Returns:
        Scalars, detached but for `loss`.
    """
    x, y, i = labeled['image'], labeled['target'], labeled['index']
    weak, strong, j = unlabeled['weak'], unlabeled.get('strong'), unlabeled['index']
    f, f_weak, z, z_weak, z_strong = forward_views(model, x, weak, strong, args.weak_forward)

    # What a method or the bank keeps is kept of the joined batch, on every process alike.
    j_all, z_weak_all = accelerator.gather((j, z_weak))
    first = accelerator.process_index * len(j)
    num_classes = z.shape[1] - has_extra_class(args)  # the extra class is a target of some images, and else left out
    z_method = z_weak_all if args.algorithm == 'marginmatch' else z_weak_all[:, :num_classes]
    weight = method(z_method, j_all, num_updates)[first:first + len(j)]
    loss_labeled = F.cross_entropy(z, y, label_smoothing=args.label_smoothing)
    confidence, pseudo_label = z_weak[:, :num_classes].softmax(1).max(1)
    target = pseudo_label
    if args.algorithm == 'marginmatch':
        target = torch.where(method.is_wrong(j), num_classes, pseudo_label)
    loss_unlabeled = (F.cross_entropy(z_strong, target, reduction='none') * weight).mean()
    loss = loss_labeled + lambda_u(num_updates, args) * loss_unlabeled
    if args.algorithm == 'freematch':
        loss = loss + args.freematch_fairness * method.fairness(z_strong[:, :num_classes], weight, accelerator)
    if args.logit_margin_penalty:
        loss = loss + args.logit_margin_penalty * logit_margin_penalty(z_strong, args.logit_margin)

    loss_mixup = torch.zeros_like(loss)
    if calmix is not None:
        i_all, y_all, z_all = accelerator.gather((i, y, z.detach()))
        pseudo_label_all = z_weak_all[:, :num_classes].argmax(1)
        z_all, z_weak_all = (logits[:, :calmix.num_classes] for logits in (z_all, z_weak_all))
        calmix.update(i_all, y_all, z_all, j_all, pseudo_label_all, z_weak_all, num_updates)
        if num_updates >= calmix.warmup_steps:
            easy = find_easy(calmix, i_all, j_all, pseudo_label_all, accelerator)
            mixed = calmix.mix(i, y, x, f, j, pseudo_label, weak, f_weak, confidence, easy)
            if calmix.split == 'joined':
                mixed = mixed._replace(weight=joined_weight(mixed, accelerator))
            loss_mixup = calmix.loss(model(mixed.images)[1][:, :calmix.num_classes], mixed)
            loss = loss + calmix.weight * loss_mixup

    known = unlabeled['target'] >= 0
    return dict(
        loss=loss,
        loss_labeled=loss_labeled.detach(),
        loss_unlabeled=loss_unlabeled.detach(),
        loss_mixup=loss_mixup.detach(),
        mask_rate=weight.mean(),
        pseudo_label_right=((pseudo_label == unlabeled['target']) & known).float().mean(),
        pseudo_label_known=known.float().mean(),
    )


def lambda_u(num_updates: int, args: argparse.Namespace) -> float:
    """Factor of the unlabeled loss: grows from 0 over --lambda-u-warmup, then --lambda-u."""
    share = args.lambda_u_warmup
    if share is None:
        share = 0.4 if args.algorithm == 'pseudo_label' else 0.
    warmup = share * args.epochs * args.train_steps_per_epoch
    return args.lambda_u * min(1, num_updates / warmup) if warmup else args.lambda_u


# --- Stopping ---------------------------------------------------------------------------------------------------------

class Stopped(Exception):
    """A signal asked this run to stop; `signal` is its number."""

    def __init__(self, number: int):
        super().__init__(f'stopped by {signal.Signals(number).name}')
        self.signal = number


caught = []  # the first of STOP_SIGNALS that came; a list of the module, as handlers are the whole process's


def catch_signals() -> None:
    """Notes a signal of STOP_SIGNALS in `caught`; a second one ends the process, with status 128 + its number.

    A thread reads them, since a handler in Python waits for the main thread, which may hang in a collective or in a
    file system. Within a second they count as one: a launcher and a terminal or scheduler may both pass on the same.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)

    def listen():
        first = math.inf
        while True:
            number = os.read(reader, 1)[0]
            if number not in STOP_SIGNALS:  # torch handles SIGCHLD, to see its data workers end
                continue
            if not caught:
                first = time.monotonic()
                caught.append(number)
            elif time.monotonic() > first + 1:
                os._exit(128 + number)

    threading.Thread(target=listen, daemon=True).start()


class StopRequest:
    """Whether to stop after the update at hand: `ask` before it, `check` after it.

    A single process just looks. Several have to stop after the same update, whichever of them the signal reached. Their
    answer is a maximum over a group of gloo's, in main memory, that travels while the update is computed: the device is
    never waited for, as it would be for a flag in one of the step's own collectives, and stopping takes an update more
    at the most. A process that died is also noticed here at once, where NCCL would wait for its timeout.
    """

    def __init__(self, accelerator: Accelerator, timeout: float):
        self.group = None
        if accelerator.num_processes > 1:
            self.group = torch.distributed.new_group(backend='gloo', timeout=timedelta(seconds=timeout))

    def ask(self) -> None:
        if self.group is not None:
            self.flag = torch.tensor([caught[0] if caught else 0])
            self.answer = torch.distributed.all_reduce(
                self.flag, torch.distributed.ReduceOp.MAX, self.group, async_op=True,
            )

    def check(self) -> None:
        """Raises Stopped, on all processes alike, if one of them was asked to stop."""
        if self.group is not None:
            self.answer.wait()
            number = int(self.flag)
        else:
            number = caught[0] if caught else 0
        if number:
            raise Stopped(number)


# --- Training ---------------------------------------------------------------------------------------------------------

class Monitor:
    """Sums of a step's terms, on the device; reading them is what waits for it.

    A loss that is not finite is noted with its step and terms without a wait, and reported at the next reading.
    """
    TERMS = ('loss', 'loss_labeled', 'loss_unlabeled', 'loss_mixup', 'mask_rate', 'pseudo_label_right',
             'pseudo_label_known')

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.sums = torch.zeros(len(self.TERMS) + 1, device=accelerator.device)
        self.bad = torch.full((len(self.TERMS) + 1,), -1., device=accelerator.device)
        self.seen = self.sums.clone()

    def add(self, terms: dict[str, torch.Tensor], step: int) -> None:
        # A GPU would be waited for by new_tensor, and by a number that is assigned to an element.
        row = torch.stack([torch.ones_like(terms['loss']), *(
            terms[name] if name in terms else torch.zeros_like(terms['loss']) for name in self.TERMS
        )]).detach()
        note = torch.cat([row.new_full((1,), step), row[1:]])
        self.bad = torch.where((self.bad[0] < 0) & ~terms['loss'].isfinite(), note, self.bad)
        self.sums = self.sums + row

    def check(self) -> None:
        """Raises RunError, on every process, if the loss of one was not finite."""
        for rank, bad in enumerate(self.accelerator.gather(self.bad[None]).tolist()):
            if bad[0] >= 0:
                parts = ', '.join(f'{name} {value:.4g}' for name, value in zip(self.TERMS[1:4], bad[2:5]))
                raise RunError(
                    f'the loss is not finite at update {bad[0]:.0f} on process {rank} ({parts}); nothing was saved '
                    'since. Try a lower --lr, --clip-grad 1, or without --amp'
                )

    def read(self, since_last: bool = False) -> dict[str, float]:
        """Means over all processes, of the epoch or since the last reading, after a check."""
        self.check()
        sums = self.accelerator.reduce(self.sums, 'sum')
        total = (sums - self.seen if since_last else sums).tolist()
        self.seen = sums
        mean = {name: value / max(total[0], 1) for name, value in zip(self.TERMS, total[1:])}
        right, known = mean.pop('pseudo_label_right'), mean.pop('pseudo_label_known')
        mean['pseudo_label_accuracy'] = right / known if known else math.nan
        return mean

    def reset(self) -> None:
        self.sums, self.seen = torch.zeros_like(self.sums), torch.zeros_like(self.sums)


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
    monitor: Monitor
    accelerator: Accelerator
    labels: torch.Tensor  # [2, L] int64, the labeled images' positions in the training split and their targets
    num_classes: int  # K, without an extra class
    num_updates: int = 0
    num_draws: int = 0  # batches drawn from each loader; ahead of the updates by skipped ones and by accumulation
    skipped_updates: int = 0
    skipped_images: tuple[set[int], set[int]] = field(default_factory=lambda: (set(), set()))  # labeled, unlabeled
    recorded: int = 0  # updates at the last end of an epoch whose evaluation is done and logged
    best_metric: float | None = None

    @property
    def eval_model(self) -> nn.Module:
        return self.ema.module if self.ema is not None else self.timm_model


@torch.no_grad()
def share_batch_norm(model: nn.Module, accelerator: Accelerator, how: str) -> None:
    """Makes the running batch-norm statistics the same on all processes, in one collective.

    Done after every update, so that the averaged weights, an evaluation and a checkpoint are those of all processes.
    """
    buffers = [buffer for name, buffer in model.named_buffers() if name.endswith(('running_mean', 'running_var'))]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    flat = accelerator.reduce(flat, 'mean') if how == 'reduce' else broadcast(flat)
    for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers])):
        buffer.copy_(part.view_as(buffer))


def train_one_update(run: Run, labeled_batches, unlabeled_batches, args: argparse.Namespace) -> bool:
    """One optimizer update from `--grad-accum-steps` batches; False if float16 gradients overflowed: none was made."""
    accelerator = run.accelerator
    run.model.train()
    for micro_step in range(args.grad_accum_steps):
        torch.manual_seed(item_seed(args.seed, 'step', accelerator.process_index, run.num_draws))
        run.num_draws += 1
        labeled = next(labeled_batches)
        last = micro_step == args.grad_accum_steps - 1
        # Gradients are exchanged in the last backward pass only.
        with nullcontext() if last else accelerator.no_sync(run.model):
            if args.algorithm == 'supervised':
                terms = supervised_step(run.model, labeled, run.calmix, accelerator, args)
            else:
                terms = semi_supervised_step(
                    run.model, labeled, next(unlabeled_batches), run.method, run.calmix, run.num_updates, accelerator,
                    args,
                )
            accelerator.backward(terms['loss'] / args.grad_accum_steps)
        run.monitor.add(terms, run.num_updates)
    if args.clip_grad is not None:
        accelerator.unscale_gradients(run.optimizer)
        dispatch_clip_grad(run.timm_model.parameters(), value=args.clip_grad, mode=args.clip_mode)
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.optimizer.step_was_skipped:
        return False
    if accelerator.num_processes > 1:
        share_batch_norm(run.timm_model, accelerator, args.dist_bn)
    run.num_updates += 1
    step_scheduler(run, args)
    if run.ema is not None:
        run.ema.update(run.timm_model, step=run.num_updates)
    return True


@contextmanager
def progress_bar(total: int, done: int, visible: bool):
    """Bar of the updates, below the log; where it is not visible it is there all the same, and `disable` is True."""
    with (
        tqdm(total=total, initial=done, unit='update', dynamic_ncols=True, disable=not visible) as bar,
        logging_redirect_tqdm() if visible else nullcontext(),
    ):
        yield bar


def train_one_epoch(
        run: Run,
        epoch: int,
        labeled_batches,
        unlabeled_batches,
        save,
        stop: StopRequest,
        bar: tqdm,
        args: argparse.Namespace,
) -> None:
    """Goes on to the end of the epoch, from wherever in it the run stands."""
    end = (epoch + 1) * args.train_steps_per_epoch
    total = args.epochs * args.train_steps_per_epoch
    images = args.batch_size * args.grad_accum_steps * run.accelerator.num_processes
    images *= 1 if args.algorithm == 'supervised' else 1 + args.mu
    started, first, in_a_row = time.perf_counter(), run.num_updates, 0
    while run.num_updates < end:
        stop.ask()
        updated = train_one_update(run, labeled_batches, unlabeled_batches, args)
        run.skipped_updates += not updated
        stop.check()
        if not updated:
            in_a_row += 1
            if in_a_row == MAX_SKIPPED_UPDATES:
                raise RunError(f'{in_a_row} updates in a row overflowed in float16 at update {run.num_updates}; use '
                               '--amp-dtype bfloat16 or a lower --lr')
            continue
        in_a_row = 0
        bar.update()
        if run.num_updates % args.log_interval == 0 or run.num_updates == end:
            means = run.monitor.read(since_last=True)
            rate = (run.num_updates - first) / (time.perf_counter() - started)
            left = round((total - run.num_updates) / rate)
            skipped = f'  skipped updates {run.skipped_updates}' if run.skipped_updates else ''
            if bar.disable:
                _logger.info(
                    f'epoch {epoch} update {run.num_updates}/{total}  loss {means["loss"]:.4f} '
                    f'(labeled {means["loss_labeled"]:.4f} unlabeled {means["loss_unlabeled"]:.4f} '
                    f'mixup {means["loss_mixup"]:.4f})  mask {means["mask_rate"]:.3f}  '
                    f'pseudo-labels right {means["pseudo_label_accuracy"]:.3f}  '
                    f'lr {run.optimizer.param_groups[0]["lr"]:.4g}  {rate * images:.0f} img/s  '
                    f'left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}{skipped}'
                )
            else:
                bar.set_postfix_str(f'loss {means["loss"]:.3f}  mask {means["mask_rate"]:.3f}{skipped}', refresh=False)
        if args.recovery_interval and run.num_updates % args.recovery_interval == 0 and run.num_updates < end:
            save()


@torch.no_grad()
def validate(
        model: nn.Module,
        feed: Feed,
        accelerator: Accelerator,
        num_classes: int,
        batch_size: int,
        stop: StopRequest | None = None,
) -> EvalMeter:
    """Measures a model on this process's part of the images and joins the processes: every image counts once.

    Short batches are filled up, since the last digits of logits depend on the size of the batch that they are in.
    Every module's mode is put back, and no statistic changes.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    meter = EvalMeter(num_classes, accelerator.device)
    # All processes have to ask as often, and one may have a batch more than another.
    asked = -(-(len(feed.loader.dataset) // accelerator.num_processes) // batch_size) if stop is not None else 0
    for number, batch in enumerate(feed):
        if number < asked:
            stop.ask()
        good, image = batch['skipped'] < 0, batch['image']
        with accelerator.autocast():
            logits = model(F.pad(image, (0, 0) * 3 + (0, batch_size - len(image))))[:len(image)]
        # Without MarginMatch's virtual class, and without the images that stand in for broken ones.
        meter.update(logits[good, :num_classes].float(), batch['target'][good])
        if number < asked:
            stop.check()
    for module, mode in modes:
        module.training = mode
    meter.sync(lambda state: accelerator.reduce(state, 'sum'))
    return meter


# --- Files ------------------------------------------------------------------------------------------------------------

def replace_file(path: Path, write) -> None:
    """Writes a file whole or not at all: under another name, synced, renamed."""
    part = path.with_name(path.name + '.part')
    try:
        write(part)
        with open(part, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise RunError(f'{path} cannot be written: {reason}; what was saved before is intact') from error
    finally:
        with suppress(OSError):  # a disk that went read-only refuses this too, and the first error is the one to tell
            part.unlink(missing_ok=True)


def pack(value, tensors: dict[str, torch.Tensor], name: str = ''):
    """JSON form of a nested state: its tensors go to `tensors`, and their names take their places."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {'tensor': name}
    if isinstance(value, dict):  # as pairs: JSON keys would turn an optimizer's integers into strings
        return {'dict': [[key, pack(item, tensors, f'{name}.{key}')] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [pack(item, tensors, f'{name}.{i}') for i, item in enumerate(value)]
    return value


def unpack(value, tensors: dict[str, torch.Tensor]):
    """Inverse of `pack`; tuples come back as lists."""
    if isinstance(value, dict):
        if 'tensor' in value:
            return tensors[value['tensor']]
        return {key: unpack(item, tensors) for key, item in value['dict']}
    return [unpack(item, tensors) for item in value] if isinstance(value, list) else value


def join_skipped(skipped: Sequence[set[int]], accelerator: Accelerator, args: argparse.Namespace) -> list[set[int]]:
    """Each set joined over the processes, all of which take part."""
    if not args.skip_bad_images:
        return [set() for _ in skipped]
    return [set().union(*gather_object([part])) for part in skipped]


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
        scaler=run.accelerator.scaler.state_dict() if run.accelerator.scaler is not None else None,
        sums=run.accelerator.gather(run.monitor.sums[None]),
        labels=run.labels,
        num_updates=run.num_updates,
        num_draws=run.num_draws,
        skipped_updates=run.skipped_updates,
        skipped_images=[sorted(skipped) for skipped in join_skipped(run.skipped_images, run.accelerator, args)],
        recorded=run.recorded,
        best_metric=run.best_metric,
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


CHECKPOINT_FORMAT = 2  # goes up when the contents of a checkpoint take another form or meaning

# Differences that would attach a margin or a table to another image or class.
FIXED_ARGS = ('dataset', 'train_split', 'unlabeled_split', 'exclude_labeled', 'algorithm', 'calibratemix',
              'model', 'num_classes', 'model_ema', 'opt', 'calmix_bank_dtype', 'aum_threshold_samples')
# Differences that nobody needs to be told of.
FREE_ARGS = ('config', 'resume', 'output', 'experiment', 'workers', 'pin_mem', 'log_interval', 'device', 'labels_file',
             'num_labels', 'label_seed', 'label_noise', 'dist_timeout', 'calmix_bank_shards')
# Arguments that an optimizer keeps in its groups, by the names there; from a checkpoint it would take the old values.
OPTIMIZER_ARGS = dict(weight_decay='weight_decay', momentum='momentum', opt_eps='eps', opt_betas='betas')


def resume(run: Run, state: dict, path: Path, args: argparse.Namespace) -> None:
    """Puts a run where the checkpoint was.

    Raises:
        UsageError: If the checkpoint belongs to other data, labels, classes, another method or version of this script.
    """
    if state.get('format') != CHECKPOINT_FORMAT:
        raise UsageError(f'--resume {path}: another version of this script made the checkpoint, of format '
                         f'{state.get("format", "0")} where this one reads {CHECKPOINT_FORMAT}; resume with that one')
    changed = {key: (old, getattr(args, key)) for key, old in state['args'].items()
               if key not in FREE_ARGS and hasattr(args, key) and getattr(args, key) != old}
    if args.global_batch_size is not None:
        changed.pop('batch_size', None)  # follows from the other, and from the number of processes
    told = ', '.join(f'--{key.replace("_", "-")} {old} -> {new}' for key, (old, new) in changed.items())
    if changed.keys() & set(FIXED_ARGS):
        raise UsageError(f'--resume {path}: the checkpoint was made with other arguments: {told}')
    if not torch.equal(state['labels'], run.labels):
        raise UsageError(f'--resume {path}: the checkpoint was made with other labeled images or labels; give its '
                         'labels.json as --labels-file')
    if run.calmix is not None and state['calmix'] is None:
        raise UsageError(f'--resume {path}: the checkpoint holds no margins; --save-margins keeps them from the start')
    if told:
        _logger.warning(f'Resuming with changed arguments: {told}')
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
            asked = [{key: group[key] for name, key in OPTIMIZER_ARGS.items() if name in changed and key in group}
                     for group in run.optimizer.param_groups]
            run.optimizer.load_state_dict(state['optimizer'])
            for group, values in zip(run.optimizer.param_groups, asked):
                group.update(values)
        if run.ema is not None:
            run.ema.module.load_state_dict(state['ema'])
        if run.method is not None:
            run.method.load_state_dict(state['method'])
        if run.calmix is not None:
            load_whole(run.calmix, state['calmix'])
        for key in ('num_updates', 'num_draws', 'skipped_updates', 'recorded', 'best_metric'):
            setattr(run, key, state[key])
        for skipped, saved in zip(run.skipped_images, state['skipped_images']):
            skipped.update(saved)
        run.num_draws = -(-run.num_draws * old_step // step)  # the same place in the data, in batches of the new size
    except (RuntimeError, ValueError, KeyError) as error:
        raise UsageError(f'--resume {path}: {" ".join(str(error).split())}') from error
    if run.accelerator.scaler is not None and state['scaler']:
        run.accelerator.scaler.load_state_dict(state['scaler'])
    sums = state['sums'].to(run.accelerator.device)
    if len(sums) != run.accelerator.num_processes:  # the first process takes them all
        sums = F.pad(sums.sum(0, keepdim=True), (0, 0, 0, run.accelerator.num_processes - 1))
    run.monitor.sums, run.monitor.seen = sums[run.accelerator.process_index].clone(), sums.sum(0)


def exportable(run: Run) -> nn.Module:
    """Copy of the evaluated network as timm loads it: contiguous weights, without an extra class."""
    model = copy.deepcopy(run.eval_model).to('cpu', memory_format=torch.contiguous_format)
    if model.num_classes > run.num_classes:
        wide = model.get_classifier()
        model.reset_classifier(run.num_classes)
        with torch.no_grad():
            for name, parameter in model.get_classifier().named_parameters():
                parameter.copy_(getattr(wide, name)[:-1])
    return model


def write_weights(run: Run, folder: Path, data_config: DataConfig, metrics: dict) -> None:
    """Weights and metrics to a folder that `timm.create_model('local-dir:<folder>', pretrained=True)` takes."""
    scratch = folder / 'part'
    try:
        folder.mkdir(exist_ok=True)
        save_for_hf(
            exportable(run),
            scratch,
            safe_serialization=True,
            data_config=dict(vars(data_config)),
        )
        for name in ('model.safetensors', 'config.json'):
            os.replace(scratch / name, folder / name)
        scratch.rmdir()
    except (OSError, SafetensorError) as error:
        raise RunError(f'{folder} cannot be written: {getattr(error, "strerror", None) or error}') from error
    replace_file(folder / 'metrics.json', lambda part: part.write_text(json.dumps(metrics, indent=1) + '\n'))


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
    labeled images threshold_sample, and where labels were flipped on purpose flipped and true_label.
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
    if datasets.original is not None:
        known.update(flipped=datasets.label != datasets.original, true_label=datasets.original)
        noise = float(known['flipped'].double().mean())
    apm = whole_bank(run.calmix.apm, run.accelerator)
    if not run.accelerator.is_main_process:
        return
    parts = [rows('labeled', run.calmix.aum, datasets.source_index, datasets.label, **known)]
    if datasets.unlabeled is not None:
        parts.append(rows('unlabeled', apm, datasets.unlabeled.index, apm.label))
    schema = pa.schema(dict(
        set=pa.string(), index=pa.int64(), label=pa.int64(), margin=pa.float32(), visits=pa.int32(), easy=pa.bool_(),
        threshold_sample=pa.bool_(), flipped=pa.bool_(), true_label=pa.int64(),
    ), metadata=dict(
        dataset=args.dataset or args.data_dir,
        split=args.train_split,
        unlabeled_split=unlabeled_split(args),
        label_noise=str(noise),
        label_seed=str(label_seed(args)),
        seed=str(args.seed),
        num_updates=str(run.num_updates),
    ))
    table = pa.concat_tables([schema.empty_table(), *parts], promote_options='default')
    replace_file(path, lambda part: pq.write_table(table, part))


# --- Main -------------------------------------------------------------------------------------------------------------

def unlabeled_split(args: argparse.Namespace) -> str:
    return args.unlabeled_split or known_facts(args.dataset).get('unlabeled_split', args.train_split)


def open_source(args: argparse.Namespace, split: str | None) -> Source:
    """A split of --dataset."""
    return create_source(
        args.dataset,
        args.data_dir,
        split,
        input_key=args.input_key,
        target_key=args.target_key,
        class_map=args.class_map,
        download=args.dataset_download,
        skip_missing=args.skip_missing,
    )


def open_sources(args: argparse.Namespace) -> tuple[Source, Source, Source]:
    """Training, unlabeled and evaluation images; the first two are one object unless --unlabeled-split differs."""
    train = unlabeled = open_source(args, args.train_split)
    if unlabeled_split(args) != args.train_split:
        unlabeled = open_source(args, unlabeled_split(args))
        if unlabeled.class_names != train.class_names:  # its labels, if any, mean other classes
            unlabeled.targets = torch.full_like(unlabeled.targets, -1)
    return train, unlabeled, open_source(args, args.val_split)


def count_classes(args: argparse.Namespace, train, evaluation) -> int:
    if train.class_names != evaluation.class_names:
        raise UsageError(f'{args.dataset or args.data_dir}: training and evaluation split have different classes')
    largest = int(max(train.targets.max(), evaluation.targets.max())) + 1
    num_classes = args.num_classes or (len(train.class_names) if train.class_names else largest)
    if num_classes < max(largest, 2):
        raise UsageError(f'--num-classes {num_classes}: the data set has labels up to {largest - 1}')
    if (evaluation.targets < 0).any():
        raise UsageError('the evaluation split has images without a label')
    return num_classes


def build_calmix(
        args: argparse.Namespace,
        datasets: Datasets,
        num_classes: int,
        accelerator: Accelerator,
) -> CalibrateMix | None:
    """CalibrateMix; with --save-margins alone one in an endless warmup, which keeps the margins and mixes nothing.

    The class of threshold samples is one as any other to it.
    """
    if not (args.calibratemix or args.save_margins):
        return None
    num_unlabeled = len(datasets.unlabeled) if datasets.unlabeled is not None else 0
    num_classes += args.aum_threshold_samples is not None
    bank_dtype = getattr(torch, args.calmix_bank_dtype)
    shards = args.calmix_bank_shards
    if shards is None:
        shards = num_unlabeled * num_classes * bank_dtype.itemsize > 2 ** 30 and args.calmix_split != 'bank'
    updates = args.epochs * args.train_steps_per_epoch
    if not args.calibratemix:
        warmup_steps = math.inf
    elif args.calmix_warmup_epochs is not None:
        warmup_steps = round(args.calmix_warmup_epochs * args.train_steps_per_epoch)
    else:
        warmup_steps = round(PRESETS[args.calmix_preset]['warmup_steps'] / FULL_SCHEDULE * updates)
    apm = None
    try:
        if shards and accelerator.num_processes > 1:
            part = (accelerator.process_index, accelerator.num_processes)
            apm = BankShard(num_unlabeled, num_classes, part, smoothing=0.997, dtype=bank_dtype)
        return CalibrateMix(
            len(datasets.labeled),
            num_unlabeled,
            num_classes,
            preset=args.calmix_preset,
            gamma=args.calmix_gamma,
            gamma_dist=args.calmix_gamma_dist,
            topk=args.calmix_topk,
            similarity=args.calmix_similarity,
            space=args.calmix_space,
            loss=args.calmix_loss,
            weight=args.calmix_weight,
            split=args.calmix_split,
            pairing=args.calmix_pairing,
            min_confidence=args.calmix_min_confidence,
            warmup_steps=warmup_steps,
            apm_in_warmup=args.calmix_apm_in_warmup if args.calibratemix else True,
            bank_dtype=bank_dtype,
            apm=apm,
            labeled_to_unlabeled=datasets.labeled_to_unlabeled,
        )
    except ValueError as error:
        raise UsageError(f'--calmix-{str(error).replace("_", "-", 1)}') from error


def build_ema(model: nn.Module, args: argparse.Namespace) -> ModelEmaV3:
    """Averages parameters and floating buffers, copies integer ones, as one multi-tensor operation."""
    return ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, foreach=True)


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


def step_scheduler(run: 'Run', args: argparse.Namespace) -> None:
    """Sets the learning rate that belongs to the updates done so far, whether the schedule counts these or epochs."""
    run.scheduler.step_update(run.num_updates)
    run.scheduler.step(run.num_updates // args.train_steps_per_epoch)


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


def open_run_folder(args: argparse.Namespace, accelerator: Accelerator, img_size: int) -> tuple:
    """The run folder, the checkpoint to go on from, and on the main process the lock to keep while the run goes on."""
    found, lock = [None], None
    if accelerator.is_main_process:
        name = args.experiment or '-'.join([datetime.now().strftime('%Y%m%d-%H%M%S'), args.model, str(img_size)])
        folder = Path(args.output) / name.replace('/', '_')
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(folder)
            if not args.resume and (folder / 'args.yaml').exists():
                raise UsageError(f'{folder} holds a run already: go on with --resume auto, or choose another '
                                 '--experiment')
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


def main(args: argparse.Namespace) -> dict[str, float]:
    """Trains; returns the last evaluation's metrics."""
    accelerator = setup_accelerator(args)
    _logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    share_batch(args, accelerator.num_processes)
    torch.manual_seed(item_seed(args.seed, 'model'))  # equal initial weights on all processes

    with accelerator.main_process_first():  # downloads and caches are written once
        train, unlabeled, evaluation = sources = open_sources(args)
    num_classes = count_classes(args, train, evaluation)
    model = build_model(args, num_classes + has_extra_class(args))
    data_config = resolve_data(args, model)
    check_head(model, args, data_config.input_size)
    on_gpu = accelerator.device.type == 'cuda'
    if args.aug_device == 'cuda' and not on_gpu:
        raise UsageError(f'--aug-device cuda: the device is {accelerator.device}')
    datasets = build_datasets(args, sources, num_classes, data_config, on_gpu and args.aug_device in ('auto', 'cuda'))
    method = None
    if args.algorithm != 'supervised':
        method = ALGORITHMS[args.algorithm](len(datasets.unlabeled), num_classes, args)
    calmix = build_calmix(args, datasets, num_classes, accelerator)
    # The lock lasts as long as its file is open.
    folder, checkpoint, lock = open_run_folder(args, accelerator, data_config.input_size[1])

    if args.sync_bn:
        model = convert_sync_batchnorm(model)  # timm's, as torch's would drop the activations of BatchNormAct2d
    model.to(accelerator.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    ema = build_ema(model, args) if args.model_ema else None
    optimizer = build_optimizer(model, args)
    scheduler = build_scheduler(args, optimizer)  # not prepared: Accelerate would step it once per process
    timm_model, model = model, FeaturesAndLogits(model)
    if args.torchcompile:
        model = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
    model, optimizer = accelerator.prepare(model, optimizer)
    if calmix is not None:
        calmix.to(accelerator.device)
    if method is not None:
        method.to(accelerator.device)
    monitor = Monitor(accelerator)
    labels = torch.stack([datasets.source_index, datasets.labeled.targets])
    run = Run(
        model, timm_model, optimizer, scheduler, ema, method, calmix, monitor, accelerator, labels, num_classes,
    )
    if checkpoint is not None:
        resume(run, read_checkpoint(checkpoint), checkpoint, args)
        if not (folder / 'best').exists():  # a resume into another folder
            run.best_metric = None
        _logger.info(f'Resuming from {checkpoint} at update {run.num_updates}')
    if args.start_epoch is not None:
        run.num_updates = run.recorded = args.start_epoch * args.train_steps_per_epoch
    step_scheduler(run, args)
    # Stopped between an epoch's last update and the end of its evaluation, a run goes on with the evaluation.
    due = run.num_updates % args.train_steps_per_epoch == 0 and run.num_updates != run.recorded
    first_epoch = run.num_updates // args.train_steps_per_epoch - due
    if first_epoch >= args.epochs:
        written = folder / 'last' / 'metrics.json'
        if not written.exists():
            raise UsageError(f'--resume {checkpoint}: it is at the end of its {args.epochs} epochs; raise --epochs')
        _logger.info(f'{folder} is finished')
        accelerator.end_training()
        metrics = json.loads(written.read_text())
        about = ('epoch', 'num_updates', 'bins', 'extra_val')
        return {key: value for key, value in metrics.items() if key not in about}
    if accelerator.is_main_process:
        retire_checkpoints(folder, run.num_updates)
        write_args(folder / 'args.yaml', args)
        replace_file(folder / 'labels.json', lambda part: write_labels(
            part,
            datasets.source_index,
            datasets.label,
            datasets.original,
            dataset=args.dataset,
            split=args.train_split,
            num_classes=num_classes,
            num_images=len(train),
            seed=label_seed(args),
        ))

    if args.log_tensorboard or args.log_wandb:
        start_trackers(accelerator, folder, args)

    def feed(dataset, batch_size, workers, stream, skipped):
        batches = EndlessBatches(len(dataset), batch_size, accelerator.process_index, accelerator.num_processes,
                                 args.seed, stream, start=run.num_draws)
        loader = create_loader(dataset, batches, workers, args.pin_mem)
        return Feed(loader, data_config, accelerator.device, args.channels_last, skipped)

    # The labeled set is small beside the unlabeled one; one worker keeps up with it.
    of_labeled, of_unlabeled = run.skipped_images
    labeled_feed = feed(datasets.labeled, args.batch_size, min(args.workers, 1), 'labeled', of_labeled)
    feeds = [labeled_feed]
    if datasets.unlabeled is not None:
        feeds.append(feed(datasets.unlabeled, args.batch_size * args.mu, args.workers, 'unlabeled', of_unlabeled))
    labeled_batches, unlabeled_batches = iter(labeled_feed), iter(feeds[-1])

    eval_batch_size = args.validation_batch_size or 4 * args.batch_size

    def eval_feed(dataset):
        rank, world = accelerator.process_index, accelerator.num_processes
        batches = evaluation_batches(len(dataset), eval_batch_size, rank, world)
        loader = create_loader(dataset, batches, args.workers, args.pin_mem)
        return Feed(loader, data_config, accelerator.device, args.channels_last)

    eval_feeds = [eval_feed(dataset) for dataset in (datasets.evaluation, datasets.extra) if dataset is not None]

    _logger.info(
        f'{args.model}, {sum(p.numel() for p in run.timm_model.parameters()):,} parameters, images '
        f'{"x".join(map(str, data_config.input_size))}, mean {data_config.mean}, std {data_config.std}'
    )
    _logger.info(
        f'{len(datasets.labeled)} labeled, {len(datasets.unlabeled) if datasets.unlabeled else 0} unlabeled and '
        f'{len(datasets.evaluation)} evaluation images of {num_classes} classes; joined batch '
        f'{args.batch_size * args.grad_accum_steps * accelerator.num_processes} labeled on '
        f'{accelerator.num_processes} process(es), device {accelerator.device}'
    )
    if args.calibratemix:
        _logger.info(f'{calmix}')

    stop = StopRequest(accelerator, args.dist_timeout)

    def save():
        save_checkpoint(run, folder, args)

    total = args.epochs * args.train_steps_per_epoch
    visible = accelerator.is_main_process and sys.stderr.isatty()
    try:
        with progress_bar(total, run.num_updates, visible) as bar:
            for epoch in range(first_epoch, args.epochs):
                train_one_epoch(run, epoch, labeled_batches, unlabeled_batches, save, stop, bar, args)
                train_metrics = run.monitor.read()
                if (epoch + 1) % args.val_interval == 0 or epoch == args.epochs - 1:
                    meters = [
                        validate(run.eval_model, f, accelerator, num_classes, eval_batch_size, stop) for f in eval_feeds
                    ]
                    metrics = meters[0].compute()
                    skipped = join_skipped([f.skipped for f in [*feeds, *eval_feeds]], accelerator, args)
                    skipped_images = sum(map(len, skipped))
                    train_metrics.update(skipped_updates=run.skipped_updates, skipped_images=skipped_images)
                    record_evaluation(run, folder, epoch, train_metrics, meters, data_config, args)
                    if args.save_margins:
                        write_margins(run, folder / 'margins.parquet', datasets, args)
                run.monitor.reset()
                run.recorded = run.num_updates
                save()
    except Stopped:
        _logger.info(f'Stopping at update {run.num_updates}')
        save()
        accelerator.wait_for_everyone()  # a launcher ends the others as soon as the first one has ended
        accelerator.end_training()
        raise
    accelerator.end_training()
    return metrics


def record_evaluation(
        run: Run,
        folder: Path,
        epoch: int,
        train_metrics: dict,
        meters: list[EvalMeter],
        data_config: DataConfig,
        args: argparse.Namespace,
) -> None:
    """Logs an evaluation; the main process writes summary.csv, last/ and, if it is the best so far, best/."""
    metrics = meters[0].compute()
    value = metrics[args.eval_metric]
    sign = -1 if args.eval_metric in LOWER_IS_BETTER else 1
    best = run.best_metric is None or sign * value > sign * run.best_metric
    run.best_metric = value if best else run.best_metric
    _logger.info(
        f'epoch {epoch} evaluation of {metrics["count"]:.0f} images: error {metrics["error"]:.2f} %, '
        f'ECE {metrics["ece"]:.2f} %, NLL {metrics["nll"]:.4f}, confidence {metrics["confidence"]:.2f} %'
        + (f' (best {args.eval_metric} so far)' if best else '')
    )
    extra = [meter.compute() for meter in meters[1:]]
    for found in extra:
        _logger.info(f'epoch {epoch} evaluation of {found["count"]:.0f} images of {args.extra_val}: error '
                     f'{found["error"]:.2f} %, ECE {found["ece"]:.2f} %, NLL {found["nll"]:.4f}')
    if not run.accelerator.is_main_process:
        return
    row = dict(epoch=epoch, num_updates=run.num_updates, lr=run.optimizer.param_groups[0]['lr'])
    row.update((f'train_{name}', train_metrics[name]) for name in TRAIN_COLUMNS)
    row.update((f'eval_{name}', metrics[name]) for name in EVAL_COLUMNS)
    write_summary(folder / 'summary.csv', row)
    run.accelerator.log(row, step=run.num_updates)
    bins = {key: value.tolist() for key, value in meters[0].bins()._asdict().items()}
    content = OrderedDict(epoch=epoch, num_updates=run.num_updates, **metrics, bins=bins)
    if extra:
        content['extra_val'] = extra[0]
    write_weights(run, folder / 'last', data_config, content)
    if best:
        write_weights(run, folder / 'best', data_config, content)


def explain(error: Exception, resume: str = '') -> RunError | None:
    """What an error of a library or the system says about the run, in one line; None if it is no known fault.

    Args:
        error: The error.
        resume: What the line ends with: how nothing that was saved is lost.
    """
    text = ' '.join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return RunError(f'the device is out of memory; a smaller --batch-size or --amp needs less, and in training '
                        f'--grad-accum-steps and --grad-checkpointing ({text})')
    if isinstance(error, MemoryError):
        return RunError(f'out of memory, in this process or in a data worker; fewer --workers need less{resume}')
    distributed = isinstance(error, torch.distributed.DistError) or re.search('gloo|nccl', text, re.IGNORECASE)
    # A worker that dies while it hands a batch over leaves a broken connection.
    if text.startswith('DataLoader worker') or (isinstance(error, (ConnectionError, EOFError)) and not distributed):
        return RunError(f'a data worker died: {text.rstrip(".")}. If the system was out of memory, fewer --workers '
                        f'need less{resume}')
    if isinstance(error, OSError) and error.errno is not None:
        return RunError(f'{error.filename or "the system"}: {error.strerror}{resume}')
    if distributed and re.search('connect|timed? ?out|broken pipe|reset by peer|remote process', text, re.IGNORECASE):
        reason = re.sub(r'^\[[^]]*\] ', '', text)
        return RunError(f'another process ended, as it will say itself, or does not answer ({reason}){resume}')
    return None


def exit_with(error: UsageError | RunError | Stopped) -> None:
    """Tells the error in one line and ends the process: status 2 for a usage error, 1 for a fault, 75 when stopped."""
    code = 2 if isinstance(error, UsageError) else 1
    line = f'error: {error}'
    if isinstance(error, Stopped):
        code, line = STOPPED, f'{error}; --resume auto goes on from there'
        for number in STOP_SIGNALS:  # nothing is left to interrupt, and the status shall be this one
            signal.signal(number, signal.SIG_IGN)
    # A usage error is the same on all processes of a machine, and the first tells it; a fault may be one process's own.
    if code == 1 or os.environ.get('LOCAL_RANK', '0') == '0':
        print(f'{Path(sys.argv[0]).name}: {line}', file=sys.stderr, flush=True)
    if int(os.environ.get('WORLD_SIZE', '1')) > 1:
        os._exit(code)  # others may wait in a collective, on which an orderly exit would hang or abort
    sys.exit(code)


def run_program(program: Callable[[], Any], resume: str = '') -> Any:
    """Returns what the program does; an error of it is told in one line and ends the process (see `exit_with`).

    Only a fault that `explain` does not know shows its traceback.
    """
    try:
        try:
            return program()
        except BaseException:
            # For a data worker that died, torch's handler raises wherever the main thread happens to be: no longer, or
            # the worker's end could break off the telling of what was raised because of it.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            raise
    except (UsageError, RunError, Stopped) as error:
        exit_with(error)
    except Exception as error:
        fault = explain(error, resume)
        if fault is None:
            traceback.print_exc()
            fault = RunError('the traceback above is no known fault; please report it')
        exit_with(fault)


if __name__ == '__main__':
    setup_default_logging()
    catch_signals()
    result = run_program(lambda: main(_parse_args()), resume='. --resume auto goes on from the last checkpoint')
    if os.environ.get('RANK', '0') == '0':
        print(f'--result\n{json.dumps(result, indent=4)}')
