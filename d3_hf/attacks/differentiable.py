"""A classifier as a function of pixels, for attackers that compute gradients on their own model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..models.evaluating import evaluating
from ..models.source import preprocessing_of


@contextmanager
def pixels_to_logits(model: PreTrainedModel) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give the differentiable function from raw pixels to logits.

    Inside, the model is in eval mode and its parameters need no gradient; both are restored. Where the model's input has
    another size than the images, they are resized bilinearly, which stands in for the processor's own (not differentiable)
    resizing.

    Args:
        model: A classifier as `load_classifier` gives it, with ``image_processor``.

    Yields:
        Function from float32 (B, 3, H, W) in [0, 1], on the model's device, to logits float32 (B, C).
    """
    preprocessing = preprocessing_of(model)
    device = next(model.parameters()).device
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (preprocessing.mean, preprocessing.std))

    def logits(images: Tensor) -> Tensor:
        if tuple(images.shape[-2:]) != tuple(preprocessing.size):
            images = F.interpolate(images, tuple(preprocessing.size), mode="bilinear", antialias=True)
        return model(pixel_values=(images - mean) / std).logits.float()

    needs = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        with evaluating(model):
            yield logits
    finally:
        for parameter, flag in needs:
            parameter.requires_grad_(flag)
