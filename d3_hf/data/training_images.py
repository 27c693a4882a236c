"""Images at the model's size, augmented by batch.

A retain set is small, so it is decoded once and augmented by batch: a pipeline per image would be the bottleneck.
"""

import hashlib

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .augmentation import Augmentation
from .images import RawImages
from .preprocessing import Preprocessing


class TrainingImages(torch.utils.data.Dataset):
    """Images at the model's size as a Trainer reads them: one call gives a whole batch, augmented, still uint8.

    Normalisation is left to the device. Use ``TrainingImages.collate`` as the collator: torch's loader passes it what
    ``__getitems__`` returns, and a stock collator would take that for a list of samples.

    The epoch is kept in shared memory, so that workers started before `set_epoch`, persistent ones too, see the new
    value. Accelerate's loaders call `set_epoch` on one process only; with several it must be called by the trainer.

    Args:
        images: uint8 (N, 3, h, w), at the model's size.
        labels: int64 (N,).
        augmentation: What to do to the images; None for evaluation.
        sample_ids: int64 (N,), at least 0: the rows of the augmentation's table. The same id gets the same draws in
            any subset; by default 0..N-1.

    Raises:
        ValueError: Shapes, types or lengths are not these, or there are no images.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        augmentation: Augmentation | None = None,
        sample_ids: Tensor | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
            raise ValueError(f"images must be uint8 (N, 3, h, w) with N > 0; got {images.dtype} {tuple(images.shape)}")
        sample_ids = torch.arange(len(images)) if sample_ids is None else sample_ids
        if not len(images) == len(labels) == len(sample_ids):
            raise ValueError(f"{len(images)} images, {len(labels)} labels, {len(sample_ids)} sample ids: lengths differ")
        if labels.dtype != torch.int64 or sample_ids.dtype != torch.int64 or sample_ids.min() < 0:
            raise ValueError("labels and sample_ids must be int64, and sample_ids at least 0")
        self.images, self.labels, self.augmentation, self.sample_ids = images, labels, augmentation, sample_ids
        if augmentation is not None:
            self._padded = augmentation.pad(images)
            margin, (height, width) = augmentation.crop_padding, images.shape[2:]
            self.images = self._padded[:, :, margin : margin + height, margin : margin + width]  # one copy, not two
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._table: tuple[int, tuple[Tensor, ...]] | None = None

    @classmethod
    def from_raw(
        cls, raw: RawImages, preprocessing: Preprocessing, augmentation: Augmentation | None = None
    ) -> "TrainingImages":
        """Bring raw images to the model's size once, showing progress; ``raw.index`` becomes the sample ids."""
        with tqdm(total=len(raw), desc="Resizing images", unit="image") as progress:
            images = resized(raw, preprocessing, progress)
        return cls(images, raw.labels, augmentation, raw.index)

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentation anew: draws depend on (augmentation.seed, epoch, sample id) and on nothing else."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([position]).items()}

    def __getitems__(self, positions: list[int]) -> dict[str, Tensor]:
        """Return one batch: ``pixel_values`` uint8 (B, 3, h, w), augmented, and ``labels`` int64 (B,)."""
        rows = torch.as_tensor(positions)
        if self.augmentation is None:
            images = self.images.index_select(0, rows)  # many times faster than indexing
        else:
            draws = (column[self.sample_ids[rows]] for column in self._draws())
            images = self.augmentation.apply(self._padded, rows, *draws)
        return {"pixel_values": images, "labels": self.labels[rows]}

    def fingerprint(self) -> str:
        """SHA-256 of images, labels and sample ids, in their order."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for tensor in (self.images, self.labels, self.sample_ids):
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()

    @staticmethod
    def collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch as it is; it was made whole."""
        return batch

    def _draws(self) -> tuple[Tensor, ...]:
        epoch = int(self._epoch)
        if self._table is None or self._table[0] != epoch:
            self._table = (epoch, self.augmentation.draws(epoch, int(self.sample_ids.max()) + 1))
        return self._table[1]


def without_augmentation(images: torch.utils.data.Dataset) -> torch.utils.data.Dataset:
    """The same images as they are: of `TrainingImages` without their augmentation; any other data set is returned itself."""
    return TrainingImages(images.images, images.labels) if isinstance(images, TrainingImages) else images


def resized(raw: RawImages, preprocessing: Preprocessing, progress: tqdm | None = None) -> Tensor:
    """Raw images at the model's size, uint8 (N, 3, h, w), on the CPU and in their order; ``progress`` counts them."""
    images = torch.empty((len(raw), 3, *preprocessing.size), dtype=torch.uint8)
    for rows, batch, _ in raw.batches(256):
        images[rows] = preprocessing.resize(batch)
        if progress is not None:
            progress.update(len(batch))
    return images
