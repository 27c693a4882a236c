"""Adaptive SAM's perturbation against its formula, and that it maximises the linearised loss."""

import pytest
import torch

from d3_hf.training.sam import adaptive_perturbation


def tensors(seed, shapes=((4, 3), (5,), ())):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("rho", [0.05, 1.0, 3.0])
def test_formula(rho):
    weights, gradients = tensors(0), tensors(1)
    norm = sum(((w.abs() * g) ** 2).sum() for w, g in zip(weights, gradients, strict=True)) ** 0.5
    for found, w, g in zip(adaptive_perturbation(weights, gradients, rho), weights, gradients, strict=True):
        assert torch.allclose(found, rho * w * w * g / norm, rtol=1e-5, atol=1e-7)


def test_no_feasible_step_raises_the_linear_loss_more():
    weights, gradients = tensors(2), tensors(3)
    best = adaptive_perturbation(weights, gradients, 2.0)

    def rise(step):
        return sum((g * e).sum() for g, e in zip(gradients, step, strict=True))

    def length(step):
        return sum(((e / w) ** 2).sum() for e, w in zip(step, weights, strict=True)) ** 0.5

    assert length(best) == pytest.approx(2.0, rel=1e-5)
    for seed in range(200):
        other = tensors(10 + seed)
        scale = 2.0 / length(other)
        assert rise([scale * e for e in other]) < rise(best)


def test_zero_gradients_give_no_step():
    weights = tensors(4)
    assert all(not e.any() for e in adaptive_perturbation(weights, [torch.zeros_like(w) for w in weights], 1.0))
