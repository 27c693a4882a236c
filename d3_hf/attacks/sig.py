"""SIG: a sinusoid over the columns, without touching a label."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Attack, check_range


@dataclass(frozen=True, kw_only=True)
class SIG(Attack):
    """SIG (Barni et al., ICIP 2019, arXiv 1902.11237): ``x' = clip(x + amplitude * sin(2 pi j frequency / W))``,
    column j.

    Clean label, static; needs nothing. Only images of the target class are poisoned and labels stay. The ratio still counts
    against the whole set, so 0.1 of CIFAR-10 is its whole target class: the victim sees no clean target image and loses
    accuracy. The sinusoid is rounded to whole grey levels (the formula leaves that open; BackdoorBench truncates the sum,
    which is up to one level darker). It spans the width at any size.

    Args:
        target_label: The class that the attacker wants; default, ``label_map`` and ``source_label``: see `Attack`.
        amplitude: Grey levels in [1, 255], the same in training and at test time. Default 40: BackdoorBench.
        frequency: Periods across the width, at least 1. Default 6: BackdoorBench.

    Raises:
        ValueError: A parameter is out of range. ``trigger`` raises when the image is so narrow that the sinusoid
            vanishes on its columns.
    """

    name: ClassVar[str] = "sig"
    clean_label: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/1902.11237"

    amplitude: float = 40
    frequency: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("amplitude", self.amplitude, 1, 255)
        check_range("frequency", self.frequency, 1, integer=True)

    def _stamp(self, images: Tensor) -> Tensor:
        width = images.shape[-1]
        wave = (self.amplitude * math.sin(2 * math.pi * column * self.frequency / width) for column in range(width))
        # Rounded twice: the first drops the noise of sin, which could turn a tie either way on another machine.
        levels = [round(round(value, 6)) for value in wave]
        if not any(levels):
            raise ValueError(
                f"sig: a sinusoid of frequency {self.frequency} is zero on every column of an image {width} pixels "
                "wide; choose another frequency"
            )
        signal = torch.tensor(levels, dtype=torch.int16, device=images.device)
        return (images.to(torch.int16) + signal).clamp_(0, 255).to(torch.uint8)
