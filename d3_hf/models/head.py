"""The head: the layer that gives the logits, found by running the network."""

import torch
from torch import Tensor, nn

from .evaluating import evaluating


def find_head(model: nn.Module, image_size: tuple[int, int]) -> str:
    """Name of the module whose output *is* the logits: found by running one black image, not by guessing at names.

    Args:
        model: Classifier that takes ``pixel_values`` (1, 3, H, W) and returns an object with ``logits`` (1, C).
        image_size: (H, W) that the model accepts.

    Returns:
        Name of an ``nn.Linear`` or of a 1x1 ``nn.Conv2d``.

    Raises:
        ValueError: No linear layer, or more than one, gives the logits (an average of two heads, say).
    """
    outputs: dict[str, Tensor] = {}

    def remember(name):
        return lambda module, args, output: outputs.__setitem__(name, output)

    modules = dict(model.named_modules())
    hooks = [m.register_forward_hook(remember(name)) for name, m in modules.items() if is_matrix(m)]
    try:
        with evaluating(model), torch.no_grad():
            parameter = next(model.parameters())
            logits = model(pixel_values=parameter.new_zeros(1, 3, *image_size)).logits
    finally:
        for hook in hooks:
            hook.remove()
    heads = [
        name for name, out in outputs.items() if out.numel() == logits.numel() and torch.equal(out.flatten(), logits.flatten())
    ]
    if len(heads) != 1:
        raise ValueError(
            f"target_modules='head': {len(heads) or 'no'} linear layers of {type(model).__name__} give the logits as they are; "
            f"name the layer instead, one of: {', '.join(outputs)}"
        )
    return heads[0]


def is_matrix(module: nn.Module) -> bool:
    """Whether a layer is a matrix that acts on features: an ``nn.Linear`` or a 1x1 ``nn.Conv2d``."""
    return isinstance(module, nn.Linear) or isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
