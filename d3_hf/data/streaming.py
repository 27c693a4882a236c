"""Retain sets that do not fit in memory: a `datasets.IterableDataset`, read while the model trains."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import datasets
import torch
from datasets import ClassLabel
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from . import sources
from .augmentation import Augmentation
from .images import decode
from .preprocessing import Preprocessing

SHUFFLE_BUFFER = 1000  # images that wait for their turn: the default of datasets' own `shuffle`
DRAWN_AT_ONCE = 1024  # rows of an augmentation table


@dataclass(eq=False)
class StreamedImages(torch.utils.data.IterableDataset):
    """An endless stream of single training samples, this process's share of a `datasets.IterableDataset`.

    The stream is shuffled through a buffer of 1,000 images, anew in each pass, and begun again when it ends, so that no
    process runs dry before another. Files are shared out among the processes where their number is a multiple of the
    processes'; otherwise each process reads all of them and decodes its own images. Augmentation depends on the seed and on an
    image's number in the stream: one process sees what several see together where these share images and not files.

    Attributes:
        stream: ``load_dataset(..., streaming=True)["train"]``: one column of pictures, one of `ClassLabel`.
        preprocessing: Of the model.
        augmentation: What to do to the images.
        seed: Of the shuffling, at least 0.
        rank: Number of this process.
        world_size: How many there are.

    Raises:
        ValueError: The stream does not say what its columns hold, or not exactly one of them holds pictures and one labels with
            names.
    """

    stream: datasets.IterableDataset
    preprocessing: Preprocessing
    augmentation: Augmentation
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        features = self.stream.features
        if features is None:
            raise ValueError(
                "the stream does not say what its columns hold: "
                "stream.cast(Features({'image': Image(), 'label': ClassLabel(...)}))"
            )
        self.image_column = sources.image_column(features, None)
        self.label_column = sources.label_column(features, None)
        if not isinstance(features[self.label_column], ClassLabel):
            raise ValueError(
                f"the labels of a stream need names beforehand: stream.cast_column({self.label_column!r}, "
                "ClassLabel(names=[...]))"
            )
        self.class_names: list[str] = features[self.label_column].names
        columns = self.stream.with_format(None).select_columns([self.image_column, self.label_column])
        self._undecoded = columns.cast_column(self.image_column, datasets.Image(decode=False))
        self._own = self._undecoded.shuffle(self.seed, buffer_size=SHUFFLE_BUFFER)
        if self.world_size > 1:
            self._own = split_dataset_by_node(self._own, self.rank, self.world_size)
        self._drawn: tuple[int, tuple[Tensor, ...]] | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield ``pixel_values`` uint8 (3, h, w) at the model's size, augmented, and ``labels`` int64 (), without end.

        Raises:
            ValueError: The stream holds no images; a picture cannot be decoded; a label is missing.
        """
        worker = torch.utils.data.get_worker_info()
        share, shares = (worker.id, worker.num_workers) if worker else (0, 1)
        numbers = count(share * self.world_size + self.rank, shares * self.world_size)
        for epoch in count():
            self._own.set_epoch(epoch)
            empty = True
            for example in self._own:
                empty = False
                yield self._sample(example, next(numbers))
            if empty and share == 0:
                raise ValueError(f"process {self.rank} of {self.world_size} finds no images in its share of the stream")
            if empty:  # more workers than files
                return

    def loader(self, args: TrainingArguments, collate: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]) -> DataLoader:
        """Batches for the Trainer. Not prepared by accelerate, which would let one process read for all or share out again."""
        return DataLoader(
            self,
            args.per_device_train_batch_size,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            generator=torch.Generator(),  # its own: not the global one's draws
        )

    def fingerprint(self) -> str:
        """SHA-256 of what has to be the same in all processes: classes, number of files, the first picture and its label."""
        first = next(iter(self._undecoded), None)
        return hashlib.sha256(repr((self.class_names, self.stream.num_shards, first)).encode()).hexdigest()

    def _sample(self, example: dict[str, Any], number: int) -> dict[str, Tensor]:
        label = example[self.label_column]
        if label is None or not 0 <= label < len(self.class_names):
            raise ValueError(f"image {number} of the stream has the label {label}, not one of 0..{len(self.class_names) - 1}")
        try:
            image = decode(example[self.image_column])
        except Exception as error:  # image decoders raise anything, from OSError to SyntaxError
            raise ValueError(
                f"cannot decode image {number} of the stream: {error!r}; replace the picture or leave it out"
            ) from error
        image = self.preprocessing.resize(image[None])
        row = torch.tensor([number % DRAWN_AT_ONCE])
        draws = (column[row] for column in self._table(number // DRAWN_AT_ONCE))
        augmented = self.augmentation.apply(self.augmentation.pad(image), torch.zeros(1, dtype=torch.int64), *draws)
        return {"pixel_values": augmented[0], "labels": torch.tensor(label)}

    def _table(self, block: int) -> tuple[Tensor, ...]:
        if self._drawn is None or self._drawn[0] != block:
            self._drawn = (block, self.augmentation.draws(block, DRAWN_AT_ONCE))
        return self._drawn[1]
