"""The fits of a temperature and of a factor and an offset for each class."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import scaling


def noisy_logits(scale: float, seed: int = 0, n: int = 600, k: int = 5, agree: float = 0.7):
    """Logits of a given scale, and labels that agree with them in part."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, k, generator=generator)
    target = torch.where(torch.rand(n, generator=generator) < agree, logits.argmax(1),
                         torch.randint(k, (n,), generator=generator))
    return logits, target


def nll(logits: torch.Tensor, target: torch.Tensor) -> float:
    return float(F.cross_entropy(logits.double(), target))


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('scale', [0.05, 1., 20., 60.])
def test_temperature_is_the_minimum_that_a_grid_finds(scale, seed):
    logits, target = noisy_logits(scale, seed)
    temperature, at_bound = scaling.fit_temperature(logits, target)
    low, high = np.log(0.01), np.log(100)
    for _ in range(12):  # finer and finer grids; the likelihood has one maximum
        grid = np.linspace(low, high, 21)
        best = int(np.argmin([nll(logits.double() / np.exp(t), target) for t in grid]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 20)]
    assert not at_bound
    assert temperature == pytest.approx(np.exp((low + high) / 2), rel=1e-5)


def test_temperature_is_the_one_that_labels_were_drawn_with():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40_000, 4, generator=generator)
    target = torch.multinomial((logits / 2.5).softmax(1), 1, generator=generator).squeeze(1)
    assert scaling.fit_temperature(logits, target)[0] == pytest.approx(2.5, rel=0.03)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_temperature_of_half_precision_logits_is_that_of_their_float32_values(dtype):
    logits, target = noisy_logits(3.)
    half = logits.to(dtype)
    assert scaling.fit_temperature(half, target) == scaling.fit_temperature(half.float(), target)


def test_temperature_without_a_maximum_of_the_likelihood_stops_at_a_bound_and_says_so():
    logits, _ = noisy_logits(2.)
    right, wrong = logits.argmax(1), logits.argmin(1)
    assert scaling.fit_temperature(logits, right) == (0.01, True)
    assert scaling.fit_temperature(1e6 * logits, right) == (0.01, True)
    assert scaling.fit_temperature(logits, wrong) == (100., True)
    assert scaling.fit_temperature(logits[:1], right[:1]) == (0.01, True)
    assert scaling.fit_temperature(torch.ones(7, 3), torch.zeros(7, dtype=torch.int64)) == (1., False)
    with pytest.raises(ValueError, match='empty'):
        scaling.fit_temperature(logits[:0], right[:0])


def test_vector_scaling_is_stationary_and_beats_temperature_scaling_where_it_was_fitted():
    logits, target = noisy_logits(2., n=3000)
    logits = logits * torch.tensor([0.3, 1., 1., 2., 1.]) + torch.tensor([0., 2., 0., -1., 0.])
    temperature, _ = scaling.fit_temperature(logits, target)
    factor, offset = scaling.fit_vector(logits, target, temperature, ridge=0.)
    factor, offset = factor.requires_grad_(), offset.requires_grad_()
    loss = F.cross_entropy(logits.double() * factor + offset, target)  # convex: no slope, no better fit
    for slope in torch.autograd.grad(loss, (factor, offset)):
        assert slope.abs().max() < 1e-6
    assert float(loss.detach()) < nll(logits / temperature, target) - 0.01
    factor, offset = scaling.fit_vector(logits, target, temperature)
    assert nll(logits * factor + offset, target) < float(loss.detach()) + 1e-3  # 3000 images outweigh the prior


def test_vector_scaling_becomes_temperature_scaling_when_its_prior_is_strong():
    logits, target = noisy_logits(2.)
    factor, offset = scaling.fit_vector(logits, target, 1.7, ridge=1e12)
    assert torch.allclose(factor, torch.full((5,), 1 / 1.7, dtype=torch.float64), rtol=1e-6)
    assert offset.abs().max() < 1e-6


def test_vector_scaling_stays_finite_on_few_images_that_are_all_right():
    logits = 5 * torch.eye(5)[:3]
    factor, offset = scaling.fit_vector(logits, torch.arange(3), 1.)
    assert factor.isfinite().all() and offset.isfinite().all() and factor.abs().max() < 10
    assert (offset[3:] < offset[:3].min()).all()  # classes without an image


@pytest.mark.parametrize('number', [2, 3, 50])
def test_every_image_is_dominant_once_and_another_ones_partner_once(number):
    partner = scaling.draw_partners(number, 0)
    assert sorted(partner.tolist()) == list(range(number)) and (partner != torch.arange(number)).all()
    assert number < 50 or not torch.equal(partner, scaling.draw_partners(number, 1))
    with pytest.raises(ValueError, match='make no pair'):
        scaling.draw_partners(1, 0)
