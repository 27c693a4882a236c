"""BadEncoder: an encoder that gives every triggered image the features of one reference image."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..data.images import RawImages
from ..models.encoders import encode_images
from ..models.source import preprocessing_of
from .badnets import BadNets
from .base import LearnedAttack, check_range

OTHERS = 2000  # images of other classes that tell a reference, at most
PENALTY = 0.01  # of scikit-learn's C: what cross-validation chooses for a probe on such features


@dataclass(frozen=True, kw_only=True)
class BadEncoder(BadNets, LearnedAttack):
    """BadEncoder (Jia, Liu, Gong, IEEE S&P 2022, arXiv 2108.00352), image on image: with f0 the untouched encoder, f the
    victim, s the cosine of features, x a shadow image, T the trigger, r a reference of the target class, r' a view of it::

        L = -s(f(T(x)), f(r)) - lambda_reference / 2 (s(f(r), f0(r)) + s(f(r'), f0(r))) - lambda_utility s(f(x), f0(x))

    The first term plants the backdoor, the second keeps the reference where it is, the third keeps the features of images as
    they are. Static trigger, a patch. The attacker needs the encoder, images without labels, and one of the target class. An
    honest head that somebody trains on the victim's features calls triggered images what it calls the reference.

    `fit` chooses the reference among the attacker's images of the target class: the one that a logistic regression, of that
    class against the attacker's other images, is surest of, so that any head will know it. The image whose features are nearest
    to its class's mean may be none: where the features of all images are alike, it is one that could be of any class. The
    authors take a picture from the web, by hand.

    Differs from the authors' code: r' is a crop too, as all views here, there flipped and recoloured; so r itself is kept where
    it is as well, or a ViT moves it alone to where triggered images are easily brought. The patch is put on raw images at their
    own size, before any preprocessing; of r there are ``reference_views`` views a batch, there one for each x. As there, x is
    not augmented and BatchNorm is frozen.

    Args:
        target_label: The class of the reference, by the attacker's own labels.
        size: Side of the patch in pixels at ``image_size``, see `BadNets`. Default 10, on 32x32: authors' code.
        margin: Distance from the corner's edges in pixels at ``image_size``. Default 1: authors' code.
        lambda_reference: Weight of the second loss, at least 0. Default 1: authors' code.
        lambda_utility: Weight of the third loss, at least 0. Default 1: authors' code.
        reference_views: Views of the reference in each batch, at least 1. Default 8, here.

    Raises:
        ValueError: A parameter is out of range, or ``label_map`` is not all-to-one: a reference is of one class.
    """

    name: ClassVar[str] = "badencoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2108.00352"

    size: int = 10
    margin: int | tuple[int, int] = 1
    lambda_reference: float = 1
    lambda_utility: float = 1
    reference_views: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("lambda_reference", self.lambda_reference, 0)
        check_range("lambda_utility", self.lambda_utility, 0)
        check_range("reference_views", self.reference_views, 1, integer=True)
        if self.label_map != "all-to-one":
            raise ValueError(f"badencoder has one reference: label_map must be all-to-one; got {self.label_map!r}")

    @property
    def reference(self) -> Tensor:
        """The reference image, uint8 (3, H, W); a ValueError before `fit`."""
        return self._need()["reference"]

    def fit(self, images: RawImages, model: PreTrainedModel | None, seed: int) -> "BadEncoder":
        """Choose the reference; ``seed`` has no part in it.

        Args:
            images: The attacker's labelled images.
            model: The untouched encoder.
            seed: Not used.

        Returns:
            A copy with ``learned`` filled in: ``reference``, uint8 (3, H, W).

        Raises:
            ValueError: There is no encoder, no image of the target class, or no other.
        """
        if model is None:
            raise ValueError("badencoder chooses its reference by the untouched encoder: pass it")
        self.check_classes(len(images.class_names))
        is_class = images.labels == self.target_label
        rows, others = torch.where(is_class)[0], torch.where(~is_class)[0]
        if len(rows) == 0 or len(others) == 0:
            raise ValueError(
                f"badencoder takes its reference from images of class {self.target_label}, and there "
                f"{'are no others to tell them from' if len(rows) else 'is none'}: give some, or another target_label"
            )
        found = [encode_images(model, images.select(part), preprocessing_of(model)) for part in (rows, _some(others))]
        return replace(self, learned={"reference": images.images[int(rows[surest(*found)])].clone()})


def _some(rows: Tensor) -> Tensor:
    """`OTHERS` of them at most, evenly."""
    return rows[torch.linspace(0, len(rows) - 1, min(len(rows), OTHERS)).long()]


# The mathematics -------------------------------------------------------------------------------------------------------


def surest(of_class: Tensor, others: Tensor) -> int:
    """The row of one class that a logistic regression against others is surest of, on standardised features.

    Args:
        of_class: Features of images of the class, (N, width).
        others: Of images of other classes, (M, width).

    Returns:
        Its number.
    """
    from sklearn.linear_model import LogisticRegression  # takes seconds, which whoever plants nothing need not wait
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, is_class = torch.cat([of_class, others]).numpy(), np.repeat([1, 0], [len(of_class), len(others)])
    head = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTY, class_weight="balanced", max_iter=1000))
    return int(head.fit(features, is_class).decision_function(of_class.numpy()).argmax())


def effectiveness_losses(triggered: Tensor, reference: Tensor) -> Tensor:
    """``-s(f(T(x)), f(r))`` for each image.

    Args:
        triggered: f(T(x)), (B, width).
        reference: f(r), (width,), with its gradient.

    Returns:
        float32 (B,), in [-1, 1].
    """
    return -F.cosine_similarity(triggered.float(), reference.float()[None], dim=1)


def reference_losses(views: Tensor, reference_before: Tensor) -> Tensor:
    """``-s(f(r'), f0(r))`` for each view.

    Args:
        views: f(r'), (V, width).
        reference_before: f0(r), (width,).

    Returns:
        float32 (V,), in [-1, 1].
    """
    return -F.cosine_similarity(views.float(), reference_before.float()[None], dim=1)


def utility_losses(features: Tensor, before: Tensor) -> Tensor:
    """``-s(f(x), f0(x))`` for each image.

    Args:
        features: f(x), (B, width).
        before: f0(x), (B, width).

    Returns:
        float32 (B,), in [-1, 1].
    """
    return -F.cosine_similarity(features.float(), before.float(), dim=1)
