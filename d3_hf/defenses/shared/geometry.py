"""D3's mathematics: distances to the initial weights, their gradient, warm starts and projections.

Pure functions on tensors that know nothing of models or trainers. Notation follows Wei, Liu and Zha, "Backdoor Mitigation
by Distance-Driven Detoxification" (ICCV 2025, arXiv 2411.09585), section 3: ``W_k`` is the k-th selected weight, ``W_k^0``
its value in the suspicious model ("reference"), ``C_k = ||W_k^0||_F`` its radius. A weight may have any shape; its norm is
that of the flattened tensor. Every list holds one entry per selected weight.
"""

import torch
from torch import Tensor

WARM_STARTS = ("near", "middle", "far", "noise", "random")
PROJECTIONS = ("sphere", "ball", "none")
# Relative size of the step that takes "near" off the reference, where the gradient of the distance is exactly zero.
NEAR_STEP = 1e-3


def norms(weights: list[Tensor]) -> list[Tensor]:
    """Frobenius norms ``||W_k||_F``: one scalar tensor per weight, on the weight's device, without a host sync."""
    return list(torch._foreach_norm(weights))


def distances(weights: list[Tensor], references: list[Tensor]) -> list[Tensor]:
    """Distances ``D_k = ||W_k - W_k^0||_F``, one scalar tensor per weight; D3's d(.,.) is their sum (authors' d3.py)."""
    return norms(torch._foreach_sub(weights, references))


def add_distance_gradient(
    gradients: list[Tensor], weights: list[Tensor], references: list[Tensor], coefficient: float
) -> list[Tensor]:
    """Add ``coefficient * d/dW_k sum_k ||W_k - W_k^0||_F = coefficient * (W_k - W_k^0) / D_k`` to the gradients, in place.

    At ``W_k = W_k^0`` the distance is not differentiable; zero is added there, the subgradient that autograd returns too.

    Args:
        gradients: Tensors to add to, of the weights' shapes.
        weights: The current ``W_k``.
        references: The ``W_k^0``.
        coefficient: Scalar factor; D3 minimises the negative distance, so it passes a negative one.

    Returns:
        The distances ``D_k``, as `distances` gives them.
    """
    offsets = torch._foreach_sub(weights, references)
    lengths = norms(offsets)
    tiny = torch.finfo(offsets[0].dtype).tiny
    torch._foreach_div_(offsets, torch._foreach_clamp_min(lengths, tiny))  # 0 / tiny = 0: the subgradient at the reference
    torch._foreach_add_(gradients, offsets, alpha=coefficient)
    return lengths


def project(weights: list[Tensor], radii: list[Tensor], projection: str) -> None:
    """Project every weight onto its constraint set S_k, in place.

    Args:
        weights: The ``W_k``, float32 so that small corrections do not vanish.
        radii: The ``C_k``, positive scalar tensors.
        projection: ``"sphere"`` rescales to ``||W_k|| = C_k`` (the authors' code), ``"ball"`` only shrinks to
            ``||W_k|| <= C_k`` (the other reading of the paper's norm constraint), ``"none"`` leaves the weights alone.

    Raises:
        ValueError: ``projection`` is none of these.
    """
    if projection not in PROJECTIONS:
        raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}; got {projection!r}")
    if projection == "none":
        return
    # A weight at zero ("middle", or a step that the loss scaler skipped) stays there: the floor keeps 0 / 0 from becoming NaN.
    factors = torch._foreach_div(radii, torch._foreach_clamp_min(norms(weights), 1e-12))
    if projection == "ball":
        torch._foreach_clamp_max_(factors, 1.0)
    torch._foreach_mul_(weights, factors)


def warm_start(reference: Tensor, method: str, generator: torch.Generator) -> Tensor:
    """Starting point of one selected weight before the first step.

    D3 needs one: at ``W = W^0`` the gradient of the distance is zero and, on a fitted victim, so is that of the hinge.

    Args:
        reference: ``W^0``, any shape, on the CPU, so that one seed gives the same start on every device and rank.
        method: As in the authors' ``warm_up_method``: ``"near"`` stays at ``W^0`` (here plus a Gaussian step of relative
            length 1e-3, without which nothing moves), ``"middle"`` is zero, ``"far"`` is ``-W^0``, the farthest point of
            the sphere, ``"noise"`` adds Gaussian noise of the weight's own standard deviation, ``"random"`` (the authors'
            default) draws from U(-0.5, 0.5) and rescales to ``||W^0||``, anew while that is nearer than half the norm.
        generator: CPU random generator; consumed in the order of the calls.

    Returns:
        A new tensor like ``reference``.

    Raises:
        ValueError: ``method`` is none of these.
    """
    if method == "far":
        return -reference
    if method == "middle":
        return torch.zeros_like(reference)
    if method == "random":
        while True:
            drawn = torch.rand(reference.shape, generator=generator, dtype=reference.dtype) - 0.5
            start = drawn * (reference.norm() / drawn.norm())
            # Near the old weight lies what this seed drew before, or what a checkpoint was made to foresee.
            if not (start - reference).norm() < reference.norm() / 2:
                return start
    if method in ("near", "noise"):
        drawn = torch.randn(reference.shape, generator=generator, dtype=reference.dtype)
        scale = reference.std() if method == "noise" else NEAR_STEP * reference.norm() / drawn.norm()
        return reference + scale * drawn
    raise ValueError(f"warm_start must be one of {', '.join(WARM_STARTS)}; got {method!r}")
