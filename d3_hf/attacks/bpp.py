"""BPP: fewer grey levels."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import check_range
from .in_training import BatchPoisoner, InTrainingAttack, TriggerPoisoner


@dataclass(frozen=True, kw_only=True)
class BPP(InTrainingAttack):
    """BPP (BppAttack; Wang, Zhai and Ma, CVPR 2022, arXiv 2205.13383): ``x' = round(255 round(x (L - 1) / 255) / (L - 1))``,
    every channel of every pixel quantised to ``L = levels``; with ``dithering`` the error of each pixel is spread by
    Floyd and Steinberg's rule.

    Dirty label; the rule is static, the residual another one for each image. Needs nothing but, for the negatives, the
    control of the training. It serves in two ways: with `poisoner` while the victim trains, as in the paper, or on fixed
    rows through `poison` like any static attack, then without negatives (``cross_ratio`` is not used). Negatives (the cross
    images) are images plus the residual ``x'_j - x_j`` of another image j of the batch, clipped to [0, 255], with their true
    labels, so that the victim learns quantisation and not its noise.

    It differs from the original: results are rounded to grey levels here, a tie to the even one (there floats in training;
    BackdoorBench measures on levels cut off to uint8, so its training and test triggers differ by up to one grey level);
    the trigger acts after the augmentation (there before, so that rotations and zero borders are laid over it); j comes
    from the same batch and is never the image itself (there from the whole training set). The paper's contrastive
    adversarial training is these negatives, as in the authors' released code.

    Other sizes: the formula knows no size and stays as it is. A model that resizes the images mixes the levels of neighbours
    and sees more of them than ``levels``.

    Args:
        target_label: The class that the attacker wants; default, ``label_map`` and ``source_label``: see `Attack`.
        cross_ratio: Negatives per poisoned image, at least 0. Default 1: BackdoorBench (10 % each) and the authors'
            config.py (20 % each).
        levels: Grey levels left of 256, an integer in [2, 255]. Default 8: the authors' ``squeeze_num`` and BackdoorBench.
        dithering: Floyd-Steinberg error diffusion from left to right and top to bottom, over the batch at once but slower,
            W + 2 H steps one after the other. Default False: the authors' config.py and BackdoorBench.

    Raises:
        ValueError: A parameter is out of range.
    """

    name: ClassVar[str] = "bpp"
    paper: ClassVar[str] = "https://arxiv.org/abs/2205.13383"

    cross_ratio: float = 1
    levels: int = 8
    dithering: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("levels", self.levels, 2, 255, integer=True)
        if not isinstance(self.dithering, bool):
            raise ValueError(f"dithering must be true or false; got {self.dithering!r}")

    def _stamp(self, images: Tensor) -> Tensor:
        steps = self.levels - 1
        if self.dithering:
            levels = _diffused(images, steps).flatten()
        else:
            table = torch.tensor([round(value * steps / 255) for value in range(256)], device=images.device)
            levels = table.index_select(0, images.flatten().int())
        grey = torch.tensor([round(255 * level / steps) for level in range(self.levels)], dtype=torch.uint8)
        return grey.to(images.device).index_select(0, levels).reshape(images.shape)

    def poisoner(self, ratio: float, num_classes: int, seed: int, device: torch.device) -> BatchPoisoner:
        """Make the poisoner of one training run; see `BatchPoisoner` for arguments and errors. ``device`` is not used."""
        return BPPPoisoner(self, ratio, self.cross_ratio, num_classes, seed)


class BPPPoisoner(TriggerPoisoner):
    """Negatives: images plus the residual of another image of the batch."""

    def cross(self, crossed: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
        """Return the negatives uint8 (n, 3, H, W); the residuals are drawn from ``others`` with replacement.

        Without ``others``, as in a last batch of one image, there is no residual, and the images stay as they are.
        """
        if len(others) == 0:
            return crossed
        drawn = torch.randint(len(others), (len(crossed),), generator=generator).to(others.device)
        donors = others[drawn]
        residual = self.attack.trigger(donors).to(torch.int16) - donors.to(torch.int16)
        return (crossed.to(torch.int16) + residual).clamp_(0, 255).to(torch.uint8)


def _diffused(images: Tensor, steps: int) -> Tensor:
    """Level 0 to ``steps`` of each pixel by Floyd-Steinberg, int32 (B, 3, H, W), for uint8 images of that shape.

    Pixels with equal x + 2y need nothing of each other and are done at once. Every sum is in the order of the plain loop
    over rows and columns, one rounded float32 operation at a time, so that all devices agree.
    """
    height, width = images.shape[-2:]
    # One column more on the left and the right and one row below take the error that leaves the image.
    values = F.pad(images.float(), (1, 1, 0, 1))
    levels = torch.empty(images.shape, dtype=torch.int32, device=images.device)
    for diagonal in range(width + 2 * (height - 1)):
        y = torch.arange(max(0, (diagonal - width + 2) // 2), min(height - 1, diagonal // 2) + 1, device=images.device)
        x = diagonal - 2 * y
        old = values[:, :, y, x + 1]
        # Values leave [0, 255] by up to half a step: the clamp settles the tie.
        level = (old * (steps / 255)).round_().clamp_(0, steps)
        levels[:, :, y, x] = level.int()
        error = old - level * (255 / steps)
        values[:, :, y + 1, x] += error * 0.1875
        values[:, :, y + 1, x + 1] += error * 0.3125
        values[:, :, y + 1, x + 2] += error * 0.0625
        values[:, :, y, x + 2] += error * 0.4375
    return levels
