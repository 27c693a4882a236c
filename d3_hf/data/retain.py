"""Retain and evaluation sets in the form that a trainer's loaders read."""

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PretrainedConfig, default_data_collator

from .augmentation import Augmentation
from .images import RawImages
from .labels import check_labels
from .preprocessing import Preprocessing
from .streaming import StreamedImages
from .training_images import TrainingImages, without_augmentation


def held_images(
    dataset: Any,
    config: PretrainedConfig,
    preprocessing: Preprocessing,
    augmentation: Augmentation | None = None,
    images_class: type[TrainingImages] = TrainingImages,
) -> Any:
    """Bring a data set into memory at the model's size; samples that are ready for the model stay as they are.

    Args:
        dataset: A `datasets.Dataset` or `RawImages`; anything else is returned itself.
        config: Of the model whose classes the labels must be.
        preprocessing: Of the model.
        augmentation: What to do to the images; None for evaluation.
        images_class: What holds them.

    Raises:
        ValueError: The labels are not the model's, or see `RawImages.from_dataset`.
    """
    raw = RawImages.from_dataset(dataset) if isinstance(dataset, datasets.Dataset) else dataset
    if not isinstance(raw, RawImages):
        return dataset
    check_labels(raw.class_names, config)
    return images_class.from_raw(raw, preprocessing, augmentation)


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


def collate(batch: Any) -> dict[str, Tensor]:
    """A batch that `TrainingImages` made whole stays as it is; single samples of other datasets are stacked."""
    return batch if isinstance(batch, dict) else default_data_collator(batch)


def column(dataset: Any, name: str) -> list[int] | None:
    """A column of a `datasets.Dataset`, where there is one."""
    if isinstance(dataset, datasets.Dataset) and name in dataset.column_names:
        return list(dataset[name])
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
    if isinstance(dataset, StreamedImages):
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
