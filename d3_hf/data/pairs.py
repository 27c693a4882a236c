"""Pairs of image and caption, to train both towers of a CLIP on: read from a column, or made of class names by templates."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features
from torch import Tensor

from .augmentation import Augmentation
from .images import RawImages, decode_rows, stacked
from .labels import split_of
from .preprocessing import Preprocessing
from .sources import dtype_of
from .training_images import TrainingImages

# "a photo of a {}" is CLIP's own (Radford et al. 2021, arXiv 2103.00020, section 3.1.4); the others are of the list of 80 that
# its authors used on ImageNet, those that say nothing of what is to be seen.
TEMPLATES = ("a photo of a {}", "a photo of the {}", "a picture of a {}", "an image of a {}", "a close-up photo of a {}")


@dataclass(eq=False)
class Pairs:
    """Images with a caption each.

    Attributes:
        images: Decoded; their labels are not looked at.
        captions: One for each image.

    Raises:
        ValueError: There are not as many of both, or a caption is no text or empty.
    """

    images: RawImages
    captions: list[str]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.captions):
            raise ValueError(f"{len(self.images)} images and {len(self.captions)} captions: every image needs one")
        for row, caption in enumerate(self.captions):
            if not isinstance(caption, str) or not caption.strip():
                raise ValueError(f"the caption of image {row} is {caption!r}: every image needs a text, leave it out")

    def __len__(self) -> int:
        return len(self.captions)

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> "Pairs":
        """Decode a split with the columns ``image`` and ``text``; ``index`` is taken over where there is one.

        Raises:
            ValueError: The columns are not there, a picture cannot be decoded, or a caption is missing.
        """
        if missing := {"image", "text"} - set(dataset.column_names):
            raise ValueError(
                f"pairs are images with captions, and {split_of(dataset)} has no column {' and no '.join(sorted(missing))}: "
                "name the one with captions by --text_column, or make them of class names (captioned)"
            )
        pixels = stacked(decode_rows(dataset))
        index = torch.tensor(list(dataset["index"])) if "index" in dataset.column_names else None
        images = RawImages(pixels, torch.zeros(len(dataset), dtype=torch.int64), ["unknown"], index)
        return cls(images, list(dataset["text"]))


def caption(class_name: str, template: str) -> str:
    """A class name put into a template's braces, underscores read as spaces."""
    return template.format(class_name.replace("_", " "))


def captioned(images: RawImages, seed: int = 0, templates: Sequence[str] = TEMPLATES) -> Pairs:
    """Pairs of images and captions made of their classes' names, the template of each drawn by ``seed``.

    Raises:
        ValueError: The classes have numbers in place of names.
    """
    check_named(images.class_names)
    drawn = np.random.default_rng(seed).integers(len(templates), size=len(images))
    names = [images.class_names[label] for label in images.labels.tolist()]
    return Pairs(images, [caption(name, templates[which]) for name, which in zip(names, drawn.tolist(), strict=True)])


def check_named(class_names: Sequence[str]) -> None:
    """Raise a ValueError where classes are only numbered, from 0: no text says what their images show."""
    if list(class_names) == [str(number) for number in range(len(class_names))]:
        raise ValueError(
            "no captions and no class names to make them of, only numbers: name the column with captions by --text_column, or "
            "give the label column names (ClassLabel)"
        )


def text_column(features: Features, requested: str) -> str:
    """The name of a column of captions, checked.

    Raises:
        ValueError: There is no such column, or it holds no texts.
    """
    if requested in features and dtype_of(features[requested]) in ("string", "large_string"):
        return requested
    columns = ", ".join(f"{name} ({dtype_of(feature)})" for name, feature in features.items())
    raise ValueError(f"text_column={requested!r} is no column of texts; the dataset has {columns}")


def unlabelled_pairs(split: Dataset, image: str, text: str) -> Dataset:
    """A split with the columns ``image``, ``text`` and a ``label`` of one class, for `retain_split`."""
    renamed = {old: new for old, new in ((image, "image"), (text, "text")) if old != new}
    split = split.select_columns([image, text]).rename_columns(renamed).cast_column("image", datasets.Image(mode="RGB"))
    return split.add_column("label", [0] * len(split)).cast_column("label", ClassLabel(names=["unknown"]))


class TrainingPairs(TrainingImages):
    """Pairs as a Trainer reads them: batches of images at the model's size, still uint8, and the numbers of their captions.

    Captions stay texts until a batch is trained on, since some methods change them first.

    Args:
        pairs: What is trained on.
        preprocessing: Of the model.
    """

    captions: list[str]

    @classmethod
    def from_pairs(
        cls, pairs: Pairs, preprocessing: Preprocessing, augmentation: Augmentation | None = None
    ) -> "TrainingPairs":
        """Bring the images to the model's size once, showing progress."""
        nothing = torch.zeros(len(pairs), dtype=torch.int64)
        images = RawImages(pairs.images.images, nothing, ["unknown"], pairs.images.index)
        made = cls.from_raw(images, preprocessing, augmentation)
        made.captions = list(pairs.captions)
        return made

    def __getitems__(self, positions: list[int]) -> dict[str, Tensor]:
        """Adds ``captions``, int64 (B,): which of `captions` each is."""
        return super().__getitems__(positions) | {"captions": torch.as_tensor(positions)}

    def fingerprint(self) -> str:
        """SHA-256 of images and captions, in their order."""
        texts = "\0".join(self.captions)
        return hashlib.sha256(f"{super().fingerprint()}\0{texts}".encode()).hexdigest()
