"""Reversing triggers: the smallest mask and pattern that turn images into a class, and which classes need an oddly small one.

Nothing here knows of a trainer: `reverse_trigger` takes any function from images with a trigger to logits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

COST_UP, COST_DOWN = 2.0, 2.0**1.5
ADAM_BETAS = (0.5, 0.9)
LEAST_GAIN = 0.01  # relative: a mask that shrinks by less does not delay the early stop
MAD_TO_SIGMA = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class Schedule:
    """How a trigger is searched for; see `NeuralCleanseConfig` for ranges and defaults.

    Attributes:
        epochs: Most passes over the images.
        learning_rate: Of Adam.
        initial_cost: Weight of the mask's L1 norm at the start.
        success_threshold: Share of images that a trigger must turn.
        cost_patience: Epochs in a row before the cost changes.
        stop_patience: Epochs without a smaller mask after which the search ends.
    """

    epochs: int
    learning_rate: float
    initial_cost: float
    success_threshold: float
    cost_patience: int
    stop_patience: int


@dataclass(frozen=True)
class Findings:
    """The triggers of C classes, F of them flagged.

    Attributes:
        norms: float32 (C,), L1 norms of the masks.
        reached: bool (C,), whose trigger reached the threshold.
        flagged: int64 (F,), the flagged classes.
        masks: float32 (F, 1, h, w) in (0, 1).
        patterns: float32 (F, 3, h, w) in (0, 1), pixels.
    """

    norms: Tensor
    reached: Tensor
    flagged: Tensor
    masks: Tensor
    patterns: Tensor


def stamp(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """``(1 - m) x + m p``; the same in pixels and, with a normalised pattern, in normalised values."""
    return (1 - mask) * images + mask * pattern


def random_start(size: tuple[int, int], target: int, seed: int) -> Tensor:
    """Mask and pattern (4, h, w) uniform in (0, 1) (paper's authors), by seed and class, before (tanh + 1) / 2."""
    derived = int(np.random.SeedSequence([seed, target]).generate_state(1)[0])
    uniform = torch.rand((4, *size), generator=torch.Generator().manual_seed(derived))
    return torch.atanh(0.999 * (2 * uniform - 1))


def next_cost(cost: float, streak: int, patience: int) -> tuple[float, int]:
    """Adapt the cost after an epoch.

    Args:
        cost: Weight of the mask's norm.
        streak: Epochs in a row at or above the threshold, or, negative, below it.
        patience: Length of a streak that changes the cost.

    Returns:
        The cost and the streak, which begins anew where the cost changed.
    """
    if abs(streak) < patience:
        return cost, streak
    return (cost * COST_UP if streak > 0 else cost / COST_DOWN), 0


def reverse_trigger(
    attack: Callable[[Any, Tensor, Tensor], Tensor],
    fit: list[Any],
    validate: list[Any],
    target: int,
    raw: Tensor,
    schedule: Schedule,
) -> tuple[Tensor, bool]:
    """Find the smallest trigger that turns images into a class.

    Args:
        attack: From a batch, a mask (1, h, w) and a pattern (3, h, w) to the logits (B, C) of the stamped images.
        fit: Batches to fit the trigger to.
        validate: Batches to measure its success on.
        target: The class t.
        raw: Start, (4, h, w): mask and pattern before (tanh + 1) / 2.
        schedule: How to search.

    Returns:
        Mask and pattern (4, h, w) in (0, 1), and whether they reached the threshold; if none did, the last ones.
    """
    raw = raw.clone().requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=schedule.learning_rate, betas=ADAM_BETAS)
    cost, streak, waited, best, trigger = schedule.initial_cost, 0, 0, math.inf, None
    for _ in range(schedule.epochs):
        for batch in fit:
            squashed = (raw.tanh() + 1) / 2
            logits = attack(batch, squashed[:1], squashed[1:])
            labels = torch.full((len(logits),), target, device=logits.device)
            loss = F.cross_entropy(logits, labels) + cost * squashed[:1].sum()
            (gradient,) = torch.autograd.grad(loss, raw)  # backward() would leave gradients in the model
            raw.grad = gradient
            optimizer.step()
        with torch.no_grad():
            squashed = (raw.tanh() + 1) / 2
            hits = torch.cat([attack(batch, squashed[:1], squashed[1:]).argmax(1) == target for batch in validate])
        success, norm = hits.float().mean().item() >= schedule.success_threshold, squashed[:1].sum().item()
        waited = 0 if success and norm < (1 - LEAST_GAIN) * best else waited + 1
        if success and norm < best:
            best, trigger = norm, squashed
        if trigger is not None and waited >= schedule.stop_patience:
            break
        cost, streak = next_cost(cost, max(streak, 0) + 1 if success else min(streak, 0) - 1, schedule.cost_patience)
    return (squashed, False) if trigger is None else (trigger, True)


def anomaly_indices(norms: Tensor) -> Tensor:
    """``|L - median| / (1.4826 MAD)`` of L1 norms (C,); where the MAD is 0, infinite off the median."""
    norms = norms.double()
    deviations = (norms - norms.quantile(0.5)).abs()
    indices = deviations / (MAD_TO_SIGMA * deviations.quantile(0.5))
    return indices.where(deviations > 0, 0.0)


def flagged_classes(norms: Tensor, reached: Tensor, threshold: float) -> Tensor:
    """Classes, int64 (F,), whose trigger works (``reached``, bool (C,)) and has an anomalously small norm (``norms``, (C,))."""
    small = norms.double() < norms.double().quantile(0.5)
    return torch.nonzero(small & reached & (anomaly_indices(norms) > threshold)).flatten()


def flag(triggers: Tensor, reached: Tensor, threshold: float) -> Findings:
    """Flag the anomalous ones of the triggers (C, 4, h, w) of all classes, of which ``reached``, bool (C,), work."""
    norms = triggers[:, 0].sum((1, 2))
    flagged = flagged_classes(norms, reached, threshold)
    masks, patterns = triggers[flagged].split([1, 3], dim=1)
    return Findings(norms, reached, flagged, masks.contiguous(), patterns.contiguous())
