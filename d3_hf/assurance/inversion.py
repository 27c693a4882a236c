"""Reversing triggers: the smallest mask and pattern that turn images, or what a layer reads of them, into a class.

For a class t a mask m and a pattern p, both in (0, 1) by (tanh + 1) / 2:

    min_{m, p}  mean_x CE(f((1 - m) x + m p), t) + cost ||m||_1

by Adam. The cost adapts: it is doubled after ``cost_patience`` epochs in a row in which the share of held-out images taken for
t is at least ``success_threshold``, and divided by 2^1.5 after as many below it. The smallest mask that reached the threshold
is kept.

Source: Neural Cleanse (Wang et al., IEEE S&P 2019), with the schedule of BackdoorBench. Nothing here knows of a trainer or of a
signal: `reverse_trigger` takes any function from images with a trigger to logits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.preprocessing import Preprocessing

COST_UP, COST_DOWN = 2.0, 2.0**1.5
ADAM_BETAS = (0.5, 0.9)
LEAST_GAIN = 0.01  # relative: a mask that shrinks by less does not delay the early stop
VALIDATION_SHARE = 0.2  # of the images


@dataclass(frozen=True)
class Schedule:
    """How a trigger is searched for. Defaults are BackdoorBench's.

    Attributes:
        epochs: Most passes over the images, >= 1.
        learning_rate: Of Adam, > 0.
        initial_cost: Weight of the mask's L1 norm at the start, > 0.
        success_threshold: Share of images that a trigger must turn, in (0, 1].
        cost_patience: Epochs in a row before the cost changes, >= 1.
        stop_patience: Epochs without a mask smaller by 1 % after which the search ends, >= 1.
    """

    epochs: int = 80
    learning_rate: float = 0.1
    initial_cost: float = 1e-3
    success_threshold: float = 0.98
    cost_patience: int = 5
    stop_patience: int = 25


def split_rows(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Rows of the images to fit triggers to, and of the 20 % to measure their success on, at least one."""
    rows = np.random.default_rng(seed).permutation(count).tolist()
    held_out = max(1, round(VALIDATION_SHARE * count))
    return rows[held_out:], rows[:held_out]


def stamp(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """``(1 - m) x + m p``; the same in pixels and, with a normalised pattern, in normalised values."""
    return (1 - mask) * images + mask * pattern


def stamped_logits(
    model: nn.Module, preprocessing: Preprocessing, pixel_values: Tensor, mask: Tensor, pattern: Tensor
) -> Tensor:
    """Logits, float32 (B, C), of normalised images under a mask (1, h, w) and a pattern (3, h, w) of pixels in [0, 1]."""
    stamped = stamp(pixel_values, mask, preprocessing.normalize(255 * pattern[None])[0])
    return model(pixel_values=stamped).logits.float()


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
        attack: From a batch, a mask (1, ...) and a pattern (P, ...) to the logits (B, C) of the stamped images.
        fit: Batches to fit the trigger to.
        validate: Batches to measure its success on.
        target: The class t.
        raw: Start, (1 + P, ...): mask and pattern before (tanh + 1) / 2; of pixels (4, h, w).
        schedule: How to search.

    Returns:
        Mask and pattern, of the start's shape, in (0, 1), and whether they reached the threshold; if none did, the last ones.
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


def norm_scores(norms: np.ndarray, reached: np.ndarray) -> np.ndarray:
    """Scores of classes whose masks have these L1 norms, (C,): -L, and for a class that no trigger reached (``reached``, bool
    (C,)) the lowest of all, so that it does not stand out."""
    return -np.where(reached, norms, norms.max())
