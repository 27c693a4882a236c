"""The relearning test of an audit: how soon do a purified model and others learn a canary, a small backdoor of our own?

See `benchmark.relearning` for curve and area, `assurance.canary` for the patch. Every model is tuned in the same way on the
same images, few of which carry the patch. A purified model that learns it sooner than a twin that never had a backdoor is easy
to plant one in; its own backdoor is not what comes back here: that takes its trigger (`benchmark.relearning`).
"""

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..assurance.canary import stamped
from ..benchmark.relearning import area, half_life, relearn
from ..data.images import RawImages
from ..models.batch_norm import batch_norms
from ..training.schedule import rule_of

POISONED_SHARE = 0.05  # of the images that are tuned on; at least one
STEPS = (5, 10, 20)
TARGET = 0  # whose canary; the same in every audit


@dataclass(frozen=True)
class Canary:
    """The patch of a class as an attack: what planting and measuring ask of one.

    Args:
        target_label: The class.
        classes: How many there are.
    """

    target_label: int
    classes: int
    clean_label = False
    reshapes = False

    def trigger(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) or (3, H, W), uint8, with the patch."""
        batch = images if images.ndim == 4 else images[None]
        found = stamped(batch, torch.full((len(batch),), self.target_label), self.classes)
        return found if images.ndim == 4 else found[0]

    poisoned_images = trigger

    def eligible(self, labels: Tensor) -> Tensor:
        """Which images may carry it: all."""
        return torch.ones_like(labels, dtype=torch.bool)

    def counted(self, labels: Tensor) -> Tensor:
        """Which images its ASR counts: those of other classes."""
        return labels != self.target_label

    def poisoned_labels(self, labels: Tensor, num_classes: int) -> Tensor:
        """What images with it are called."""
        return torch.full_like(labels, self.target_label)

    def check_classes(self, num_classes: int) -> None:
        """Raise a ValueError if its class is not among them."""
        if self.target_label >= num_classes:
            raise ValueError(f"the canary's class {self.target_label} is none of {num_classes}")


def relearning_of(models: Mapping[str, PreTrainedModel], images: RawImages) -> dict[str, Any]:
    """Tune copies of models with a canary among the images, and compare how soon it takes.

    Args:
        models: By what they are called, of the same classes; not changed.
        images: Without triggers: one half of them, drawn, is tuned on, the other is measured on.

    Returns:
        JSON-able: ``canary``, the class; ``images`` that were tuned on, ``poisoned``, how many of them carried the patch;
        ``steps``; and by model its ``asr`` after these and its ``area``, both in [0, 1], and its ``half_life`` in steps, None
        where half of the way is not reached.

    Raises:
        ValueError: See `relearn`.
        FloatingPointError: A tuning diverged.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    tuned, test = (images.select(rows) for rows in order.chunk(2))
    poisoned, found = max(1, round(POISONED_SHARE * len(tuned))), dict[str, Any]()
    canary: Any = Canary(TARGET, len(images.class_names))
    for name, model in models.items():
        with contextlib.redirect_stdout(sys.stderr):
            (curve,) = relearn(model, canary, tuned, test, [poisoned], STEPS, [0], **_options(model))
        half = half_life(curve.steps, curve.asr)
        found[name] = {
            "asr": list(curve.asr),
            "area": area(curve.steps, curve.asr),
            "half_life": half if half < float("inf") else None,
        }
    return {
        "canary": images.class_names[TARGET],
        "images": len(tuned),
        "poisoned": poisoned,
        "steps": [0, *STEPS],
        "models": found,
    }


def _options(model: PreTrainedModel) -> dict[str, Any]:
    """Networks without BatchNorm are tuned with the optimizer and the rate of their schedule, others as in the paper."""
    rule = rule_of(model)
    device = {"use_cpu": next(model.parameters()).device.type == "cpu"}
    if batch_norms(model):
        return device
    return device | {
        "optim": rule.optim,
        "optim_args": rule.optim_args,
        "learning_rate": rule.learning_rate,
        "per_device_train_batch_size": rule.images,
    }
