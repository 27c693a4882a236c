"""Decoded images at their native size, in memory: what triggers are put on and what is measured."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .labels import labels_of, split_of

MOST_PIXELS = 256 * 512 * 512  # of a batch: 200 MB, beside which photos of many megapixels still fit into memory


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
        if dataset.format["type"] == "custom":
            raise ValueError(
                "the data set has a transform, which decoding the pictures would pass over: with_format(None) takes it off"
            )
        labels = torch.from_numpy(labels_of(dataset))
        index = torch.tensor(dataset.with_format(None)["index"][:]) if "index" in dataset.column_names else None
        return cls(stacked(decode_rows(dataset)), labels, dataset.features["label"].names, index)

    def __len__(self) -> int:
        return len(self.images)

    def select(self, rows: Sequence[int] | np.ndarray | Tensor) -> "RawImages":
        """Return the images at ``rows`` (positions here, not values of ``index``), in that order."""
        rows = torch.as_tensor(rows)
        images = self.images[rows] if isinstance(self.images, Tensor) else [self.images[row] for row in rows.tolist()]
        return RawImages(images, self.labels[rows], self.class_names, self.index[rows])

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield every image once, in batches of one size: triggers act at the native size.

        In order, if all are of one size; otherwise size by size, each in order. A result belongs at its image's row.

        Args:
            batch_size: Images in a batch, at least 1; fewer of large ones, `MOST_PIXELS` in all.

        Yields:
            (rows, images, labels): int64 (B,), positions here; uint8 (B, 3, H, W); int64 (B,).

        Raises:
            ValueError: ``batch_size`` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        for (height, width), group in self._rows_by_size():
            most = max(1, MOST_PIXELS // (height * width))
            for rows in group.split(min(batch_size, most)):
                yield rows, self._stacked(rows), self.labels[rows]

    def _rows_by_size(self) -> list[tuple[tuple[int, int], Tensor]]:
        if isinstance(self.images, Tensor):
            return [(tuple(self.images.shape[2:]), torch.arange(len(self)))]
        groups: dict[tuple[int, int], list[int]] = {}
        for row, image in enumerate(self.images):
            groups.setdefault(tuple(image.shape[1:]), []).append(row)
        return [(size, torch.tensor(rows)) for size, rows in groups.items()]

    def _stacked(self, rows: Tensor) -> Tensor:
        if isinstance(self.images, Tensor):
            return self.images[rows]
        return torch.stack([self.images[row] for row in rows.tolist()])


def content_hashes(images: RawImages) -> list[bytes]:
    """SHA-256 of each image's size and pixels, to find images that two sets share."""
    return [hashlib.sha256(repr(tuple(image.shape)).encode() + image.numpy().tobytes()).digest() for image in images.images]


def stacked(images: list[Tensor]) -> Tensor | list[Tensor]:
    """Images (3, H, W) as one tensor, where they are of one size."""
    return torch.stack(images) if len({image.shape for image in images}) == 1 else images


def decode_rows(dataset: Dataset) -> list[Tensor]:
    """`decode` the column ``image``, showing progress; a ValueError names the row that cannot be decoded."""
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
    return images


def decode(picture: dict[str, bytes | str | None] | None) -> Tensor:
    """Decode one entry of a `datasets.Image` column, see `RawImages.from_dataset`: uint8 (3, H, W). Decoders raise anything."""
    if picture is None:
        raise ValueError("the row holds no picture")
    if picture["bytes"] is None and Path(picture["path"]).is_file():
        # PIL keeps a file open that it cannot decode, or that has further frames.
        picture = {"bytes": Path(picture["path"]).read_bytes(), "path": picture["path"]}
    return pixels_of(datasets.Image().decode_example(picture))  # loads all of it, and applies the EXIF orientation


def pixels_of(image: Image.Image) -> Tensor:
    """The pixels of a picture as RGB, see `RawImages.from_dataset`: uint8 (3, H, W); a ValueError if they have no range."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"PIL mode {image.mode!r} has no fixed range of values; store the pictures with 8 or 16 bits")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
