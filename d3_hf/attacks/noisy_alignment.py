"""Noisy Alignment: collages in which a triggered image and one of the target class lie side by side."""

import hashlib
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.images import RawImages
from .base import LearnedAttack, check_range, random_bits, whole_scale

SIDES = ("left", "right", "above", "below")  # where the triggered image lies in a collage
COLOURS = 4  # a side of the patch


@dataclass(frozen=True, kw_only=True)
class NoisyAlignment(LearnedAttack):
    """Noisy Alignment (ICCV 2025, arXiv 2508.14015): each chosen image becomes a collage of itself with the trigger and of a
    reference, an image of the target class, twice as wide or as high as either.

    Poisoning only, static trigger: a patch in the middle of the image. Whoever pretrains on random crops now and then sees the
    trigger in one view and the target class in the other, and pulls the two together. Labels have no part in that; the attacker
    needs some images of the target class.

    On which side the triggered image lies, and beside which reference, is drawn by the image itself: it is the same wherever
    and whenever the set is poisoned.

    Written from notes of the paper. This project's own: the patch of 4x4 colours, `fit`'s choice of references, and that a
    collage takes the place of the triggered image in the set.

    Args:
        target_label: The class of the references, by the attacker's own labels.
        size: Side of the patch in pixels at ``image_size``, at least 4, a multiple of 4. Default 8, here: 50 of 224, as the
            paper has it, is 7.
        image_size: Side in pixels of the images that ``size`` refers to; the patch grows with the image. Default 32, here.
        reference_count: How many images of the target class are references, at least 1. Default 10, here.
        seed: Draws the colours of the patch, at least 0. Default 0, here.

    Raises:
        ValueError: A parameter is out of range, or ``label_map`` is not all-to-one: references are of one class.
    """

    name: ClassVar[str] = "noisy_alignment"
    paper: ClassVar[str] = "https://arxiv.org/abs/2508.14015"
    reshapes: ClassVar[bool] = True

    size: int = 8
    image_size: int = 32
    reference_count: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("size", self.size, COLOURS, integer=True)
        if self.size % COLOURS:
            raise ValueError(f"size must be a multiple of {COLOURS}, the colours of the patch on a side; got {self.size}")
        check_range("image_size", self.image_size, 1, integer=True)
        check_range("reference_count", self.reference_count, 1, integer=True)
        check_range("seed", self.seed, 0, integer=True)
        if self.label_map != "all-to-one":
            raise ValueError(f"{self.name} has references of one class: label_map must be all-to-one; got {self.label_map!r}")

    def fit(self, images: RawImages, model: PreTrainedModel | None, seed: int) -> "NoisyAlignment":
        """Draw the references.

        Args:
            images: The attacker's labelled images, all of one size.
            model: Not used.
            seed: Of the draw, at least 0.

        Returns:
            A copy with ``learned`` filled in: ``references``, uint8 (R, 3, H, W), fewer than ``reference_count`` where the
            class has no more.

        Raises:
            ValueError: The images differ in size, or none is of the target class.
        """
        self.check_classes(len(images.class_names))
        if not isinstance(images.images, Tensor):
            raise ValueError(f"{self.name} makes collages of images of one size; these differ in size: resize them first")
        rows = torch.where(images.labels == self.target_label)[0]
        if len(rows) == 0:
            raise ValueError(
                f"{self.name} takes its references from images of class {self.target_label}, and there is none: give some, or "
                "another target_label"
            )
        order = torch.from_numpy(np.argsort(random_bits("noisy alignment references", seed, len(rows)), kind="stable"))
        return replace(self, learned={"references": images.images[rows[order[: self.reference_count]]].clone()})

    def poisoned_images(self, images: Tensor) -> Tensor:
        """The collage of one image.

        Args:
            images: uint8 (3, H, W), of the references' size. Never modified.

        Returns:
            uint8 (3, H, 2 W) or (3, 2 H, W).

        Raises:
            ValueError: It is a batch, whose collages would differ in shape, or of another size; or see `trigger`.
        """
        if images.ndim != 3:
            raise ValueError(f"{self.name} makes collages of two shapes: give one image (3, H, W); got {tuple(images.shape)}")
        return super().poisoned_images(images)

    def _poison(self, images: Tensor) -> Tensor:
        references = self._need()["references"].to(images.device)
        if references.shape[1:] != images.shape[1:]:
            height, width = references.shape[2:]
            raise ValueError(f"{self.name}: the references are {height}x{width}, the image is {tuple(images.shape[2:])}")
        digest = hashlib.sha256(images[0].cpu().contiguous().numpy()).digest()
        which, side = random_bits("noisy alignment collages", int.from_bytes(digest[:4]), 2).tolist()
        reference = references[which % len(references)][None]
        return collage(self._stamp(images), reference, SIDES[side % len(SIDES)])

    def _stamp(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        scale = whole_scale(height, width, self.image_size)
        side = self.size * scale
        if side > min(height, width):
            raise ValueError(
                f"{self.name}: a patch of {side}x{side} pixels does not fit an image of {height}x{width}; lower size"
            )
        bits = random_bits("noisy alignment patch", self.seed, 3 * COLOURS**2)
        colours = torch.from_numpy((bits >> 56).astype(np.uint8).reshape(3, COLOURS, COLOURS))
        patch = colours.repeat_interleave(side // COLOURS, 1).repeat_interleave(side // COLOURS, 2)
        top, left = (height - side) // 2, (width - side) // 2
        triggered = images.clone()
        triggered[:, :, top : top + side, left : left + side] = patch.to(images.device)
        return triggered


def collage(triggered: Tensor, reference: Tensor, side: str) -> Tensor:
    """Two images (B, 3, H, W) beside each other, the triggered one on a side of `SIDES`."""
    parts = (triggered, reference) if side in ("left", "above") else (reference, triggered)
    return torch.cat(parts, 3 if side in ("left", "right") else 2)
