"""Retain and evaluation sets in the form that a trainer's loaders read."""

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from ..labels import check_labels
from . import samples
from .augmentation import Augmentation
from .images import RawImages, decode_rows, stacked
from .preprocessing import Preprocessing
from .streaming import StreamedImages
from .training_images import TrainingImages, without_augmentation


def held_images(
    dataset: Any,
    config: PretrainedConfig,
    preprocessing: Preprocessing,
    augmentation: Augmentation | None = None,
    images_class: type[TrainingImages] = TrainingImages,
    name: str = "the data set",
) -> Any:
    """Bring a data set into memory at the model's size; samples that are ready for the model stay as they are.

    Args:
        dataset: `RawImages`; a `datasets.Dataset` of pictures, or one whose column ``pixel_values`` or transform is ready for
            the model; any other data set of the samples that `samples` describes. None stays None.
        config: Of the model whose classes the labels must be.
        preprocessing: Of the model.
        augmentation: What to do to the images; None for evaluation.
        images_class: What holds them.
        name: What errors call the data set.

    Raises:
        ValueError: The labels are not the model's; it is no such data set, or see `RawImages.from_dataset`.
    """
    if dataset is None or isinstance(dataset, TrainingImages):
        return dataset
    if not isinstance(dataset, RawImages):
        samples.check_kind(dataset, name)
        dataset = ready_or_raw(dataset, config, name)
    if not isinstance(dataset, RawImages):
        return dataset
    check_labels(dataset.class_names, config)
    return images_class.from_raw(dataset, preprocessing, augmentation)


def ready_or_raw(dataset: Any, config: PretrainedConfig, name: str) -> Any:
    """A data set as it is where its samples are ready for the model, `RawImages` where they are pictures; see `held_images`."""
    if isinstance(dataset, datasets.Dataset):
        is_transformed = dataset.format["type"] == "custom"
        if not is_transformed and "pixel_values" not in dataset.column_names:
            return RawImages.from_dataset(dataset)
        if not is_transformed:
            used = [column for column in dataset.column_names if column in ("pixel_values", *samples.LABELS)]
            dataset = dataset.with_format("torch", columns=used)
    for class_names in samples.known_class_names(dataset):
        check_labels(class_names, config)
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return dataset
    if len(dataset) == 0:
        raise ValueError(f"{name} holds no images")
    # A transform is asked for every sample anew; what it makes is never kept.
    if isinstance(dataset, datasets.Dataset) or not samples.is_picture(dataset[0]):
        return dataset
    class_names = next(samples.known_class_names(dataset), None) or [str(number) for number in range(config.num_labels)]
    return samples.read_pictures(dataset, class_names)


def unlabelled_images(dataset: Any, preprocessing: Preprocessing) -> "UnlabelledImages":
    """Pictures without labels, to predict: a `datasets.Dataset` with a column ``image``."""
    images = stacked(decode_rows(dataset))
    nothing = torch.zeros(len(dataset), dtype=torch.int64)
    return UnlabelledImages.from_raw(RawImages(images, nothing, ["unknown"]), preprocessing)


class UnlabelledImages(TrainingImages):
    """Images whose batches carry no labels."""

    def __getitems__(self, positions: list[int]) -> dict[str, Tensor]:
        """Return one batch: ``pixel_values`` uint8 (B, 3, h, w)."""
        return {"pixel_values": super().__getitems__(positions)["pixel_values"]}


def streamed_images(
    dataset: datasets.IterableDataset,
    config: PretrainedConfig,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    process: tuple[int, int],
) -> StreamedImages:
    """Images that are read while the model trains.

    Args:
        dataset: See `StreamedImages`.
        config: Of the model whose classes the labels must be.
        preprocessing: Of the model.
        augmentation: What to do to the images; its seed also shuffles them.
        process: Number of this process, and how many there are.

    Raises:
        ValueError: The labels are not the model's, or the stream cannot be used, see `StreamedImages`.
    """
    images = StreamedImages(dataset, preprocessing, augmentation, augmentation.seed, *process)
    check_labels(images.class_names, config)
    return images


def yields_ready(stream: datasets.IterableDataset) -> bool:
    """Whether a stream, as one that was mapped, yields ``pixel_values``; one that does not name its columns is looked into."""
    return "pixel_values" in (stream.column_names or next(iter(stream), ()))


def column(dataset: Any, name: str) -> list[int] | None:
    """A column of a `datasets.Dataset`, where there is one, whatever format or transform is set."""
    if isinstance(dataset, datasets.Dataset) and name in dataset.column_names:
        return list(dataset.with_format(None)[name])
    return None


def retain_batches(
    dataset: Any,
    batches: int | list[list[int]],
    collator: Callable[[Any], dict[str, Tensor]],
    purpose: str | None,
    augmented: bool = False,
    is_silent: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of a retain set, as its collator makes them; the global random numbers are left alone.

    Args:
        dataset: The retain set, with its length.
        batches: Images in each batch of the whole set in order, where a last single one, which has no statistics of its own,
            joins the batch before; or the rows of every batch.
        collator: The trainer's.
        purpose: What for, for progress bar and error.
        augmented: As in the epoch of training that the data set was last set to, or as the images are.
        is_silent: Whether there is no progress bar.

    Raises:
        ValueError: The retain set is a stream, which has no end.
    """
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise ValueError(f"{purpose} takes the retain set as a whole: load it without streaming=True")
    images = dataset if augmented else without_augmentation(dataset)
    rows = rows_of_batches(len(dataset), batches) if isinstance(batches, int) else batches
    loader = DataLoader(images, batch_sampler=rows, collate_fn=collator, generator=torch.Generator())
    yield from tqdm(loader, purpose, disable=is_silent, leave=False)


def rows_of_batches(count: int, size: int) -> list[list[int]]:
    """Rows 0 to ``count`` in order, ``size`` in each batch; a last single one joins the batch before."""
    rows = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    if size > 1 and len(rows) > 1 and len(rows[-1]) == 1:
        rows[-2:] = [rows[-2] + rows[-1]]
    return rows
