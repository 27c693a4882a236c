"""Features: what a layer reads, recorded while a network runs, and what the head makes of it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.fitting import BATCH, run_with_fitting_batch
from ..data.images import RawImages
from ..data.preprocessing import Preprocessing
from .evaluating import evaluating
from .head import find_head


@contextlib.contextmanager
def recorded_input(layer: nn.Module) -> Iterator[list[Tensor]]:
    """The inputs of a layer, one for each pass that is made inside, with their graphs; what the layer computes stays."""
    found: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    try:
        yield found
    finally:
        hook.remove()


def finite_logits(model: nn.Module, images: Tensor, preprocessing: Callable[[Tensor], Tensor], what: str) -> Tensor:
    """Logits (B, C) of raw uint8 (B, 3, H, W); ``what`` these are, for the ValueError if a logit is not finite."""
    logits = model(pixel_values=preprocessing(images)).logits
    if not torch.isfinite(logits).all():
        raise ValueError(f"the model's logits on {what} are not finite (NaN or infinite): its weights are broken")
    return logits


@dataclass(frozen=True, eq=False)
class HeadReading:
    """What the head reads of each image and makes of it: float32 on the CPU, without gradient.

    Args:
        features: The head's input, (N, D), in the order of the images.
        logits: (N, C).
        weight: Of the head, (C, D).
        bias: Of the head, (C,); zeros where it has none.
    """

    features: Tensor
    logits: Tensor
    weight: Tensor
    bias: Tensor


def read_head(model: PreTrainedModel, images: RawImages, preprocessing: Preprocessing, batch_size: int = BATCH) -> HeadReading:
    """Read the head's input and the logits of every image in one pass, in evaluation mode; the model is left as it was.

    Args:
        model: The classifier; its head is found by `find_head`.
        images: Raw images.
        preprocessing: The model's.
        batch_size: Raw images per batch, at least 1; halved while they do not fit into memory.

    Raises:
        ValueError: The model has no single head, or a logit is not finite.
        RuntimeError: A single image does not fit into the device's memory.
    """
    head = model.get_submodule(find_head(model, preprocessing.size))
    with evaluating(model):
        features, logits = run_with_fitting_batch(lambda size: _passes(model, head, images, preprocessing, size), batch_size)
    weight = head.weight.detach().flatten(1).float().cpu()
    bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach().float().cpu()
    return HeadReading(features, logits, weight, bias)


@torch.no_grad()
def _passes(
    model: PreTrainedModel, head: nn.Module, images: RawImages, preprocessing: Preprocessing, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Features (N, D) and logits (N, C)."""
    device, order, features, logits = next(model.parameters()).device, [], [], []
    for rows, raw, _ in images.batches(batch_size):
        with recorded_input(head) as read:
            logits.append(finite_logits(model, raw.to(device), preprocessing, "clean images").float().cpu())
        features.append(read[0].flatten(1).float().cpu())
        order.append(rows)
    back = torch.cat(order).argsort()
    return torch.cat(features)[back], torch.cat(logits)[back]
