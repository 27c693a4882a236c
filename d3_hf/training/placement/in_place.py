"""One process or DDP: the model in training is itself made of whole, ordinary tensors."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers.trainer import OPTIMIZER_NAME


class InPlace:
    """Where every operation costs nothing; `fsdp.Sharded` does what they say.

    Attributes:
        plain: A model of whole, ordinary tensors. Between `read` and `write` its parameters are those in training.
    """

    optimizer_file = OPTIMIZER_NAME  # in a checkpoint

    def __init__(self, model: nn.Module):
        self.plain = self._model = model

    def read(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Bring parameters of ``plain``, by default all of them and the buffers, up to date; called by all processes."""

    def write(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Carry what was changed in ``plain`` over to the model in training; as `read`."""

    def gradients(self, parameters: Iterable[nn.Parameter]) -> contextlib.AbstractContextManager:
        """Inside, what is added to the parameters' ``grad`` in ``plain``, the same in all processes, counts in training."""
        return contextlib.nullcontext()

    def zero_gradients(self) -> None:
        """Set all gradients in training to zero."""
        torch._foreach_zero_([p.grad for p in self._model.parameters() if p.grad is not None])

    def evaluating(self) -> contextlib.AbstractContextManager:
        """Inside, the Trainer evaluates the model."""
        return contextlib.nullcontext()

    def optimizer_saved(self, checkpoint: Path) -> None:
        """Called by the process that saves, when the Trainer has written the optimizer into a checkpoint."""
