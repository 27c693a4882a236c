"""BadNets: a small patch."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Attack, check_choice, check_range, whole_scale

PATTERNS = ("solid", "checker", "nad_grid")
POSITIONS = ("bottom-right", "bottom-left", "top-right", "top-left")
# The grid of the published NAD victims (Li et al., ICLR 2021): 1 is lit, 0 is black; the last entry is the
# bottom-right pixel.
NAD_GRID = ((0, 0, 1), (0, 1, 0), (1, 0, 1))


@dataclass(frozen=True, kw_only=True)
class BadNets(Attack):
    """BadNets (Gu et al., 2017, arXiv 1708.06733): ``x' = (1 - m) x + m p``, a patch ``p`` replaces the pixels of mask
    ``m``.

    Dirty label, static; needs nothing.

    Sizes are in pixels of a 32x32 image and scale with the image: on (H, W) every pixel of the pattern becomes a
    square of ``s = max(1, round(min(H, W) / image_size))`` pixels, so the default is 3x3 at 32, 6x6 at 64 and 21x21 at
    224 (BackdoorBench enlarges its trigger picture with the data, to 6x6 at 64; its interpolated grey edges are left
    out here).

    Args:
        target_label: The class that the attacker wants; default, ``label_map`` and ``source_label``: see `Attack`.
        size: Side of the square patch in pixels at ``image_size``, at least 1. Default 3: BackdoorBench.
        pattern: ``"solid"`` is a square of one colour (default, white: BackdoorBench); ``"checker"`` alternates colour
            and black, the corner pixel of the bottom right being lit; ``"nad_grid"`` is the 3x3 grid of NAD's
            published victims.
        color: Red, green and blue of the lit pixels, 0 to 255. Default white: BackdoorBench.
        position: Corner of the image. Default bottom right: BackdoorBench.
        margin: Distance in pixels at ``image_size`` from that corner's edges, one number or (rows, columns), so that
            every place can be reached. Default 0: BackdoorBench.
        image_size: Side in pixels of the images that ``size`` and ``margin`` refer to. Default 32: CIFAR-10, here;
            224 gives a patch of exactly ``size`` pixels at 224.

    Raises:
        ValueError: A parameter is out of range, or ``nad_grid`` has another size than 3. ``trigger`` raises when the
            patch does not fit the image.
    """

    name: ClassVar[str] = "badnets"
    paper: ClassVar[str] = "https://arxiv.org/abs/1708.06733"

    size: int = 3
    pattern: str = "solid"
    color: tuple[int, int, int] = (255, 255, 255)
    position: str = "bottom-right"
    margin: int | tuple[int, int] = 0
    image_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("size", self.size, 1, integer=True)
        check_choice("pattern", self.pattern, PATTERNS)
        check_choice("position", self.position, POSITIONS)
        check_range("image_size", self.image_size, 1, integer=True)
        if self.pattern == "nad_grid" and self.size != len(NAD_GRID):
            raise ValueError(f"pattern nad_grid is a 3x3 grid: size must be 3; got {self.size}")
        if not isinstance(self.color, tuple) or len(self.color) != 3:
            raise ValueError(f"color must be three integers (red, green, blue); got {self.color!r}")
        for value in self.color:
            check_range("color", value, 0, 255, integer=True)
        if isinstance(self.margin, tuple) and len(self.margin) != 2:
            raise ValueError(f"margin must be one integer or (rows, columns); got {self.margin!r}")
        for value in self._margins():
            check_range("margin", value, 0, integer=True)

    def _margins(self) -> tuple[int, int]:
        return self.margin if isinstance(self.margin, tuple) else (self.margin, self.margin)

    def _patch(self) -> Tensor:
        """The patch at ``image_size``, uint8 (3, size, size)."""
        if self.pattern == "solid":
            lit = torch.ones(self.size, self.size)
        elif self.pattern == "checker":
            index = torch.arange(self.size)
            lit = (index[:, None] + index[None, :] + 1) % 2
        else:
            lit = torch.tensor(NAD_GRID)
        return lit.to(torch.uint8) * torch.tensor(self.color, dtype=torch.uint8)[:, None, None]

    def _stamp(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        scale = whole_scale(height, width, self.image_size)
        side = self.size * scale
        top, left = (margin * scale for margin in self._margins())
        if top + side > height or left + side > width:
            raise ValueError(
                f"badnets: a patch of {side}x{side} pixels, {top} rows and {left} columns from the edge, does not fit "
                f"an image of {height}x{width}; lower size or margin"
            )
        if self.position.startswith("bottom"):
            top = height - side - top
        if self.position.endswith("right"):
            left = width - side - left
        patch = self._patch().repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        triggered = images.clone()
        triggered[:, :, top : top + side, left : left + side] = patch.to(images.device)
        return triggered
