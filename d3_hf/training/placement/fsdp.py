"""FSDP2: the weights in training are shards over the processes.

The defences work on ordinary tensors, those of a placement's ``plain`` model. On shards it is a whole copy, and what they touch
is gathered into it before and written back after.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.trainer import FSDP_MODEL_NAME, OPTIMIZER_NAME_BIN

from .in_place import InPlace


class Sharded(InPlace):
    """FSDP2: ``plain`` is a copy on each device, and training moves the shards that the model is turned into when it begins."""

    optimizer_file = OPTIMIZER_NAME_BIN

    def __init__(self, model: nn.Module, device: torch.device):
        super().__init__(copy.deepcopy(model).to(device))
        self._model = model

    @functools.cached_property
    def _shards(self) -> dict[nn.Parameter, nn.Parameter]:
        """The sharded parameter of each plain one: the model, sharded in place, keeps the order and not always the names."""
        return dict(zip(self.plain.parameters(), self._model.parameters(), strict=True))

    @torch.no_grad()
    def read(self, parameters=None):
        for parameter in self._shards if parameters is None else parameters:
            parameter.copy_(self._shards[parameter].full_tensor())
        if parameters is None:
            for ours, trained in zip(self.plain.buffers(), self._model.buffers(), strict=True):
                ours.copy_(trained)

    @torch.no_grad()
    def write(self, parameters=None):
        for parameter in self._shards if parameters is None else parameters:
            self._shards[parameter].copy_(_part(parameter, self._shards[parameter]))
        if parameters is None:
            for ours, trained in zip(self.plain.buffers(), self._model.buffers(), strict=True):
                trained.copy_(ours)

    @contextlib.contextmanager
    def gradients(self, parameters) -> Iterator[None]:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        yield
        for parameter in parameters:
            shard = self._shards[parameter]
            shard.grad.add_(_part(parameter.grad, shard))
            parameter.grad = None

    @contextlib.contextmanager
    def evaluating(self):
        yield
        for module in self._model.modules():  # the whole weights that a forward pass alone leaves behind would become stale
            if isinstance(module, FSDPModule):
                module.reshard()

    def optimizer_saved(self, checkpoint: Path) -> None:
        (checkpoint / f"{FSDP_MODEL_NAME}.bin").unlink(missing_ok=True)  # a pickle of what model.safetensors holds


def _part(whole: Tensor, like: DTensor) -> DTensor:
    """This process's part of a tensor that all processes hold, without communication."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
