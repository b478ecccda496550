"""What passes through the network in a step: the views of its images, and what methods of consistency make of them."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

TRIAL = 1.  # length of VAT's trial step; of the paper's 1e-6, float32 pixels of order 1 would keep next to nothing


class Outputs(NamedTuple):
    """What the network says about the images of a step; all but the labeled and the strong logits are detached."""
    features: torch.Tensor  # [B, D] of the labeled images
    logits: torch.Tensor  # [B, K] float32, without the network's further outputs
    weak_features: torch.Tensor  # [U, D]
    weak_logits: torch.Tensor  # [U, K] float32
    strong_logits: torch.Tensor  # [U, K] float32
    labeled_strong_logits: torch.Tensor | None = None  # [B, K] float32, where labeled images have a strong view


def pass_joined(network: Callable, images: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Features and float32 logits of each kind of images, by name, from one pass over all of them."""
    sizes = [len(part) for part in images.values()]
    features, logits = network(torch.cat([*images.values()]))
    return dict(zip(images, zip(features.split(sizes), logits.float().split(sizes))))


def forward_views(
        model: nn.Module,
        labeled: dict,
        unlabeled: dict,
        weak_forward: str = 'joint',
        average: Callable | None = None,
        train: bool = True,
        further_outputs: int = 0,
) -> Outputs:
    """One pass over labeled, weak and strong images, or with 'no-grad' one for the weak ones and one for the rest.

    Without strong images the weak ones take their place, in the one pass and with their gradient (Pseudo-Label).

    Args:
        model: Returns features and logits.
        labeled: image `[B, C, S, S]`, and strong where labeled images have such a view.
        unlabeled: weak and strong `[U, C, S, S]`.
        weak_forward: See above.
        average: Takes the weak images in place of the model: Mean Teacher's teacher. It returns the same.
        train: False for images that are only looked at: no graph is kept, and no running statistics move.
        further_outputs: How many of the network's last outputs are no logits of classes, and left out.
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
    if further_outputs:
        seen = {name: (features, logits[:, :-further_outputs]) for name, (features, logits) in seen.items()}
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
    """Within it no running statistics of norms move; batches are still normalised by their own.

    Nor is a pass within it computed again in the backward pass, by timm's gradient checkpointing: that would move them.
    """
    kept = []

    def put(module, name, value):
        kept.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # Momentum 0 would not do: 0 times an infinite mean is NaN, and with momentum None the pass would count.
            put(module, 'track_running_stats', False)
        elif getattr(module, 'running_var', None) is not None and hasattr(module, 'momentum'):  # such as timm's EvoNorm
            put(module, 'momentum', 0.)
        if getattr(module, 'grad_checkpointing', False) is True:
            put(module, 'grad_checkpointing', False)
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def unit(x: torch.Tensor) -> torch.Tensor:
    """Images `[U, C, S, S]`, each scaled to the Euclidean length 1; one of zeros alone stays."""
    length = x.flatten(1).norm(dim=1).clamp(min=1e-12)
    return x / length.view(-1, *[1] * (x.ndim - 1))


def divergence(logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL divergence of each row, `[U]`: from the probabilities of the first logits to those of the other, `[U, K]`."""
    log_probs = logits.log_softmax(1)
    return (log_probs.exp() * (log_probs - other.log_softmax(1))).sum(1)


def find_adversary(
        model: nn.Module,
        images: torch.Tensor,
        logits: torch.Tensor,
        length: float,
) -> torch.Tensor:
    """Virtual adversarial perturbations `[U, C, S, S]` (arXiv 1704.03976, equations 10 to 12), detached.

    One power iteration, from a random direction: towards where the divergence from what the network says of the images
    grows most. The gradient is taken for the images alone; parameters get none.

    Args:
        model: Returns features and logits.
        images: `[U, C, S, S]`, normalised.
        logits: `[U, K]` of them, detached.
        length: Euclidean length of each perturbation.
    """
    trial = (TRIAL * unit(torch.randn_like(images))).requires_grad_()
    with torch.enable_grad():
        said = model(images + trial)[1][:, :logits.shape[1]].float()
        grown = divergence(logits, said).sum() * 1024  # the direction is the same, and float16 loses less of it
    gradient, = torch.autograd.grad(grown, trial)
    return length * unit(gradient)


def mix(images: torch.Tensor, targets: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes each image, and its target alike, with one drawn from the batch (MixMatch, arXiv 1905.02249, eq. 8 to 11).

    Args:
        images: `[N, C, S, S]`.
        targets: `[N, K]` probabilities.
        alpha: The own image's weight is the larger part of a draw from Beta(alpha, alpha), one a pair; 0: nothing is
            mixed.

    Returns:
        Mixed images and targets, of the same shapes.
    """
    if alpha == 0:
        return images, targets
    partner = torch.randperm(len(images), device=images.device)
    drawn = torch.distributions.Beta(alpha, alpha, validate_args=False).sample((len(images),))
    own = torch.maximum(drawn, 1 - drawn).to(images.device, non_blocking=True)
    return (torch.lerp(images[partner], images, own.view(-1, *[1] * (images.ndim - 1))),
            torch.lerp(targets[partner], targets, own[:, None]))


def rotate(images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Square images `[U, C, S, S]`, each turned counter-clockwise by so many right angles, `[U]` int64 from 0 to 3."""
    turned = images
    for k in (1, 2, 3):
        turned = torch.where((turns == k).view(-1, 1, 1, 1), images.rot90(k, (2, 3)), turned)
    return turned


def mean_square(logits: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the probabilities of logits, and other ones, `[U, K]` (a Brier score)."""
    return F.mse_loss(logits.softmax(1), probs)
