"""The head: the layer that gives the logits, found by running the network."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .evaluating import evaluating
from .probe import run

SHOWN = 8  # layers named in a message


class NoOneHead(ValueError):
    """No layer, or more than one, gives the logits."""


def find_head(model: nn.Module, image_size: tuple[int, int]) -> str:
    """Name of the module whose output *is* the logits: found by running one black image, not by guessing at names.

    Args:
        model: Classifier that takes ``pixel_values`` (1, 3, H, W) and returns an object with ``logits`` (1, C).
        image_size: (H, W) that the model accepts.

    Returns:
        Name of an ``nn.Linear`` or of a 1x1 ``nn.Conv2d``.

    Raises:
        NoOneHead: No linear layer, or more than one, gives the logits (an average of two heads, say); the message begins with
            those that have as many outputs as there are classes.
        ValueError: The classifier fails on the image, see `run`, or its logits are NaN.
    """
    outputs: dict[str, Tensor] = {}

    def remember(name):
        return lambda module, args, output: outputs.__setitem__(name, output)

    modules = dict(model.named_modules())
    hooks = [m.register_forward_hook(remember(name)) for name, m in modules.items() if is_matrix(m)]
    try:
        with evaluating(model), torch.no_grad():
            parameter = next(model.parameters())
            logits = run(model, parameter.new_zeros(1, 3, *image_size), type(model).__name__)
    finally:
        for hook in hooks:
            hook.remove()
    if logits.isnan().any():
        raise ValueError(f"{type(model).__name__}: the logits of a black image are not finite (NaN): its weights are broken")
    heads = [
        name for name, out in outputs.items() if out.numel() == logits.numel() and torch.equal(out.flatten(), logits.flatten())
    ]
    if len(heads) == 1:
        return heads[0]
    fitting = [name for name, out in outputs.items() if out.numel() == logits.numel()]
    found = f"with {logits.shape[-1]} outputs there are {last_first(fitting)}" if fitting else f"they are {last_first(outputs)}"
    raise NoOneHead(
        f"{type(model).__name__} has no single head: {len(heads) or 'none'} of its linear layers gives the logits as they are; "
        f"{found}"
    )


def last_first(names: Iterable[str]) -> str:
    """Names of layers for a message: the last ones, among which the heads are, first; few of them."""
    found = list(names)[::-1]
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def is_matrix(module: nn.Module) -> bool:
    """Whether a layer is a matrix that acts on features: an ``nn.Linear`` or a 1x1 ``nn.Conv2d``."""
    return isinstance(module, nn.Linear) or isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
