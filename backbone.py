"""Any timm model: as a network that gives features and logits in one pass, and as it is loaded for evaluation."""
import argparse
import copy
import difflib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from timm.data import create_transform, resolve_input_data_config
from timm.models import group_parameters, load_checkpoint, load_state_dict, resolve_model_input_args
from torch import nn
from torchvision import transforms

import wide_resnet  # noqa: F401  registers wide_resnet28_2 and others with timm
from data import DataConfig, Feed
from methods import has_extra_class
from program import RunError, UsageError
from scaling import DOMINANT
from views import bound_memory

_logger = logging.getLogger('train')


class FeaturesAndLogits(nn.Module):
    """A timm model that returns its pre-logits features `[B, D]` beside its logits `[B, K]`, from one pass.

    The wrapper is what Accelerate prepares: DDP sees one forward call, and features need no second pass.

    Args:
        model: The timm model.
        frozen: Batch-norms of the model, as `freeze` returns them, that stay in evaluation mode.
    """

    def __init__(self, model: nn.Module, frozen: tuple[nn.Module, ...] = ()):
        super().__init__()
        self.model, self.frozen = model, frozen

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.model.forward_head(self.model.forward_features(x), pre_logits=True)
        return features, self.model.get_classifier()(features)


def build_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """timm model; one of a fixed image size is built for --img-size."""
    if ':' not in args.model and not timm.is_model(args.model):
        close = difflib.get_close_matches(args.model, timm.list_models(), 3)
        raise UsageError(f'--model {args.model}: timm has no such model; close are {", ".join(close) or "none"}')
    if args.initial_checkpoint and not Path(args.initial_checkpoint).is_file():
        raise UsageError(f'--initial-checkpoint {args.initial_checkpoint}: no such file')
    weights, overlay = read_pretrained(args.pretrained_path) if args.pretrained_path else (None, {})

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
            checkpoint_path=args.initial_checkpoint,
            **args.model_kwargs,
        ))

    try:
        model = create(weights)
        if weights is not None:
            with torch.random.fork_rng(devices=[]), quiet_timm():
                nowhere = create({name: torch.full_like(v, torch.nan) if v.is_floating_point() else v
                                  for name, v in weights.items()})
            check_loaded(model, nowhere, args)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, FileNotFoundError) as error:
        where = f'--pretrained-path {args.pretrained_path}: ' if weights is not None else ''
        raise UsageError(f'{where}--model {args.model}: {" ".join(str(error).split())[:500]}') from error
    if args.head_init_scale is not None:
        with torch.no_grad():
            for parameter in model.get_classifier().parameters():
                parameter.mul_(args.head_init_scale)
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


def read_pretrained(path: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights of a file or of a checkpoint folder, and what they change in timm's configuration of the model.

    The head is always a new one, as in timm's train.py: as many classes need not be the same classes. A folder's
    config.json says how the images of its weights were normalised.

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
            raise UsageError(f'--pretrained-path {path}: no {" or ".join(names)} in it'
                             + (f'; give {inside}' if inside else ''))
    if not file.is_file():
        raise UsageError(f'--pretrained-path {path}: no such file or folder')
    if file.name.startswith('checkpoint-') and file.suffix == '.safetensors':
        raise UsageError(f'--pretrained-path {path}: this is a state to resume from; weights are in best/ and last/')
    try:
        config = file.parent / 'config.json'
        if config.is_file():
            known = json.loads(config.read_text()).get('pretrained_cfg', {})
            keys = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
            overlay.update((key, known[key]) for key in keys if key in known)
        weights = load_state_dict(str(file), weights_only=True)
    except Exception as error:  # zip, pickle, safetensors and json have their own ways to complain
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise UsageError(f'--pretrained-path {path}: no weights can be read from it safely ({reason[:300]})') from error
    weights = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    if not weights:
        raise UsageError(f'--pretrained-path {path}: no weights in it')
    return weights, overlay


@contextmanager
def quiet_timm():
    """timm says a second time what it found in the weights that are loaded twice; once is enough."""
    logger = logging.getLogger('timm')
    level = logger.level
    logger.setLevel(logging.ERROR)
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


# --- Evaluation -------------------------------------------------------------------------------------------------------

# Of the command line and, for weights without a config.json, of a run's args.yaml: which model and images of what kind.
MODEL_KEYS = ('in_chans', 'num_classes', 'model_kwargs', 'img_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean',
              'std')


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
                       choices=['nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos'])
    group.add_argument('--mean', type=float, nargs='+', metavar='X', default=None, help='channel means')
    group.add_argument('--std', type=float, nargs='+', metavar='X', default=None, help='channel standard deviations')
    group.add_argument('--use-train-size', action=flag, default=False,
                       help='timm\'s training size where a pretrained model has a larger one for evaluation')


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
    group.add_argument('-j', '--workers', type=int, metavar='N', default=4,
                       help='loading processes, per process (default: 4)')
    group.add_argument('--pin-mem', action=flag, default=False, help='pin memory for faster copies to a GPU')


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
    try:
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
