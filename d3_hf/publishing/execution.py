"""How a run was executed, as manifest and card record it: read from the trainer that ran, not from the options it was given.

Options say what was asked for. A launcher, a configuration file of accelerate, a checkpoint's optimizer or an optimizer that is
handed over change what is computed without changing an option.
"""

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, DynamoBackend
from torch import Tensor
from transformers import Trainer

from .names import public_name

SECRET = re.compile(r"(token|secret|password|api_?key)$", re.IGNORECASE)


def execution_of(run: Trainer) -> dict[str, Any]:
    """The state in force: precision, processes, devices, what is compiled or sharded, optimizer; JSON-able.

    Args:
        run: A trainer; its optimizer is known from the training on.
    """
    accelerator, compiler = run.accelerator, run.accelerator.state.dynamo_plugin
    found = {
        "mixed_precision": accelerator.mixed_precision,
        "weights": sorted({str(weight.dtype).removeprefix("torch.") for weight in run.model.parameters()}),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "device": accelerator.device.type,
        "distributed_type": accelerator.distributed_type.value,
        "processes": accelerator.num_processes,
        "images_per_step": run.get_total_train_batch_size(run.args),
        "gradient_accumulation_steps": run.args.gradient_accumulation_steps,
        "activation_checkpointing": run.model.is_activation_checkpointing,
        "attention": run.model.config._attn_implementation,
        "compiled": plain(compiler.to_dict()) if compiler.backend != DynamoBackend.NO else "no",
    }
    if accelerator.distributed_type == DistributedType.FSDP:
        found["fsdp"] = plain(accelerator.state.fsdp_plugin)
    if accelerator.parallelism_config is not None:
        found["parallelism"] = plain(accelerator.parallelism_config)
    if run.optimizer is not None:
        found["optimizer"] = _optimizer(run.optimizer)
    return found


def _optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its class and the options of its groups of weights; the learning rate is that before the schedule."""
    if isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    groups: list[Any] = []
    for group in optimizer.param_groups:
        options = {name: value for name, value in group.items() if name not in ("params", "initial_lr")}
        options = plain(options | {"lr": group.get("initial_lr", group["lr"])})
        groups += [options] if options not in groups else []
    return {"class": type(optimizer).__name__, "groups": groups}


def plain(value: Any) -> Any:
    """A value as JSON can hold it, without secrets and without this machine's folders; of an object its name."""
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | Path):
        return public_name(str(value))
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items() if not SECRET.search(str(name))}
    if isinstance(value, list | tuple | set):
        return [plain(inner) for inner in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in fields(value)})
    if isinstance(value, partial):
        return plain(value.func)
    return value.__name__ if callable(value) and not isinstance(value, torch.nn.Module) else type(value).__name__


def resumed(earlier: dict[str, Any] | None, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What a run that went on from checkpoints did otherwise before them, in their order.

    Args:
        earlier: The manifest of the checkpoint; None of a run that was not resumed.
        facts: That of the run, with at least ``arguments`` and ``execution``.

    Returns:
        Per checkpoint ``until_step`` and, of ``arguments`` and ``execution``, the values up to there that are others now, None
        where there was none. Empty where all was the same.
    """
    if earlier is None:
        return []
    found = {kind: others(earlier.get(kind, {}), facts[kind]) for kind in ("arguments", "execution") if kind in earlier}
    found = {kind: values for kind, values in found.items() if values}
    return [*earlier.get("resumed", []), *([{"until_step": earlier["steps"]} | found] if found else [])]


def others(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The entries of ``then`` that are not those of ``now``; None for one that it lacks."""
    return {name: then.get(name) for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)}
