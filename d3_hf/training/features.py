"""Features, what a layer reads: how far they are from another network's."""

import torch.nn.functional as F
from torch import Tensor


def feature_distances(features: Tensor, others: Tensor) -> Tensor:
    """``||f / ||f|| - f_0 / ||f_0|| ||^2 = 2 - 2 cos(f, f_0)`` for each image: 0 where they agree, 2 where they are orthogonal.

    Args:
        features: f, (B, ...), any float dtype; computed in float32.
        others: f_0, of the same shape.

    Returns:
        float32 (B,), in [0, 4].
    """
    pairs = (F.normalize(f.flatten(1).float(), dim=1) for f in (features, others))
    return F.mse_loss(*pairs, reduction="none").sum(1)


def cut_off(distances: Tensor, threshold: float) -> Tensor:
    """``h(P) = P`` where ``P <= threshold``, else 0: an image that is far enough adds neither value nor gradient."""
    return distances * (distances.detach() <= threshold)
