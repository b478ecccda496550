"""Any timm model, as a network that gives features and logits in one pass."""
import argparse
import copy
import difflib
import json
import logging
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from timm.models import group_parameters, load_state_dict, resolve_model_input_args
from torch import nn

import wide_resnet  # noqa: F401  registers wide_resnet28_2 and others with timm
from methods import has_extra_class
from program import UsageError

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
