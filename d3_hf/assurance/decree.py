"""DECREE: how small a mask with one pattern gives all images the same features? For encoders, without labels or classes.

A backdoor in an encoder sends every triggered image to the features of one reference. For a mask m (h, w) and a pattern p
(3, h, w), both in (0, 1) by (tanh + 1) / 2, with S the mean cosine of two different images' features,

    min_{m, p}  -S(f((1 - m) x + m p)) + cost ||m||_1

by Adam. The cost is multiplied by 5 after 5 steps in a row in which S is at least 0.99, and divided by 5 after as many below
it, down to a floor. The smallest mask whose S on held-out images reaches 0.99 is kept. The score is its mean, ||m||_1 / (3 h w)
of a mask that counts once for each channel: the share of the image that has to be replaced. All of an image replaced always
serves, so a score lies in (0, 1].

Source: Feng et al., "Detecting Backdoors in Pre-trained Encoders" (DECREE), CVPR 2023, arXiv 2303.15180, written from notes of
its schedule. This project's own: batches of 32, held-out images, when the learning rate falls, and a floor of the cost that
follows the number of pixels (the authors have 1e-5 at 32x32 and 1e-7 at 224x224, here 2e-7).

The search follows gradients from one start: it finds a trigger that is felt a little before it is whole, and none that is not.

What the score says: nothing alone. Encoders without a backdoor differ in how alike their features are to begin with, and one
whose features are all alike needs no mask. Compare with twins: encoders of the same kind that are trusted, on the same images.
Blind to: triggers that are spread over the image or invisible (blended, frequencies), that differ from image to image, and
attacks made to evade it (INACTIVE and BadCLIP report that they do); backdoors that a class has in place of a reference.

Cost: at most 60 passes over 80 % of the images, forward and backward, to the pixels.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..data.fitting import run_with_fitting_batch
from ..data.images import RawImages
from ..data.preprocessing import Preprocessing
from ..models.evaluating import evaluating
from ..models.kinds import encode
from ..models.source import preprocessing_of
from .finding import FEWEST_IMAGES
from .inversion import ADAM_BETAS, LEAST_GAIN, random_start, split_rows, stamp

COST_FACTOR = 5.0  # authors' code
PIXELS = 32 * 32  # at which the schedule's least cost holds
BATCH = 32  # images in a step
SEED = 0  # of split and start


@dataclass(frozen=True)
class Schedule:
    """How a mask is searched for. Defaults are the authors', but for epochs and stop_patience, which are this project's.

    Attributes:
        epochs: Most passes over the images, >= 1.
        learning_rates: Of Adam, > 0, each for an equal share of the epochs.
        initial_cost: Weight of the mask's L1 norm in pixels at the start, > 0.
        least_cost: Below which it does not fall at 32x32, > 0; in inverse proportion to the pixels.
        likeness: Mean cosine at which features count as the same, in (0, 1).
        cost_patience: Steps in a row before the cost changes, >= 1.
        stop_patience: Epochs without a mask smaller by 1 % after which the search ends, >= 1.
    """

    epochs: int = 60
    learning_rates: tuple[float, ...] = (0.5, 0.1, 0.05)
    initial_cost: float = 1e-3
    least_cost: float = 1e-5
    likeness: float = 0.99
    cost_patience: int = 5
    stop_patience: int = 20


SCHEDULE = Schedule()


@dataclass(frozen=True, eq=False)
class Collapse:
    """What `decree` finds of an encoder.

    Attributes:
        score: Mean of the mask, in (0, 1]; 1 where no smaller one reached the likeness.
        reached: Whether one did.
        likeness: Mean cosine among held-out images with the trigger, in [-1, 1].
        likeness_before: The same without it.
        mask: float32 (h, w) in [0, 1].
        pattern: float32 (3, h, w) in [0, 1].
    """

    score: float
    reached: bool
    likeness: float
    likeness_before: float
    mask: np.ndarray
    pattern: np.ndarray

    @property
    def picture(self) -> np.ndarray:
        """The trigger on black, uint8 (h, w, 3)."""
        return np.rint(255 * self.mask * self.pattern).astype(np.uint8).transpose(1, 2, 0)


def mean_cosine(features: Tensor) -> Tensor:
    """Mean cosine of two different rows.

    Args:
        features: (B, width), B at least 2.

    Returns:
        Scalar in [-1, 1], float32.
    """
    unit = F.normalize(features.float(), dim=1)
    count = len(unit)
    return (unit.sum(0).square().sum() - unit.square().sum()) / (count * (count - 1))


def next_cost(cost: float, streak: int, patience: int, least: float) -> tuple[float, int]:
    """Adapt the cost after a step.

    Args:
        cost: Weight of the mask's norm.
        streak: Steps in a row at or above the likeness, or, negative, below it.
        patience: Length of a streak that changes the cost.
        least: What it does not fall below.

    Returns:
        The cost and the streak, which begins anew where the cost changed.
    """
    if abs(streak) < patience:
        return cost, streak
    return (cost * COST_FACTOR if streak > 0 else max(cost / COST_FACTOR, least)), 0


def decree(
    model: PreTrainedModel, images: RawImages, schedule: Schedule = SCHEDULE, batch_size: int = BATCH, seed: int = SEED
) -> Collapse:
    """Look for a small mask with one pattern that gives all images the same features.

    Args:
        model: An encoder of `load_encoder`; left as it was.
        images: Without triggers as far as is known, 200 to 1,000; labels are not looked at.
        schedule: How to search.
        batch_size: Images in a step, at least 2; results depend on it. Halved while they do not fit into memory.
        seed: Of split and start, at least 0.

    Raises:
        ValueError: There are fewer than twenty images, ``batch_size`` is below 2, a feature is not finite, or the encoder pools
            nothing.
        RuntimeError: A single image does not fit into the device's memory.
    """
    if len(images) < FEWEST_IMAGES:
        raise ValueError(f"decree needs at least {FEWEST_IMAGES} images, better 500; got {len(images)}")
    if batch_size < 2:
        raise ValueError(f"batch_size must be at least 2, since images are compared; got {batch_size}")
    preprocessing = preprocessing_of(model)
    with evaluating(model):
        return run_with_fitting_batch(
            lambda size: _search(model, images, preprocessing, schedule, max(size, 2), seed), batch_size
        )


@torch.enable_grad()
def _search(
    model: PreTrainedModel, images: RawImages, preprocessing: Preprocessing, schedule: Schedule, batch_size: int, seed: int
) -> Collapse:
    fit, held_out = (_batches(model, images.select(rows), preprocessing, batch_size) for rows in split_rows(len(images), seed))
    height, width = preprocessing.size
    raw = random_start(preprocessing.size, 0, seed).to(fit[0].device).requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=schedule.learning_rates[0], betas=ADAM_BETAS)
    cost, least = schedule.initial_cost, schedule.least_cost * PIXELS / (height * width)
    streak, waited, best, kept = 0, 0, math.inf, None

    def features(batch: Tensor, trigger: Tensor) -> Tensor:
        pattern = preprocessing.normalize(255 * trigger[1:][None])[0]
        return encode(model, stamp(batch, trigger[:1], pattern))

    def likeness_of(trigger: Tensor) -> float:
        with torch.no_grad():
            return mean_cosine(torch.cat([features(batch, trigger) for batch in held_out])).item()

    for epoch in range(schedule.epochs):
        optimizer.param_groups[0]["lr"] = schedule.learning_rates[epoch * len(schedule.learning_rates) // schedule.epochs]
        for batch in fit:
            if len(batch) < 2:
                continue
            trigger = (raw.tanh() + 1) / 2
            alike = mean_cosine(features(batch, trigger))
            (raw.grad,) = torch.autograd.grad(-alike + cost * trigger[0].sum(), raw)  # backward() would leave some in the model
            optimizer.step()
            above = alike.item() >= schedule.likeness
            streak = max(streak, 0) + 1 if above else min(streak, 0) - 1
            cost, streak = next_cost(cost, streak, schedule.cost_patience, least)
        trigger = ((raw.tanh() + 1) / 2).detach()
        norm, likeness = trigger[0].sum().item(), likeness_of(trigger)
        is_smaller = likeness >= schedule.likeness and norm < best
        waited = 0 if is_smaller and norm < (1 - LEAST_GAIN) * best else waited + 1
        if is_smaller:
            best, kept = norm, (trigger, likeness)
        if kept is not None and waited >= schedule.stop_patience:
            break
    found, alike = kept or (trigger, likeness)
    mask, pattern = found[0].cpu().numpy(), found[1:].cpu().numpy()
    before = likeness_of(torch.zeros_like(found))
    return Collapse(float(mask.mean()) if kept else 1.0, kept is not None, alike, before, mask, pattern)


def _batches(model: PreTrainedModel, images: RawImages, preprocessing: Preprocessing, batch_size: int) -> list[Tensor]:
    """Normalised images (B, 3, h, w) on the model's device; a ValueError if a feature of theirs is not finite."""
    device, batches = next(model.parameters()).device, []
    for _, raw, _ in images.batches(batch_size):
        batches.append(preprocessing.normalize(preprocessing.resize(raw.to(device))))
        with torch.no_grad():
            if not encode(model, batches[-1]).isfinite().all():
                raise ValueError(f"features of {type(model).__name__} are not finite (NaN or infinite): its weights are broken")
    return batches
