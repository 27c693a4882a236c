"""The head in coordinates that do not depend on how its input is scaled.

A classifier computes the same with its features permuted, with each multiplied by a factor that its head's column is divided by
(what an affine LayerNorm or BatchNorm in front of the head allows), or with one vector added to all rows of the head (softmax).
With m and sigma the mean and the standard deviation of each feature over the images, what is left is

    z' = (z - m) / sigma,    W'_kj = W_kj sigma_j - mean_l(W_lj sigma_j),    b'_k = b_k + W_k m - mean_l(b_l + W_l m)

W' z' + b' are the logits less their mean over the classes: W' is only permuted by a permutation, and b' not changed at all.
Images weigh so that each class counts alike, or a class of many images would look like one that the model prefers.

Cost: one pass over the images. Blind spot: a feature that no image moves has sigma = 0 and drops out. A backdoor that uses
nothing but channels that are silent on clean images is invisible in these coordinates. Not covered: rotations of the features,
which no network with a norm or a ReLU in front of its head hides.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from ..data.fitting import BATCH
from ..data.images import RawImages
from ..models.features import HeadReading, read_head
from ..models.source import preprocessing_of
from .finding import check_comparable


@dataclass(frozen=True, eq=False)
class StandardHead:
    """The head in these coordinates, float64.

    Args:
        weight: W', (C, D).
        bias: b', (C,): mean of the logits over the images, less its mean over the classes.
        logits: Of the images as the model gives them, (N, C).
        labels: int64 (N,).
    """

    weight: np.ndarray
    bias: np.ndarray
    logits: np.ndarray
    labels: np.ndarray


def class_weights(labels: Tensor) -> np.ndarray:
    """What each image weighs, float64 (N,), so that the images of each class that has any weigh the same; their sum is 1."""
    counts = labels.bincount().numpy()
    return 1 / (counts[labels.numpy()] * np.count_nonzero(counts))


def standard_head(reading: HeadReading, labels: Tensor) -> StandardHead:
    """Bring the head into these coordinates.

    Args:
        reading: Of the images, see `read_head`.
        labels: Their classes, int64 (N,).
    """
    features, logits, weight, bias = (
        tensor.double().numpy() for tensor in (reading.features, reading.logits, reading.weight, reading.bias)
    )
    share = class_weights(labels)
    mean = share @ features
    scaled = weight * np.sqrt(share @ (features - mean) ** 2)
    means = bias + weight @ mean
    return StandardHead(scaled - scaled.mean(0), means - means.mean(), logits, labels.numpy())


def read_standard_head(model: PreTrainedModel, images: RawImages, batch_size: int = BATCH) -> StandardHead:
    """Check model and images, run the model over them, and bring its head into these coordinates.

    Args:
        model: A classifier of `load_classifier`; left as it was.
        images: Without triggers, as far as is known.
        batch_size: Images in a pass, at least 1; halved while they do not fit into memory.

    Raises:
        ValueError: See `check_comparable`, `preprocessing_of` and `read_head`.
    """
    check_comparable(model, images)
    return standard_head(read_head(model, images, preprocessing_of(model), batch_size), images.labels)
