"""A model in evaluation mode, and left as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


@contextmanager
def evaluating(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Eval mode on ``device`` inside; afterwards each module's training flag and the model's device are restored."""
    training = {module: module.training for module in model.modules()}
    home = next(model.parameters()).device
    model.to(device).eval()
    try:
        yield
    finally:
        model.to(home)
        for module, flag in training.items():
            module.training = flag
