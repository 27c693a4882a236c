"""What ANP and RNP share: a mask in [0, 1] per BatchNorm channel, learned on clean images, and pruning by its value.

A neuron is a channel of a BatchNorm layer. Its mask m multiplies the scale gamma; a neuron with m <= threshold is pruned by
gamma = 0 in the victim itself (its shift beta stays, as in both authors' codes). The threshold is the largest of 0, 0.05, ...,
0.9 at which the pruned victim keeps its accuracy on the validation images; BackdoorBench picks it by test ASR, the ANP
authors fix 0.2 and BackdoorBench saves RNP at 0.7.
"""

import itertools
import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput

from ...models.batch_norm import batch_norms
from ...models.computed import refuse_computed
from ...training.checkpoints import is_asked_to_resume
from .staged import StagedConfig, StagedTrainer, check_functional

THRESHOLDS = tuple(step / 20 for step in range(19))  # BackdoorBench's grid

Scales = dict[str, tuple[Tensor, Tensor]]


def batch_norm_scales(model: nn.Module, method: str) -> Scales:
    """Scale gamma and shift beta (C,) of every BatchNorm layer that has them, by the layer's name, detached.

    Raises:
        ValueError: There is none, the message names ``method``; or a scale is computed from others.
    """
    found = set(batch_norms(model))
    layers = {name: module for name, module in model.named_modules() if module in found and module.affine}
    if not layers:
        raise ValueError(
            f"{method} masks the scales of BatchNorm channels, and {type(model).__name__} has no BatchNorm layer with scales "
            "(LayerNorm normalises each token, its scales are no neurons): use another defence, such as fine-pruning or TSBD"
        )
    for name, layer in layers.items():
        refuse_computed(name, layer)
    return {name: (layer.weight.detach(), layer.bias.detach()) for name, layer in layers.items()}


def masked(scales: Scales, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters ``gamma * m`` by name."""
    return {f"{name}.weight": gamma * masks[name] for name, (gamma, _) in scales.items()}


def below(masks: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Which neurons a threshold prunes: bool (C,) per layer, ``m <= threshold``."""
    return {name: mask <= threshold for name, mask in masks.items()}


@dataclass
class MaskConfig(StagedConfig):
    """Arguments that ANP and RNP share.

    There is no loop over the weights: masks are learned by SGD with momentum 0.9 and a constant ``learning_rate``, for
    ``max_steps`` updates if positive, else ``num_train_epochs`` passes over 80 % of the retain set. ``optim``,
    ``lr_scheduler_type``, ``weight_decay``, evaluation and checkpoints during training have no effect.

    Args:
        max_validation_drop: 0.05 (here, not measured): half of the 10 % that BackdoorBench allows on test images, because no
            fine-tuning follows that could recover the accuracy.

    Raises:
        ValueError: fp16, activation checkpointing or gradient accumulation is asked for; see `StagedConfig`.
    """

    max_validation_drop: float = field(default=0.05, metadata={"help": "Relative loss of retain validation accuracy allowed."})

    def __post_init__(self):
        check_functional(self)
        super().__post_init__()
        if self.gradient_accumulation_steps != 1:
            raise ValueError("masks are updated once per batch: leave gradient_accumulation_steps at 1")


class MaskPruningTrainer(StagedTrainer, ABC):
    """Learns masks and prunes; a defence says how by `mask_loss`, and prepares it in `start`.

    Raises:
        ValueError: The model has no BatchNorm layer with scales.
        RuntimeError: After the search, when no threshold prunes anything at a tolerable loss of accuracy.

    Attributes:
        scales: Scale and shift of each BatchNorm layer, sharing memory with the model.
    """

    def prepare(self) -> None:
        """Find the scales."""
        super().prepare()
        self.scales = batch_norm_scales(self.model, self.method)

    @abstractmethod
    def mask_loss(self, masks: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        """The scalar that the masks minimise on one batch; ``masks`` are (C,) per layer and require gradients."""

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None) -> TrainOutput:
        """Learn the masks, choose the threshold, prune. Callbacks are not called, since no weight is trained.

        Args:
            resume_from_checkpoint: Must not name a checkpoint: none are written. True begins from the start.
            trial: Not used.
            ignore_keys_for_eval: Not used.

        Returns:
            Number of mask updates, mean mask loss, and the run time in seconds.

        Raises:
            ValueError: A checkpoint is asked for.
            FloatingPointError: The loss of the masks is NaN or infinite.
            RuntimeError: Nothing can be pruned at a tolerable loss of accuracy.
        """
        if is_asked_to_resume(self.asked_checkpoint(resume_from_checkpoint)):
            raise ValueError(f"{self.method} writes no checkpoints to resume from: run it again from the suspicious model")
        started = time.perf_counter()
        self.begin(resumed=False)
        masks, loss = self.find_masks()
        self.prune(self.agree(masks))
        seconds = time.perf_counter() - started
        return TrainOutput(self.state.global_step, loss, {"train_runtime": seconds, "train_loss": loss})

    def find_masks(self) -> tuple[dict[str, Tensor], float]:
        """Minimise `mask_loss` by SGD from masks of one, clipped to [0, 1] after each update; the masks and the mean loss."""
        args = self.args
        masks = {name: torch.ones_like(gamma, requires_grad=True) for name, (gamma, _) in self.scales.items()}
        flat = list(masks.values())
        optimizer = torch.optim.SGD(flat, args.learning_rate, momentum=0.9)
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * self.tune_batches_per_epoch())
        total = torch.zeros((), device=args.device)
        batches = itertools.islice(self.endless_tune_batches(), steps)
        for batch in self.progress(batches, f"{self.method} masks", steps):
            loss = self.mask_loss(masks, batch)
            # Of the masks only: `backward` would add up gradients in all weights of the model too.
            for mask, gradient in zip(flat, torch.autograd.grad(loss, flat, materialize_grads=True), strict=True):
                mask.grad = gradient
            optimizer.step()
            with torch.no_grad():
                torch._foreach_clamp_min_(flat, 0.0)
                torch._foreach_clamp_max_(flat, 1.0)
            total += loss.detach()
        self.state.global_step = steps
        if not torch.isfinite(total):
            raise FloatingPointError(f"the loss of the {self.method} masks is {total.item()}: lower learning_rate")
        return {name: mask.detach() for name, mask in masks.items()}, total.item() / max(steps, 1)

    def choose_threshold(self, masks: dict[str, Tensor]) -> dict[str, Any]:
        """The largest threshold at which validation accuracy is tolerable, and what it prunes.

        Accuracy need not fall evenly with the number of pruned channels.

        Raises:
            RuntimeError: There is none that prunes a neuron.
        """
        before = self.accuracy(self.validate)
        found, count, accuracy = {}, 0, before
        for threshold in THRESHOLDS:
            pruned = below(masks, threshold)
            if (larger := sum(int(p.sum()) for p in pruned.values())) > count:
                count = larger
                accuracy = self.accuracy(self.validate, masked(self.scales, {name: ~p for name, p in pruned.items()}))
            if count and self.is_tolerable(accuracy, before):
                found = {"threshold": threshold, "pruned": count} | self.accuracies(before, accuracy)
        if not found:
            lowest = min(mask.min().item() for mask in masks.values())
            raise RuntimeError(
                f"{self.method} found nothing to prune within max_validation_drop={self.args.max_validation_drop} (lowest mask "
                f"{lowest:.2f}, thresholds 0 to {THRESHOLDS[-1]}): the model is not purified. Train the masks longer, or raise "
                "max_validation_drop"
            )
        return found | {"neurons": sum(len(mask) for mask in masks.values())}

    @torch.no_grad()
    def prune(self, masks: dict[str, Tensor]) -> None:
        """Choose the threshold and set gamma = 0 where the mask is not above it."""
        self.found = self.choose_threshold(masks)
        weights = []
        for name, pruned in below(masks, self.found["threshold"]).items():
            weights.append(self.model.get_submodule(name).weight.data.masked_fill_(pruned, 0.0))
        self.agree(weights)
        threshold, count, neurons = (self.found[name] for name in ("threshold", "pruned", "neurons"))
        self.say(f"pruned {count} of {neurons} BatchNorm channels (threshold {threshold})")
