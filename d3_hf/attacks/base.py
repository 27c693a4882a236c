"""What every attack shares: its trigger, its rule for labels and its description.

An attack is a trigger on raw uint8 images at native size, before any preprocessing, and a rule for labels. Attacks
only make victims and measure them; no trainer of a defence imports this package. Conventions follow BackdoorBench (Wu et
al., NeurIPS 2022, arXiv 2206.12654).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.images import RawImages

LABEL_MAPS = ("all-to-one", "all-to-all", "one-to-one")


def check_range(name: str, value: float, low: float, high: float = math.inf, integer: bool = False) -> None:
    """Check one parameter of an attack.

    Args:
        name: The parameter's name, for the error.
        value: Its value.
        low: Smallest value allowed.
        high: Largest value allowed; without it any finite one is.
        integer: Whether only an ``int`` will do.

    Raises:
        ValueError: ``value`` is not a finite number (with ``integer``: an ``int``) in ``[low, high]``.
    """
    number = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or value == math.inf:
        kind = "an integer" if integer else "a number" if high < math.inf else "a finite number"
        bounds = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {kind} {bounds}; got {value!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError that lists ``choices`` unless ``value`` is one of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def random_bits(purpose: str, seed: int, count: int) -> np.ndarray:
    """Draw ``count`` uint64 that are the same on every machine: NumPy keeps the raw stream of PCG64 fixed, unlike that
    of its distributions (NEP 19).

    Args:
        purpose: Names the stream. Two purposes share nothing at the same seed: without it, the rows poisoned with seed
            0 would be the very rows of the retain set drawn with seed 0.
        seed: Any integer of at least 0.
        count: How many to draw; fewer are a prefix of more.

    Returns:
        uint64 (count,).
    """
    return np.random.PCG64([*purpose.encode(), seed]).random_raw(count)


def random_uniform(purpose: str, seed: int, count: int) -> np.ndarray:
    """Draw ``count`` float64 from [0, 1) that are the same on every machine; see `random_bits`."""
    return (random_bits(purpose, seed, count) >> 11) * 2.0**-53


def to_levels(values: Tensor) -> Tensor:
    """Round float64 grey levels in [0, 255] to the nearest uint8, a tie to the even one, alike on every machine."""
    # Rounded twice: the first drops the noise of sums, which could turn a tie either way on another machine.
    return values.round(decimals=6).round().to(torch.uint8)


def whole_scale(height: int, width: int, image_size: int) -> int:
    """By how much a trigger drawn for ``image_size`` pixels is enlarged on an image of (height, width): at least 1.

    Half rounds up: Python's round would shrink a patch at 2.5.
    """
    return max(1, (2 * min(height, width) + image_size) // (2 * image_size))


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """A trigger and a rule for labels; the fields of a subclass are the attack's parameters.

    Args:
        target_label: The class that the attacker wants, from 0. Default 0 as in BackdoorBench. Not used all-to-all.
        label_map: ``"all-to-one"``: every triggered image shall be called ``target_label`` (default, BackdoorBench);
            ``"all-to-all"``: an image of class y shall be called (y + 1) mod C; ``"one-to-one"``: images of
            ``source_label`` shall be called ``target_label``. One-to-one poisons images of the source class only, without
            cover images, so the trigger may carry over to other classes.
        source_label: The class that one-to-one turns into the target; only there.

    Attributes:
        name: What descriptions, recipes and tables call the attack.
        clean_label: Whether only images of the target class are poisoned, and labels stay (dirty label otherwise).
        paper: Address of the paper.
        reshapes: Whether poisoned images have another shape than the others; `poisoned_images` then takes one at a time.

    Raises:
        ValueError: A parameter is out of its range, a clean-label attack is given another map than all-to-one, or
            ``source_label`` is missing with one-to-one, given without it, or the target itself.
    """

    name: ClassVar[str]
    clean_label: ClassVar[bool] = False
    paper: ClassVar[str]
    reshapes: ClassVar[bool] = False

    target_label: int = 0
    label_map: str = "all-to-one"
    source_label: int | None = None

    def __post_init__(self) -> None:
        for parameter in self._parameters():  # JSON and YAML know lists only
            value = getattr(self, parameter)
            if isinstance(value, list):
                object.__setattr__(self, parameter, tuple(value))
        check_range("target_label", self.target_label, 0, integer=True)
        check_choice("label_map", self.label_map, LABEL_MAPS)
        if self.clean_label and self.label_map != "all-to-one":
            raise ValueError(f"{self.name} leaves labels alone: label_map must be all-to-one; got {self.label_map!r}")
        if (self.source_label is not None) != (self.label_map == "one-to-one"):
            raise ValueError(
                f"source_label belongs to label_map one-to-one; got source_label {self.source_label} with {self.label_map}"
            )
        if self.source_label is not None:
            check_range("source_label", self.source_label, 0, integer=True)
            if self.source_label == self.target_label:
                raise ValueError(f"source_label and target_label are both {self.target_label}; they must differ")

    def trigger(self, images: Tensor) -> Tensor:
        """Stamp the trigger on raw images.

        Args:
            images: uint8 (B, 3, H, W) or (3, H, W), RGB at native size, before any preprocessing, on any device. Never
                modified.

        Returns:
            A new uint8 tensor of the same shape on the same device; each image's bytes are the same alone and in a
            batch.

        Raises:
            ValueError: ``images`` has another dtype or shape, or is too small for the trigger.
        """
        return self._on_batch(self._stamp, images)

    def poisoned_images(self, images: Tensor) -> Tensor:
        """What the chosen images become in the training set; as `trigger`, unless the attack prepares them further.

        Args:
            images: uint8 (B, 3, H, W) or (3, H, W), as `trigger` takes them. Never modified.

        Returns:
            A new uint8 tensor of the same shape on the same device.

        Raises:
            ValueError: See `trigger`, or the attack lacks what it prepares them with.
        """
        return self._on_batch(self._poison, images)

    def quality(self, images: Tensor) -> dict[str, float]:
        """What the trigger does to uint8 (B, 3, H, W): ``largest_change`` of a pixel, in grey levels, 0 to 255."""
        return {"largest_change": (self.trigger(images).int() - images.int()).abs().max().item()}

    def _on_batch(self, change: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim not in (3, 4) or images.shape[-3] != 3:
            raise ValueError(
                "a trigger acts on raw uint8 images of shape (B, 3, H, W) or (3, H, W), before preprocessing; got "
                f"{images.dtype} of shape {tuple(images.shape)}"
            )
        return change(images) if images.ndim == 4 else change(images[None])[0]

    @abstractmethod
    def _stamp(self, images: Tensor) -> Tensor:
        """Return new triggered images for uint8 (B, 3, H, W), image by image, without changing the input."""

    def _poison(self, images: Tensor) -> Tensor:
        """Return the training images for uint8 (B, 3, H, W) that were chosen; by default triggered ones."""
        return self._stamp(images)

    def eligible(self, labels: Tensor) -> Tensor:
        """Which images may be poisoned: bool (N,) for int64 labels (N,); with clean labels only the target class."""
        if self.clean_label:
            return labels == self.target_label
        if self.label_map == "one-to-one":
            return labels == self.source_label
        return torch.ones_like(labels, dtype=torch.bool)

    def poisoned_labels(self, labels: Tensor, num_classes: int) -> Tensor:
        """What the attacker wants triggered images of true classes ``labels`` (int64, any shape) to be called."""
        if self.label_map == "all-to-all":
            return (labels + 1) % num_classes
        return torch.full_like(labels, self.target_label)

    def counted(self, labels: Tensor) -> Tensor:
        """Which triggered images ASR and RA count: bool (N,) for int64 labels (N,). All-to-one: those of another class than
        the target; all-to-all: all; one-to-one: the source class."""
        if self.label_map == "all-to-all":
            return torch.ones_like(labels, dtype=torch.bool)
        return labels == self.source_label if self.label_map == "one-to-one" else labels != self.target_label

    def check_classes(self, num_classes: int) -> None:
        """Raise a ValueError if a label of this attack is not one of ``num_classes`` classes."""
        for name in ("target_label", "source_label"):
            label = getattr(self, name)
            if label is not None and label >= num_classes:
                raise ValueError(f"{name} {label} is out of range: there are classes 0 to {num_classes - 1}")

    def describe(self) -> dict[str, Any]:
        """Description that survives JSON: ``{"name": ..., parameters...}``; ``from_description`` turns it back."""
        values = {parameter: getattr(self, parameter) for parameter in self._parameters()}
        return {"name": self.name} | {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}

    @classmethod
    def _parameters(cls) -> list[str]:
        return [parameter.name for parameter in fields(cls) if parameter.compare]


@dataclass(frozen=True, kw_only=True)
class LearnedAttack(Attack):
    """An attack whose trigger is learned by the attacker; a victim's folder keeps what was learned beside the description.

    Args:
        learned: What `fit` found, named tensors on the CPU; None before. No parameter: `describe` leaves it out.
    """

    learned: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)

    @abstractmethod
    def fit(self, images: RawImages, model: PreTrainedModel | None, seed: int) -> "LearnedAttack":
        """Learn the trigger.

        Args:
            images: The attacker's training images, all of one size; not modified.
            model: The attacker's own classifier without a backdoor, with ``image_processor``; None if there is none.
            seed: Integer of at least 0.

        Returns:
            A copy of this attack with ``learned`` filled in.

        Raises:
            ValueError: The attack needs a model and got none, or the images do not serve.
        """

    def _need(self) -> dict[str, Tensor]:
        """What was learned; raises a ValueError before `fit`."""
        if self.learned is None:
            raise ValueError(
                f"{self.name} has not learned its trigger yet: call fit(images, model, seed), or load it from a "
                "victim's folder with load_attack"
            )
        return self.learned
