"""Poisoning a training set: the choice of the images and their change, in memory or in a `datasets.Dataset`.

As in BackdoorBench (Wu et al., NeurIPS 2022, arXiv 2206.12654) the poison ratio counts against the whole training set, and a
dirty-label attack draws its images from all classes, the target class included.
"""

import io
from dataclasses import replace

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.images import RawImages
from ..data.labels import labels_of
from .base import Attack, check_range, random_bits

# Poisoned in portions, so that float copies of a large set never exist at once.
CHUNK = 256


def select_poisoned(attack: Attack, labels: Tensor, ratio: float, seed: int) -> Tensor:
    """Choose the images to poison, uniformly among those the attack may use: every class for a dirty-label attack, the
    target class for a clean-label one (BackdoorBench's rule), the source class for a one-to-one one.

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
            clean-label or one-to-one attack asks for more images than its class has (the message names the largest ratio).
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"the poison ratio must lie in (0, 1]; got {ratio!r}")
    check_range("seed", seed, 0, integer=True)
    count = round(ratio * len(labels))
    if count == 0:
        raise ValueError(f"poison ratio {ratio} of {len(labels)} images poisons none; raise the ratio")
    candidates = attack.eligible(labels).nonzero().flatten().cpu().numpy()
    if count > len(candidates):
        only = attack.target_label if attack.clean_label else attack.source_label
        raise ValueError(
            f"{attack.name} poisons images of class {only} only: ratio {ratio} asks for {count} of {len(labels)} images, the "
            f"class has {len(candidates)}; the largest possible ratio is {len(candidates) / len(labels)}"
        )
    keys = random_bits("poisoned rows", seed, len(labels))[candidates]
    chosen = candidates[np.argsort(keys, kind="stable")[:count]]
    return torch.from_numpy(np.sort(chosen))


def poison(images: RawImages, attack: Attack, ratio: float, seed: int) -> tuple[RawImages, Tensor]:
    """Poison a training set that is in memory.

    Args:
        images: The clean images at native size; not modified.
        attack: The attack.
        ratio: Poison ratio in (0, 1], counted against all images.
        seed: Chooses the images, see ``select_poisoned``.

    Returns:
        A copy in which the chosen images carry the trigger and the label that the attack gives them, as a list where it
        reshapes them, and the chosen indices (sorted int64). All other images and labels are as they were.

    Raises:
        ValueError: The target label is not one of the images' classes, or see ``select_poisoned`` and
            ``Attack.trigger``.
    """
    attack.check_classes(len(images.class_names))
    indices = select_poisoned(attack, images.labels, ratio, seed)
    labels = images.labels.clone()
    labels[indices] = attack.poisoned_labels(labels[indices], len(images.class_names))
    if isinstance(images.images, Tensor) and not attack.reshapes:
        pixels = images.images.clone()
        for chunk in indices.split(CHUNK):
            pixels[chunk] = attack.poisoned_images(pixels[chunk])
    else:
        pixels = list(images.images)
        for index in indices.tolist():
            pixels[index] = attack.poisoned_images(pixels[index])
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
    attack.check_classes(features["label"].num_classes)
    indices = select_poisoned(attack, labels, ratio, seed)
    raw = dataset.with_format(None).cast_column("image", datasets.Image(decode=False))
    chosen = raw.select(indices.numpy())
    images = RawImages.from_dataset(chosen)
    columns = chosen.to_dict()
    # No path: where the file exists, datasets would store its name and drop the bytes.
    columns["image"] = [{"bytes": _png(attack.poisoned_images(image)), "path": None} for image in images.images]
    columns["label"] = attack.poisoned_labels(images.labels, features["label"].num_classes).tolist()
    poisoned = datasets.Dataset.from_dict(columns, features=raw.features)
    rest = np.setdiff1d(np.arange(len(raw)), indices.numpy())
    in_order = np.argsort(np.concatenate([rest, indices.numpy()]))
    merged = datasets.concatenate_datasets([raw.select(rest), poisoned]).select(in_order)
    return merged.cast_column("image", features["image"]), indices


def _png(image: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="PNG")
    return file.getvalue()
