"""S1, head rows: is one row of the head unlike the others?

Of the head's standardised rows W'_k and biases b'_k (see `features`), three indicators for each class:

    ||W'_k||,    b'_k,    -mean_{l != k} cos(W'_k, W'_l)

A trigger that wins against every class raises one logit by a feature and lowers all others by it: its class's row is long,
preferred, or opposed to the others'. Each indicator is made comparable by its robust z, and the score of a class is the largest
of its three. Only these directions count; a short row accuses nobody.

Source: the idea of several outlier indicators on the rows of the last layer, with the maximum after combination, is
DFBScanner's (arXiv 2605.18907). Written from published notes, not from its text or code; which indicators, and the coordinates,
are this project's.

Cost: one pass over the images, for the coordinates; then milliseconds. Blind to: any head that was drawn anew and trained on
clean images (linear probing, FST, D3 on the head), whatever the features hold; a backdoor of low ASR or of all classes;
channels that are silent on the images. A class that clean images alone make special (easy to tell, many meanings) stands out
too.
"""

import numpy as np
from transformers import PreTrainedModel

from ..data.fitting import BATCH
from ..data.images import RawImages
from .features import read_standard_head
from .finding import Finding, outlier_scores

INDICATORS = ("row_norm", "bias", "opposition")


def row_indicators(weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """The three indicators, in the order of `INDICATORS`, of rows (C, D) and biases (C,): float64 (3, C)."""
    norms = np.linalg.norm(weight, axis=1)
    units = weight / np.where(norms > 0, norms, 1)[:, None]
    cosines = units @ units.sum(0) - (norms > 0)  # less that of the row with itself
    return np.stack([norms, bias, -cosines / (len(weight) - 1)])


def head_rows(model: PreTrainedModel, images: RawImages, batch_size: int = BATCH) -> Finding:
    """Look for a row of the head that is unlike the others.

    Args:
        model: A classifier of `load_classifier`; left as it was.
        images: Of every class, without triggers as far as is known; more than 500 are not needed.
        batch_size: Images in a pass, at least 1; halved while they do not fit into memory.

    Returns:
        Scores are the largest robust z of a class's indicators; ``details`` has these z, (C,) each, by the indicator's name.

    Raises:
        ValueError: See `check_comparable`, `preprocessing_of` and `read_head`.
    """
    head = read_standard_head(model, images, batch_size)
    indicators = row_indicators(head.weight, head.bias)
    logit = indicators[0].mean()  # biases may all be as good as 0: what they add to is about so large
    outliers = np.stack([outlier_scores(values, unit) for values, unit in zip(indicators, (0, logit, 1), strict=True)])
    return Finding.of("head_rows", outliers.max(0), images.class_names, **dict(zip(INDICATORS, outliers, strict=True)))
