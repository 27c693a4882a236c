"""ZeRO-2 and ZeRO-3: the optimizer's state, the gradients and in stage 3 the weights lie in DeepSpeed's partitions.

DeepSpeed keeps each weight twice: in the model, and in a float32 partition that its optimizer moves. Both are written here.
Its step, which accelerate takes at the end of the backward pass, is held back until the Trainer asks for it as it does in other
launches, so that gradients can be completed before and weights projected after. Checkpoints hold what one process would write.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper, DeepSpeedOptimizerWrapper
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import OPTIMIZER_NAME

from .fsdp import USE_DDP, Sharded

if TYPE_CHECKING:
    from ..trainer import PurifyTrainer

RECIPES = {2: "recipes/accelerate/zero2.yaml", 3: "recipes/accelerate/zero3.yaml"}
# Those that treat every element alike: ZeRO hands them flat pieces, of which rows and layers cannot be told.
OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
# DeepSpeed's options that must be at their default: they lay out weights or gradients in other ways.
UNTRIED = {
    "zero_quantized_weights": False,
    "zero_quantized_gradients": False,
    "zero_hpz_partition_size": 1,
    "mics_shard_size": -1,
    "round_robin_gradients": False,
    "zenflow": None,
    "tensor_parallel": None,
    "sequence_parallel_size": 1,
}


class HeldEngine(DeepSpeedEngineWrapper):
    """The engine as accelerate knows one, whose backward pass takes no step."""

    def __init__(self, engine: Any):
        super().__init__(self)
        self._engine = engine

    def destroy(self) -> None:
        """Nothing: a training begins by destroying the engine of the one before, and the weights are in it."""

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs) -> None:
        self._engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self._engine.backward(loss, **kwargs)

    @property
    def partial_gradients(self) -> list[Tensor]:
        """This process's part of the reduced gradients."""
        return [part for group in self._engine.optimizer.averaged_gradients.values() for part in group]

    def get_global_grad_norm(self) -> float:
        """Before the step, where the Trainer asks for it; DeepSpeed's own is that of the last step."""
        zero = torch.zeros((), device=self._engine.device)  # a process may have no part
        squares = sum((part.float().square().sum() for part in self.partial_gradients), zero)
        dist.all_reduce(squares)
        return squares.sqrt().item()


class HeldOptimizer(DeepSpeedOptimizerWrapper):
    """ZeRO's optimizer as the Trainer knows one: it steps when it is told to, and its state is that of one process."""

    def __init__(self, engine: Any):
        super().__init__(engine.optimizer)
        self._engine = engine
        self._in_stage_2 = engine.zero_optimization_stage() == 2
        self._whole: dict[str, Any] | None = None

    def step(self, closure=None):
        self._engine.step()

    @property
    def _parameters(self) -> list[list[nn.Parameter]]:
        """The model's, by the optimizer's groups and in their order."""
        zero = self.optimizer
        if self._in_stage_2:
            return zero.bit16_groups
        groups = [[] for _ in zero.optimizer.param_groups]
        for number, part in enumerate(zero.fp16_groups):
            groups[zero.sub_group_to_group_id[number]] += part
        return groups

    def _link(self) -> None:
        """Show the parameters their optimizer state. Stage 2 does so after the step of the first group, and of no other."""
        if self._in_stage_2 and self.optimizer.optimizer.state:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, the main process has the whole state; entered by all, since each holds a part."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        inner, state, groups = self.optimizer.optimizer, {}, []
        kept = next(iter(inner.state.values()), {})
        for options, parameters in zip(inner.param_groups, self._parameters, strict=True):
            first = len(state)
            for parameter in parameters:
                state[len(state)] = {
                    key: value.clone() if key == "step" else safe_get_full_optimizer_state(parameter, key).cpu()
                    for key, value in kept.items()
                }
            groups.append(options | {"params": list(range(first, len(state)))})
        self._whole = {"state": state, "param_groups": groups}
        yield
        self._whole = None

    def state_dict(self):
        return self._whole

    def load_state_dict(self, state_dict):
        inner, zero = self.optimizer.optimizer, self.optimizer
        kept = state_dict["state"].get(0, {})
        for options, saved in zip(inner.param_groups, state_dict["param_groups"], strict=True):
            options |= {name: value for name, value in saved.items() if name != "params"}
        for flat in zero.single_partition_of_fp32_groups if self._in_stage_2 else zero.fp32_partitioned_groups_flat:
            inner.state[flat] = {k: v.clone() if k == "step" else torch.zeros_like(flat) for k, v in kept.items()}
        self._link()
        for number, parameter in enumerate(parameter for group in self._parameters for parameter in group):
            for key, value in state_dict["state"].get(number, {}).items():
                if key != "step":
                    _set_state(parameter, value, key)


class Zero(Sharded):
    """``plain`` is a copy on each device; training moves the partitions that DeepSpeed makes of the model when it begins."""

    optimizer_file = OPTIMIZER_NAME
    resumes = True

    def __init__(self, model: nn.Module, device: torch.device):
        super().__init__(model, device)
        self._engine: HeldEngine | None = None

    @functools.cached_property
    def _shards(self) -> dict[nn.Parameter, nn.Parameter]:
        """The parameter in training of each plain one that moves; DeepSpeed's optimizer does not know the frozen ones."""
        pairs = zip(self.plain.parameters(), self._model.parameters(), strict=True)
        return {ours: trained for ours, trained in pairs if trained.requires_grad}

    def begin(self, trainer, max_steps, checkpoint):
        if self._engine is None:
            self._engine, self._optimizer = HeldEngine(trainer.model_wrapped), HeldOptimizer(trainer.model_wrapped)
        trainer.accelerator.deepspeed_engine_wrapped = self._engine
        # Called again, `train` comes with an optimizer that the engine knows nothing of.
        trainer.optimizer, trainer.lr_scheduler = self._optimizer, None
        trainer.create_scheduler(max_steps)
        for name in ("optimizer", "lr_scheduler"):
            setattr(trainer.callback_handler, name, getattr(trainer, name))
        if checkpoint is not None:
            trainer._load_from_checkpoint(checkpoint)
            with _without_deepspeed(trainer):
                trainer._load_optimizer_and_scheduler(checkpoint)

    def read(self, parameters=None):
        if self._engine is not None:  # else nothing was trained
            super().read(parameters)

    def _whole(self, shard):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(shard)

    def _set(self, shard, whole):
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if hasattr(shard, "ds_id"):
            safe_set_local_fp32_param(shard, _part(whole, shard))
            with deepspeed.zero.GatheredParameters([shard], modifier_rank=0):
                shard.data.copy_(whole)
        else:
            safe_set_full_fp32_param(shard, whole)
            shard.data.copy_(whole)

    def _add_gradient(self, shard, whole):
        from deepspeed.utils import safe_get_full_grad, safe_get_local_grad, safe_set_full_grad, safe_set_local_grad

        if hasattr(shard, "ds_id"):
            safe_set_local_grad(shard, safe_get_local_grad(shard) + _part(whole, shard))
        else:
            safe_set_full_grad(shard, safe_get_full_grad(shard) + whole)

    def zero_gradients(self):
        for part in self._engine.partial_gradients:
            part.zero_()

    @contextlib.contextmanager
    def evaluating(self, trainer):
        with _without_deepspeed(trainer):
            yield
        if self._engine is not None:
            trainer.model_wrapped.empty_partition_cache()  # the whole weights that a forward pass alone leaves behind

    @contextlib.contextmanager
    def saving(self, trainer):
        self.read()
        with _without_deepspeed(trainer):
            yield

    @contextlib.contextmanager
    def saving_optimizer(self, trainer, checkpoint):
        with self._optimizer.gathered(), _without_deepspeed(trainer):
            yield


@contextlib.contextmanager
def _without_deepspeed(trainer: "PurifyTrainer") -> Iterator[None]:
    """Inside, the Trainer saves, loads and evaluates as in one process: DeepSpeed's own files hold weights as pickles."""
    before, trainer.is_deepspeed_enabled = trainer.is_deepspeed_enabled, False
    try:
        yield
    finally:
        trainer.is_deepspeed_enabled = before


def _part(whole: Tensor, like: nn.Parameter) -> Tensor:
    """This process's part of a tensor under ZeRO-3, padded as the partition of the parameter is."""
    size, group = like.ds_tensor.numel(), like.ds_process_group
    flat = F.pad(whole.flatten(), (0, size * dist.get_world_size(group) - whole.numel()))
    return flat.narrow(0, size * dist.get_rank(group), size)


def _set_state(trained: nn.Parameter, whole: Tensor, key: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if hasattr(trained, "ds_id"):
        safe_set_local_optimizer_state(trained, _part(whole, trained), key)
    else:
        safe_set_full_optimizer_state(trained, whole, key)


def zero_placement(trainer: "PurifyTrainer", model: nn.Module) -> Zero:
    """The placement of a trainer that was launched with DeepSpeed; see `placement_of`."""
    # Making the accelerator has set it again, and transformers would partition what is loaded from now on.
    unset_hf_deepspeed_config()
    args, config = trainer.args, trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    zero, instead = config["zero_optimization"], f"use {RECIPES[2]} or {RECIPES[3]}"
    if zero["stage"] not in RECIPES:
        raise ValueError(f"ZeRO stage {zero['stage']} is not supported: set zero_stage to 2 or 3 ({instead})")
    if own := [name for name in ("optimizer", "scheduler") if name in config]:
        raise ValueError(f"DeepSpeed's configuration names an {own[0]}: leave it out, the run's own options say it")
    kind = trainer.get_optimizer_cls_and_kwargs(args)[0]
    if kind not in OPTIMIZERS:
        raise ValueError(f"ZeRO would hand {kind.__name__} flat pieces of weights: use sgd or adamw_torch, or {USE_DDP}")
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device", "none") != "none":
            raise ValueError(f"ZeRO with offload is not supported: set {name}_device to none ({instead})")
    if untried := [name for name, default in UNTRIED.items() if (zero | config).get(name, default) != default]:
        raise ValueError(f"ZeRO with {untried[0]} is not supported: leave it out ({instead})")
    other = [name for name in ("fp16", "bf16", "torch_autocast") if (config.get(name) or {}).get("enabled")]
    other += ["torch_compile"] if args.torch_compile else []
    if other or trainer.accelerator.mixed_precision != "no":
        raise ValueError(f"{(other or ['mixed precision'])[0]} under DeepSpeed is not supported: leave it out, or {USE_DDP}")
    clipping = config.get("gradient_clipping") or 0
    if clipping != (args.max_grad_norm or 0):
        raise ValueError(
            f"DeepSpeed would clip gradients at {clipping}, max_grad_norm is {args.max_grad_norm}: set gradient_clipping to "
            f"auto ({instead})"
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError("ZeRO-3 partitioned the weights while they were loaded: load the model after making the configuration")
    return Zero(model, args.device)
