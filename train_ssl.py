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
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from timm.utils import setup_default_logging
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from backbone import (
    PHOTO_MODEL,
    PHOTO_SIDE,
    SMALL_MODEL,
    FeaturesAndLogits,
    add_pin_memory_argument,
    average_lags,
    build_ema,
    build_model,
    check_head,
    check_model_arguments,
    choose_model,
    describe_averages,
    fit_to_length,
    freeze,
    resolve_data,
    share_batch_norm,
    stages,
)
from calibratemix import CHOICES, PRESETS, CalibrateMix
from checkpoint import (
    EVAL_COLUMNS,
    TRAIN_COLUMNS,
    Run,
    ends_patience,
    finished_metrics,
    judge,
    open_run_folder,
    out_of_patience,
    read_checkpoint,
    resume,
    save_checkpoint,
    start_folder,
    start_trackers,
    tell_skipped,
    write_margins,
    write_summary,
    write_weights,
)
from data import (
    BatchDataset,
    DataConfig,
    Datasets,
    EndlessBatches,
    Feed,
    ViewDataset,
    create_loader,
    decode_all,
    evaluation_batches,
    limit_workers,
)
from imbalance import (
    LogitAdjustment,
    add_imbalance_arguments,
    adjust,
    build_adjustment,
    by_class,
    check_imbalance,
    measure,
    tell_tail,
)
from labels import choose_labels
from methods import (
    ALGORITHMS,
    Method,
    add_method_arguments,
    check_method,
    fit_to_method,
    has_extra_class,
    lambda_u,
    logit_margin_penalty,
    num_outputs,
    tell_idle,
    warmup_updates,
    without_defaults,
)
from metrics import EvalMeter
from passes import Outputs, forward_views, still_statistics
from program import (
    STOPPED,
    ArgumentParser,
    ParseKwargs,
    RunError,
    Stopped,
    StopRequest,
    UsageError,
    catch_signals,
    once_a_machine,
    parse_with_config,
    run_program,
    setup_accelerator,
    takes_bar,
    tell_bfloat16,
)
from schedule import (
    add_optimizer_arguments,
    build_optimizer,
    build_scheduler,
    check_optimizer,
    clip_gradients,
    learning_rate,
    step_scheduler,
)
from seeds import item_seed
from shards import BankShard, find_easy, joined_weight
from sources import MAX_PIXELS, known_facts, unlabeled_split
from splits import (
    Sources,
    agree_on_classes,
    check_overlap,
    evaluation_name,
    identify,
    match_extra,
    open_sources,
    place_labeled,
    tell_choice,
)
from views import BatchViews, build_views

_logger = logging.getLogger('train')

MAX_SKIPPED_UPDATES = 100  # float16 overflows in a row after which a run is given up
ADVICE = 'nothing was saved since. Try a lower --lr, --clip-grad 1, or without --amp'  # after a loss that is not finite


# --- Arguments --------------------------------------------------------------------------------------------------------

def create_parser() -> argparse.ArgumentParser:
    flag = argparse.BooleanOptionalAction
    parser = ArgumentParser(
        description='Semi-supervised training of any timm classifier, with CalibrateMix.',
        stray='; pictures are given as --data-dir FOLDER',
        epilog=f'Exit status: 0 finished, 2 a mistake in the arguments, 1 a fault, {STOPPED} stopped by SIGTERM, '
               'SIGINT or SIGUSR1 after the update at hand, with a checkpoint that --resume auto goes on from. A '
               'second signal ends the run at once.',
    )
    parser.add_argument('-c', '--config', metavar='FILE', default=None,
                        help='YAML file of arguments, such as a run\'s args.yaml; the command line wins over it')

    group = parser.add_argument_group('Dataset')
    group.add_argument('--dataset', metavar='NAME', default='',
                       help='digits (bundled); cifar10, cifar100, svhn, stl10, imagenet (from --data-dir if given, '
                            'else from the hub); webvision, webvision-mini (from --data-dir); hfds/<hub name or '
                            'folder>[:config]; torch/<torchvision\'s name>; a folder with <split>/<class>/<image> or '
                            'parquet files; a .parquet file or glob; a .csv, .tsv or .jsonl file, a row a picture: '
                            'columns file_name (filename, path, image), label (class, target; empty: none) and, if '
                            'there are splits, split (default: the folder --data-dir)')
    group.add_argument('--data-dir', metavar='DIR', default=None,
                       help='where the files of --dataset lie (of a .csv, by default in its folder); cache of hfds/')
    group.add_argument('--dataset-download', action=flag, default=False, help='let torchvision download (torch/)')
    group.add_argument('--train-split', metavar='NAME', default='train', help='training split (default: train)')
    group.add_argument('--val-split', metavar='NAME', default=None,
                       help='evaluation split (default: the first of validation, val, valid, test that exists)')
    group.add_argument('--val-fraction', type=float, metavar='SHARE', default=None,
                       help='evaluate on, and choose best/ by, this share of every class of the training split, which '
                            'is then in neither the labeled nor the unlabeled set')
    group.add_argument('--val-seed', type=int, metavar='N', default=0,
                       help='of that draw, which does not depend on --seed (default: 0)')
    group.add_argument('--test-split', metavar='NAME', default=None,
                       help='split to report once, at the end of training (default: none; validate.py reports it too)')
    group.add_argument('--unlabeled-split', metavar='NAME', default=None,
                       help='split of the unlabeled images, or a folder of them: its path below the data set\'s or '
                            'an absolute one; a+b joins two (default: the training split; stl10: train+unlabeled)')
    group.add_argument('--unlabeled-dir', metavar='DIR', default=None,
                       help='pictures below this folder that no row of a .csv names are unlabeled images too')
    group.add_argument('--val-labels', metavar='FILE', default=None,
                       help='labels of an evaluation split that is a flat folder, as ImageNet\'s: a .csv of file and '
                            'label, as Kaggle\'s LOC_val_solution.csv, or a text file with a line a picture: wnids, or '
                            'ILSVRC2012_validation_ground_truth.txt with the devkit\'s meta.mat or map_clsloc.txt '
                            'beside it, which name its numbers')
    group.add_argument('--extra-val', metavar='NAME', default=None,
                       help='second evaluation set, such as imagenet for webvision: logged, and kept in metrics.json; '
                            'of its images those count that show a class of the training set')
    group.add_argument('--extra-val-dir', metavar='DIR', default=None, help='as --data-dir, for --extra-val')
    group.add_argument('--input-key', metavar='COLUMN', default=None, help='image column of a table, if not image')
    group.add_argument('--target-key', metavar='COLUMN', default=None, help='label column, if not the only likely one')
    group.add_argument('--class-map', metavar='FILE', default='', help='timm\'s class map (image folders)')
    group.add_argument('--skip-missing', action=flag, default=False,
                       help='leave out images of WebVision\'s lists or of a .csv that are not there, and count them, '
                            'instead of stopping')
    group.add_argument('--skip-bad-images', action=flag, default=False,
                       help='step over images that cannot be decoded, and count them, instead of stopping')
    group.add_argument('--max-pixels', type=int, metavar='N', default=MAX_PIXELS,
                       help=f'pixels up to which an image is decoded, a guard of the memory (default: {MAX_PIXELS})')

    group = parser.add_argument_group('Model')
    group.add_argument('--model', metavar='NAME', default=None,
                       help=f'any timm model with forward_features and forward_head (default: {SMALL_MODEL} for '
                            f'CIFAR-10 and its like and other small images, else {PHOTO_MODEL} at {PHOTO_SIDE} px)')
    group.add_argument('--pretrained', action=flag, default=False, help='start from timm\'s pretrained weights')
    group.add_argument('--pretrained-path', metavar='PATH', default='',
                       help='start from the weights of this file (.safetensors, .pth, ...) or checkpoint folder as if '
                            'they were timm\'s pretrained ones of --model; the head is new')
    group.add_argument('--initial-checkpoint', metavar='PATH', default='',
                       help='start from the weights of this file or checkpoint folder, head and all')
    group.add_argument('--head-init-scale', type=float, metavar='X', default=None,
                       help='factor of the initial weights of the head. Some models (EfficientNets) start a small new '
                            'head with large ones, so that random pseudo-labels look certain: give 0 then')
    group.add_argument('--freeze', metavar='N', nargs='?', type=stages, const='backbone', default=None,
                       help='keep the first N stages of the model as they are, the stem being one, with their '
                            'batch-norm statistics; without N all but the classifier. With pretrained weights a few '
                            'labels then train in minutes')
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
                       help='batch-norm momentum (default: the model\'s, raised in short runs to 100 / updates, at '
                            'most 0.1: the wide ResNets have 0.001, made for 2^20 updates)')
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
    group.add_argument('-j', '--workers', type=int, metavar='N', default=None,
                       help='loading processes of the unlabeled set, per process, no more than there are processors '
                            '(default: 4 at most)')
    group.add_argument('--aug-device', default='auto', choices=['auto', 'pil', 'cpu', 'cuda'],
                       help='where views are made: image by image through PIL, or, if the images are small and of one '
                            'size, as batches of tensors in the loading processes (cpu) or on the GPU. auto: as '
                            'tensors where possible, on the GPU if there is one (default: auto)')
    add_pin_memory_argument(group)

    group = add_optimizer_arguments(parser)
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
                       help='base method; supervised sees the labeled images only, pseudo_label and vat no strong '
                            'views, pi_model, meanteacher and mixmatch two weak ones (default: fixmatch)')
    draw = group.add_mutually_exclusive_group()
    draw.add_argument('--num-labels', type=int, metavar='N', default=None,
                      help='labeled images in total, drawn balanced over the classes (default: all that have a label)')
    draw.add_argument('--labels-per-class', type=int, metavar='N', default=None, help='labeled images of every class')
    draw.add_argument('--label-fraction', type=float, metavar='SHARE', default=None,
                      help='share of every class that is labeled, at least one image')
    draw.add_argument('--label-fold', type=int, metavar='N', default=None,
                      help='one of STL-10\'s ten predefined folds of 1,000 labeled images')
    group.add_argument('--labels-file', metavar='FILE', default=None,
                       help='take the labeled images from a run\'s labels.json instead of drawing them, or from a '
                            'list of file names: a text file with one a line, as SimCLR\'s 1percent.txt, or a .csv '
                            'with a column of them')
    group.add_argument('--label-seed', type=int, metavar='N', default=None,
                       help='seed of the draw of the labeled images (default: --seed)')
    group.add_argument('--label-noise', type=float, metavar='SHARE', default=0.,
                       help='flip this share of the labels to another class; labels.json keeps the original ones too '
                            '(default: 0)')
    add_imbalance_arguments(group)
    group.add_argument('--exclude-labeled', action=flag, default=False,
                       help='leave the labeled images out of the unlabeled set; the published protocol keeps them in')
    add_method_arguments(group)
    group.add_argument('--hflip', type=float, metavar='P', default=None,
                       help='probability of mirroring a training image (default: 0.5; 0 for svhn and the sets of '
                            'digits)')

    group = parser.add_argument_group('CalibrateMix', 'Options that are not given take the value of the preset.')
    group.add_argument('--calibratemix', action=flag, default=False, help='add CalibrateMix to the base method')
    group.add_argument('--calmix-preset', default='paper', choices=PRESETS,
                       help='paper: arXiv 2511.12964; authors-code: their public code, which differs (after warmup '
                            'it minimises 2 base + mix: this at twice the --lr and half the --weight-decay); ours: '
                            'the paper\'s with equal weights and without ranking; steered: random pairs with equal '
                            'weights, and a factor of the loss that finds itself: the best one with a thousand '
                            'unlabeled images or more (default: paper)')
    group.add_argument('--calmix-gamma', type=float, metavar='X', default=None,
                       help='weight of the labeled image (fixed), or the parameter of Beta(X, X) (ours, '
                            'steered: 0.5, the others: 0.4)')
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
                       help='factor of the mixup loss (presets: 0.5, steered: at most 1)')
    group.add_argument('--calmix-weight-rate', type=float, metavar='X', default=None,
                       help='move that factor after warmup, from 0 to --calmix-weight and back, so that the network is '
                            'as sure as it is right, judged by how often its pseudo-labels change: by X times the gap, '
                            'each update (steered: 0.1, the others: 0, a fixed factor)')
    group.add_argument('--calmix-mask-scale', type=float, metavar='X', default=None,
                       help='factor of the logits by which the base method chooses and weighs pseudo-labels after '
                            'warmup: mixing takes confidence from all images, and fewer would pass a threshold '
                            '(steered: 1.5, the others: 1). Methods with losses of their own are left as they are')
    group.add_argument('--calmix-split', default=None, choices=CHOICES['split'],
                       help='easy and hard by the median of the batch of a process, of the joined batch of all '
                            'processes, or of the whole bank (presets: batch)')
    group.add_argument('--calmix-pairing', default=None, choices=CHOICES['pairing'],
                       help='random: split and partners drawn at random, the random-mixup baseline (presets: targeted)')
    group.add_argument('--calmix-min-confidence', type=float, metavar='P', default=None,
                       help='mix only unlabeled images of at least this confidence (presets: 0, all)')
    group.add_argument('--calmix-warmup-epochs', type=float, metavar='N', default=None,
                       help='epochs of the base method alone (paper, ours: 100 of 1024, authors-code: 146.5; by '
                            'default the same share of --epochs). Without one the ECE was higher in short runs')
    group.add_argument('--calmix-apm-in-warmup', action=flag, default=None,
                       help='unlabeled margins count from the first step on (paper, ours: yes, authors-code: no)')
    group.add_argument('--calmix-mixed-statistics', action=flag, default=None,
                       help='mixed images move batch norm\'s running statistics too, although the network is evaluated '
                            'on images as they are (authors-code: yes, the others: no)')
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
    group.add_argument('--model-ema-warmup', action=flag, default=None,
                       help='let the decay grow from 0, or the average holds the initial weights for long (default: '
                            'yes in runs of less than 100 / (1 - decay) updates, which is 100,000 for 0.999)')

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
    group.add_argument('--patience', type=int, metavar='N', default=None,
                       help='end the run after N evaluations in a row without a better --eval-metric; those before '
                            'CalibrateMix starts do not count. The schedule stays that of --epochs')
    group.add_argument('--eval-metric', default='top1', choices=EVAL_COLUMNS,
                       help='by which best/ is chosen, on the evaluation split (default: top1)')
    return parser


def _parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = create_parser()
    return _check_args(parser, parse_with_config(parser, argv, without_defaults))


def _check_args(parser: ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Ranges that argparse does not check; exits with status 2."""
    if args.batch_size is None and args.global_batch_size is None:
        args.batch_size = 64
    fit_to_method(args)
    parser.at_least(args, **dict.fromkeys((
        'epochs', 'train_steps_per_epoch', 'batch_size', 'global_batch_size', 'validation_batch_size', 'mu',
        'grad_accum_steps', 'log_interval', 'val_interval', 'checkpoint_hist', 'dist_timeout', 'patience', 'max_pixels',
    ), 1))
    parser.at_least(args, **dict.fromkeys((
        'workers', 'recovery_interval', 'lambda_u', 'seed', 'label_seed', 'logit_margin_penalty', 'logit_margin',
        'freematch_fairness', 'vat_eps', 'mixmatch_alpha', 'calmix_warmup_epochs',
    ), 0))
    parser.shares(args, 'threshold', 'model_ema_decay', 'hflip', 'freematch_max_threshold')
    parser.shares(args, 'lambda_u_warmup', 'stat_momentum', 'label_noise', 'label_smoothing', below=True)
    if args.input_size is not None:
        if args.input_size[1] != args.input_size[2] or args.img_size not in (None, args.input_size[1]):
            parser.error(f'--input-size {args.input_size}: expected one square size, as --img-size if both are given')
        args.in_chans, args.img_size, args.input_size = args.input_size[0], args.input_size[1], None
    check_optimizer(parser, args)
    if args.start_epoch is not None and not 0 <= args.start_epoch < args.epochs:
        parser.error(f'--start-epoch {args.start_epoch}: expected 0 to {args.epochs - 1}')
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        parser.error(f'--val-fraction {args.val_fraction}: expected a number in (0, 1)')
    if args.val_fraction is not None and args.val_split is not None:
        parser.error(f'--val-fraction and --val-split {args.val_split}: give one; --test-split is reported at the end')
    args.pretrained = args.pretrained or bool(args.pretrained_path)
    check_model_arguments(parser, args)
    if args.torchcompile and args.torchcompile not in torch._dynamo.list_backends(exclude_tags=()):
        parser.error(f'--torchcompile {args.torchcompile}: unknown; there are '
                     f'{", ".join(torch._dynamo.list_backends())}')
    check_method(parser, args)
    if args.label_noise and args.labels_file:
        parser.error(f'--label-noise {args.label_noise} would flip the labels of --labels-file, which may be flipped '
                     'already: give --label-noise 0')
    if args.aum_threshold_samples is not None and not args.save_margins:
        parser.error('--aum-threshold-samples: their margins go to margins.parquet; add --save-margins')
    if args.resume == 'auto' and not args.experiment:
        parser.error('--resume auto: the default run folder is named by the time and always new; add --experiment')
    if args.calmix_warmup_epochs is not None and args.calibratemix and args.calmix_warmup_epochs >= args.epochs:
        parser.error(f'--calmix-warmup-epochs {args.calmix_warmup_epochs:g}: not below --epochs {args.epochs}, so that '
                     'CalibrateMix would never run')
    check_imbalance(parser, args)
    fit_to_length(args)
    return args


# --- Set-up -----------------------------------------------------------------------------------------------------------

def share_batch(args: argparse.Namespace, num_processes: int) -> None:
    """Sets --batch-size where --global-batch-size is given."""
    if args.global_batch_size is not None:
        parts = num_processes * args.grad_accum_steps
        if args.global_batch_size % parts:
            raise UsageError(f'--global-batch-size {args.global_batch_size}: not divisible by {num_processes} '
                             f'process(es) x --grad-accum-steps {args.grad_accum_steps}')
        args.batch_size = args.global_batch_size // parts


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
    apm = None
    try:
        if shards and accelerator.num_processes > 1:
            part = (accelerator.process_index, accelerator.num_processes)
            apm = BankShard(num_unlabeled, num_classes, part, smoothing=0.997, dtype=bank_dtype)
        rate = args.calmix_weight_rate
        rate = PRESETS[args.calmix_preset]['weight_rate'] if rate is None else rate
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
            weight_rate=rate / args.grad_accum_steps,  # w moves with every batch, of which an update has several
            mask_scale=args.calmix_mask_scale,
            split=args.calmix_split,
            pairing=args.calmix_pairing,
            min_confidence=args.calmix_min_confidence,
            warmup_steps=warmup_updates(args),
            apm_in_warmup=args.calmix_apm_in_warmup if args.calibratemix else True,
            mixed_statistics=args.calmix_mixed_statistics,
            bank_dtype=bank_dtype,
            apm=apm,
            labeled_to_unlabeled=datasets.labeled_to_unlabeled,
        )
    except ValueError as error:
        raise UsageError(f'--calmix-{str(error).replace("_", "-", 1)}') from error


def build_datasets(
        args: argparse.Namespace,
        sources: Sources,
        num_classes: int,
        data_config: DataConfig,
        views_on_gpu: bool = False,
) -> Datasets:
    """Draws or reads the labels, and wraps the sources in their views."""
    train = sources.train
    labels, unlabeled_index, position = choose_labels(args, train, num_classes), None, None
    if args.algorithm != 'supervised':
        unlabeled_index, position = place_labeled(args, sources, labels, num_classes)
    identity = identify(sources, labels, unlabeled_index)
    extra = match_extra(args, train.class_names, num_classes, train.bits) if args.extra_val else None
    check_overlap(args, sources, labels, unlabeled_index, extra and extra[:2])
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

    kinds = getattr(ALGORITHMS[args.algorithm], 'labeled_views', Method.labeled_views)
    labeled_set = with_views(kinds, train, labels.index, labels.trained, 'labeled')
    evaluation_set = with_views({'image': 'eval'}, sources.evaluation)
    extra_set = test_set = unlabeled_set = None
    if extra is not None:
        extra_set = with_views({'image': 'eval'}, *extra)
    if sources.test is not None:
        test_set = with_views({'image': 'eval'}, sources.test)
    if unlabeled_index is not None:
        kinds = ALGORITHMS[args.algorithm].views
        unlabeled_set = with_views(kinds, sources.unlabeled, unlabeled_index, stream='unlabeled')
    return Datasets(labeled_set, unlabeled_set, evaluation_set, extra_set, position, labels, identity, test_set)


# --- Step -------------------------------------------------------------------------------------------------------------

def supervised_step(
        model: nn.Module,
        labeled: dict,
        calmix: CalibrateMix | None,
        accelerator: Accelerator,
        args: argparse.Namespace,
        adjustment: LogitAdjustment | None = None,
) -> dict[str, torch.Tensor]:
    """Cross-entropy on the labeled images alone."""
    logits = model(labeled['image'])[1].float()
    if calmix is not None:
        calmix.aum.update(*accelerator.gather((labeled['index'], logits.detach(), labeled['target'])))
    z = logits if adjustment is None else adjustment.adjust_labeled(logits)
    loss = F.cross_entropy(z, labeled['target'], label_smoothing=args.label_smoothing)
    return dict(loss=loss, loss_labeled=loss)


def semi_supervised_step(
        model: nn.Module,
        labeled: dict,
        unlabeled: dict,
        method: Method,
        calmix: CalibrateMix | None,
        num_updates: int,
        accelerator: Accelerator,
        args: argparse.Namespace,
        adjustment: LogitAdjustment | None = None,
        average: Callable | None = None,
) -> dict[str, torch.Tensor]:
    """Losses of a step: the base method's, and after warmup the mixup loss from a second pass over mixed images only.

    Args:
        model: Returns features and logits.
        labeled: image `[B, C, S, S]` (and what other views the method has), target `[B]`, index `[B]`.
        unlabeled: weak and strong `[U, C, S, S]` (likewise), target `[U]` (for monitoring only; -1: unknown), index
            `[U]`. Both may say whether an index stands twice, as repeated.
        method: The base method.
        calmix: None for the base method alone.
        num_updates: Updates done so far.
        adjustment: Of the logits in the labeled and the pseudo-labeled loss, by class frequencies.
        average: The averaged network, for a method that takes it: it gets the weak images.

    Returns scalars by name, detached but for `loss`.
    """
    i, y, j = labeled['index'], labeled['target'], unlabeled['index']
    out = forward_views(
        model, labeled, unlabeled, args.weak_forward, average, method.trains_on_views, method.further_outputs,
    )
    num_classes = method.num_classes  # an extra class of the network is a target of some images, and else left out
    confidence, pseudo_label = out.weak_logits[:, :num_classes].softmax(1).max(1)

    # What a method or the bank keeps is kept of the joined batch, on every process alike.
    i_all, y_all, z_all, j_all, z_weak_all, pseudo_label_all = accelerator.gather(
        (i, y, out.logits.detach(), j, out.weak_logits, pseudo_label),
    )
    for_mask = calmix.for_mask if calmix is not None and not method.own_losses else lambda logits, step: logits
    if calmix is not None and not method.own_losses and num_updates >= calmix.warmup_steps:
        method.mask_scale = calmix.mask_scale
    method.see_labeled(for_mask(z_all, num_updates), y_all, num_updates)
    seen_all = for_mask(z_weak_all[:, :num_classes + method.virtual_class], num_updates)
    weight_all = method(seen_all, j_all, num_updates)
    weight = weight_all[accelerator.process_index * len(j):][:len(j)]
    logits = adjust(adjustment, out.logits, out.strong_logits, z_weak_all, weight_all)
    out = out._replace(weak_logits=for_mask(out.weak_logits, num_updates))  # soft targets are made of these
    loss, terms = base_losses(
        model, labeled, unlabeled, method, out, *logits, pseudo_label, weight, num_updates, accelerator, args,
    )
    if calmix is not None:
        joined = (i_all, y_all, z_all, j_all, pseudo_label_all, z_weak_all)
        loss_mixup = mixup_loss(
            model, labeled, unlabeled, calmix, out, pseudo_label, confidence, joined, num_updates, accelerator,
        )
        if loss_mixup is not None:
            loss = loss + calmix.weight * loss_mixup
            terms['loss_mixup'] = loss_mixup.detach()

    return dict(terms, loss=loss, mask_rate=weight.mean(), **judge_pseudo_labels(pseudo_label, unlabeled['target']))


def base_losses(
        model: nn.Module,
        labeled: dict,
        unlabeled: dict,
        method: Method,
        out: Outputs,
        logits: torch.Tensor,
        strong_logits: torch.Tensor,
        pseudo_label: torch.Tensor,
        weight: torch.Tensor,
        num_updates: int,
        accelerator: Accelerator,
        args: argparse.Namespace,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of the base method on a process's own images, and its labeled and unlabeled parts by name, detached.

    `logits` `[B, K]` and `strong_logits` `[U, K]` are those of `out`, adjusted by class frequencies if that is asked.
    """
    if method.own_losses:
        loss_labeled, loss_unlabeled, further = method.losses(model, labeled, unlabeled, out)
    else:
        loss_labeled = F.cross_entropy(logits, labeled['target'], label_smoothing=args.label_smoothing)
        target = method.target(out.weak_logits, pseudo_label, unlabeled['index'])
        loss_unlabeled = (F.cross_entropy(strong_logits, target, reduction='none') * weight).mean()
        further = method.further_loss(out.strong_logits, weight, accelerator)
    loss = loss_labeled.add(loss_unlabeled, alpha=lambda_u(num_updates, args))
    if isinstance(further, torch.Tensor):
        loss = loss + further
    if args.logit_margin_penalty:
        penalty = logit_margin_penalty(out.strong_logits, pseudo_label, weight, accelerator, args)
        loss = loss + args.logit_margin_penalty * penalty
    return loss, dict(loss_labeled=loss_labeled.detach(), loss_unlabeled=loss_unlabeled.detach())


def mixup_loss(
        model: nn.Module,
        labeled: dict,
        unlabeled: dict,
        calmix: CalibrateMix,
        out: Outputs,
        pseudo_label: torch.Tensor,
        confidence: torch.Tensor,
        joined: tuple[torch.Tensor, ...],
        num_updates: int,
        accelerator: Accelerator,
) -> torch.Tensor | None:
    """Moves the banks by the joined batch. After warmup it mixes a process's own labeled with weak views of its
    unlabeled images, passes the mixed ones through the network, and returns their loss.
    """
    i_all, y_all, z_all, j_all, pseudo_label_all, z_weak_all = joined
    z_all, z_weak_all = (logits[:, :calmix.num_classes] for logits in (z_all, z_weak_all))
    alone = accelerator.num_processes == 1  # else the others' images are not known without a wait
    repeated = tuple(batch.get('repeated') if alone else None for batch in (labeled, unlabeled))
    calmix.update(i_all, y_all, z_all, j_all, pseudo_label_all, z_weak_all, num_updates, repeated)
    if num_updates < calmix.warmup_steps:
        return None
    mixed = calmix.mix(
        labeled['index'],
        labeled['target'],
        labeled['image'],
        out.features,
        unlabeled['index'],
        pseudo_label,
        unlabeled['weak'],
        out.weak_features,
        confidence,
        find_easy(calmix, i_all, j_all, pseudo_label_all, accelerator),
    )
    if calmix.split == 'joined':
        mixed = mixed._replace(weight=joined_weight(mixed, accelerator))
    with nullcontext() if calmix.mixed_statistics else still_statistics(model):
        logits = model(mixed.images)[1]
    return calmix.loss(logits[:, :calmix.num_classes], mixed)


def judge_pseudo_labels(pseudo_label: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Shares of the images `[U]` whose pseudo-label is right and whose label is known (-1: unknown), for monitoring."""
    # A pseudo-label is never -1.
    right, known = torch.stack([pseudo_label == target, target >= 0]).mean(1, dtype=torch.float32).unbind()
    return dict(pseudo_label_right=right, pseudo_label_known=known)


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
        self.bad = torch.full((len(self.TERMS) + 2,), -1., device=accelerator.device)
        self.seen, self.one = self.sums.clone(), torch.ones((), device=accelerator.device)

    def add(self, terms: dict[str, torch.Tensor], step: int) -> None:
        # A GPU would be waited for by new_tensor, and by a number that is assigned to an element.
        loss = terms['loss'].detach()
        absent = None if terms.keys() >= set(self.TERMS) else torch.zeros_like(loss)
        row = [terms.get(name, absent) for name in self.TERMS]
        row = torch.stack([loss.new_full((), step), self.one, *row]).detach()
        self.bad = torch.where((self.bad[0] < 0) & (loss - loss != 0), row, self.bad)  # NaN != 0 too
        self.sums = self.sums + row[1:]

    def check(self) -> None:
        """Raises RunError, on every process, if the loss of one was not finite."""
        for rank, bad in enumerate(self.accelerator.gather(self.bad[None]).tolist()):
            if bad[0] >= 0:
                parts = ', '.join(f'{name} {value:.4g}' for name, value in zip(self.TERMS[1:4], bad[3:6]))
                raise RunError(f'the loss is not finite at update {bad[0]:.0f} on process {rank} ({parts}); {ADVICE}')

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


def ask_average(run: Run, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and logits of the averaged network, in evaluation mode."""
    with run.accelerator.autocast():
        return FeaturesAndLogits(run.ema.module).eval()(images)


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
                terms = supervised_step(run.model, labeled, run.calmix, accelerator, args, run.adjustment)
            else:
                average = partial(ask_average, run) if run.method.takes_average else None
                terms = semi_supervised_step(
                    run.model, labeled, next(unlabeled_batches), run.method, run.calmix, run.num_updates, accelerator,
                    args, run.adjustment, average,
                )
            loss = terms['loss']
            accelerator.backward(loss / args.grad_accum_steps if args.grad_accum_steps > 1 else loss)
        run.monitor.add(terms, run.num_updates)
    if args.clip_grad is not None:
        accelerator.unscale_gradients(run.optimizer)
        clip_gradients(run.timm_model, args)
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.optimizer.step_was_skipped:
        return False
    if accelerator.num_processes > 1:
        share_batch_norm(run.timm_model, accelerator, args.dist_bn)
    run.num_updates += 1
    step_scheduler(run.scheduler, run.num_updates, args)
    if run.ema is not None:
        run.ema.update(run.timm_model, step=run.num_updates)
    return True


def progress_words(means: dict[str, float], args: argparse.Namespace, digits: int = 4) -> str:
    """What a step's terms were, for a line or the bar: those that the run has, and right pseudo-labels if it knows."""
    total, right = f'loss {means["loss"]:.{digits}f}', means['pseudo_label_accuracy']
    if args.algorithm == 'supervised':
        return total
    names = ('labeled', 'unlabeled', *['mixup'] * args.calibratemix)
    parts = ' '.join(f'{name} {means[f"loss_{name}"]:.{digits}f}' for name in names)
    return (f'{total} ({parts})  mask {means["mask_rate"]:.3f}'
            + ('' if math.isnan(right) else f'  pseudo-labels right {right:.3f}'))


@contextmanager
def progress_bar(total: int, done: int, visible: bool):
    """Bar of the updates, below the log; where it is not visible it is there all the same, and `disable` is True."""
    form = '{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]'
    with (
        tqdm(total=total, initial=done, bar_format=form, dynamic_ncols=True, disable=not visible) as bar,
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
        if args.calibratemix and run.num_updates == run.calmix.warmup_steps + 1:
            _logger.info(f'CalibrateMix starts mixing in epoch {epoch}, with update {run.num_updates}: the loss has '
                         'one more part from here on, and is higher by it')
        if run.num_updates % args.log_interval == 0 or run.num_updates == end:
            means = run.monitor.read(since_last=True)
            rate = (run.num_updates - first) / (time.perf_counter() - started)
            left = round((total - run.num_updates) / rate)
            tail = f'  skipped updates {run.skipped_updates}' if run.skipped_updates else ''
            if args.calibratemix and run.calmix.weight_rate > 0:
                tail = f'  mixup weight {float(run.calmix.weight):.3f}{tail}'
            if bar.disable:
                _logger.info(
                    f'epoch {epoch} update {run.num_updates}/{total}  {progress_words(means, args)}  '
                    f'lr {learning_rate(run.optimizer.param_groups):.4g}  {rate * images:.0f} img/s  '
                    f'left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}{tail}'
                )
            else:
                bar.set_postfix_str(f'{progress_words(means, args, 3)}  {rate * images:.0f} img/s{tail}', refresh=False)
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
        logits = logits[good, :num_classes].float()
        if not logits.isfinite().all():  # the last update did it, of which no loss tells any more
            raise RunError(f'the loss is not finite: logits are NaN or infinite in an evaluation; {ADVICE}')
        meter.update(logits, batch['target'][good])
        if number < asked:
            stop.check()
    for module, mode in modes:
        module.training = mode
    meter.sync(lambda state: accelerator.reduce(state, 'sum'))
    return meter


def record_evaluation(
        run: Run,
        folder: Path,
        epoch: int,
        train_metrics: dict,
        meters: dict[str, EvalMeter],
        split: str,
        data_config: DataConfig,
        args: argparse.Namespace,
) -> dict[str, float]:
    """Logs an evaluation and returns its metrics; the main process writes summary.csv, last/ and, if it is the best so
    far, best/. Of the meters, `evaluation` is of the named split and chooses best/; the others are only told.
    """
    metrics = measure(meters['evaluation'], run.labeled_by_class)
    best = judge(run, metrics, args)
    _logger.info(
        f'epoch {epoch} evaluation of {metrics["count"]:.0f} images of {split}: error {metrics["error"]:.2f} %, '
        f'ECE {metrics["ece"]:.2f} %, NLL {metrics["nll"]:.4f}, confidence {metrics["confidence"]:.2f} %'
        + tell_tail(metrics) + (f' (best {args.eval_metric} so far)' if best else '')
    )
    further = {}
    for name, source in (('extra_val', args.extra_val), ('test', args.test_split)):
        if name in meters:
            found = further[name] = dict(source=source, **measure(meters[name], run.labeled_by_class),
                                         bins=meters[name].bin_lists())
            _logger.info(f'epoch {epoch} evaluation of {found["count"]:.0f} images of {source}: error '
                         f'{found["error"]:.2f} %, ECE {found["ece"]:.2f} %, NLL {found["nll"]:.4f}{tell_tail(found)}')
    if not run.accelerator.is_main_process:
        return metrics
    row = dict(epoch=epoch, num_updates=run.num_updates, lr=learning_rate(run.optimizer.param_groups))
    row.update((f'train_{name}', train_metrics[name]) for name in TRAIN_COLUMNS)
    row.update((f'eval_{name}', metrics[name]) for name in (*EVAL_COLUMNS, 'tail_error') if name in metrics)
    if args.calibratemix:
        row['calmix_weight'] = float(run.calmix.weight)
    write_summary(folder / 'summary.csv', row)
    run.accelerator.log(row, step=run.num_updates)
    content = dict(
        epoch=epoch,
        num_updates=run.num_updates,
        split=split,
        weights='average' if run.ema is not None else 'student',
        precision=args.amp_dtype if args.amp else 'float32',
        best_chosen_by=f'{args.eval_metric} on {split}',
        class_names=run.identity.class_names,
        **metrics,
        bins=meters['evaluation'].bin_lists(),
        classes=by_class(meters['evaluation'], run.labeled_by_class),
        **further,
    )
    if out_of_patience(run, args):
        content['out_of_patience'] = True
    write_weights(run, folder / 'last', data_config, content)
    if best:
        write_weights(run, folder / 'best', data_config, content)
    return metrics


# --- Main -------------------------------------------------------------------------------------------------------------

def tell_batch(args: argparse.Namespace, processes: int, device: str) -> str:
    """How many images an update takes, in all and per process and batch."""
    kinds = [('labeled', args.batch_size)]
    if args.algorithm != 'supervised':
        kinds.append(('unlabeled', args.batch_size * args.mu))
    joined = ' and '.join(f'{number * args.grad_accum_steps * processes} {kind}' for kind, number in kinds)
    own = ' and '.join(str(number) for _, number in kinds)
    steps = f' from each of {args.grad_accum_steps} batches' if args.grad_accum_steps > 1 else ''
    return (f'an update takes {joined} images: {own}{steps} on '
            + (f'each of {processes} processes' if processes > 1 else 'one process') + f', device {device}'
            + (', with TF32 and cudnn.benchmark' if device.startswith('cuda') else ''))


def saves_backward(args: argparse.Namespace) -> bool:
    """Whether --weak-forward no-grad can be added, and saves anything: a frozen backbone has no gradient anyway."""
    apart = getattr(ALGORITHMS[args.algorithm], 'weak_apart', False)
    return apart and args.weak_forward == 'joint' and args.freeze != 'backbone'


def describe(
        run: Run,
        datasets: Datasets,
        split: str,
        data_config: DataConfig,
        args: argparse.Namespace,
) -> None:
    """The start-up lines: model, images, sets and splits, batch, who labels."""
    _logger.info(
        f'{args.model}, {sum(p.numel() for p in run.timm_model.parameters()):,} parameters, images '
        f'{"x".join(map(str, data_config.input_size))}, mean {data_config.mean}, std {data_config.std}'
    )
    semi = datasets.unlabeled is not None
    sets = [f'{len(datasets.labeled)} labeled images of {args.train_split}']
    if semi:
        sets.append(f'{len(datasets.unlabeled)} unlabeled of {unlabeled_split(args)}')
    sets.append(f'{len(datasets.evaluation)} for evaluation of {split}')
    if datasets.test is not None:
        sets.append(f'{len(datasets.test)} of {args.test_split} at the end')
    _logger.info(f'{run.num_classes} classes; {", ".join(sets)}')
    _logger.info(tell_batch(args, run.accelerator.num_processes, str(run.accelerator.device)))
    if semi:
        averages = ', not the average that is evaluated' if run.ema is not None else ''
        who = f'the student, the network that is trained{averages}'
        if run.method.takes_average:
            who = 'the averaged network, the teacher'
        _logger.info(f'Pseudo-labels are those of {who}')
    speed = tell_bfloat16(args.amp, saves_backward(args)) if run.accelerator.device.type == 'cpu' else ''
    for line in filter(None, (speed, tell_idle(args))):
        _logger.info(line)
    tell_choice(args, split)
    _logger.info(describe_averages(run.timm_model, args))
    if args.calibratemix:
        _logger.info(f'{run.calmix}')


def build_run(
        args: argparse.Namespace,
        accelerator: Accelerator,
        model: nn.Module,
        datasets: Datasets,
        num_classes: int,
) -> Run:
    """Everything that changes while a run goes on, on the device."""
    method = None
    if args.algorithm != 'supervised':
        method = ALGORITHMS[args.algorithm](len(datasets.unlabeled), num_classes, args)
    calmix = build_calmix(args, datasets, num_classes, accelerator)
    if args.sync_bn:
        model = convert_sync_batchnorm(model)  # timm's, as torch's would drop the activations of BatchNormAct2d
    frozen = () if args.freeze is None else freeze(model, args.freeze)
    model.to(accelerator.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    ema = build_ema(model, args) if args.model_ema else None
    optimizer = build_optimizer(model, args)
    scheduler = build_scheduler(args, optimizer)  # not prepared: Accelerate would step it once per process
    timm_model, model = model, FeaturesAndLogits(model, frozen)
    if args.torchcompile:
        model = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
    model, optimizer = accelerator.prepare(model, optimizer)
    adjustment = build_adjustment(args, datasets.labels.trained, num_classes)
    for module in (method, calmix, adjustment):
        if module is not None:
            module.to(accelerator.device)
    return Run(
        model,
        timm_model,
        optimizer,
        scheduler,
        ema,
        method,
        calmix,
        Monitor(accelerator),
        accelerator,
        torch.stack([datasets.labels.index, datasets.labels.trained]),
        num_classes,
        datasets.identity,
        adjustment=adjustment,
    )


def build_feeds(run: Run, datasets: Datasets, data_config: DataConfig, args: argparse.Namespace) -> tuple:
    """Batches on the device: endless ones of the labeled and the unlabeled set, by name those to evaluate, and one of
    labeled images, the same each time.
    """
    accelerator = run.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes

    def feed(dataset, batches, workers, skipped=None):
        loader = create_loader(dataset, batches, workers, args.pin_mem, accelerator.device)
        return Feed(loader, data_config, accelerator.device, args.channels_last, skipped)

    def endless(dataset, batch_size, workers, stream, skipped):
        batches = EndlessBatches(len(dataset), batch_size, rank, world, args.seed, stream, start=run.num_draws)
        return feed(dataset, batches, workers, skipped)

    # The labeled set is small beside the unlabeled one; one worker keeps up with it.
    of_labeled, of_unlabeled = run.skipped_images
    train_feeds = [endless(datasets.labeled, args.batch_size, min(args.workers, 1), 'labeled', of_labeled)]
    if datasets.unlabeled is not None:
        batch_size = args.batch_size * args.mu
        train_feeds.append(endless(datasets.unlabeled, batch_size, args.workers, 'unlabeled', of_unlabeled))
    evaluated = dict(evaluation=datasets.evaluation, extra_val=datasets.extra, test=datasets.test)
    eval_feeds = {
        name: feed(dataset, evaluation_batches(len(dataset), eval_batch_size(args), rank, world), args.workers)
        for name, dataset in evaluated.items() if dataset is not None
    }
    size = len(datasets.labeled)
    size = min(size, eval_batch_size(args) * world) if size >= 2 * world else 0  # batch-norm needs two images
    probe = feed(datasets.labeled, evaluation_batches(size, eval_batch_size(args), rank, world), 0)
    return train_feeds, eval_feeds, probe


def eval_batch_size(args: argparse.Namespace) -> int:
    return args.validation_batch_size or 4 * args.batch_size


def train_and_evaluate(
        run: Run,
        folder: Path,
        first_epoch: int,
        datasets: Datasets,
        split: str,
        data_config: DataConfig,
        args: argparse.Namespace,
) -> dict[str, float]:
    """The epochs, each with its evaluation where one is due and a checkpoint; returns the last evaluation's metrics."""
    train_feeds, eval_feeds, probe = build_feeds(run, datasets, data_config, args)
    labeled_batches, unlabeled_batches = iter(train_feeds[0]), iter(train_feeds[-1])
    accelerator = run.accelerator
    stop = StopRequest(accelerator, args.dist_timeout)

    def save():
        save_checkpoint(run, folder, args)

    def evaluate(name):
        feed, size = eval_feeds[name], eval_batch_size(args)
        return validate(run.eval_model, feed, accelerator, run.num_classes, size, stop)

    total = args.epochs * args.train_steps_per_epoch
    lag, width = '', run.num_classes + has_extra_class(args)
    visible = accelerator.is_main_process and takes_bar(sys.stderr)
    try:
        with progress_bar(total, run.num_updates, visible) as bar:
            for epoch in range(first_epoch, args.epochs):
                train_one_epoch(run, epoch, labeled_batches, unlabeled_batches, save, stop, bar, args)
                train_metrics = run.monitor.read()
                if (epoch + 1) % args.val_interval == 0 or epoch == args.epochs - 1:
                    meters = {name: evaluate(name) for name in eval_feeds if name != 'test'}
                    seen = measure(meters['evaluation'], run.labeled_by_class)
                    if 'test' in eval_feeds and (epoch == args.epochs - 1 or ends_patience(run, seen, args)):
                        meters['test'] = evaluate('test')
                    skipped_images = tell_skipped(run, [*train_feeds, *eval_feeds.values()], args)
                    train_metrics.update(skipped_updates=run.skipped_updates, skipped_images=skipped_images)
                    metrics = record_evaluation(run, folder, epoch, train_metrics, meters, split, data_config, args)
                    # In the first half of a run an average may be behind; one line of it is enough.
                    if run.ema is not None and not lag and 2 * run.num_updates >= total:
                        lag = average_lags(run.timm_model, run.eval_model, probe, accelerator, width)
                        if lag:
                            _logger.warning(lag)
                    if args.save_margins:
                        write_margins(run, folder / 'margins.parquet', datasets, args)
                run.monitor.reset()
                run.recorded = run.num_updates
                save()
                if out_of_patience(run, args):
                    _logger.info(f'Ending after epoch {epoch}: {run.not_better} evaluations in a row were not better '
                                 f'than {args.eval_metric} {run.best_metric:.4g}')
                    break
    except Stopped:
        _logger.info(f'Stopping at update {run.num_updates}')
        save()
        accelerator.wait_for_everyone()  # a launcher ends the others as soon as the first one has ended
        accelerator.end_training()
        raise
    return metrics


def main(args: argparse.Namespace) -> dict[str, float]:
    """Trains; returns the last evaluation's metrics."""
    accelerator = setup_accelerator(
        device=args.device,
        amp=args.amp,
        amp_dtype=args.amp_dtype,
        dist_timeout=args.dist_timeout,
        sync_bn=args.sync_bn,
        trackers=[name for name in ('tensorboard', 'wandb') if getattr(args, f'log_{name}')],
        project_dir=args.output,
    )
    _logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    share_batch(args, accelerator.num_processes)
    args.workers = limit_workers(args.workers)
    torch.manual_seed(item_seed(args.seed, 'model'))  # equal initial weights on all processes

    with once_a_machine(accelerator):  # downloads and caches are written once
        sources = open_sources(args)
    num_classes = agree_on_classes(args, sources)
    choose_model(args, sources.train)
    model = build_model(args, num_outputs(args, num_classes))
    data_config = resolve_data(args, model)
    check_head(model, args, data_config.input_size)
    on_gpu = accelerator.device.type == 'cuda'
    if args.aug_device == 'cuda' and not on_gpu:
        raise UsageError(f'--aug-device cuda: the device is {accelerator.device}')
    datasets = build_datasets(args, sources, num_classes, data_config, on_gpu and args.aug_device in ('auto', 'cuda'))
    run = build_run(args, accelerator, model, datasets, num_classes)
    # The lock lasts as long as its file is open.
    folder, checkpoint, lock = open_run_folder(args, accelerator, data_config.input_size[1])

    if checkpoint is not None:
        resume(run, read_checkpoint(checkpoint), checkpoint, args)
        if not (folder / 'best').exists():  # a resume into another folder
            run.best_metric = None
        _logger.info(f'Resuming from {checkpoint} at update {run.num_updates}')
    if args.start_epoch is not None:
        run.num_updates = run.recorded = args.start_epoch * args.train_steps_per_epoch
    step_scheduler(run.scheduler, run.num_updates, args)
    # Stopped between an epoch's last update and the end of its evaluation, a run goes on with the evaluation.
    due = run.num_updates % args.train_steps_per_epoch == 0 and run.num_updates != run.recorded
    first_epoch = run.num_updates // args.train_steps_per_epoch - due
    if first_epoch >= args.epochs or (not due and out_of_patience(run, args)):
        metrics = finished_metrics(folder, checkpoint, args)
        accelerator.end_training()
        return metrics
    if accelerator.is_main_process:
        start_folder(folder, run, sources, datasets, args)
    if args.log_tensorboard or args.log_wandb:
        start_trackers(accelerator, folder, args)

    split = evaluation_name(args, sources.evaluation)
    describe(run, datasets, split, data_config, args)
    metrics = train_and_evaluate(run, folder, first_epoch, datasets, split, data_config, args)
    accelerator.end_training()
    return metrics


if __name__ == '__main__':
    setup_default_logging()
    catch_signals()
    result = run_program(lambda: main(_parse_args()), resume='. --resume auto goes on from the last checkpoint')
    if os.environ.get('RANK', '0') == '0':
        print(f'--result\n{json.dumps(result, indent=4)}')
