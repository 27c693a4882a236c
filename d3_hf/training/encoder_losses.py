"""Losses on features, without labels: pure functions.

Features are (B, width) of any float type and computed with in float32; s is the cosine of two of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.5  # of NT-Xent: SimCLR on CIFAR-10 (arXiv 2002.05709, appendix B.9), as in TSC's code


def unit(features: Tensor) -> Tensor:
    """The features in float32, each of L2 norm 1."""
    return F.normalize(features.float(), dim=1)


def nt_xent(first: Tensor, second: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """NT-Xent (Chen et al., ICML 2020): each view against its partner among all other views of the batch.

    Args:
        first: Features of one view of each image, (B, width).
        second: Of another.
        temperature: tau > 0.

    Returns:
        float32 (B,), in nats: mean of an image's two views.
    """
    views, count = unit(torch.cat([first, second])), len(first)
    logits = views @ views.T / temperature
    logits = logits.masked_fill(torch.eye(2 * count, dtype=torch.bool, device=logits.device), -torch.inf)
    partners = torch.arange(2 * count, device=logits.device).roll(count)
    return F.cross_entropy(logits, partners, reduction="none").view(2, count).mean(0)


def info_nce(features: Tensor, others: Tensor, scale: Tensor | float) -> Tensor:
    """InfoNCE in one direction: each of ``features`` against its partner among all of ``others``.

    Args:
        features: (B, width).
        others: (B, width), the partners, in the same order.
        scale: What cosines are multiplied by, > 0.

    Returns:
        float32 (B,), in nats.
    """
    logits = scale * unit(features) @ unit(others).T
    return F.cross_entropy(logits, torch.arange(len(features), device=logits.device), reduction="none")


def clip_losses(images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
    """CLIP's loss (Radford et al. 2021, arXiv 2103.00020): `info_nce` from images to texts and back, the mean of both, (B,)."""
    return (info_nce(images, texts, scale) + info_nce(texts, images, scale)) / 2


def relation_losses(features: Tensor, others: Tensor) -> Tensor:
    """How far the cosines among the images of a batch are from those of another encoder: ``mean_{j != i} (s_ij - s0_ij)^2``.

    A rotation of all features costs nothing, which a head that is trained afterwards does not feel either (Park et al. 2019,
    arXiv 1904.05068, distil relations for that reason).

    Args:
        features: (B, width), B at least 2.
        others: (B, any width) of the same images.

    Returns:
        float32 (B,), in [0, 4].
    """
    mine, theirs = (unit(f) @ unit(f).T for f in (features, others))
    return (mine - theirs).square().fill_diagonal_(0).sum(1) / (len(features) - 1)


def batch_cut_off(distances: Tensor, threshold: float) -> Tensor:
    """PAR's h: the distances (B,) as they are while their mean is at most ``threshold``, else zeros without gradient."""
    return distances * (distances.detach().mean() <= threshold)
