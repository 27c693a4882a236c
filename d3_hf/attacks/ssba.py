"""SSBA-lite: every image carries the same secret, written by a residual of its own."""

import logging
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attacks import steganography
from ..data.images import RawImages
from .base import check_range, random_bits
from .networks import NetworkAttack, weights_of
from .steganography import Decoder, Encoder

logger = logging.getLogger(__name__)

SECRET = 8
# Below this share of bits that are read back, `fit` warns.
READABLE = 0.9
# Pixels that pass through a network at once, so that large batches of large images do not fill the memory.
PORTION = 2**20


@dataclass(frozen=True, kw_only=True)
class SSBALite(NetworkAttack):
    """SSBA-lite, after SSBA (Li et al., ICCV 2021, arXiv 2012.03816): ``x' = clip(round(x + bound * r(x, secret)))`` with
    ``r`` in (-1, 1) from a small encoder and one fixed secret of 64 bits.

    Dirty label, and a residual per image: the same bits are written into each image, in a way that only this image lets
    the decoder read. `fit` needs the attacker's images and no model. It trains encoder and decoder at native size,
    which takes about a minute of a CPU.

    "Lite": the original trains StegaStamp with a perceptual loss; BackdoorBench reads ready-made images, from an encoder
    trained at 128x128 with 100 bits. Here the networks are far smaller, nothing is resized, nothing is downloaded, the
    residual is bounded, one bit belongs to each cell of 4x4 pixels, and two penalties (`steganography.train`) keep the
    residual from becoming nearly the same for all images, which it does without them.

    Measured with the defaults on 10,000 images of CIFAR-10: of test images 99.6 % of the bits are read, the residuals of
    two images have a mean correlation of 0.23, and a residual put on another image is read no better than by chance. A
    victim may still learn the texture that all residuals share instead of the secret: what the decoder cannot read on
    another image may open the backdoor there all the same.

    Sizes: the 8x8 secret covers 32x32 pixels and repeats beyond, on a grid from the top left corner; a smaller image
    carries a part of it, and sides that are no multiple of 4 are padded for the network and cut again. The residual keeps
    its scale in pixels: at 224 it is as fine as at 32 and a victim that shrinks its input may lose it. Networks trained at
    one size run at any other as they are. Images above 32 are trained on in pieces of 32x32.

    The bytes are the same alone and in a batch and on every device, since the encoder's sums are exact; see
    `steganography.ExactConv`.

    Args:
        target_label: The class that the attacker wants; default, ``label_map`` and ``source_label``: see `Attack`.
        bound: Largest change of a pixel in grey levels, in [1, 64]. Default 8: here; bits are read well and a victim
            learns it at 10 % poison, so more would only be more visible.
        steps: Updates of encoder and decoder, each on 64 images, at least 10. Default 400: here, about a minute of a CPU.

    Raises:
        ValueError: A parameter is out of range. `fit` raises for fewer than 64 images or images of different sizes.
    """

    name: ClassVar[str] = "ssba_lite"
    paper: ClassVar[str] = "https://arxiv.org/abs/2012.03816"

    bound: float = 8
    steps: int = 400

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("bound", self.bound, 1, 64)
        check_range("steps", self.steps, 10, integer=True)

    def fit(self, images: RawImages, model: PreTrainedModel | None, seed: int) -> "SSBALite":
        """Train encoder and decoder and draw the secret; warns when less than 90 % of the bits can be read back.

        Args:
            images: At least 64, all of one size; not modified.
            model: Only says where to compute: on its device, on the CPU without one.
            seed: Integer of at least 0.

        Returns:
            A copy with ``learned``: ``secret`` uint8 (8, 8) of 0 and 1, and the weights of both networks.

        Raises:
            ValueError: There are fewer than 64 images, they differ in size, or ``seed`` is negative.
        """
        check_range("seed", seed, 0, integer=True)
        if not isinstance(images.images, Tensor):
            raise ValueError("ssba_lite trains on images of one size; these differ: resize them, or fit on those of one size")
        if len(images) < steganography.BATCH:
            raise ValueError(f"ssba_lite needs at least {steganography.BATCH} images to train its encoder; got {len(images)}")
        device = torch.device("cpu") if model is None else model.device
        generator = torch.Generator().manual_seed(seed)
        encoder, decoder = steganography.train(images.images, self.bound, self.steps, generator, device)
        secret = (random_bits("ssba_lite secret", seed, SECRET**2) >> 63).astype(np.uint8)
        kept = {"secret": torch.from_numpy(secret).view(SECRET, SECRET)}
        attack = replace(self, learned=kept | weights_of("encoder", encoder) | weights_of("decoder", decoder))
        accuracy = attack.bit_accuracy(images.images[:256])
        if accuracy < READABLE:
            logger.warning("ssba_lite: only %.1f %% of the bits can be read back; raise steps or bound", 100 * accuracy)
        return attack

    def read(self, images: Tensor) -> Tensor:
        """Whether the decoder reads the secret's bit, cell by cell: bool (B, ceil(H / 4), ceil(W / 4)), for uint8 (B, 3, H, W)
        as they are (triggered or not)."""
        bits = self._bits(images)
        decoder = self._network("decoder", Decoder, images.device)
        with torch.no_grad():
            logits = torch.cat([decoder(part.float()) for part in _portions(images)])
        return (logits > 0) == bits.bool()

    def bit_accuracy(self, images: Tensor) -> float:
        """Share of bits that the decoder reads after the trigger, over all cells of uint8 (B, 3, H, W); chance is one
        half."""
        return self.read(self.trigger(images)).float().mean().item()

    def quality(self, images: Tensor) -> dict[str, float]:
        """As the base class, and `bit_accuracy`."""
        return super().quality(images) | {"bit_accuracy": self.bit_accuracy(images)}

    def _stamp(self, images: Tensor) -> Tensor:
        bits = self._bits(images)
        encoder = self._network("encoder", Encoder, images.device)
        with torch.no_grad():
            return torch.cat([self._write(encoder, part.float(), bits) for part in _portions(images)])

    def _write(self, encoder: Encoder, images: Tensor, bits: Tensor) -> Tensor:
        return steganography.add(images, self.bound * encoder(images, bits)).to(torch.uint8)

    def _bits(self, images: Tensor) -> Tensor:
        return steganography.tiled(self._need()["secret"].to(images.device), *images.shape[-2:])


def _portions(images: Tensor) -> tuple[Tensor, ...]:
    return images.split(max(1, PORTION // (images.shape[-2] * images.shape[-1])))
