"""What `PurifyTrainer` cannot train."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..models.computed import refuse_hooked
from .config import PurifyConfig


def refuse_unsupported(model: nn.Module, args: PurifyConfig, kwargs: dict[str, Any]) -> None:
    """Refuse a combination that would train something else than what was handed over, or leak it.

    Args:
        model: What is to be purified.
        args: The defence's configuration.
        kwargs: Further arguments of `Trainer`.

    Raises:
        ValueError: ``model_init``; no transformers model; checkpoints pushed to the Hub; `nn.DataParallel`; an optimizer that
            steps within the backward pass; a PEFT or device-mapped model; a layer whose weight a hook computes (pruning).
    """
    if kwargs.get("model_init") is not None:
        raise ValueError("model_init would replace the suspicious model inside train(); pass model= instead")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is no transformers model: wrap it with d3_hf.load_classifier(module, num_labels=..., "
            "image_mean=..., image_std=...)"
        )
    refuse_hooked(model)
    if args.push_to_hub and args.save_strategy != "no" and args.hub_strategy != "end":
        raise ValueError(
            "push_to_hub with checkpoints would upload pickles and half-purified weights on the way: set hub_strategy='end'"
        )
    if args.n_gpu > 1:
        raise ValueError(f"one process would drive {args.n_gpu} GPUs by nn.DataParallel; start it with `accelerate launch`")
    optimizer = str(getattr(args.optim, "value", args.optim))
    if "layerwise" in optimizer or optimizer.endswith("lomo"):
        raise ValueError(
            f"optim={optimizer} updates each layer within the backward pass, before the gradient is complete: use sgd or "
            "adamw_torch"
        )
    if getattr(model, "hf_device_map", None) or getattr(model, "peft_config", None):
        raise ValueError("PEFT and device-mapped models are not supported: merge the adapter, load on one device")
