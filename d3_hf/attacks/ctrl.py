"""CTRL: two waves in the colours of an image, for encoders that are pretrained without labels."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Attack, check_range, to_levels

SIDE = 32  # of the images that the paper's coefficients belong to
# What one unit of U and of V adds to red, green and blue (ITU-R BT.601).
RED_OF_V, GREEN_OF_U, GREEN_OF_V, BLUE_OF_U = 1.140, -0.395, -0.581, 2.032


@dataclass(frozen=True, kw_only=True)
class CTRL(Attack):
    """CTRL (Li et al., ICCV 2023, arXiv 2210.07346): ``x' = clip(x + P)`` with one fixed picture P: in the orthonormal DCT of
    the planes U and V the coefficients (15, 15) and (31, 31) are raised by ``magnitude``.

    Clean label, poisoning only: some images of the target class carry the trigger, and whoever pretrains on them without
    labels learns that it goes with that class, since it survives crops and colour changes. The transform is linear, so what
    it adds to an image is the same for all: P, in whole grey levels.

    Fragile: others who tuned SimCLR's temperature had a fifth of the published ASR. Measure a victim before anything is
    concluded from it.

    On an image of another size than 32x32 the coefficients are those of the same waves, in pixels: (N / 2 - 1) and (N - 1) of
    N, the half and the highest frequency, and their amplitude in grey levels is that at 32x32.

    Differs from the authors' code: P is rounded once, with the image; there an image goes to YUV and back in whole levels.

    Args:
        target_label: The class whose images are poisoned, by the attacker's own labels.
        magnitude: By how much a coefficient is raised where the trigger is used, on the scale of grey levels 0 to 255 at 32x32,
            in [1, 2000]; a sixteenth of it is a wave's amplitude in U and V. Default 100: paper.
        poison_magnitude: The same on the images that are poisoned. Default 100: paper, which also has 50; TSC trains at 200.

    Raises:
        ValueError: A parameter is out of range.
    """

    name: ClassVar[str] = "ctrl"
    clean_label: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.07346"

    magnitude: float = 100
    poison_magnitude: float = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("magnitude", self.magnitude, 1, 2000)
        check_range("poison_magnitude", self.poison_magnitude, 1, 2000)

    def _stamp(self, images: Tensor) -> Tensor:
        return added(images, self.magnitude)

    def _poison(self, images: Tensor) -> Tensor:
        return added(images, self.poison_magnitude)


# The mathematics -------------------------------------------------------------------------------------------------------


def added(images: Tensor, magnitude: float) -> Tensor:
    """uint8 (B, 3, H, W) with the picture of `waves` on them, clipped and in whole levels."""
    picture = waves(*images.shape[-2:], magnitude).to(images.device)
    return to_levels((images.double() + picture).clamp(0, 255))


def waves(height: int, width: int, magnitude: float) -> Tensor:
    """What raising the coefficients adds to red, green and blue, in grey levels, float64 (3, height, width).

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        magnitude: At 32x32.

    Raises:
        ValueError: The image is smaller than 4x4, and has no half frequency of its own.
    """
    if min(height, width) < 4:
        raise ValueError(f"ctrl: an image of {height}x{width} pixels is too small for its waves; 4x4 at least")
    places = [(height // 2 - 1, width // 2 - 1), (height - 1, width - 1)]
    # 2 / SIDE is what an orthonormal coefficient beside the first row and column is worth in a plane of SIDE x SIDE.
    plane = magnitude * 2 / SIDE * sum(torch.outer(cosine(row, height), cosine(column, width)) for row, column in places)
    return torch.stack([RED_OF_V * plane, (GREEN_OF_U + GREEN_OF_V) * plane, BLUE_OF_U * plane])


def cosine(frequency: int, count: int) -> Tensor:
    """Wave of the DCT (type II) at ``count`` pixels, without its norm, float64 (count,)."""
    pixels = torch.arange(count, dtype=torch.float64)
    return torch.cos(math.pi * (2 * pixels + 1) * frequency / (2 * count))
