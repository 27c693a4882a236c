"""Training images of which some are collages of two, beside or above each other; none is squeezed to another's shape."""

import torch
from torch import Tensor

from .augmentation import Augmentation
from .images import RawImages
from .preprocessing import Preprocessing
from .training_images import TrainingImages


class Collages(TrainingImages):
    """Images at the model's size (h, w) and collages of two, (h, 2 w) or (2 h, w), each in the upper left of (2 h, 2 w).

    Beyond an image's edge its last row and column are repeated. Batches carry a column ``extents``, int64 (B, 2): height and
    width of each image, as `view` takes them. Takes four times the memory of images alone.
    """

    extents: Tensor

    @classmethod
    def from_raw(cls, raw: RawImages, preprocessing: Preprocessing, augmentation: Augmentation | None = None) -> "Collages":
        """Bring every image, and every half of a collage, to the model's size.

        Raises:
            ValueError: The images are not of one size, with collages of two of them.
        """
        shapes = torch.tensor([image.shape[1:] for image in raw.images])
        least = shapes.amin(0)
        parts = shapes // least  # how many images lie above, and beside, each other
        if (parts * least != shapes).any() or (parts.prod(1) > 2).any():
            raise ValueError("collages are of two images of one size, and these images differ in size: resize them first")
        height, width = preprocessing.size
        images = torch.empty((len(raw), 3, 2 * height, 2 * width), dtype=torch.uint8)
        rows, columns = torch.arange(2 * height), torch.arange(2 * width)
        for places, batch, _ in raw.batches(256):
            down, across = parts[places[0]].tolist()
            resized = [
                torch.cat([preprocessing.resize(part) for part in strip.chunk(across, 3)], 3) for strip in batch.chunk(down, 2)
            ]
            last_row, last_column = down * height - 1, across * width - 1
            whole = torch.cat(resized, 2)[:, :, rows.clamp(max=last_row)]
            images[places] = whole[:, :, :, columns.clamp(max=last_column)]
        made = cls(images, raw.labels, augmentation, raw.index)
        made.extents = parts * torch.tensor([height, width])
        return made

    def __getitems__(self, positions: list[int]) -> dict[str, Tensor]:
        """One batch, with its ``extents``."""
        return super().__getitems__(positions) | {"extents": self.extents[torch.as_tensor(positions)]}
