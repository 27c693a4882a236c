"""A classifier or an encoder as a function of pixels, for attackers that compute gradients on their own model."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..models.evaluating import evaluating
from ..models.kinds import encode
from ..models.source import preprocessing_of


def pixels_to_logits(model: PreTrainedModel) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
    """Give the differentiable function from raw pixels to logits float32 (B, C) of a classifier; see `pixels_to`."""
    return pixels_to(model, lambda pixels: model(pixel_values=pixels).logits.float())


def pixels_to_features(model: PreTrainedModel) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
    """Give the differentiable function from raw pixels to features float32 (B, width) of an encoder; see `pixels_to`."""
    return pixels_to(model, lambda pixels: encode(model, pixels).float())


@contextmanager
def pixels_to(model: PreTrainedModel, output: Callable[[Tensor], Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give the differentiable function from raw pixels to what a model makes of them.

    Inside, the model is in eval mode and its parameters need no gradient; both are restored. Where the model's input has
    another size than the images, they are resized bilinearly, which stands in for the processor's own (not differentiable)
    resizing.

    Args:
        model: With ``image_processor``.
        output: What it makes of images that are ready for it.

    Yields:
        Function from float32 (B, 3, H, W) in [0, 1], on the model's device, to ``output``.
    """
    preprocessing = preprocessing_of(model)
    device = next(model.parameters()).device
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (preprocessing.mean, preprocessing.std))

    def run(images: Tensor) -> Tensor:
        if tuple(images.shape[-2:]) != tuple(preprocessing.size):
            images = F.interpolate(images, tuple(preprocessing.size), mode="bilinear", antialias=True)
        return output((images - mean) / std)

    needs = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        with evaluating(model):
            yield run
    finally:
        for parameter, flag in needs:
            parameter.requires_grad_(flag)
