"""Where the weights live: in the model itself (one process, DDP) or in shards over the processes (FSDP2; ZeRO: `zero`).

The defences work on ordinary tensors, those of a placement's ``plain`` model. Where that is the model in training they work in
place. On shards it is a whole copy, and what they touch is gathered into it before and written back after.
"""

import contextlib
import copy
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.trainer import FSDP_MODEL_NAME, OPTIMIZER_NAME, OPTIMIZER_NAME_BIN

if TYPE_CHECKING:
    from ..trainer import PurifyTrainer

RECIPE = "recipes/accelerate/fsdp2.yaml"
USE_DDP = "launch with DDP (recipes/accelerate/ddp.yaml)"


class InPlace:
    """One process or DDP: the model in training is itself plain, and every operation costs nothing.

    Attributes:
        plain: A model of whole, ordinary tensors. Between `read` and `write` its parameters are those in training.
    """

    optimizer_file = OPTIMIZER_NAME  # in a checkpoint
    resumes = False  # loads the checkpoint itself, in `begin`

    def __init__(self, model: nn.Module):
        self.plain = self._model = model

    def begin(self, trainer: "PurifyTrainer", max_steps: int, checkpoint: str | None) -> None:
        """Called when the Trainer has prepared model and optimizer; ``checkpoint`` is what the training goes on from."""

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

    def evaluating(self, trainer: "PurifyTrainer") -> contextlib.AbstractContextManager:
        """Inside, the Trainer evaluates the model."""
        return contextlib.nullcontext()

    def saving(self, trainer: "PurifyTrainer") -> contextlib.AbstractContextManager:
        """Inside, the Trainer saves the model; entered by all processes."""
        return contextlib.nullcontext()

    def saving_optimizer(self, trainer: "PurifyTrainer", checkpoint: Path) -> contextlib.AbstractContextManager:
        """Inside, the Trainer saves the optimizer into a checkpoint; as `saving`."""
        return contextlib.nullcontext()


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

    def _whole(self, shard: nn.Parameter) -> Tensor:
        """A parameter in training, gathered from all processes."""
        return shard.full_tensor()

    def _set(self, shard: nn.Parameter, whole: Tensor) -> None:
        """Set this process's part of a parameter in training."""
        shard.copy_(_shard(whole, shard))

    def _add_gradient(self, shard: nn.Parameter, whole: Tensor) -> None:
        """Add this process's part to the gradient of a parameter in training."""
        shard.grad.add_(_shard(whole, shard))

    @torch.no_grad()
    def read(self, parameters=None):
        for parameter in self._shards if parameters is None else parameters:
            parameter.copy_(self._whole(self._shards[parameter]))
        if parameters is None:
            for ours, trained in zip(self.plain.buffers(), self._model.buffers(), strict=True):
                ours.copy_(trained)

    @torch.no_grad()
    def write(self, parameters=None):
        for parameter in self._shards if parameters is None else parameters:
            self._set(self._shards[parameter], parameter)
        if parameters is None:
            for ours, trained in zip(self.plain.buffers(), self._model.buffers(), strict=True):
                trained.copy_(ours)

    @contextlib.contextmanager
    def gradients(self, parameters) -> Iterator[None]:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        yield
        for parameter in parameters:
            self._add_gradient(self._shards[parameter], parameter.grad)
            parameter.grad = None

    @contextlib.contextmanager
    def evaluating(self, trainer):
        yield
        for module in self._model.modules():  # the whole weights that a forward pass alone leaves behind would become stale
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextlib.contextmanager
    def saving_optimizer(self, trainer, checkpoint):
        yield
        if trainer.args.should_save:
            (checkpoint / f"{FSDP_MODEL_NAME}.bin").unlink(missing_ok=True)  # a pickle of what model.safetensors holds


def _shard(whole: Tensor, like: DTensor) -> DTensor:
    """This process's part of a tensor that all processes hold, without communication."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def placement_of(trainer: "PurifyTrainer", model: nn.Module) -> InPlace:
    """The placement of a trainer's model.

    Args:
        trainer: Its accelerator says how the run was launched.
        model: As handed over, not yet sharded.

    Raises:
        ValueError: FSDP1 or another stage of ZeRO than 2 and 3; on shards, a defence or an option that does not work there.
    """
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        return InPlace(model)
    kind = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP"
    if not trainer.runs_sharded:
        raise ValueError(f"{type(trainer).__name__} does not run under {kind}, only D3 and fine-tuning do: {USE_DDP}")
    if whole := [option for option in ("average_last", "sam_rho") if getattr(trainer.args, option)]:
        raise ValueError(f"{whole[0]} does not run under {kind}: leave it out, or {USE_DDP}")
    if trainer.is_deepspeed_enabled:
        from .zero import zero_placement  # builds on this module

        return zero_placement(trainer, model)
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"FSDP1 is not supported: set fsdp_version to 2 ({RECIPE}), or {USE_DDP}")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            f"FSDP would load the suspicious weights in one process: set fsdp_cpu_ram_efficient_loading to false ({RECIPE})"
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(f"FSDP with parameters on the CPU is not supported: set fsdp_offload_params to false ({RECIPE})")
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # of the default type, in which no whole model is saved
    plugin.set_state_dict_type("FULL_STATE_DICT")
    return Sharded(model, trainer.args.device)
