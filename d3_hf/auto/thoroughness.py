"""Thoroughness: how far a recipe went from the suspicious model, as far as that can be told without a trigger; larger is more.

None says that a backdoor is gone. On one victim the first three ranked four recipes as their ASR does
(model_cards/few_images.md); the last has not been measured.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..assurance.canary import canary
from ..assurance.latent_shift import MOST_CLASSES, latent_shift
from ..data.images import RawImages
from ..models.evaluating import evaluating
from ..models.features import recorded_input
from ..training.features import feature_distances

# What each score says of the recipe that has most of it.
SCORES = {
    "place": "that is farthest up the ladder",
    "feature_distance": "that moved the features most",
    "evenness": "that leaves no class standing out",
    "reluctance": "that leaves a model which takes up a canary last",
}
RULE = "place"  # the score that decides. Until the scores are measured against the truth: it is there for every network


def place(rung: int) -> float:
    """The rung on the ladder, 1 the gentlest: what its order claims."""
    return float(rung)


def evenness(purified: PreTrainedModel, images: RawImages) -> float:
    """Minus the statistic of `latent_shift`: how little a class stands out that a short shift of the features reaches; <= 0.

    Raises:
        ValueError: There are more than `MOST_CLASSES`, or see `latent_shift`.
        FloatingPointError, RuntimeError: Of its solver.
    """
    if (classes := purified.config.num_labels) > MOST_CLASSES:
        raise ValueError(f"with {classes} classes it takes hours: it is found with at most {MOST_CLASSES}")
    return -latent_shift(purified, images).statistic


def reluctance(purified: PreTrainedModel, images: RawImages) -> float:
    """Minus the statistic of `canary`: how late the model takes up a small backdoor of our own, in [-1, 0].

    Raises:
        ValueError, FloatingPointError, RuntimeError: See `canary`.
    """
    return -canary(purified, images).statistic


@torch.no_grad()  # no inference mode: weights that are moved to the device inside would stay inference tensors
def feature_distance(suspect: PreTrainedModel, purified: PreTrainedModel, layer: str, batches: Iterable[Tensor]) -> float:
    """Mean over images of ``||f / ||f|| - f_0 / ||f_0|| ||^2``, f what a layer reads; in [0, 4].

    Args:
        suspect: The suspicious model, of f_0.
        purified: The other one, of f; both are computed on its device in evaluation mode, and left as they were.
        layer: Name of the layer: the head, see `find_head`.
        batches: Inputs float32 (B, 3, h, w), on that device; at least one image.
    """
    distances = []
    with evaluating(purified), evaluating(suspect, next(purified.parameters()).device):
        for pixel_values in batches:
            f, f_0 = (_read(model, layer, pixel_values) for model in (purified, suspect))
            distances.append(feature_distances(f, f_0))
    return torch.cat(distances).double().mean().item()


def _read(model: PreTrainedModel, layer: str, pixel_values: Tensor) -> Tensor:
    with recorded_input(model.get_submodule(layer)) as found:
        model(pixel_values=pixel_values)
    return found[-1]
