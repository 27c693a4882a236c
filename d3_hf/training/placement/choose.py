"""Which placement a run has, as it was launched."""

from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer

from ...models.shared import shared_names
from .fsdp import Sharded
from .in_place import InPlace

FSDP2 = "--accelerate_config fsdp2"
USE_DDP = "launch with DDP (--num_processes N)"


def placement_of(trainer: Trainer, model: nn.Module, runs_sharded: bool) -> InPlace:
    """The placement of a trainer's model.

    Args:
        trainer: Its accelerator says how the run was launched.
        model: As handed over, not yet sharded.
        runs_sharded: Whether the method knows of shards.

    Raises:
        ValueError: DeepSpeed or FSDP1; on shards, a method, an option or a network that does not work there.
    """
    if trainer.is_deepspeed_enabled:
        raise ValueError(f"DeepSpeed is not supported: shard by FSDP2 ({FSDP2}), or {USE_DDP}")
    if not trainer.is_fsdp_enabled:
        return InPlace(model)
    if not runs_sharded:
        raise ValueError(f"{type(trainer).__name__} does not run under FSDP, only D3 and fine-tuning do: {USE_DDP}")
    if whole := [option for option in ("average_last", "sam_rho") if getattr(trainer.args, option)]:
        raise ValueError(f"{whole[0]} does not run under FSDP: set it to 0, or {USE_DDP}")
    if shared := shared_names(model):
        raise ValueError(f"FSDP takes no network with one tensor under two names ({' and '.join(shared[0][:2])}): {USE_DDP}")
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"FSDP1 is not supported: set fsdp_version to 2 ({FSDP2}), or {USE_DDP}")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            f"FSDP would load the suspicious weights in one process: set fsdp_cpu_ram_efficient_loading to false ({FSDP2})"
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(f"FSDP with parameters on the CPU is not supported: set fsdp_offload_params to false ({FSDP2})")
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # of the default type, in which no whole model is saved
    plugin.set_state_dict_type("FULL_STATE_DICT")
    return Sharded(model, trainer.args.device)
