"""What every attack shares: its description, the choice of the images to poison, and the poisoning itself.

An attack is a trigger on raw uint8 images at native size, before any preprocessing, and a rule for labels. Attacks
only make victims and measure them; no trainer or defence imports this package. Conventions follow BackdoorBench (Wu et
al., NeurIPS 2022, arXiv 2206.12654): the poison ratio counts against the whole training set, and a dirty-label attack
draws its images from all classes, the target class included.
"""

import io
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data import RawImages
from ..labels import labels_of

# Poisoned in portions, so that float copies of a large set never exist at once.
CHUNK = 256


def check_range(name: str, value: float, low: float, high: float = float("inf"), integer: bool = False) -> None:
    """Check one parameter of an attack.

    Args:
        name: The parameter's name, for the error.
        value: Its value.
        low: Smallest value allowed.
        high: Largest value allowed.
        integer: Whether only an ``int`` will do.

    Raises:
        ValueError: ``value`` is not a number (with ``integer``: an ``int``) in ``[low, high]``.
    """
    number = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        kind = "an integer" if integer else "a number"
        bounds = f"at least {low}" if high == float("inf") else f"in [{low}, {high}]"
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
    """
    return np.random.PCG64([*purpose.encode(), seed]).random_raw(count)


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """A trigger and a rule for labels; the fields of a subclass are the attack's parameters.

    Args:
        target_label: The class that the attacker wants, from 0. Default 0 as in BackdoorBench.

    Raises:
        ValueError: A parameter is out of its range.
    """

    name: ClassVar[str]
    clean_label: ClassVar[bool] = False
    paper: ClassVar[str]

    target_label: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):  # JSON and YAML know lists only
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        check_range("target_label", self.target_label, 0, integer=True)

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
        if images.dtype != torch.uint8 or images.ndim not in (3, 4) or images.shape[-3] != 3:
            raise ValueError(
                "a trigger acts on raw uint8 images of shape (B, 3, H, W) or (3, H, W), before preprocessing; got "
                f"{images.dtype} of shape {tuple(images.shape)}"
            )
        return self._stamp(images) if images.ndim == 4 else self._stamp(images[None])[0]

    @abstractmethod
    def _stamp(self, images: Tensor) -> Tensor:
        """Return new triggered images for uint8 (B, 3, H, W), image by image, without changing the input."""

    def eligible(self, labels: Tensor) -> Tensor:
        """Which images may be poisoned: bool (N,) for int64 labels (N,); with clean labels only the target class."""
        return labels == self.target_label if self.clean_label else torch.ones_like(labels, dtype=torch.bool)

    def poisoned_labels(self, labels: Tensor) -> Tensor:
        """Labels that poisoned images carry in training, of ``labels``' shape: the target label (all-to-one)."""
        return torch.full_like(labels, self.target_label)

    def describe(self) -> dict[str, Any]:
        """Description that survives JSON: ``{"name": ..., parameters...}``; ``from_description`` turns it back."""
        parameters = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"name": self.name, **parameters}


def select_poisoned(attack: Attack, labels: Tensor, ratio: float, seed: int) -> Tensor:
    """Choose the images to poison, uniformly among those the attack may use: every class for a dirty-label attack, the
    target class for a clean-label one (BackdoorBench's rule).

    The choice depends on ``seed`` and the labels only and is the same on every machine; a smaller ratio with the same
    seed chooses a subset of a larger one.

    Args:
        attack: The attack.
        labels: int64 (N,), true labels of the whole training set.
        ratio: Poison ratio in (0, 1], counted against all N images.
        seed: Integer of at least 0.

    Returns:
        Sorted int64 indices, exactly ``round(ratio * N)`` of them.

    Raises:
        ValueError: ``ratio`` is outside (0, 1] or so small that no image would be poisoned, ``seed`` is negative, or a
            clean-label attack asks for more images than the target class has (the message names the largest ratio).
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"the poison ratio must lie in (0, 1]; got {ratio!r}")
    check_range("seed", seed, 0, integer=True)
    count = round(ratio * len(labels))
    if count == 0:
        raise ValueError(f"poison ratio {ratio} of {len(labels)} images poisons none; raise the ratio")
    candidates = attack.eligible(labels).nonzero().flatten().cpu().numpy()
    if count > len(candidates):
        raise ValueError(
            f"{attack.name} poisons images of its target class {attack.target_label} only: ratio {ratio} asks for "
            f"{count} of {len(labels)} images, the class has {len(candidates)}; the largest possible ratio is "
            f"{len(candidates) / len(labels)}"
        )
    keys = random_bits("poisoned rows", seed, len(labels))[candidates]
    chosen = candidates[np.argsort(keys, kind="stable")[:count]]
    return torch.from_numpy(np.sort(chosen))


def _check_target(attack: Attack, num_classes: int) -> None:
    if attack.target_label >= num_classes:
        raise ValueError(f"target_label {attack.target_label} is out of range: the images have classes 0 to {num_classes - 1}")


def poison(images: RawImages, attack: Attack, ratio: float, seed: int) -> tuple[RawImages, Tensor]:
    """Poison a training set that is in memory.

    Args:
        images: The clean images at native size; not modified.
        attack: The attack.
        ratio: Poison ratio in (0, 1], counted against all images.
        seed: Chooses the images, see ``select_poisoned``.

    Returns:
        A copy in which the chosen images carry the trigger and the label that the attack gives them, and the chosen
        indices (sorted int64). All other images and labels are as they were.

    Raises:
        ValueError: The target label is not one of the images' classes, or see ``select_poisoned`` and
            ``Attack.trigger``.
    """
    _check_target(attack, len(images.class_names))
    indices = select_poisoned(attack, images.labels, ratio, seed)
    labels = images.labels.clone()
    labels[indices] = attack.poisoned_labels(labels[indices])
    if isinstance(images.images, Tensor):
        pixels = images.images.clone()
        for chunk in indices.split(CHUNK):
            pixels[chunk] = attack.trigger(pixels[chunk])
    else:
        pixels = list(images.images)
        for index in indices.tolist():
            pixels[index] = attack.trigger(pixels[index])
    return replace(images, images=pixels, labels=labels), indices


def poison_dataset(dataset: datasets.Dataset, attack: Attack, ratio: float, seed: int) -> tuple[datasets.Dataset, Tensor]:
    """Poison a ``datasets.Dataset``, losslessly: a chosen image is stored as PNG, every other one keeps its own bytes.

    Args:
        dataset: Columns ``image`` (``Image``) and ``label`` (``ClassLabel``), as ``load_images`` gives them; other
            columns are kept.
        attack: The attack.
        ratio: Poison ratio in (0, 1], counted against all rows.
        seed: Chooses the rows, the same ones as ``poison`` does.

    Returns:
        The poisoned dataset, of the same features, and the chosen rows (sorted int64).

    Raises:
        ValueError: A column is missing or of another type, a label is missing, a chosen picture cannot be decoded, or
            see ``poison``.
    """
    features = dataset.features
    if not isinstance(features.get("image"), datasets.Image):
        raise ValueError(
            f"no Image column 'image' among the columns {', '.join(features)}: pass the dataset through load_images first"
        )
    labels = torch.from_numpy(labels_of(dataset))
    _check_target(attack, features["label"].num_classes)
    indices = select_poisoned(attack, labels, ratio, seed)
    raw = dataset.with_format(None).cast_column("image", datasets.Image(decode=False))
    chosen = raw.select(indices.numpy())
    images = RawImages.from_dataset(chosen)
    columns = chosen.to_dict()
    # No path: where the file exists, datasets would store its name and drop the bytes.
    columns["image"] = [{"bytes": _png(attack.trigger(image)), "path": None} for image in images.images]
    columns["label"] = attack.poisoned_labels(images.labels).tolist()
    poisoned = datasets.Dataset.from_dict(columns, features=raw.features)
    rest = np.setdiff1d(np.arange(len(raw)), indices.numpy())
    in_order = np.argsort(np.concatenate([rest, indices.numpy()]))
    merged = datasets.concatenate_datasets([raw.select(rest), poisoned]).select(in_order)
    return merged.cast_column("image", features["image"]), indices


def _png(image: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="PNG")
    return file.getvalue()
