"""Any timm model, as a network that gives features and logits in one pass."""
import argparse
import copy
import difflib
from pathlib import Path

import timm
import torch
from timm.models import resolve_model_input_args
from torch import nn

import wide_resnet  # noqa: F401  registers wide_resnet28_2 and others with timm
from methods import has_extra_class
from program import UsageError


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
