"""Any timm model, as a network that gives features and logits in one pass."""
import argparse
import copy
import difflib
import logging
import traceback
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.data import resolve_data_config
from timm.layers import ClassifierHead
from timm.models import get_pretrained_cfg, resolve_model_input_args
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import wide_resnet  # noqa: F401  registers wide_resnet28_2 and others with timm
from data import DataConfig, Feed
from methods import has_extra_class
from program import UsageError
from sources import ImageError, Source, known_facts

_logger = logging.getLogger('train')

SMALL_MODEL = 'wide_resnet28_2'  # the literature's, for images of up to SMALL_SIDE pixels and the sets it is tuned on
SMALL_SIDE = 64
PHOTO_MODEL, PHOTO_SIDE = 'resnet18', 128  # what one machine trains in hours, not days

# What a network raises that was made for images of another size, or has no head of timm's usual form.
MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


# --- Averages that fit the length of the run --------------------------------------------------------------------------

def newest_share(updates: int) -> float:
    """What the newest batch counts in a running average, as the default for a run of so many updates.

    An average whose newest value counts s looks back over 1/s updates. That has to be a small part of the run, or what
    is evaluated at its end is a network of long ago: here a hundredth. Published runs have 0.001 (1,000 of 2^20
    updates), which stands from 100,000 updates on. Nothing counts more than 0.1, or single batches would show.
    """
    return min(max(100 / updates, 0.001), 0.1)


def fit_to_length(args: argparse.Namespace) -> None:
    """Sets --stat-momentum and --model-ema-warmup where they are not given; for --bn-momentum see `build_model`.

    The warmup of the averaged weights follows the same rule: a decay d looks back over 1/(1-d) updates, and needs no
    warmup where that is at most a hundredth of the run.
    """
    updates = args.epochs * args.train_steps_per_epoch
    if args.stat_momentum is None:
        args.stat_momentum = 1 - newest_share(updates)
    if args.model_ema_warmup is None:
        args.model_ema_warmup = round(updates * (1 - args.model_ema_decay), 6) < 100


def fit_batch_norm(model: nn.Module, args: argparse.Namespace) -> None:
    """Sets the batch-norm momentum that is given, or a larger one than the model's own if the run is too short for it.

    `--bn-momentum` then has the value in force; it stays None where the model keeps its own.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    own = [module.momentum for module in norms if module.momentum is not None]
    share = newest_share(args.epochs * args.train_steps_per_epoch)
    if args.bn_momentum is None and own and min(own) < share:
        args.bn_momentum = share
    if args.bn_momentum is not None:
        for module in norms:
            module.momentum = args.bn_momentum


def describe_averages(model: nn.Module, args: argparse.Namespace) -> str:
    """The start-up line on what is averaged over the updates."""
    weights = 'the weights as they are (--no-model-ema)'
    if args.model_ema:
        warmup = ' growing from 0 (--model-ema-warmup)' if args.model_ema_warmup else ' from the first update on'
        weights = f'averaged weights, decay {args.model_ema_decay:g}{warmup}'
    momenta = sorted({norm.momentum for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.momentum})
    norm = f'; batch-norm momentum {" and ".join(f"{value:.3g}" for value in momenta)}' if momenta else ''
    statistics = ''
    if args.algorithm in ('softmatch', 'freematch'):
        statistics = f'; --stat-momentum {args.stat_momentum:.4g}'
    return f'{args.epochs * args.train_steps_per_epoch:,} updates; evaluated: {weights}{norm}{statistics}'


class Average(ModelEmaV3):
    """timm's average of parameters and floating buffers, as one multi-tensor operation; integer buffers are copied.

    A tensor with several names (tied weights, as in coat_*) moves once an update, where timm moves it once a name.
    """

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        both = zip(self.module.state_dict(keep_vars=True).values(), model.state_dict(keep_vars=True).values())
        moving, values = [], []
        for average, value in {id(average): (average, value) for average, value in both}.values():
            if average.is_floating_point():
                moving.append(average)
                values.append(value)
            else:
                average.copy_(value)
        self._foreach_lerp_(moving, values, weight=1. - decay)


def build_ema(model: nn.Module, args: argparse.Namespace) -> Average:
    return Average(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)


@torch.no_grad()
def average_lags(student: nn.Module, average: nn.Module, feed: Feed, accelerator: Accelerator) -> str:
    """A line to tell if the averaged network fits labeled images far worse than the one in training; else ''.

    Either the average or its batch-norm statistics then hold a network of long ago. The student is asked in training
    mode, so that its own statistics do not matter; they and all modes are as before afterwards. Far worse is a
    cross-entropy of more than twice the student's and half a nat, over all processes.
    """
    buffers = [(buffer, buffer.clone()) for buffer in student.buffers()]
    mode = student.training
    sums = torch.zeros(3, device=accelerator.device)
    for batch in feed:
        with accelerator.autocast():
            logits = [model(batch['image']).float() for model in (student.train(), average.eval())]
        losses = [F.cross_entropy(z, batch['target'], reduction='sum') for z in logits]
        sums += torch.stack([*losses, sums.new_full((), len(batch['target']))])
    student.train(mode)
    for buffer, value in buffers:
        buffer.copy_(value)
    total, total_average, count = accelerator.reduce(sums, 'sum').tolist()
    if not count or total_average / count <= 2 * total / count + 0.5:
        return ''
    return (f'the averaged weights, which are evaluated and saved, fit the labeled images far worse (cross-entropy '
            f'{total_average / count:.2f}) than the network in training ({total / count:.2f}): the average or the '
            'batch-norm statistics are still those of long ago. --model-ema-warmup, a lower --model-ema-decay, a '
            'larger --bn-momentum or more updates help')


# --- The network ------------------------------------------------------------------------------------------------------

class FeaturesAndLogits(nn.Module):
    """A timm model that returns its pre-logits features `[B, D]` beside its logits `[B, K]`, from one pass.

    The wrapper is what Accelerate prepares: DDP sees one forward call, and features need no second pass.

    Most classifiers are a layer on top of the features. Other heads (1x1 convolutions; two heads, which timm averages
    in training as in evaluation; a head for each of several branches) are run as timm does, and once more for the
    features alone, without a gradient: they are what the heads have in common, by timm's pre_logits.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        classifier = model.get_classifier()  # sequencer2d_* give the head with its pooling, a ClassifierHead
        self.split = isinstance(classifier, nn.Module) and not isinstance(
            classifier, (nn.Conv2d, nn.ModuleList, ClassifierHead))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self.model.forward_features(x)
        if self.split:
            features = self.model.forward_head(maps, pre_logits=True)
            return features, self.model.get_classifier()(features)
        logits = self.model.forward_head(maps)
        with torch.no_grad():
            return self.model.forward_head(maps, pre_logits=True), logits


def choose_model(args: argparse.Namespace, train: Source) -> None:
    """Sets --model, and for photographs --img-size, where --model is not given, and tells what was chosen."""
    if args.model is not None:
        return
    side = args.img_size or known_facts(args.dataset).get('img_size') or 0
    known = 'mean' in known_facts(args.dataset)
    why = f'as the images are to have {side} px' if args.img_size else f'as the images of {args.dataset} have {side} px'
    for index in range(0 if side else min(len(train), 10)):
        try:
            width, height = train.image(index).size
        except ImageError:
            continue  # whether bad images are an error is for the loaders to say
        side, why = max(width, height), f'as the first image has {width}x{height} px'
        break
    if 0 < side <= SMALL_SIDE or (known and side < 224):
        args.model = SMALL_MODEL
        _logger.info(f'--model is not given: {args.model}, {why}')
        return
    args.model, args.img_size = PHOTO_MODEL, args.img_size or PHOTO_SIDE
    advice = '' if args.pretrained or args.initial_checkpoint else \
        '; --pretrained would start from weights of ImageNet, which few labels need'
    _logger.info(f'--model is not given: {args.model} at {args.img_size} px (--img-size), {why}{advice}')


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


def reason_of(error: Exception) -> str:
    """What an error says, in one line; of one that says nothing, the line of code that it comes from."""
    text = ' '.join(str(error).split())
    if isinstance(error, KeyError) or not text:
        lines = traceback.extract_tb(error.__traceback__)
        own = [line for line in lines if not line.filename.startswith(str(Path(torch.__file__).parent))]
        line = (own or lines)[-1]  # torch's own last line says no more
        text = ' '.join([type(error).__name__, *([text] if text else []),
                         f'at `{line.line}` in {Path(line.filename).name}'])
    return text


def wanted_size(name: str) -> str:
    """The image size that a model was made for, in words."""
    config = get_pretrained_cfg(name) if ':' not in name else None
    if config is None:
        return 'see its configuration for the size that it wants'
    only = ', and takes no other' if config.fixed_input_size else ''
    least = f', at least {config.min_input_size[1]}' if config.min_input_size else ''
    return f'it was made for {config.input_size[1]} px{least}{only}'


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
    except FileNotFoundError as error:
        raise UsageError(f'--model {args.model}: {error}') from error
    except MISFITS as error:
        size = f' at --img-size {args.img_size} ({wanted_size(args.model)})' if args.img_size else ''
        raise UsageError(f'--model {args.model} cannot be built{size}: {reason_of(error)}') from error
    fit_batch_norm(model, args)
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AttributeError, AssertionError) as error:
            raise UsageError(f'--grad-checkpointing: {args.model} does not support it') from error
    return model


@torch.no_grad()
def check_head(model: nn.Module, args: argparse.Namespace, input_size: tuple[int, int, int]) -> None:
    """Tries the network on two images.

    Raises:
        UsageError: If it does not take images of this size, or if its features and logits cannot be had from one pass
            that is also timm's own; the line says which.
    """
    mode = model.training
    model.eval()
    x = torch.rand(2, *input_size, generator=torch.Generator().manual_seed(0))
    try:
        own = model(x)
    except MISFITS as error:
        raise UsageError(f'--model {args.model} does not take images of {"x".join(map(str, input_size))}; '
                         f'{wanted_size(args.model)} (--img-size): {reason_of(error)}') from error
    try:
        network = FeaturesAndLogits(model)
        features, logits = network(x)
    except MISFITS as error:
        raise UsageError(f'--model {args.model}: its head has no forward_features and forward_head(pre_logits=True) '
                         f'as timm\'s have: {reason_of(error)}') from error
    if has_extra_class(args) and not isinstance(model.get_classifier(), (nn.Linear, nn.Conv2d)):
        raise UsageError(f'--model {args.model}: an extra class (marginmatch, --aum-threshold-samples) needs a head '
                         f'that is one linear layer, and this one\'s is {type(model.get_classifier()).__name__}')
    if features.ndim != 2 or logits.shape != own.shape or not torch.allclose(logits, own, atol=1e-4):
        raise UsageError(f'--model {args.model}: its head is no layer on top of its pre-logits features, which are '
                         f'{list(features.shape)} for two images')
    if args.drop and network.split:
        # A few heads drop out behind the pre-logits, which the split head would leave out without a word.
        trial = copy.deepcopy(model).train()  # a copy, since its statistics move
        maps = trial.forward_features(x)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            whole = trial.forward_head(maps)
            torch.manual_seed(0)
            split = trial.get_classifier()(trial.forward_head(maps, pre_logits=True))
        if not torch.allclose(whole, split, atol=1e-4):
            raise UsageError(f'--drop {args.drop}: {args.model} drops out behind its pre-logits features')
    if not network.split and moves_twice(model, x):
        raise UsageError(f'--model {args.model}: its head has batch-norm before its pre-logits features, whose '
                         'statistics would move twice a step')
    model.train(mode)


def moves_twice(model: nn.Module, x: torch.Tensor) -> bool:
    """Whether the features of a head that is run twice move running statistics that timm's own pass moves once."""
    trial = copy.deepcopy(model).train()
    with torch.random.fork_rng(devices=[]):
        maps = trial.forward_features(x)
        before = [buffer.clone() for buffer in trial.buffers()]
        trial.forward_head(maps, pre_logits=True)
    return not all(map(torch.equal, before, trial.buffers()))
