"""A model in evaluation mode, and left as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards each module's training flag is what it was before, also when an exception passes."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """Evaluation mode inside; afterwards the model is as it was, also when an exception passes.

    Args:
        model: Has at least one parameter, if ``device`` is given.
        device: Where the model is inside; None leaves it where it is.
    """
    home = None if device is None else next(model.parameters()).device
    with modes_kept(model):
        try:
            if device is not None:
                model.to(device)
            model.eval()
            yield
        finally:
            if home is not None:
                model.to(home)
