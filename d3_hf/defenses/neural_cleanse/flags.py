"""Which classes need an oddly small trigger."""

from dataclasses import dataclass

import torch
from torch import Tensor

MAD_TO_SIGMA = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class Findings:
    """The triggers of C classes, F of them flagged.

    Attributes:
        norms: float32 (C,), L1 norms of the masks.
        reached: bool (C,), whose trigger reached the threshold.
        flagged: int64 (F,), the flagged classes.
        masks: float32 (F, 1, h, w) in (0, 1).
        patterns: float32 (F, 3, h, w) in (0, 1), pixels.
    """

    norms: Tensor
    reached: Tensor
    flagged: Tensor
    masks: Tensor
    patterns: Tensor


def anomaly_indices(norms: Tensor) -> Tensor:
    """``|L - median| / (1.4826 MAD)`` of L1 norms (C,); where the MAD is 0, infinite off the median."""
    norms = norms.double()
    deviations = (norms - norms.quantile(0.5)).abs()
    indices = deviations / (MAD_TO_SIGMA * deviations.quantile(0.5))
    return indices.where(deviations > 0, 0.0)


def flagged_classes(norms: Tensor, reached: Tensor, threshold: float) -> Tensor:
    """Classes, int64 (F,), whose trigger works (``reached``, bool (C,)) and has an anomalously small norm (``norms``, (C,))."""
    small = norms.double() < norms.double().quantile(0.5)
    return torch.nonzero(small & reached & (anomaly_indices(norms) > threshold)).flatten()


def flag(triggers: Tensor, reached: Tensor, threshold: float) -> Findings:
    """Flag the anomalous ones of the triggers (C, 4, h, w) of all classes, of which ``reached``, bool (C,), work."""
    norms = triggers[:, 0].sum((1, 2))
    flagged = flagged_classes(norms, reached, threshold)
    masks, patterns = triggers[flagged].split([1, 3], dim=1)
    return Findings(norms, reached, flagged, masks.contiguous(), patterns.contiguous())
