"""What passes through the network in a step: the views of its images, and what methods of consistency make of them."""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn


class Outputs(NamedTuple):
    """What the network says about the images of a step; all but the labeled and the strong logits are detached."""
    features: torch.Tensor  # [B, D] of the labeled images
    logits: torch.Tensor  # [B, K] float32
    weak_features: torch.Tensor  # [U, D]
    weak_logits: torch.Tensor  # [U, K] float32
    strong_logits: torch.Tensor  # [U, K] float32
    labeled_strong_logits: torch.Tensor | None = None  # [B, K] float32, where labeled images have a strong view


def pass_joined(network: nn.Module, images: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Features and float32 logits of each kind of images, by name, from one pass over all of them."""
    sizes = [len(part) for part in images.values()]
    features, logits = network(torch.cat([*images.values()]))
    return dict(zip(images, zip(features.split(sizes), logits.float().split(sizes))))


def forward_views(
        model: nn.Module,
        labeled: dict,
        unlabeled: dict,
        weak_forward: str = 'joint',
        average: nn.Module | None = None,
        train: bool = True,
) -> Outputs:
    """One pass over labeled, weak and strong images, or with 'no-grad' one for the weak ones and one for the rest.

    Without strong images the weak ones take their place, in the one pass and with their gradient (Pseudo-Label).

    Args:
        model: Returns features and logits.
        labeled: image `[B, C, S, S]`, and strong where labeled images have such a view.
        unlabeled: weak and strong `[U, C, S, S]`.
        weak_forward: See above.
        average: Takes the weak images in place of the model: Mean Teacher's teacher.
        train: False for images that are only looked at: no graph is kept, and no running statistics move.
    """
    images = dict(image=labeled['image'])
    if train and 'strong' in labeled:
        images['labeled_strong'] = labeled['strong']
    images['weak'] = unlabeled['weak']
    if 'strong' in unlabeled:
        images['strong'] = unlabeled['strong']
    if not train:
        with torch.no_grad(), still_statistics(model):
            seen = pass_joined(model, images)
    elif average is not None or (weak_forward == 'no-grad' and 'strong' in images):
        with torch.no_grad():
            seen = pass_joined(model if average is None else average, dict(weak=images.pop('weak')))
        seen.update(pass_joined(model, images))
    else:
        seen = pass_joined(model, images)
    (features, logits), (weak_features, weak_logits) = seen['image'], seen['weak']
    return Outputs(
        features.detach(),
        logits,
        weak_features.detach(),
        weak_logits.detach(),
        seen.get('strong', seen['weak'])[1],
        seen['labeled_strong'][1] if 'labeled_strong' in seen else None,
    )


@contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Within it no running batch-norm statistics move; batches are still normalised by their own."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
