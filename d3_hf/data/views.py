"""Views: random versions of images for training without labels, drawn for a whole batch at once on uint8.

SimCLR's transform (Chen et al., ICML 2020, arXiv 2002.05709) without blur, which it leaves out at 32x32 too, and without hue:
a random crop of 20 to 100 % of the area, resized back; a flip with probability 1/2; brightness, contrast and saturation by
factors in [0.6, 1.4] with probability 0.8; grey with probability 0.2. A view depends on its generator alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CROP_AREA, CROP_RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
JITTER, JITTER_CHANCE, GREY_CHANCE = 0.4, 0.8, 0.2
LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601, as PIL and torchvision grey images


def view(
    images: Tensor,
    generator: torch.Generator,
    extents: Tensor | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Draw a view of each image.

    Args:
        images: uint8 (B, 3, H, W), on any device.
        generator: CPU generator of the draws.
        extents: int64 (B, 2), height and width in pixels of each image where it fills the upper left part of (H, W) alone;
            None: they fill all of it. A crop of an image that is wider or higher than ``size`` has the shape of ``size`` still,
            cut off where it is larger than the image.
        size: Height and width of a view in pixels; None: (H, W).

    Returns:
        uint8 (B, 3, *size).
    """
    draws = torch.rand((11, len(images)), generator=generator).to(images.device)
    size = tuple(images.shape[2:]) if size is None else size
    cropped = _cropped(images.float(), extents, size, *draws[:5])
    return _coloured(cropped, *draws[5:]).round().clamp(0, 255).to(torch.uint8)


def _cropped(
    images: Tensor,
    extents: Tensor | None,
    size: tuple[int, int],
    area: Tensor,
    ratio: Tensor,
    row: Tensor,
    column: Tensor,
    flip: Tensor,
) -> Tensor:
    """A rectangle of each image brought to ``size``, bilinearly; mirrored where ``flip`` says so."""
    share = CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * area
    low, high = (math.log(end) / 2 for end in CROP_RATIO)
    stretch = torch.exp(low + (high - low) * ratio)
    if extents is not None:
        stretch = stretch * (extents[:, 0] * size[1] / (extents[:, 1] * size[0])).sqrt()
    height, width = ((share.sqrt() * factor).clamp(max=1) for factor in (1 / stretch, stretch))
    centre_y, centre_x = ((1 - side) * (2 * place - 1) for side, place in ((height, row), (width, column)))
    if extents is not None:  # from where an image lies to where that is in all of (H, W)
        part_y, part_x = (extents / extents.new_tensor(images.shape[2:])).unbind(1)
        height, width = height * part_y, width * part_x
        centre_y, centre_x = centre_y * part_y + (part_y - 1), centre_x * part_x + (part_x - 1)  # exact where it is all
    nothing, mirror = torch.zeros_like(height), torch.where(flip < 0.5, -1.0, 1.0)
    rows = [torch.stack([mirror * width, nothing, centre_x], 1), torch.stack([nothing, height, centre_y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [len(images), 3, *size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _coloured(
    images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, jittered: Tensor, greyed: Tensor, order: Tensor
) -> Tensor:
    """Brightness, then contrast and saturation in the order that is drawn, then grey."""
    keep = jittered < JITTER_CHANCE
    bright, sharp, vivid = (
        torch.where(keep, 1 + JITTER * (2 * draw - 1), 1.0).view(-1, 1, 1, 1) for draw in (brightness, contrast, saturation)
    )
    images = (images * bright).clamp(0, 255)
    one = _saturated(_contrasted(images, sharp), vivid)
    other = _contrasted(_saturated(images, vivid), sharp)
    images = torch.where((order < 0.5).view(-1, 1, 1, 1), one, other)
    return torch.where((greyed < GREY_CHANCE).view(-1, 1, 1, 1), _grey(images), images)


def _grey(images: Tensor) -> Tensor:
    return (images * images.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True).expand_as(images)


def _contrasted(images: Tensor, factor: Tensor) -> Tensor:
    mean = _grey(images).mean((1, 2, 3), keepdim=True)
    return (mean + (images - mean) * factor).clamp(0, 255)


def _saturated(images: Tensor, factor: Tensor) -> Tensor:
    grey = _grey(images)
    return (grey + (images - grey) * factor).clamp(0, 255)
