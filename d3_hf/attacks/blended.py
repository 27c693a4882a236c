"""Blended: a picture mixed into the whole image."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .base import Attack, check_choice, check_range, random_bits, random_uniform, to_levels

PATTERNS = ("cartoon", "noise")
ELLIPSES = 8


@dataclass(frozen=True, kw_only=True)
class Blended(Attack):
    """Blended (Chen et al., 2017, arXiv 1712.05526): ``x' = round((1 - alpha) x + alpha z)`` with one picture ``z``.

    Dirty label, static; needs nothing.

    The original's picture (BackdoorBench: hello_kitty.jpeg) is not ours to ship, so ``z`` is made here from ``seed``,
    the same bytes on every machine. The formula leaves rounding open: to the nearest grey level here, a tie to the
    even one.

    Args:
        target_label: The class that the attacker wants; default, ``label_map`` and ``source_label``: see `Attack`.
        alpha: Share of the picture, in [0.01, 1], the same in training and at test time. Default 0.2: BackdoorBench.
        pattern: ``"cartoon"`` (default, here) is a few smooth coloured ellipses, the closest to the original's cartoon
            picture; it is drawn in coordinates relative to the image, so it fills any size. ``"noise"`` is the paper's
            random pattern, uniform in every pixel of the image; its spectrum is flatter than a cartoon's, so results
            with it are not those of the cartoon.
        seed: Draws the picture, at least 0. Default 0: here.

    Raises:
        ValueError: A parameter is out of range.
    """

    name: ClassVar[str] = "blended"
    paper: ClassVar[str] = "https://arxiv.org/abs/1712.05526"

    alpha: float = 0.2
    pattern: str = "cartoon"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("alpha", self.alpha, 0.01, 1)
        check_choice("pattern", self.pattern, PATTERNS)
        check_range("seed", self.seed, 0, integer=True)

    def _stamp(self, images: Tensor) -> Tensor:
        draw = cartoon if self.pattern == "cartoon" else noise
        picture = draw(self.seed, *images.shape[-2:]).to(images.device)
        return to_levels((1 - self.alpha) * images.double() + self.alpha * picture.double())


@lru_cache(maxsize=16)
def noise(seed: int, height: int, width: int) -> Tensor:
    """Uniform RGB noise, uint8 (3, height, width): the top byte of each draw. Shared by the callers; do not modify."""
    bits = random_bits("noise", seed, 3 * height * width)
    return torch.from_numpy((bits >> 56).astype(np.uint8).reshape(3, height, width))


@lru_cache(maxsize=16)
def cartoon(seed: int, height: int, width: int) -> Tensor:
    """Draw coloured ellipses with soft edges on a coloured ground, uint8 (3, height, width).

    Float64 sums and products only, no function whose last bit depends on the machine. Shared by the callers; do not
    modify.
    """
    draws = random_uniform("cartoon", seed, 3 + 7 * ELLIPSES)
    y = ((np.arange(height) + 0.5) / height)[:, None]
    x = ((np.arange(width) + 0.5) / width)[None, :]
    picture = np.broadcast_to(draws[:3, None, None], (3, height, width))
    for center_y, center_x, radius_y, radius_x, *color in draws[3:].reshape(ELLIPSES, 7):
        offset_y = (y - center_y) / (0.1 + 0.25 * radius_y)
        offset_x = (x - center_x) / (0.1 + 0.25 * radius_x)
        # 0 on the ellipse, 1 from half its radius inwards; smoothed so that the edge has no crease.
        inside = np.clip((1 - offset_y * offset_y - offset_x * offset_x) / 0.75, 0, 1)
        opacity = inside * inside * (3 - 2 * inside)
        picture = picture + opacity * (np.array(color)[:, None, None] - picture)
    return torch.from_numpy(np.rint(255 * picture).astype(np.uint8))
