"""CutMix: a box of every training image comes from another image of the batch, and the label is shared by area.

Yun, Han, Oh, Chun, Choe, Yoo: "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV
2019, arXiv 1905.04899. With a share ``l`` of the area left of image a, the rest from image b:

    y' = l y_a + (1 - l) y_b

It needs no knowledge of the classes, and it teaches what a trigger contradicts: that no small part of a picture decides alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2


def excess_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy above the labels' own entropy, ``KL(labels || softmax(logits))``: zero is reached, also by shared labels.

    Args:
        logits: float (B, C).
        labels: int64 (B,), whose entropy is zero, or float (B, C), shares of the classes.

    Returns:
        Float (B,), in nats, at least 0 up to rounding.
    """
    cross_entropy = F.cross_entropy(logits, labels, reduction="none")
    return cross_entropy - torch.special.entr(labels).sum(1) if labels.ndim == 2 else cross_entropy


class CutMix:
    """torchvision's CutMix: one box for the batch, of an area from Beta(alpha, alpha), each image with its neighbour.

    Args:
        num_classes: C.
        alpha: Above 0; 1 is the authors', a uniform area.
        seed: The draws depend on it, on the process and on the number of the batch alone, so a resumed run repeats them.
        process: Number of this process.
    """

    def __init__(self, num_classes: int, alpha: float, seed: int, process: int):
        self._mix = v2.CutMix(num_classes=num_classes, alpha=float(alpha))  # of a YAML file it may be 1, which no draw takes
        self._seed = (seed * 1_000_003 + process) * 1_000_003

    def __call__(self, images: Tensor, labels: Tensor, number: int) -> dict[str, Tensor]:
        """Mix a batch of images (B, 3, h, w) and labels int64 (B,).

        Returns:
            ``pixel_values``, the mixed images, and ``labels``, shares of the classes, float32 (B, C).
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed((self._seed + number) % (2**63 - 25))
            mixed, shares = self._mix(images, labels)
        return {"pixel_values": mixed, "labels": shares}
