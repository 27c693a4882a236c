"""Samples as the data sets of Trainer's users yield them: what they hold, and batches of them.

A sample is a mapping with ``pixel_values``, or with ``image``, and a label; or a pair of picture and label, as torchvision and
`TensorDataset` have it. Floats are ready for the model, PIL pictures and uint8 pixels are images as they are.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset
from tqdm.auto import tqdm

from .images import RawImages, pixels_of, stacked

LABELS = ("labels", "label", "label_ids")  # what data sets call them, in the order in which Trainer's collators look
WANTED = (
    "it must be pixel_values ready for the model and labels, or a pair of these; or a PIL picture and its label, which "
    "load_images(data) brings into that form"
)
# What is no data set of samples, and what its owner may have meant.
INSTEAD = (
    ((str, bytes), 'load_images(name_or_path)["train"]'),
    ((datasets.DatasetDict, datasets.IterableDatasetDict), "one of its splits, {splits}"),
    ((Mapping, Tensor, np.ndarray), "torch.utils.data.TensorDataset(pixel_values, labels), or RawImages of uint8 pixels"),
    (DataLoader, "its dataset, and per_device_train_batch_size= in the configuration"),
)


def check_kind(dataset: Any, name: str) -> None:
    """Refuse what is no data set of samples.

    Args:
        dataset: Anything.
        name: Of the argument.

    Raises:
        ValueError: It is none; the message names its type and says what to pass.
    """
    for kinds, instead in INSTEAD:
        if isinstance(dataset, kinds):
            splits = " or ".join(f"{name}[{split!r}]" for split in dataset) if "{splits}" in instead else ""
            raise ValueError(f"{name} is a {type(dataset).__name__}: pass {instead.format(splits=splits)}")
    if not hasattr(dataset, "__getitem__") and not isinstance(dataset, torch.utils.data.IterableDataset):
        raise ValueError(f"{name} is a {type(dataset).__name__}, no data set of samples; of a sample {WANTED}")


def pair_of(sample: Any, columns: tuple[str, ...] = ("pixel_values",)) -> tuple[Any, Any] | None:
    """What a sample has in the first of the columns, and its label or None; None if the sample is of another form."""
    if isinstance(sample, tuple | list) and len(sample) == 2:
        return tuple(sample)
    if isinstance(sample, Mapping) and (found := [column for column in columns if column in sample]):
        return sample[found[0]], next((sample[name] for name in LABELS if sample.get(name) is not None), None)
    return None


def is_picture(sample: Any) -> bool:
    """Whether a sample holds an image as it is, which is to be brought to the model's size, augmented and normalised."""
    if isinstance(sample, Mapping) and "pixel_values" in sample:
        return False
    picture, _ = pair_of(sample, ("image",)) or (None, None)
    return isinstance(picture, Image.Image) or getattr(picture, "dtype", None) in (torch.uint8, np.dtype("uint8"))


def leaves(dataset: Any) -> list[Any]:
    """The data sets that a `Subset` or a `ConcatDataset` is made of; any other data set is its own."""
    if isinstance(dataset, Subset):
        return leaves(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return [leaf for part in dataset.datasets for leaf in leaves(part)]
    return [dataset]


def known_class_names(dataset: Any) -> Iterator[list[str]]:
    """What is known of the classes of a data set: of a label column of `ClassLabel`, of torchvision's attribute ``classes``."""
    for leaf in leaves(dataset):
        if isinstance(leaf, datasets.Dataset | datasets.IterableDataset):
            features = [(leaf.features or {}).get(name) for name in LABELS]
            yield from [feature.names for feature in features if isinstance(feature, ClassLabel)]
        elif isinstance(names := getattr(leaf, "classes", None), list):  # of torchvision's data sets
            yield [str(name) for name in names]


def read_pictures(dataset: Any, class_names: list[str]) -> RawImages:
    """Read a data set of pictures and labels into memory, once, showing progress.

    Args:
        dataset: With a length; its samples are those that `is_picture` means. uint8 tensors are (3, H, W), arrays (H, W, 3).
        class_names: In the order of the labels.

    Raises:
        ValueError: A transform of torchvision's is on it, whose draws would be kept for ever; a sample is of another form.
    """
    if any(getattr(leaf, "transform", None) is not None for leaf in leaves(dataset)):
        raise ValueError(
            "the data set has a transform and yields pictures, which are read once: leave the transform out, since the trainer "
            "resizes, augments and normalises; or let it yield normalised floats of the model's size"
        )
    images, labels = [], []
    for row in tqdm(range(len(dataset)), "Reading images", unit="image"):
        sample = dataset[row]
        if not is_picture(sample):
            raise ValueError(f"sample {row} is no picture with its label, as the first is: replace it or leave it out")
        picture, label = pair_of(sample, ("image",))
        try:
            picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
            images.append(pixels_of(ImageOps.exif_transpose(picture)) if isinstance(picture, Image.Image) else picture)
        except (TypeError, OSError, ValueError) as error:
            raise ValueError(f"sample {row} holds no RGB or grey picture ({error}): replace it or leave it out") from error
        labels.append(label)
    return RawImages(stacked(images), _label_tensor(labels, len(class_names)), class_names)


class Collator:
    """Makes batches of samples; those that a `TrainingImages` made whole stay as they are.

    Args:
        num_labels: Of the model.
        own: A user's collator, which is handed single samples as the data set yields them; None for the one here, which takes
            ``pixel_values`` and labels and leaves everything else out.
    """

    def __init__(self, num_labels: int, own: Callable[[list[Any]], dict[str, Any]] | None = None):
        self.num_labels, self.own = num_labels, own

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """Make a batch: ``pixel_values``, float32 or uint8 (B, 3, h, w), and where there are any ``labels``, int64 (B,).

        Raises:
            ValueError: A sample is of no known form, or the label is none of the model's.
        """
        if self.own:
            return self.own(_single_samples(batch) if isinstance(batch, dict) else batch)
        if isinstance(batch, dict):
            return batch
        pictures, labels = zip(*map(_ready_pair, batch), strict=True)
        batch = {"pixel_values": _stack(pictures)}
        return batch if all(label is None for label in labels) else batch | {"labels": _label_tensor(labels, self.num_labels)}


def _ready_pair(sample: Any) -> tuple[Any, Any]:
    if (pair := pair_of(sample)) is not None:
        return pair
    of = ", ".join(map(str, sample)) if isinstance(sample, Mapping) else f"{len(sample)}" if isinstance(sample, tuple) else ""
    raise ValueError(f"a sample is a {type(sample).__name__}{of and f' of {of}'}: {WANTED}")


def _single_samples(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _stack(pictures: tuple[Any, ...]) -> Tensor:
    if any(isinstance(picture, Image.Image) for picture in pictures):
        raise ValueError("PIL pictures are taken from data sets that yield nothing else and have a length; got some in a batch")
    tensors = [torch.as_tensor(picture) for picture in pictures]
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1 or len(tensors[0].shape) != 3:
        raise ValueError(f"pixel_values must be (3, h, w), all of one size; got {' and '.join(map(str, sorted(shapes)))}")
    if tensors[0].dtype != torch.uint8 and not tensors[0].is_floating_point():
        raise ValueError(f"pixel_values must be floats, ready for the model, or uint8; got {tensors[0].dtype}")
    pixels = torch.stack(tensors)
    return pixels if pixels.dtype == torch.uint8 else pixels.float()


def _label_tensor(labels: Any, num_labels: int) -> Tensor:
    for label in labels:
        kind = torch.as_tensor(label) if label is not None else torch.empty(0)
        if kind.ndim != 0 or kind.is_floating_point() or not 0 <= kind < num_labels:
            raise ValueError(f"a label must be one integer in [0, {num_labels}), a class of the model; got {label!r}")
    return torch.as_tensor(labels, dtype=torch.int64)
