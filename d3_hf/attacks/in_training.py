"""Attacks that poison every batch anew while the victim trains, in place of a fixed set of poisoned images."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Attack, check_range


class BatchPoisoner(ABC):
    """Poisons the batches of one training run; the attack makes it, the victim's trainer calls it.

    Every batch is shuffled, so its first images are the poisoned ones, ``ratio * B`` of them, and the next
    ``cross_ratio * ratio * B`` are cross images: changed almost like poisoned ones and keeping their true labels, so that the
    victim learns the exact trigger. The rest stays as it is. A count that is no whole number is rounded at random, so that
    small ratios keep their share.

    Args:
        attack: The attack; not modified.
        ratio: Share of each batch that is poisoned, in (0, 1 / (1 + cross_ratio)].
        cross_ratio: Cross images per poisoned one, at least 0.
        num_classes: C.
        seed: Integer of at least 0. All draws depend on (seed, number of the batch) alone, so a resumed run repeats them.

    Attributes:
        penalty: Scalar with gradients to the attack's own networks, which the trainer adds to the loss of the batch poisoned
            last; None if there is nothing to add.

    Raises:
        ValueError: Poisoned and cross images together are none or more than the batch, the target is not one of the
            classes, ``seed`` is negative, or the label map is one-to-one.
    """

    def __init__(self, attack: Attack, ratio: float, cross_ratio: float, num_classes: int, seed: int):
        if not 0 < ratio * (1 + cross_ratio) <= 1:
            raise ValueError(
                f"{attack.name} turns {ratio} of each batch into poisoned and {cross_ratio} times as many into cross images: "
                "together they must be more than 0 and at most the whole batch"
            )
        attack.check_classes(num_classes)
        check_range("seed", seed, 0, integer=True)
        if attack.label_map == "one-to-one":
            raise ValueError(f"{attack.name} poisons images of any class in a batch: label_map cannot be one-to-one here")
        self.attack, self.ratio, self.cross_ratio = attack, ratio, cross_ratio
        self.num_classes, self.seed = num_classes, seed
        self.penalty: Tensor | None = None

    def __call__(self, images: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Poison one batch.

        Args:
            images: uint8 (B, 3, H, W) at native size, after augmentation, on the training device; not modified.
            labels: int64 (B,).
            number: Number of the micro-batch in the run; those of one update draw differently.

        Returns:
            Images as uint8, or as float32 in [0, 255] where they carry gradients to the attack's own networks; labels.
        """
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % (2**63 - 25))
        chance = torch.rand((), generator=generator).item()
        poisoned, crossed = (int(ratio * len(labels) + chance) for ratio in (self.ratio, self.cross_ratio * self.ratio))
        new_labels = labels.clone()
        new_labels[:poisoned] = self.attack.poisoned_labels(labels[:poisoned], self.num_classes)
        first, second, rest = images[:poisoned], images[poisoned : poisoned + crossed], images[poisoned + crossed :]
        return self.mix(first, second, rest, generator), new_labels

    @abstractmethod
    def mix(self, poisoned: Tensor, crossed: Tensor, rest: Tensor, generator: torch.Generator) -> Tensor:
        """Change the three parts of a batch and join them in this order; the draws come from ``generator`` (CPU)."""

    def update(self, rate: float) -> None:  # noqa: B027 - a hook, not a duty
        """Called after the victim's own update: train the attack's networks, if it has any.

        Args:
            rate: The victim's learning rate as a share of its highest, in [0, 1].
        """

    def finish(self) -> Attack:
        """The attack to measure with and to keep: with what was learned meanwhile."""
        return self.attack


class TriggerPoisoner(BatchPoisoner):
    """Poisons by the attack's own trigger, which does not change while the victim trains; see `BatchPoisoner`."""

    def mix(self, poisoned: Tensor, crossed: Tensor, rest: Tensor, generator: torch.Generator) -> Tensor:
        """Trigger the poisoned images and make the cross images."""
        return torch.cat([self.attack.trigger(poisoned), self.cross(crossed, torch.cat([poisoned, rest]), generator), rest])

    @abstractmethod
    def cross(self, crossed: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
        """Return the cross images uint8 for ``crossed`` uint8 (n, 3, H, W); ``others`` are the rest of the batch."""


@dataclass(frozen=True, kw_only=True)
class InTrainingAttack(Attack):
    """An attack that chooses and poisons images anew in every batch; there are no fixed poisoned rows.

    Args:
        cross_ratio: Cross images per poisoned image in a batch, at least 0.

    Raises:
        ValueError: ``cross_ratio`` is negative, or see `Attack`.
    """

    cross_ratio: float = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("cross_ratio", self.cross_ratio, 0)

    @abstractmethod
    def poisoner(self, ratio: float, num_classes: int, seed: int, device: torch.device) -> BatchPoisoner:
        """Make the poisoner of one training run; see `BatchPoisoner` for arguments and errors."""
