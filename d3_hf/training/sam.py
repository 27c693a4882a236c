"""Sharpness-aware minimisation, adaptive form: where in the neighbourhood of the weights the loss is highest."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@torch.no_grad()
def adaptive_perturbation(weights: list[Tensor], gradients: list[Tensor], rho: float) -> list[Tensor]:
    """First-order maximiser of the loss over ``||T^-1 e||_2 <= rho`` with ``T = diag(|w|)``.

    ``e = rho * T^2 g / ||T g||_2``, one norm over all weights together: adaptive SAM (Kwon et al., ICML 2021), eq. 9, as
    FT-SAM (Zhu et al., ICCV 2023) uses it, without its eta.

    Args:
        weights: Tensors w of any shapes.
        gradients: Their gradients g, same shapes.
        rho: Size of the neighbourhood, > 0.

    Returns:
        The tensors e; zeros where all gradients are zero.
    """
    sizes = torch._foreach_abs(weights)
    scaled = torch._foreach_mul(sizes, gradients)
    norm = torch.stack(torch._foreach_norm(scaled)).norm()
    # A tensor as factor: no wait for the device.
    return torch._foreach_mul(torch._foreach_mul(scaled, sizes), rho / norm.clamp_min(torch.finfo(norm.dtype).tiny))


@contextmanager
def perturbed(weights: list[Tensor], step: list[Tensor]) -> Iterator[None]:
    """Inside, the weights are ``w + e``; afterwards they are ``w`` again, bit for bit (``(w + e) - e`` would not be)."""
    saved = [weight.clone() for weight in weights]
    torch._foreach_add_(weights, step)
    try:
        yield
    finally:
        torch._foreach_copy_(weights, saved)


@contextmanager
def at_highest_loss(model: nn.Module, rho: float) -> Iterator[None]:
    """Inside, the weights stand where their gradients say that the loss is highest, and have no gradient; see above."""
    moved = [parameter for parameter in model.parameters() if parameter.grad is not None]
    weights = [parameter.detach() for parameter in moved]
    step = adaptive_perturbation(weights, [parameter.grad for parameter in moved], rho)
    model.zero_grad(set_to_none=True)
    with perturbed(weights, step):
        yield


@contextmanager
def running_statistics_kept(batch_norms: list[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Inside, BatchNorm layers in training mode use batch statistics and leave the running ones and their counter alone."""
    tracked = [module.track_running_stats for module in batch_norms]
    for module in batch_norms:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module, flag in zip(batch_norms, tracked, strict=True):
            module.track_running_stats = flag
