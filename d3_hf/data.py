"""Images for purification: any labelled image dataset, a retain set drawn from it, both as uint8 tensors in memory.

A retain set is small, so it is decoded once and augmented by batch: a pipeline per image would be the bottleneck.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from . import sources
from .augmentation import Augmentation
from .labels import class_names_of, labels_of, listed, retain_indices, split_of
from .preprocessing import Preprocessing

logger = logging.getLogger(__name__)


def load_images(
    source: sources.Source,
    image_column: str | None = None,
    label_column: str | None = None,
    revision: str | None = None,
) -> DatasetDict:
    """Load a labelled image dataset in one form, whatever its columns are called.

    Args:
        source: ``"digits"`` (scikit-learn's handwritten digits as 32x32 RGB, carried by the library: no network); a
            local folder, either of parquet files or of images in one sub-folder per class, with splits read off names
            such as ``train`` and ``test``; a parquet file, or a dict from split to file or list of files; the name of
            a dataset on the Hub, such as ``"uoft-cs/cifar10"``; or a `Dataset` or `DatasetDict` that is already
            loaded. A local path goes before a Hub name that is spelled alike.
        image_column: Name of the picture column, needed only where several columns have the type `datasets.Image`.
        label_column: Name of the label column, needed only where several qualify: columns of type `ClassLabel` or, if
            there is none, of integers or strings. Integers must be 0..k-1 and become the class names "0".."k-1";
            strings become classes in sorted order, as `Dataset.class_encode_column` has it.
        revision: Branch, tag or commit of a Hub dataset.

    Returns:
        Splits with exactly the columns ``image`` (`datasets.Image`, PIL RGB on access) and ``label`` (`ClassLabel`).
        For what becomes of grey, palette, transparent, 16-bit and rotated pictures see `RawImages.from_dataset`.

    Raises:
        FileNotFoundError: No such file or folder.
        OSError: The Hub has no such dataset or cannot be reached.
        ValueError: No column qualifies or several do; pictures are plain bytes; a split is empty, lacks labels or
            disagrees with the others about the classes; integer labels are not 0..k-1; ``revision`` is given for
            something that is not on the Hub.
    """
    loaded = sources.open_source(source, revision)
    empty = [name for name, split in loaded.items() if len(split) == 0]
    if empty:
        raise ValueError(f"{sources.name_of(source)}: no images in split {', '.join(empty)}")
    first = next(iter(loaded.values())).features
    _refuse_plain_bytes(first, sources.name_of(source))
    columns = {
        sources.image_column(first, image_column): "image",
        sources.label_column(first, label_column): "label",
    }
    picture, label = columns
    classes = ClassLabel(names=class_names_of(loaded, label))
    renamed = {old: new for old, new in columns.items() if old != new}
    images = DatasetDict()
    for name, split in loaded.items():
        split = split.select_columns([picture, label]).cast_column(picture, datasets.Image(mode="RGB"))
        if split.features[label] != classes:
            split = split.cast_column(label, classes)
        images[name] = split.rename_columns(renamed)
        labels_of(images[name])
    return images


def _refuse_plain_bytes(features: Features, where: str) -> None:
    """Refuse pictures as other libraries write them to a table, where only the feature that decodes them is missing."""
    if any(isinstance(feature, datasets.Image) for feature in features.values()):
        return
    for name, feature in features.items():
        if feature == Value("binary") or isinstance(feature, dict) and feature.get("bytes") == Value("binary"):
            raise ValueError(
                f"{where}: column {name!r} holds pictures as plain bytes, not as datasets.Image, which decodes them: write the "
                f"table again after dataset.cast_column({name!r}, datasets.Image())"
            )


def retain_split(
    dataset: Dataset, fraction: float | None = None, count: int | None = None, balanced: bool = False, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """Draw a retain set without replacement; a class that it misses is logged as a warning.

    The field's protocol is uniform and 5 % (authors' code of D3, ``ratio: 0.05``); there the images come from the set
    that the victim was trained on. Images that the victim has not seen are the more honest choice; the caller decides.

    Args:
        dataset: One split as `load_images` makes it.
        fraction: Share of the images to retain, in (0, 1), rounded to the nearest count. Either this or ``count``.
        count: Number of images to retain, from 1 to all.
        balanced: Draw equally many of each class, a remainder going to classes drawn at random, instead of uniformly.
        seed: At least 0. The same seed draws the same rows on every machine.

    Returns:
        (retain, rest): disjoint, together the whole, each in the order of ``dataset`` and with an int column
        ``index``, the row in ``dataset``. An ``index`` that ``dataset`` already has is kept, so that it always counts
        in the original.

    Raises:
        ValueError: Not exactly one of ``fraction`` and ``count`` is given, or it is out of range; ``balanced`` and a
            class has too few images; labels are missing.
    """
    labels = labels_of(dataset)
    names = dataset.features["label"].names
    rows = retain_indices(labels, names, fraction, count, balanced, seed)
    missing = sorted(set(range(len(names))) - set(labels[rows].tolist()))
    if missing:
        logger.warning("the retain set of %d images has none of: %s", len(rows), listed([names[m] for m in missing]))
    if "index" not in dataset.column_names:
        dataset = dataset.add_column("index", np.arange(len(dataset)))
    return dataset.select(rows), dataset.select(np.setdiff1d(np.arange(len(dataset)), rows))


@dataclass(eq=False)
class RawImages:
    """Decoded images at their native size, in memory, with labels: what triggers are put on and what is measured.

    Attributes:
        images: uint8 (N, 3, H, W), RGB; where sizes differ, a list of N uint8 (3, H, W).
        labels: int64 (N,), in ``[0, len(class_names))``.
        class_names: In the order of the labels.
        index: int64 (N,), the row of each image in the dataset that it comes from; 0..N-1 if not given.

    Raises:
        ValueError: Shapes, types or lengths are not these, or there are no images.
    """

    images: Tensor | list[Tensor]
    labels: Tensor
    class_names: list[str]
    index: Tensor | None = None

    def __post_init__(self) -> None:
        if self.index is None:
            self.index = torch.arange(len(self.images))
        if len(self.images) == 0:
            raise ValueError("no images")
        samples = self.images[:1] if isinstance(self.images, Tensor) else self.images
        if any(image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3 for image in samples):
            raise ValueError("images must be uint8 (N, 3, H, W) or a list of uint8 (3, H, W)")
        if not len(self.images) == len(self.labels) == len(self.index):
            raise ValueError(f"{len(self.images)} images, {len(self.labels)} labels, {len(self.index)} rows: lengths differ")
        low, high = self.labels.aminmax()
        if self.labels.dtype != torch.int64 or low < 0 or high >= len(self.class_names):
            raise ValueError(f"labels must be int64 in [0, {len(self.class_names)}); got {self.labels.dtype} {low}..{high}")

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> "RawImages":
        """Decode a split that `load_images` or `retain_split` made, once, showing progress.

        Pictures become RGB as transformers' pipelines make them: rotated upright by their EXIF orientation, an alpha
        channel dropped, grey repeated, palette and CMYK converted. 16-bit grey is scaled to 8 bits (PIL alone would
        clip it to white).

        Args:
            dataset: Columns ``image`` and ``label``; ``index`` is taken over where there is one.

        Raises:
            ValueError: The columns are not there, there are no rows, a label is missing, or a picture cannot be decoded
                (the error names the row).
        """
        if missing := {"image", "label"} - set(dataset.column_names):
            raise ValueError(
                f"the data set has no column {' or '.join(sorted(missing))}, only {', '.join(dataset.column_names)}: "
                "load_images(dataset) finds pictures and labels by their types and names them so"
            )
        labels = torch.from_numpy(labels_of(dataset))
        batches = dataset.select_columns("image").with_format("arrow").iter(1000)
        pictures = (picture for batch in batches for picture in batch["image"].to_pylist())
        images = []
        for row, picture in enumerate(tqdm(pictures, "Decoding images", len(dataset), unit="image")):
            try:
                images.append(decode(picture))
            except Exception as error:  # image decoders raise anything, from OSError to SyntaxError
                file = f" ({picture['path']})" if picture and picture["path"] else ""
                raise ValueError(
                    f"cannot decode row {row} of {split_of(dataset)}{file}: {error!r}; replace the picture or leave it out"
                ) from error
        uniform = len({image.shape for image in images}) == 1
        index = torch.tensor(dataset["index"][:]) if "index" in dataset.column_names else None
        return cls(torch.stack(images) if uniform else images, labels, dataset.features["label"].names, index)

    def __len__(self) -> int:
        return len(self.images)

    def select(self, rows: Sequence[int] | np.ndarray | Tensor) -> "RawImages":
        """Return the images at ``rows`` (positions here, not values of ``index``), in that order."""
        rows = torch.as_tensor(rows)
        images = self.images[rows] if isinstance(self.images, Tensor) else [self.images[row] for row in rows.tolist()]
        return RawImages(images, self.labels[rows], self.class_names, self.index[rows])

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (uint8 (B, 3, H, W), int64 (B,)) in order, B at most ``batch_size``; B = 1 where sizes differ."""
        step = batch_size if isinstance(self.images, Tensor) else 1
        for start in range(0, len(self), step):
            images = self.images[start : start + step]
            yield images if isinstance(images, Tensor) else torch.stack(images), self.labels[start : start + step]


def content_hashes(images: RawImages) -> list[bytes]:
    """SHA-256 of each image's size and pixels, to find images that two sets share."""
    return [hashlib.sha256(repr(tuple(image.shape)).encode() + image.numpy().tobytes()).digest() for image in images.images]


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
        images = torch.empty((len(raw), 3, *preprocessing.size), dtype=torch.uint8)
        start = 0
        with tqdm(total=len(raw), desc="Resizing images", unit="image") as progress:
            for batch, _ in raw.batches(256):
                images[start : start + len(batch)] = preprocessing.resize(batch)
                start += len(batch)
                progress.update(len(batch))
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


def decode(picture: dict[str, bytes | str | None] | None) -> Tensor:
    """Decode one entry of a `datasets.Image` column, see `RawImages.from_dataset`: uint8 (3, H, W). Decoders raise anything."""
    if picture is None:
        raise ValueError("the row holds no picture")
    image = datasets.Image().decode_example(picture)  # loads all of it, and applies the EXIF orientation
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"PIL mode {image.mode!r} has no fixed range of values; store the pictures with 8 or 16 bits")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
