"""What `PurifyTrainer` cannot train."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..models.computed import refuse_hooked
from ..models.config import settle, settle_output
from ..models.differences import headless, with_head
from ..models.kinds import is_encoder
from .config import PurifyConfig
from .contract import Defence

# Options of `TrainingArguments` by name: the values that fit, and why no other does.
UNFIT = {
    "auto_find_batch_size": ((False,), "it would begin again from weights that have moved; set per_device_train_batch_size"),
    "bf16_full_eval": ((False,), "an evaluation would leave the weights rounded; bf16=True computes in bf16 and keeps them"),
    "fp16_full_eval": ((False,), "an evaluation would leave the weights rounded; fp16=True computes in fp16 and keeps them"),
    "label_names": ((None, ["labels"]), "batches name their labels `labels`; leave it out"),
    "remove_unused_columns": ((False,), "the trainer takes what it needs of the columns; leave it out"),
    "train_sampling_strategy": (("random", "sequential"), "images have no lengths; use random or sequential"),
}

ADDITIONS = ("cutmix", "distillation", "average_last", "sam_rho")


def refuse_additions(defence: Defence, args: PurifyConfig) -> None:
    """Refuse what is asked for besides the defence and does not fit its loss and steps; a ValueError names it."""
    if unfit := [name for name in ADDITIONS if getattr(args, name) and name not in defence.additions]:
        raise ValueError(f"{type(defence).__name__} does not take {' and '.join(unfit)}: D3 and fine-tuning do")


def refuse_unsupported(model: nn.Module, args: PurifyConfig, kwargs: dict[str, Any], trains_encoders: bool = False) -> None:
    """Refuse a combination that would train something else than what was handed over, or leak it.

    Args:
        model: What is to be purified.
        args: The defence's configuration.
        kwargs: Further arguments of `Trainer`.
        trains_encoders: Whether the method is for encoders.

    Raises:
        ValueError: ``model_init``; another loss; no transformers model; an encoder where the method needs labels and a head, or
            a classifier where it is for encoders; one of another task, see `settle`; checkpoints pushed
            to the Hub; an optimizer that steps within the backward pass; a PEFT or device-mapped model; a layer whose weight a
            hook computes (pruning); an option of `UNFIT`.
    """
    if kwargs.get("model_init") is not None:
        raise ValueError("model_init would replace the suspicious model inside train(); pass model= instead")
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func has no place: the defence computes its own loss; override compute_loss")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is no transformers model: wrap it with d3_hf.load_classifier(module, num_labels=..., "
            "image_mean=..., image_std=...)"
        )
    if is_encoder(model) and not trains_encoders:
        raise headless(type(model).__name__, "its output is features")
    if trains_encoders and not is_encoder(model):
        raise with_head(type(model).__name__, "its output is no features")
    if trains_encoders:
        settle_output(model.config)
    else:
        settle(model.config, type(model).__name__)
    refuse_hooked(model)
    if args.push_to_hub and args.save_strategy != "no" and args.hub_strategy != "end":
        raise ValueError(
            "push_to_hub with checkpoints would upload pickles and half-purified weights on the way: set hub_strategy='end'"
        )
    for option, (fits, why) in UNFIT.items():
        if (value := getattr(args, option)) not in fits:
            raise ValueError(f"{option}={value} does not fit: {why}")
    optimizer = str(getattr(args.optim, "value", args.optim))
    if "layerwise" in optimizer or optimizer.endswith("lomo"):
        raise ValueError(
            f"optim={optimizer} updates each layer within the backward pass, before the gradient is complete: use sgd or "
            "adamw_torch"
        )
    if getattr(model, "hf_device_map", None) or getattr(model, "peft_config", None):
        raise ValueError("PEFT and device-mapped models are not supported: merge the adapter, load on one device")
