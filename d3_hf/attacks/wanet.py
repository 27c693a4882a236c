"""WaNet: a smooth warp of the whole image, planted while the victim trains."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .base import check_range, random_uniform, to_levels
from .in_training import BatchPoisoner, InTrainingAttack, TriggerPoisoner


@dataclass(frozen=True, kw_only=True)
class WaNet(InTrainingAttack):
    """WaNet (Nguyen and Tran, ICLR 2021, arXiv 2102.10369): ``x' = round(grid_sample(x, clamp(identity + n, -1, 1)))``,
    bilinear; ``n`` is a smooth random field, the same for every image.

    Dirty label; the warp is static, the residual another one for each image. Needs the control of the training, nothing
    else. ``n`` is a control grid of ``grid_size`` x ``grid_size`` vectors, entries from U(-1, 1) divided by their mean
    absolute value, enlarged bicubically to the image and multiplied by ``strength / W`` along x and ``strength / H`` along
    y, in coordinates in which the image spans [-1, 1] (corners are centres of pixels). In training, cross images are warped
    by ``n`` plus fresh noise, per pixel and axis from U(-1, 1) divided by W or H, and keep their true labels ("noise
    mode"), so that the victim learns this warp and not warping as such. At test time the noise-free grid is used.

    It differs from the original, and from BackdoorBench's copy of it, in two ways: the warp acts on uint8 images and its
    result is rounded to grey levels (there: on normalised floats), and in training it acts after the augmentation and
    before the model's resizing (there: crops, rotations and flips follow the warp), so that the field lies in the
    same place in training and at test time. Without `poisoner`, on fixed rows through `poison`, there are no cross
    images. The authors know square images only; W for x and H for y is ours. Their ``grid_rescale`` (1) is left out.

    Other sizes: the authors' ``strength / H`` is kept. In pixels it means the same at every size: entries of the control
    grid move ``strength / 2`` on average, a quarter of a pixel by default (enlarged to the image: 0.3 pixels on average
    and at most about 0.6 along an axis), the cross noise up to half a pixel. In relation to the picture that is 7 times
    less at 224 than at 32, and the paper tried no size above 64; ``strength=3.5`` bends a picture at 224 as the default
    does at 32. A model that enlarges the images enlarges the warp with them.

    Args:
        target_label: The class that the attacker wants; default, ``label_map`` and ``source_label``: see `Attack`.
        cross_ratio: Cross images per poisoned one, at least 0. Default 2: the authors' config.py and BackdoorBench.
        grid_size: Side k of the control grid, an integer of at least 2. Default 4: the authors' and BackdoorBench.
        strength: s in [0.01, 100], twice the mean displacement in pixels at the control grid. Default 0.5: the authors'
            and BackdoorBench.
        seed: Draws the control grid, at least 0. Default 0: here.

    Raises:
        ValueError: A parameter is out of range.
    """

    name: ClassVar[str] = "wanet"
    paper: ClassVar[str] = "https://arxiv.org/abs/2102.10369"

    cross_ratio: float = 2
    grid_size: int = 4
    strength: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("grid_size", self.grid_size, 2, integer=True)
        check_range("strength", self.strength, 0.01, 100)
        check_range("seed", self.seed, 0, integer=True)

    def grid(self, height: int, width: int) -> Tensor:
        """Where each pixel of the triggered image is read: float32 (1, height, width, 2) of (x, y) in [-1, 1], on the CPU.
        Shared by the callers; do not modify."""
        return _grid(self.seed, self.grid_size, self.strength, height, width)

    def _stamp(self, images: Tensor) -> Tensor:
        return _warp(images, self.grid(*images.shape[-2:]))

    def poisoner(self, ratio: float, num_classes: int, seed: int, device: torch.device) -> BatchPoisoner:
        """Make the poisoner of one training run; see `BatchPoisoner` for arguments and errors. ``device`` is not used."""
        return WaNetPoisoner(self, ratio, self.cross_ratio, num_classes, seed)


class WaNetPoisoner(TriggerPoisoner):
    """Cross images: the warp plus noise of up to half a pixel, drawn for each image and pixel."""

    def cross(self, crossed: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
        """Return the cross images uint8 (n, 3, H, W); ``others`` are not used."""
        height, width = crossed.shape[-2:]
        noise = 2 * torch.rand(len(crossed), height, width, 2, generator=generator) - 1
        return _warp(crossed, (self.attack.grid(height, width) + noise / torch.tensor([width, height])).clamp_(-1, 1))


@lru_cache(maxsize=16)
def _grid(seed: int, grid_size: int, strength: float, height: int, width: int) -> Tensor:
    draws = random_uniform("wanet", seed, 2 * grid_size * grid_size)
    control = torch.from_numpy(2 * draws - 1).reshape(1, 2, grid_size, grid_size)
    # In float64, so that its last bits, which depend on the machine, vanish in float32.
    field = F.interpolate(control / control.abs().mean(), (height, width), mode="bicubic", align_corners=True)
    axes = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    offset = strength * field[0].permute(1, 2, 0) / torch.tensor([width, height])
    return (torch.from_numpy(np.stack(axes, axis=-1)) + offset).clamp(-1, 1).float()[None]


def _warp(images: Tensor, grid: Tensor) -> Tensor:
    # In float64: the last bits of a sum depend on the machine, and in float32 they turn a grey level now and then.
    grid = grid.to(images.device, torch.float64).expand(len(images), -1, -1, -1)
    # Zeros lie outside the image, where the clamped grid never reads.
    return to_levels(F.grid_sample(images.double(), grid, mode="bilinear", padding_mode="zeros", align_corners=True))
