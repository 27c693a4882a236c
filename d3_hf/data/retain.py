"""Retain and evaluation sets in the form that a trainer's loaders read."""

from typing import TYPE_CHECKING, Any

import datasets
from torch import Tensor
from transformers import PreTrainedModel, default_data_collator

from ..training.config import PurifyConfig
from .augmentation import Augmentation
from .images import RawImages
from .labels import check_labels
from .preprocessing import Preprocessing
from .streaming import StreamedImages

if TYPE_CHECKING:
    from ..training.trainer import PurifyTrainer
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .training_images import without_augmentation

if TYPE_CHECKING:
    from ..training.trainer import PurifyTrainer


def training_images(
    dataset: Any,
    trainer: "type[PurifyTrainer]",
    model: PreTrainedModel,
    args: PurifyConfig,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
) -> Any:
    """Bring a retain set into the form that the loader reads; samples that are ready for the model stay as they are.

    Args:
        dataset: See `PurifyTrainer`.
        trainer: Says how images are held and whether they may be streamed.
        model: Whose classes the labels must be.
        args: The defence's configuration.
        preprocessing: Of the model.
        augmentation: What to do to the images.

    Raises:
        ValueError: The labels are not the model's; a stream where the defence takes none, or that cannot be used (see
            `StreamedImages`), or with ``average_last``: it averages epochs, and a stream has none.
    """
    if not isinstance(dataset, datasets.IterableDataset):
        return _held(dataset, trainer, model, preprocessing, augmentation)
    if not trainer.streams:
        raise ValueError(f"{trainer.method} looks at the retain set as a whole: load it without streaming=True")
    if args.average_last:
        raise ValueError("average_last averages epochs, and a stream has none: leave it out or load without streaming=True")
    images = StreamedImages(dataset, preprocessing, augmentation, augmentation.seed, args.process_index, args.world_size)
    check_labels(images.class_names, model.config)
    return images


def evaluation_images(
    dataset: Any, trainer: "type[PurifyTrainer]", model: PreTrainedModel, preprocessing: Preprocessing
) -> Any:
    """Bring images to measure ACC on into the form that the loader reads; a ValueError if they are streamed."""
    if isinstance(dataset, datasets.IterableDataset):
        raise ValueError("eval_dataset is measured as a whole: load it without streaming=True")
    return _held(dataset, trainer, model, preprocessing, None)


def images_of(trainer: "PurifyTrainer") -> int:
    """How many images the retain set has; of a stream, how many were drawn from it."""
    if isinstance(trainer.train_dataset, StreamedImages):
        return trainer.state.global_step * trainer.get_total_train_batch_size(trainer.args)
    return len(trainer.train_dataset) if trainer.train_dataset is not None else 0


def collate(batch: Any) -> dict[str, Tensor]:
    """A batch that `TrainingImages` made whole stays as it is; single samples of other datasets are stacked."""
    return batch if isinstance(batch, dict) else default_data_collator(batch)


def column(dataset: Any, name: str) -> list[int] | None:
    """A column of a `datasets.Dataset`, where there is one."""
    if isinstance(dataset, datasets.Dataset) and name in dataset.column_names:
        return list(dataset[name])
    return None


def _held(
    dataset: Any, trainer: "type[PurifyTrainer]", model, preprocessing: Preprocessing, augmentation: Augmentation | None
) -> Any:
    raw = RawImages.from_dataset(dataset) if isinstance(dataset, datasets.Dataset) else dataset
    if not isinstance(raw, RawImages):
        return dataset
    check_labels(raw.class_names, model.config)
    return trainer.images_class.from_raw(raw, preprocessing, augmentation)


def retain_batches(trainer: "PurifyTrainer", purpose: str, augmented: bool) -> Iterator[dict[str, Tensor]]:
    """Yield the retain set once, in order, as the model takes it; every process sees all of it.

    Args:
        trainer: Its ``train_dataset``.
        purpose: For the progress bar.
        augmented: As in the epoch of training that the data set was last set to, or as the images are.

    Raises:
        ValueError: The retain set is a stream, which has no end.
    """
    if isinstance(trainer.train_dataset, StreamedImages):
        raise ValueError(f"{purpose} takes the retain set as a whole: load it without streaming=True")
    dataset = trainer.train_dataset if augmented else without_augmentation(trainer.train_dataset)
    size, generator = trainer.args.per_device_train_batch_size, torch.Generator()  # its own: not the global one's draws
    loader = DataLoader(dataset, size, collate_fn=trainer.data_collator, generator=generator)
    hidden = trainer.args.disable_tqdm or not trainer.is_world_process_zero()
    for batch in tqdm(loader, purpose, disable=hidden, leave=False):
        yield trainer._prepare_inputs(batch)
