"""Any timm model: as a network that gives features and logits in one pass, and as it is loaded for evaluation."""
import argparse
import copy
import difflib
import json
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from timm.data import create_transform, resolve_data_config, resolve_input_data_config
from timm.layers import ClassifierHead
from timm.models import (
    get_pretrained_cfg,
    group_parameters,
    load_checkpoint,
    load_state_dict,
    resolve_model_input_args,
)
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import transforms

import wide_resnet  # noqa: F401  registers wide_resnet28_2 and others with timm
from data import DataConfig, Feed
from methods import num_outputs
from program import ArgumentParser, ParseKwargs, RunError, UsageError
from scaling import DOMINANT
from schedule import needs_warmup, newest_share
from sources import ImageError, Source, known_facts
from views import INTERPOLATIONS, bound_memory

_logger = logging.getLogger('train')

SMALL_MODEL = 'wide_resnet28_2'  # the literature's, for images of up to SMALL_SIDE pixels and the sets it is tuned on
SMALL_SIDE = 64
PHOTO_MODEL, PHOTO_SIDE = 'resnet18', 128  # what one machine trains in hours, not days

# What a network raises that was made for images of another size, or has no head of timm's usual form.
MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


# --- Averages that fit the length of the run --------------------------------------------------------------------------

def fit_to_length(args: argparse.Namespace) -> None:
    """Sets --stat-momentum and --model-ema-warmup where they are not given; for --bn-momentum see `build_model`.

    The warmup of the averaged weights follows the same rule: a decay d looks back over 1/(1-d) updates, and needs no
    warmup where that is at most a hundredth of the run.
    """
    updates = args.epochs * args.train_steps_per_epoch
    if args.stat_momentum is None:
        args.stat_momentum = 1 - newest_share(updates)
    if args.model_ema_warmup is None:
        args.model_ema_warmup = needs_warmup(updates, args.model_ema_decay)


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
    if args.algorithm in ('softmatch', 'freematch', 'adamatch', 'remixmatch'):
        statistics = f'; --stat-momentum {args.stat_momentum:.4g}'
    if args.algorithm == 'freematch' and args.freematch_max_threshold < 1:
        statistics += f', thresholds of at most {args.freematch_max_threshold:g} (--freematch-max-threshold)'
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
    """The average. As timm's it starts from the weights after the first update; USB's starts from the initial ones."""
    return Average(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)


@torch.no_grad()
def average_lags(
        student: nn.Module,
        average: nn.Module,
        feed: Feed,
        accelerator: Accelerator,
        width: int | None = None,
) -> str:
    """A line to tell if the averaged network fits labeled images far worse than the one in training; else ''.

    Either the average or its batch-norm statistics then hold a network of long ago. The student is asked in training
    mode, so that its own statistics do not matter; they and all modes are as before afterwards. Far worse is a
    cross-entropy of more than twice the student's and half a nat, over all processes and the first `width` outputs.
    """
    buffers = [(buffer, buffer.clone()) for buffer in student.buffers()]
    mode = student.training
    sums = torch.zeros(3, device=accelerator.device)
    for batch in feed:
        with accelerator.autocast():
            logits = [model(batch['image'])[:, :width].float() for model in (student.train(), average.eval())]
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


@torch.no_grad()
def share_batch_norm(model: nn.Module, accelerator: Accelerator, how: str) -> None:
    """Makes the running batch-norm statistics the same on all processes, in one collective.

    Done after every update, so that the averaged weights, an evaluation and a checkpoint are those of all processes.
    """
    # Frozen ones are in evaluation mode. A mean over processes could change their last digits.
    buffers = [buffer for module in model.modules() if module.training
               for name, buffer in module.named_buffers(recurse=False) if name in ('running_mean', 'running_var')]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    flat = accelerator.reduce(flat, 'mean') if how == 'reduce' else broadcast(flat)
    for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers])):
        buffer.copy_(part.view_as(buffer))


# --- The network ------------------------------------------------------------------------------------------------------

class FeaturesAndLogits(nn.Module):
    """A timm model that returns its pre-logits features `[B, D]` beside its logits `[B, K]`, from one pass.

    The wrapper is what Accelerate prepares: DDP sees one forward call, and features need no second pass.

    Most classifiers are a layer on top of the features. Other heads (1x1 convolutions; two heads, which timm averages
    in training as in evaluation; a head for each of several branches) are run as timm does, and once more for the
    features alone, without a gradient: they are what the heads have in common, by timm's pre_logits.
    Args:
        model: The timm model.
        frozen: Batch-norms of the model, as `freeze` returns them, that stay in evaluation mode.
    """

    def __init__(self, model: nn.Module, frozen: tuple[nn.Module, ...] = ()):
        super().__init__()
        self.model, self.frozen = model, frozen
        classifier = model.get_classifier()  # sequencer2d_* give the head with its pooling, a ClassifierHead
        self.split = isinstance(classifier, nn.Module) and not isinstance(
            classifier, (nn.Conv2d, nn.ModuleList, ClassifierHead))

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

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
    """The image size that a model was made for, in words; most models of a fixed size can be built for others."""
    config = get_pretrained_cfg(name) if ':' not in name else None
    if config is None:
        return 'see its configuration for the size that it wants'
    least = f', at least {config.min_input_size[1]}' if config.min_input_size else ''
    return f'it was made for {config.input_size[1]} px{least}'


def hub_away() -> str:
    """Why the hub of timm's weights cannot be reached, in a few words; then its cache on this machine is taken alone.

    Empty if the hub answers, whatever it says. One request of five seconds at the most finds out: the client itself
    would try for more than a minute before it gives up.
    """
    try:
        get_hf_file_metadata(hf_hub_url('timm/resnet18.a1_in1k', 'config.json'), timeout=5)
    except HfHubHTTPError:
        return ''
    except OfflineModeIsEnabled:
        return 'HF_HUB_OFFLINE is set'
    except Exception as error:  # of the HTTP library, which is another one from version to version of the client
        constants.HF_HUB_OFFLINE = True
        return ' '.join(str(error).split()) or type(error).__name__
    return ''


def tell_away(name: str, away: str) -> str:
    return (f'the pretrained weights of {name} are not in the cache of this machine ({constants.HF_HUB_CACHE}), and '
            f'{constants.ENDPOINT} cannot be reached to fetch them ({away})')


def check_model_arguments(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with status 2 where no network can be built so, or what is asked of its weights excludes itself."""
    check_image_arguments(parser, args)
    parser.at_least(args, num_classes=1, head_init_scale=0)
    parser.shares(args, 'bn_momentum')
    parser.shares(args, 'drop', 'drop_path', below=True)
    if args.pretrained_path and args.initial_checkpoint:
        parser.error('--pretrained-path, --initial-checkpoint: the second would overwrite the first; give one')
    if args.head_init_scale is not None and args.initial_checkpoint:
        parser.error('--head-init-scale: the head of --initial-checkpoint is no new one; give one of them')
    if args.freeze is not None and not (args.pretrained or args.initial_checkpoint):
        parser.error('--freeze: the frozen part would keep random weights; add --pretrained, --pretrained-path or '
                     '--initial-checkpoint')


def build_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """timm model; one of a fixed image size is built for --img-size."""
    if ':' not in args.model and not timm.is_model(args.model):
        close = difflib.get_close_matches(args.model, timm.list_models(), 3)
        raise UsageError(f'--model {args.model}: timm has no such model; close are {", ".join(close) or "none"}')
    weights = initial = None
    if args.pretrained_path:
        weights, overlay = read_pretrained('--pretrained-path', args.pretrained_path)
    if args.initial_checkpoint and not args.initial_checkpoint.endswith(('.npz', '.npy')):  # models read these
        initial, _ = read_pretrained('--initial-checkpoint', args.initial_checkpoint)

    def create(weights):
        return timm.create_model(**resolve_model_input_args(
            args.model,
            dict(img_size=args.img_size, in_chans=args.in_chans),
            pretrained=args.pretrained,
            # timm takes what it needs out of the dict.
            pretrained_cfg_overlay=None if weights is None else dict(overlay, state_dict=dict(weights)),
            num_classes=num_classes,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            checkpoint_path=args.initial_checkpoint if initial is None else None,
            **args.model_kwargs,
        ))

    away = hub_away() if args.pretrained and weights is None and not args.model.startswith('local-dir:') else ''
    try:
        with quiet_timm(logging.WARNING) if weights is not None else nullcontext():  # check_loaded tells the rest
            model = create(weights)
        if weights is not None:
            with torch.random.fork_rng(devices=[]), quiet_timm():
                nowhere = create({name: torch.full_like(v, torch.nan) if v.is_floating_point() else v
                                  for name, v in weights.items()})
            check_loaded(model, nowhere, args)
    except LocalEntryNotFoundError as error:
        raise UsageError(f'--pretrained: {tell_away(args.model, away or "it broke off")}; fetch them where it can, or '
                         'give a file of them as --pretrained-path') from error
    except FileNotFoundError as error:
        raise UsageError(f'--model {args.model}: {error}') from error
    except MISFITS as error:
        size = f' at --img-size {args.img_size} ({wanted_size(args.model)})' if args.img_size else ''
        where = f'--pretrained-path {args.pretrained_path}: ' if weights is not None else ''
        raise UsageError(f'{where}--model {args.model} cannot be built{size}: {reason_of(error)[:500]}') from error
    if initial is not None:
        load_initial(model, initial, args)
    if args.head_init_scale is not None:
        with torch.no_grad():
            for parameter in model.get_classifier().parameters():
                parameter.mul_(args.head_init_scale)
    fit_batch_norm(model, args)
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AttributeError, AssertionError) as error:
            raise UsageError(f'--grad-checkpointing: {args.model} does not support it') from error
    return model


def read_pretrained(flag: str, path: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights of a file or of a checkpoint folder, and what they change in timm's configuration of the model.

    The head of --pretrained-path is always a new one, as in timm's train.py: as many classes need not be the same
    classes. A folder's config.json says how the images of its weights were normalised.

    Raises:
        UsageError: If there are none, or reading them would execute what is in the file.
    """
    folder, file = Path(path), Path(path)
    overlay = dict(source='', num_classes=-1, custom_load=False)
    if folder.is_dir():
        names = ('model.safetensors', 'pytorch_model.bin')
        file = next((folder / name for name in names if (folder / name).is_file()), None)
        if file is None:
            inside = ' or '.join(str(folder / name) for name in ('best', 'last') if (folder / name).is_dir())
            raise UsageError(f'{flag} {path}: no {" or ".join(names)} in it'
                             + (f'; give {inside}' if inside else ''))
    if not file.is_file():
        raise UsageError(f'{flag} {path}: no such file or folder')
    if file.name.startswith('checkpoint-') and file.suffix == '.safetensors':
        raise UsageError(f'{flag} {path}: this is a state to resume from; weights are in best/ and last/')
    try:
        config = file.parent / 'config.json'
        if config.is_file():
            known = json.loads(config.read_text()).get('pretrained_cfg', {})
            keys = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
            overlay.update((key, known[key]) for key in keys if key in known)
        with quiet_timm(logging.WARNING):
            weights = load_state_dict(str(file), weights_only=True)
    except Exception as error:  # zip, pickle, safetensors and json have their own ways to complain
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise UsageError(f'{flag} {path}: no weights can be read from it safely ({reason[:300]})') from error
    weights = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    if not weights:
        raise UsageError(f'{flag} {path}: no weights in it')
    return weights, overlay


def load_initial(model: nn.Module, weights: dict[str, torch.Tensor], args: argparse.Namespace) -> None:
    """Puts the weights of --initial-checkpoint into a model; raises UsageError if they do not fit it, head and all."""
    own, told = model.state_dict(), f'--initial-checkpoint {args.initial_checkpoint}'
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        for some, others, what in ((own, weights, f'tensors of {args.model} are not in it'),
                                   (weights, own, f'tensors in it are none of {args.model}')):
            names = [name for name in some if name not in others]
            if names:
                raise UsageError(f'{told}: {len(names)} of {len(some)} {what}, such as {", ".join(names[:3])}: is it '
                                 'of another model?') from error
        name = next(name for name in own if own[name].shape != weights[name].shape)
        raise UsageError(f'{told}: {name} is {list(weights[name].shape)} in it, and {list(own[name].shape)} in '
                         f'{args.model} with the {model.num_classes} outputs of this run; --pretrained-path takes all '
                         'but the head') from error


@contextmanager
def quiet_timm(least: int = logging.ERROR):
    """Keeps timm from saying what is told here, or a second time what it found in weights that are loaded twice."""
    logger = logging.getLogger('timm')
    level = logger.level
    logger.setLevel(least)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_loaded(model: nn.Module, nowhere: nn.Module, args: argparse.Namespace) -> None:
    """Tells what was not in the pretrained weights, beside the head; raises UsageError if most of the model was not.

    Args:
        model: With the weights.
        nowhere: The same model, loaded the same way from weights that are NaN, whatever timm did to them on the way:
            what is not NaN in it was not in the file.
    """
    head = {id(parameter) for parameter in nowhere.get_classifier().parameters()}
    body = {name: p for name, p in nowhere.named_parameters() if id(p) not in head}
    missing = [name for name, parameter in body.items() if not parameter.isnan().any()]
    told = f'{len(missing)} of {len(body)} tensors of {args.model} are not in it, such as {", ".join(missing[:3])}'
    if 2 * len(missing) > len(body):
        raise UsageError(f'--pretrained-path {args.pretrained_path}: {told}: is it of another model?')
    if missing:
        _logger.warning(f'--pretrained-path {args.pretrained_path}: {told}: they start at random')
    _logger.info(f'--pretrained-path {args.pretrained_path}: {len(body) - len(missing)} tensors are in it; the head of '
                 f'{model.num_classes} outputs is new')


def stages(text: str) -> str | int:
    """What --freeze takes."""
    if text != 'backbone' and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f'{text}: expected a number of stages from 1 on, or nothing')
    return text if text == 'backbone' else int(text)


def freeze(model: nn.Module, what: str | int) -> tuple[nn.Module, ...]:
    """Keeps a part of a model as it is: its parameters need no gradient, its batch-norms are for evaluation mode only.

    timm's own helper puts other modules in the place of batch-norms, without a counter, so that timm would not load the
    weights afterwards. And it takes modules only, where a model's first parameters may lie outside of them.

    Args:
        model: Changed in place.
        what: 'backbone' for all but the classifier, or a number of stages, counted from the input as the model groups
            them itself (`group_matcher(coarse=True)`): the stem is the first.

    Returns:
        The batch-norms of the part.

    Raises:
        UsageError: If the model has no such part, or nothing else would be left to train.
    """
    head = {id(parameter) for parameter in model.get_classifier().parameters()}
    parameters = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in head}
    told = 'all but the classifier'
    if what != 'backbone':
        if not hasattr(model, 'group_matcher'):
            raise UsageError(f'--freeze {what}: this model does not say what its stages are; --freeze takes all of it')
        stage = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
        last = max(stage.values())  # the head, and what belongs to no stage
        if not 1 <= what <= last:
            raise UsageError(f'--freeze {what}: this model has {last} stages before its head; expected 1 to {last}')
        parameters = {name: parameter for name, parameter in parameters.items() if stage[name] < what}
        told = f'{what} of {last} stages'
    for parameter in parameters.values():
        parameter.requires_grad_(False)

    def is_frozen(path):
        """Whether a module's parameters are; one that has none goes with the module around it."""
        own = list(model.get_submodule(path).parameters())
        return not any(p.requires_grad for p in own) if own else is_frozen(path.rpartition('.')[0])

    norms = tuple(module for path, module in model.named_modules()
                  if isinstance(module, nn.modules.batchnorm._BatchNorm) and is_frozen(path))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in parameters.values())
    if not trained:
        raise UsageError(f'--freeze {what}: no parameter is left to train')
    _logger.info(f'Frozen: {told}, {frozen:,} parameters and the statistics of {len(norms)} batch-norms; {trained:,} '
                 'parameters are trained')
    return norms


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
    if num_outputs(args, 0) and not isinstance(model.get_classifier(), (nn.Linear, nn.Conv2d)):
        raise UsageError(f'--model {args.model}: an extra class (marginmatch, --aum-threshold-samples) and the turns '
                         'of remixmatch need a head that is one linear layer, and this one\'s is '
                         f'{type(model.get_classifier()).__name__}')
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


# --- Evaluation -------------------------------------------------------------------------------------------------------

# Of the command line and, for weights without a config.json, of a run's args.yaml: which model and images of what kind.
MODEL_KEYS = ('in_chans', 'num_classes', 'model_kwargs', 'img_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean',
              'std')


def add_weights_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags of a program that evaluates, on what the weights of its --checkpoint belong to."""
    flag = argparse.BooleanOptionalAction
    group.add_argument('-m', '--model', metavar='NAME', default=None,
                       help='timm model of a weight file (default: that of the args.yaml beside it), or with '
                            '--pretrained the model itself')
    group.add_argument('--pretrained', action=flag, default=False, help='timm\'s pretrained weights of --model')
    group.add_argument('--use-ema', action=flag, default=False,
                       help='the averaged weights in a weight file (folders of train_ssl.py hold nothing else)')
    group.add_argument('--model-kwargs', nargs='*', action=ParseKwargs, default=None, metavar='K=V',
                       help='further arguments of the model\'s constructor')


def check_weights_arguments(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with status 2 unless these flags and --checkpoint name weights, and images can be made ready so."""
    check_image_arguments(parser, args)
    if not args.checkpoint and not args.model:
        parser.error('give --checkpoint RUN/best, or --model NAME --pretrained')
    if args.model and not args.checkpoint and not args.pretrained:
        parser.error(f'--model {args.model}: its weights are random; add --pretrained or --checkpoint FILE')


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of MODEL_KEYS that say how images are made ready."""
    flag = argparse.BooleanOptionalAction
    group = parser.add_argument_group('Images', 'What is not given is taken from the config.json of the weights, or '
                                                'from timm\'s of a model.')
    group.add_argument('--img-size', type=int, metavar='N', default=None, help='image side in pixels')
    group.add_argument('--in-chans', type=int, metavar='N', default=None, help='image channels, 3 or 1')
    group.add_argument('--crop-pct', type=float, metavar='X', default=None, help='share that the crop keeps')
    group.add_argument('--crop-mode', default=None, choices=['center', 'squash', 'border'], help='timm\'s crop mode')
    group.add_argument('--interpolation', default=None, help='of the resizing',
                       choices=INTERPOLATIONS)
    group.add_argument('--mean', type=float, nargs='+', metavar='X', default=None, help='channel means')
    group.add_argument('--std', type=float, nargs='+', metavar='X', default=None, help='channel standard deviations')
    group.add_argument('--use-train-size', action=flag, default=False,
                       help='timm\'s training size where a pretrained model has a larger one for evaluation')


def check_image_arguments(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with status 2 where no image can be made ready so; means and deviations are of pixels in [0, 1]."""
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        parser.error(f'--crop-pct {args.crop_pct}: expected a number above 0 and up to 1')
    parser.at_least(args, img_size=1)
    parser.shares(args, 'mean', 'std')
    parser.above_zero(args, 'std')


def add_pin_memory_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--pin-mem', action=argparse.BooleanOptionalAction, default=None,
                       help='load into pinned memory, which is copied to a GPU without a wait (default: where there is '
                            'one; timm\'s is no)')


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a program that evaluates, on what and how fast."""
    flag = argparse.BooleanOptionalAction
    group = parser.add_argument_group('Device and loading')
    group.add_argument('--device', default=None, choices=['cpu', 'cuda', 'mps'],
                       help='default: what Accelerate finds. cpu is obeyed; the others must be what it finds')
    group.add_argument('--amp', action=flag, default=None,
                       help='mixed precision (default: as the run had it, else float32; --no-amp: float32)')
    group.add_argument('--amp-dtype', default=None, choices=['float16', 'bfloat16'],
                       help='of --amp (default: the run\'s, else bfloat16; timm\'s is float16)')
    group.add_argument('--channels-last', action=flag, default=False, help='channels-last memory layout')
    group.add_argument('-b', '--batch-size', type=int, metavar='N', default=256, help='per process (default: 256)')
    group.add_argument('-j', '--workers', type=int, metavar='N', default=None,
                       help='loading processes, per process, no more than there are processors (default: 4 at most)')
    add_pin_memory_argument(group)


def agree_on_precision(args: argparse.Namespace, names: list[str], runs: list[dict]) -> None:
    """Sets --amp and --amp-dtype to what the runs had where they are not given.

    Raises:
        UsageError: If the runs differ.
    """
    had = [(True, run.get('amp_dtype') or 'bfloat16') if run.get('amp') else (False, 'bfloat16') for run in runs]
    if args.amp is None:
        for name, other in zip(names, had):
            if other[0] != had[0][0] or (args.amp_dtype is None and other != had[0]):
                raise UsageError(f'{names[0]} was trained with {told_precision(*had[0])} and {name} with '
                                 f'{told_precision(*other)}: checkpoints are compared at one precision, so give --amp '
                                 'or --no-amp')
        args.amp = had[0][0]
    args.amp_dtype = args.amp_dtype or had[0][1]


def told_precision(amp: bool, amp_dtype: str) -> str:
    return f'--amp, {amp_dtype}' if amp else 'float32'


def load_model(args: argparse.Namespace, checkpoint: Path | None, run: dict) -> tuple[nn.Module, DataConfig, Callable]:
    """The model, its data configuration, and its evaluation transform (PIL RGB -> uint8 `[C, H, W]`).

    Raises:
        UsageError: If the weights or the model cannot be had, or do not take such images.
    """
    asked = {}
    if checkpoint is None:
        source = name = args.model
    elif checkpoint.is_dir():
        source, name = str(checkpoint), f'local-dir:{checkpoint}'
    else:
        source, name = str(checkpoint), args.model or run.get('model')
        asked = {key: run[key] for key in MODEL_KEYS if run.get(key) is not None}
        if not name:
            raise UsageError(f'--checkpoint {checkpoint}: no args.yaml beside it says what model it is; give --model')
    asked.update((key, getattr(args, key)) for key in MODEL_KEYS if getattr(args, key) is not None)
    is_file = checkpoint is not None and checkpoint.is_file()
    away = hub_away() if checkpoint is None and not name.startswith('local-dir:') else ''
    try:
        with nullcontext() if checkpoint is None else quiet_timm(logging.WARNING):
            model = timm.create_model(**resolve_model_input_args(
                name,
                asked,
                pretrained=not is_file,
                # Elsewhere another number than the weights' would give a random head without a word.
                num_classes=asked.get('num_classes') if is_file else None,
                **asked.get('model_kwargs', {}),
            ))
        if is_file:
            load_checkpoint(model, str(checkpoint), use_ema=args.use_ema)
        config = resolve_input_data_config(model, asked, use_test_size=not args.use_train_size)
    except LocalEntryNotFoundError as error:
        raise UsageError(f'--pretrained: {tell_away(name, away or "it broke off")}') from error
    except Exception as error:  # the hub, pickle, safetensors and each model have their own ways to complain
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise UsageError(f'{source}: {reason[:500]}') from error
    if args.num_classes not in (None, model.num_classes):
        raise UsageError(f'--num-classes {args.num_classes}: {source} has {model.num_classes}')
    channels = config['input_size'][0]
    if channels not in (1, 3):
        raise UsageError(f'{source} takes images of {channels} channels; expected 3 or 1')
    # The last step makes a tensor; greyscale has to come before it.
    *steps, to_tensor = create_transform(
        config['input_size'],
        interpolation=config['interpolation'],
        crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'],
        mean=config['mean'],
        normalize=False,
    ).transforms
    view = transforms.Compose([*bound_memory(steps), *([transforms.Grayscale()] if channels == 1 else []), to_tensor])
    config = DataConfig(**{key: config[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')})
    return model, config, view


def class_names_of(model: nn.Module) -> list[str] | None:
    """Names of a model's classes, as timm keeps them with weights; None if they are not known."""
    names = model.pretrained_cfg.get('label_names')
    if isinstance(names, dict):  # of some classes; those of a run are the first ones
        number = {int(key): name for key, name in names.items()}
        names = [number[k] for k in range(len(number))] if set(number) == set(range(len(number))) else None
    return list(names) if names else None


@torch.no_grad()
def check_model(model: nn.Module, config: DataConfig, accelerator: Accelerator, name: str) -> None:
    """Raises UsageError unless the model turns such an image into logits."""
    try:
        with accelerator.autocast():
            shape = model(torch.zeros(1, *config.input_size, device=accelerator.device)).shape
    except (RuntimeError, AssertionError, ValueError, AttributeError) as error:
        raise UsageError(f'{name} does not take images of {"x".join(map(str, config.input_size))}: '
                         f'{" ".join(str(error).split())[:300]}') from error
    if tuple(shape) != (1, model.num_classes) or not model.num_classes:
        raise UsageError(f'{name} gives {list(shape)} for an image; expected logits of its {model.num_classes} classes')


@torch.no_grad()
def evaluate_batches(
        model: nn.Module,
        loader: Iterable,
        size: int,
        config: DataConfig,
        accelerator: Accelerator,
        channels_last: bool,
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Batches of a loader, as `Feed` gives them, and the model's logits `[B, K]` float32 of their images.

    A kernel may depend on the size of a batch, in the last digit of its results. So each batch is filled up to `size`,
    and results do not depend on where a process's part ends. A `partner` in the batch is mixed into its image, for
    pseudo-calibration.

    Raises:
        RunError: If an image cannot be decoded, or the device's memory is too small.
    """
    for batch in Feed(loader, config, accelerator.device, channels_last):
        image = batch['image']
        if 'partner' in batch:
            image = DOMINANT * image + (1 - DOMINANT) * batch['partner']
        filled = torch.cat([image, image[-1:].expand(size - len(image), -1, -1, -1)]) if len(image) < size else image
        try:
            with accelerator.autocast():
                logits = model(filled)[:len(image)].float()
        except torch.OutOfMemoryError as error:
            raise RunError(f'out of memory with --batch-size {size}; give a smaller one') from error
        yield batch, logits
