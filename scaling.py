"""Scaling of logits after training: a temperature, or a factor and an offset for each class.

A fitted temperature is kept in the config.json of the weights, by which `softmax(logits / temperature)` is meant.
"""
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

# A fitted temperature stays between these. Networks have some 0.3 to 5; the likelihood alone may want 0 or infinity.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.

# Share of the dominant image in a mixture of pseudo-calibration (Hu et al. 2024, arXiv 2307.07489).
DOMINANT = 0.65


def _minimise(parameters: list[torch.Tensor], loss: Callable[[], torch.Tensor]) -> None:
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=500,
        tolerance_grad=1e-10,
        tolerance_change=1e-13,
        line_search_fn='strong_wolfe',
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def fit_temperature(logits: torch.Tensor, target: torch.Tensor) -> tuple[float, bool]:
    """Temperature T that makes softmax(logits / T) most likely (Guo et al. 2017, arXiv 1706.04599, section 4.2).

    The mean negative log-likelihood is convex in 1/T, so its slopes at both bounds tell whether a minimum lies between
    them. None does if every image is right by a margin (T would go to 0), or if the logits rank the classes no better
    than chance does (T would go to infinity): then the bound is returned. Float64, LBFGS.

    Args:
        logits: [N, K], any floating precision.
        target: Class indices [N].

    Returns:
        T, from MIN_TEMPERATURE to MAX_TEMPERATURE, and whether it is one of them for want of a minimum between. Logits
        that are equal in each row give 1.

    Raises:
        ValueError: If there are no rows.
    """
    if not len(logits):
        raise ValueError('logits are empty: there is nothing to fit a temperature to')
    gap = logits.double() - logits.double().gather(1, target[:, None])
    if not gap.any():
        return 1.0, False

    def slope(inverse):
        return float(((inverse * gap).softmax(1) * gap).sum(1).mean())

    if slope(1 / MIN_TEMPERATURE) <= 0:
        return MIN_TEMPERATURE, True
    if slope(1 / MAX_TEMPERATURE) >= 0:
        return MAX_TEMPERATURE, True
    # In units in which a typical gap is 1, so that the tolerances mean the same for any logits.
    unit = gap.abs().mean()
    inverse = unit.clone().requires_grad_()
    _minimise([inverse], lambda: (inverse * (gap / unit)).logsumexp(1).mean())
    return min(max(float(unit / inverse.detach()), MIN_TEMPERATURE), MAX_TEMPERATURE), False


def fit_vector(
        logits: torch.Tensor,
        target: torch.Tensor,
        temperature: float,
        ridge: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vector scaling, a factor and an offset for each class (Guo et al. 2017, section 4.2), around a temperature.

    Written as logits * (1 + u) / T + v. A Gaussian prior of variance 1 / ridge on u and v, in all worth about one image
    per class, keeps them finite where images are few, or all right; a large ridge gives temperature scaling, and 0 the
    plain maximum of the likelihood. Float64, LBFGS.

    Args:
        logits: [N, K], any floating precision.
        target: Class indices [N].
        temperature: T.
        ridge: Strength of the prior.

    Returns:
        The factors (1 + u) / T and the offsets v, both [K] float64.
    """
    z = logits.double() / temperature
    u = torch.zeros(z.shape[1], dtype=torch.float64, requires_grad=True)
    v = torch.zeros_like(u, requires_grad=True)
    # Weights scaled by the root of the ridge keep LBFGS well-conditioned however large it is.
    root = max(1.0, ridge / len(z)) ** 0.5

    def loss():
        a, b = u / root, v / root
        nll = F.cross_entropy(z * (1 + a) + b, target)
        return nll + ridge / (2 * len(z)) * (a.square().sum() + b.square().sum())

    _minimise([u, v], loss)
    return (1 + u.detach() / root) / temperature, v.detach() / root


def draw_partners(number: int, seed: int) -> torch.Tensor:
    """For each of so many images another one to be mixed into it: [number] int64.

    Each image is dominant once and the other one once: they lie on a ring in random order, and each takes the next.

    Raises:
        ValueError: If there are less than two.
    """
    if number < 2:
        raise ValueError(f'{number} image(s) make no pair')
    ring = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    partner = torch.empty_like(ring)
    partner[ring] = ring.roll(-1)
    return partner


def read_temperature(folder: Path) -> dict | None:
    """What a folder of weights keeps about its temperature; None if it keeps none.

    Args:
        folder: With a config.json.

    Returns:
        temperature, split (of the images it was fitted on) and whatever else was given to `add_temperature`.

    Raises:
        ValueError: If the temperature is no number above 0, or the split is missing.
    """
    path = folder / 'config.json'
    saved = json.loads(path.read_text()).get('calibration')
    if saved is None:
        return None
    try:
        saved = dict(saved, temperature=float(saved['temperature']), split=saved['split'])
        if not 0 < saved['temperature'] < float('inf'):
            raise ValueError(f'temperature {saved["temperature"]}')
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f'{path}: calibration must hold a temperature above 0 and the split of its images '
                         f'({type(error).__name__} {error})') from error
    return saved


def add_temperature(folder: Path, **calibration) -> str:
    """The folder's config.json with a temperature, beside what timm keeps: timm passes over keys it does not know.

    Args:
        folder: With a config.json.
        calibration: temperature, split, and what else is to be kept.
    """
    config = json.loads((folder / 'config.json').read_text())
    return json.dumps(dict(config, calibration=calibration), indent=2) + '\n'
