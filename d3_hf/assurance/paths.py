"""A path away from a model: how do its answers to a few images change while a loss of theirs pulls at its weights?

A copy in evaluation mode takes steps along the gradient g of the mean cross-entropy of some images, each longer than the last:

    w <- w + d a_t g / ||g||,    a_t = 0.005 1.5^t,    d = 1 up the loss, -1 down

so that T of them lead at most 0.01 (1.5^T - 1) far: 16 steps reach from where nothing changes to where little was left of the
ResNets that were tried, without a learning rate that fits a network. What is read before a step comes from the same pass as
its gradient.

Source: this project's. Like that of SGD, the path depends on how hidden units are scaled; permuted ones change nothing, nor
does a vector that is added to all rows of the head.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..data.fitting import run_with_fitting_batch
from ..data.images import RawImages
from ..models.computed import refuse_hooked
from .finding import check_comparable

FIRST_LENGTH, GROWTH = 5e-3, 1.5
UP, DOWN = 1, -1
BATCH = 32  # images in a pass that keeps its graph


def some_of_each(images: RawImages, most: int) -> RawImages:
    """The first images of each class, as many of one as of another where there are: at most so many in all."""
    each = max(1, most // len(images.class_names))
    rows = [(images.labels == k).nonzero()[:each, 0] for k in range(len(images.class_names))]
    return images.select(torch.cat(rows)[:most])


def check_path(model: PreTrainedModel, images: RawImages, steps: int) -> None:
    """Raise a ValueError if no path can be followed: ``steps`` below 1, a model that cannot be copied, or see
    `check_comparable`."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    check_comparable(model, images)
    refuse_hooked(model)


def path_of(
    model: PreTrainedModel,
    pixel_values: Tensor,
    labels: Tensor,
    direction: int,
    steps: int,
    batch_size: int,
    is_over: Callable[[Tensor], bool],
) -> list[Tensor]:
    """Follow a path.

    Args:
        model: Where it begins; left as it was, a copy moves.
        pixel_values: What the model takes, float32 (N, 3, h, w).
        labels: Of the loss, int64 (N,).
        direction: `UP` or `DOWN` the loss.
        steps: At most so many, at least 1.
        batch_size: Images in a pass, at least 1; halved while they do not fit into memory.
        is_over: Whether the path ends where the logits are these, float64 (N, C); asked after every step.

    Returns:
        The logits at its beginning and after each step, float64 (N, C) each on the CPU: two or more.

    Raises:
        ValueError: A logit is not finite at the beginning.
        FloatingPointError: One is not finite after a step.
        RuntimeError: A single image does not fit into the device's memory.
    """
    return run_with_fitting_batch(
        lambda size: _walk(model, _split(pixel_values, labels, size), direction, steps, is_over), batch_size
    )


def _walk(
    model: PreTrainedModel,
    batches: list[tuple[Tensor, Tensor]],
    direction: int,
    steps: int,
    is_over: Callable[[Tensor], bool],
) -> list[Tensor]:
    walker = copy.deepcopy(model).eval().requires_grad_(True)
    device, found = next(walker.parameters()).device, list[Tensor]()
    batches = [(part.to(device), wanted.to(device)) for part, wanted in batches]
    count = sum(len(wanted) for _, wanted in batches)
    for step in range(steps + 1):
        walker.zero_grad()
        logits = torch.cat([_pull(walker, *batch, count, is_last=step == steps) for batch in batches])
        if not logits.isfinite().all():
            if not found:
                raise ValueError("the model's logits are not finite (NaN or infinite): its weights are broken")
            raise FloatingPointError(f"the path left all finite numbers at step {step}: nothing can be read of it")
        found.append(logits)
        if step == steps or (step and is_over(logits)):
            break
        _step(walker, direction * FIRST_LENGTH * GROWTH**step)
    return found


def _split(pixel_values: Tensor, labels: Tensor, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(pixel_values.split(batch_size), labels.split(batch_size), strict=True))


def _pull(walker: PreTrainedModel, pixel_values: Tensor, labels: Tensor, count: int, is_last: bool) -> Tensor:
    """Logits of a batch; its share of the gradient is added to what the parameters hold, but after the last step."""
    with torch.set_grad_enabled(not is_last):
        logits = walker(pixel_values=pixel_values).logits.float()
        if not is_last:
            (F.cross_entropy(logits, labels, reduction="sum") / count).backward()
    return logits.detach().double().cpu()


@torch.no_grad()
def _step(walker: PreTrainedModel, length: float) -> None:
    """Move by so much along the gradient, against it where the length is negative; not at all where there is none."""
    moved = [parameter for parameter in walker.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in moved]
    norm = torch.nn.utils.get_total_norm(gradients).clamp_min(torch.finfo(torch.float32).tiny)
    torch._foreach_add_(moved, torch._foreach_mul(gradients, (length / norm).item()))
