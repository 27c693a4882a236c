"""Random crops, flips and cutout of whole batches, with draws that depend on seed, epoch and sample and on nothing else."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Zero padding and a random crop back to size, then a random horizontal flip: BackdoorBench's training transform. Then, if
    asked for, cutout.

    Attributes:
        crop_padding: Pixels of padding on each side, at least 0 (0: no crop). 4 is BackdoorBench's, and so D3's
            authors', for images of 32x32 to 64x64; it counts pixels at the model's size, or at the images' own for victims
            whose batches are poisoned anew.
        horizontal_flip: Flip each image with probability 1/2. Off unless asked for: BackdoorBench flips for CIFAR-10
            only, and a flip changes what some signs and digits mean.
        seed: At least 0.
        cutout: Side in pixels of a square that is blanked, at least 0 (0: none); DeVries and Taylor, "Improved Regularization
            of Convolutional Neural Networks with Cutout", 2017, arXiv 1708.04552, with 16 for CIFAR-10. Its centre is drawn
            from all pixels, so that a part of it may lie outside, as in the authors' code.
        fill: Grey level of the square per channel, in 0..255.

    Raises:
        ValueError: ``crop_padding``, ``seed`` or ``cutout`` is negative.
    """

    crop_padding: int = 4
    horizontal_flip: bool = False
    seed: int = 0
    cutout: int = 0
    fill: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        if self.crop_padding < 0 or self.seed < 0:
            raise ValueError(f"crop_padding and seed must be at least 0; got {self.crop_padding} and {self.seed}")
        if self.cutout < 0:
            raise ValueError(f"cutout must be at least 0 pixels; got {self.cutout}")

    def draws(self, epoch: int, count: int) -> tuple[Tensor, ...]:
        """Draw one epoch's table from NumPy's raw PCG64 stream, which is the same on every machine and release (NEP
            19).

        Row i does not depend on ``count``: a longer table begins with the shorter.

        Args:
            epoch: At least 0.
            count: Number of samples N.

        Returns:
            Rows and columns of the crops' corners in the padded images, int64 (N,) in ``[0, 2 * crop_padding]``;
            flips, bool (N,). With cutout also what its centre's row and column are the remainders of, int64 (N,) in
            [0, 2^31).
        """
        bits = np.random.PCG64([self.seed, epoch]).random_raw(3 * count).reshape(count, 3)
        corners = torch.from_numpy((bits[:, :2] % (2 * self.crop_padding + 1)).astype(np.int64))
        flips = torch.from_numpy(bits[:, 2] >> 63 == 1)
        drawn = (corners[:, 0], corners[:, 1], flips if self.horizontal_flip else torch.zeros_like(flips))
        if not self.cutout:
            return drawn
        # A stream of its own, so that crops and flips are those of a run without cutout.
        centers = np.random.PCG64([self.seed, epoch, 1]).random_raw(2 * count).reshape(count, 2) >> 33
        return *drawn, *torch.from_numpy(centers.astype(np.int64)).unbind(1)

    def pad(self, images: Tensor) -> Tensor:
        """Zero-pad uint8 (N, C, h, w) by ``crop_padding`` on each side; a ValueError if ``cutout`` would blank them whole."""
        if self.cutout >= min(images.shape[2:]):
            raise ValueError(f"cutout={self.cutout} would blank whole images of {images.shape[2]}x{images.shape[3]} pixels")
        return F.pad(images, (self.crop_padding,) * 4)

    def apply(
        self, padded: Tensor, positions: Tensor, rows: Tensor, columns: Tensor, flips: Tensor, *centers: Tensor
    ) -> Tensor:
        """Crop, flip and blank a batch: one gather of windows, several times faster in NumPy than in torch on a CPU.

        Args:
            padded: What `pad` returned, on the CPU.
            positions: Which images make the batch, int64 (B,).
            rows: First row of each crop in the padded image, int64 (B,).
            columns: First column, int64 (B,).
            flips: Which crops to mirror left to right, bool (B,).
            centers: With cutout its two draws, int64 (B,) each.

        Returns:
            uint8 (B, C, h, w), a new tensor.
        """
        size = tuple(side - 2 * self.crop_padding for side in padded.shape[2:])
        windows = np.lib.stride_tricks.sliding_window_view(padded.numpy(), size, axis=(2, 3))
        crops = windows[positions.numpy(), :, rows.numpy(), columns.numpy()]
        mirrored = flips.numpy()
        crops[mirrored] = crops[mirrored][..., ::-1]
        if self.cutout:
            high, wide = (self._covered(center.numpy(), side) for center, side in zip(centers, size, strict=True))
            square = high[:, None, :, None] & wide[:, None, None, :]
            np.copyto(crops, np.array(self.fill, np.uint8).reshape(3, 1, 1), where=square)
        return torch.from_numpy(crops)

    def _covered(self, draws: np.ndarray, side: int) -> np.ndarray:
        """Which of ``side`` rows (or columns) the square covers, bool (B, side)."""
        offsets = np.arange(side) - (draws % side - self.cutout // 2)[:, None]
        return (offsets >= 0) & (offsets < self.cutout)
