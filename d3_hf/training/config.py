"""What every defence shares: `PurifyConfig`, a `transformers.TrainingArguments` with the field's defaults."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import SaveStrategy

BATCH_NORM_POLICIES = ("train", "eval", "frozen")
LEAST = {
    "learning_rate": 0,
    "weight_decay": 0,
    "num_train_epochs": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "seed": 0,
}


# What the options of the defences must be, as their errors say it.
RANGES: dict[str, Callable[[float], bool]] = {
    ">= 0 and finite": lambda value: 0 <= value < math.inf,
    "> 0 and finite": lambda value: 0 < value < math.inf,
    ">= 1": lambda value: value >= 1,
    "in (0, 1]": lambda value: 0 < value <= 1,
}


def check_options(args: TrainingArguments, needed: str, *names: str) -> None:
    """Raise a ValueError for the first option of these names that is not ``needed``, a key of `RANGES`."""
    for name in names:
        if not RANGES[needed](getattr(args, name)):
            raise ValueError(f"{name} must be {needed}; got {getattr(args, name)}")


@dataclass
class Additions(TrainingArguments):
    """What can be added to a defence to raise it, and to its controls alike; all off.

    `PurifyConfig` inherits these options instead of declaring them: a manifest names them where they are used and nowhere else,
    so that the record of a run without them is what it was before there were any.

    Args:
        cutout: Side in pixels, >= 0, of a square of each training image that is blanked at a random place, at the model's size;
            0: none. 16 for CIFAR-10 (DeVries and Taylor 2017, arXiv 1708.04552). As there, the square is zero after
            normalisation, here up to half a grey level: it is filled with the image processor's mean colour.
        distillation: Weight >= 0 of ``T^2 KL(suspicious model || model)``, T = 2, mean over the window's images, against the
            cross-entropy (Hinton et al. 2015, arXiv 1503.02531; its value is to be tried). The suspicious model runs in
            evaluation mode on the same augmented images: one more forward pass, memory for two models. It is meant to restore
            ordinary behaviour, and it pulls towards the outputs of a model that nobody trusts: only images that are sure to
            carry no trigger may be trained on, and what a backdoor does to such images is kept with the rest.
        average_last: Share of the updates, in [0, 1), at whose end the saved weights are the mean over the ends of its epochs
            (Izmailov et al. 2018, arXiv 1803.05407, one snapshot per epoch, the last 25 % there; a cosine to zero leaves less
            to average than their high constant rate). BatchNorm statistics are then re-estimated on the retain set, augmented
            as in training, if ``batch_norm="train"``; else they stay. What is evaluated on the way is not averaged.
        sam_rho: Size >= 0 of the neighbourhood whose highest loss is minimised, by adaptive SAM (`d3_hf.sam`), which doubles
            the passes; 0: off. 2 is FT-SAM's for CIFAR-10. D3's distance has no part in it and is that of the weights.

    Raises:
        ValueError: A value is out of range; ``average_last`` is combined with checkpoints, which would not hold the mean;
            ``sam_rho`` with accumulated gradients or fp16.
    """

    cutout: int = field(default=0, metadata={"help": "Side in pixels of a blanked square in each training image; 0: none."})
    distillation: float = field(default=0.0, metadata={"help": "Weight of the divergence from the suspicious model's outputs."})
    average_last: float = field(default=0.0, metadata={"help": "Share of the run, at its end, over which to average weights."})
    sam_rho: float = field(default=0.0, metadata={"help": "Minimise the highest loss within this size (adaptive SAM); 0: off."})

    def __post_init__(self):
        if self.cutout < 0:
            raise ValueError(f"cutout must be >= 0 pixels; got {self.cutout}")
        check_options(self, ">= 0 and finite", "distillation", "sam_rho")
        if not 0 <= self.average_last < 1:
            raise ValueError(f"average_last must be in [0, 1); got {self.average_last}")
        super().__post_init__()
        if self.average_last and self.save_strategy != SaveStrategy.NO:
            raise ValueError("average_last with checkpoints: they would not hold the mean; leave save_strategy at 'no'")
        if self.sam_rho and (self.gradient_accumulation_steps > 1 or self.fp16):
            raise ValueError("sam_rho needs whole, unscaled gradients: leave gradient_accumulation_steps at 1 and fp16 off")


@dataclass
class PurifyConfig(Additions):
    """Arguments shared by all defences: `TrainingArguments` with the schedule of the D3 study, and `Additions`.

    Only what differs from these is listed. (BB) marks BackdoorBench's common defence settings, (code) those of
    the D3 authors' ``defense/d3.py``, (here) what served best in model_cards/proof.md.

    Args:
        output_dir: Where the purified model and its evidence go.
        learning_rate: 0.1 (here): with 0.01 (BB, code) a trigger that no longer yields the target still destroys the
            prediction. Measured on CNNs, and used as it is on a ViT (model_cards/vit.md).
        num_train_epochs: 15 passes over the retain set (here); 100 (BB, code).
        per_device_train_batch_size: 128 (here); 256 (BB, code). 15 passes over 2,500 images are 300 steps, the code's 1,000.
        optim: SGD (BB).
        optim_args: Momentum 0.9 (BB).
        lr_scheduler_type: Cosine to zero, stepped per update; the code steps it once per epoch.
        weight_decay: 0, as the code runs (its configured 5e-4 is never passed on).
        max_grad_norm: 0, no clipping: a clip would scale the clean gradient and the distance gradient apart from what
            lambda says.
        batch_norm: How BatchNorm layers run while training: ``"train"`` (batch statistics, running ones updated; code),
            ``"eval"`` (running statistics kept, scale and shift trained) or ``"frozen"`` (nothing of them changes).
        crop_padding: Pixels of zero padding before the random crop, >= 0; 4 (BB, at 32x32).
        horizontal_flip: Flip half of the images. Off, because a flip changes what some signs and digits mean; BB flips
            CIFAR-10.
        save_strategy: ``"no"``: the final model is saved; checkpoints, which hold optimizer state as pickles, only on request.
        overwrite_output_dir: Replace the results or the checkpoints of another run in ``output_dir``, which are refused
            otherwise.
        hub_strategy: ``"end"``: pushing on the way would upload half-purified weights and pickles; the trainer refuses it.
        hub_private_repo: Repositories are created private.
        hub_create_pr: With ``push_to_hub``: open a pull request on the repository that the model came from, instead of making
            one.

    Raises:
        ValueError: ``batch_norm`` is unknown; ``crop_padding`` < 0; an option of `LEAST` is lower or not finite; ``hub_token``
            is given (it would be written into logs: log in or set ``HF_TOKEN``); ``hub_create_pr`` without ``push_to_hub`` or
            with ``hub_model_id``;
            ``label_smoothing_factor`` is not 0 (the loss is the method's own).
    """

    output_dir: str | None = field(
        default="outputs/purified", metadata={"help": "Folder for the purified model and its evidence."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace another run's results or checkpoints in output_dir."}
    )
    learning_rate: float = field(default=0.1, metadata={"help": "Initial learning rate."})
    num_train_epochs: float = field(default=15, metadata={"help": "Passes over the images that are trained on."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images per device and micro-batch."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Images per device and batch in evaluation."})
    optim: str = field(default="sgd", metadata={"help": "Optimizer, any name of TrainingArguments."})
    optim_args: str | None = field(default="momentum=0.9", metadata={"help": "Arguments of the optimizer."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip the gradient to this norm; 0 does not clip."})
    batch_norm: str = field(
        default="train",
        metadata={"help": "BatchNorm while training: train, eval or frozen.", "choices": BATCH_NORM_POLICIES},
    )
    crop_padding: int = field(default=4, metadata={"help": "Zero padding in pixels before the random crop."})
    horizontal_flip: bool = field(default=False, metadata={"help": "Flip half of the training images."})
    save_strategy: str = field(default="no", metadata={"help": "When to write checkpoints for resuming."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    report_to: str = field(default="none", metadata={"help": "Trackers to report to."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Go on from this checkpoint; `true`: from the last one in output_dir."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Push the purified model to the Hub at the end."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository to push to, as me/model-purified."})
    hub_strategy: str = field(default="end", metadata={"help": "When to push: at the end, never half-purified weights."})
    hub_private_repo: bool | None = field(default=True, metadata={"help": "Create Hub repositories private."})
    hub_create_pr: bool = field(default=False, metadata={"help": "Push as a pull request on the source's repository."})
    # Each of these would be wrong with the library's default: the data set's own columns are converted by the trainer, the
    # non-finite loss is an error here, and no parameter of a classifier stays unused.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns that the model does not take."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide non-finite losses from the log."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "DDP: look for unused parameters."})

    def __post_init__(self):
        if self.batch_norm not in BATCH_NORM_POLICIES:
            raise ValueError(f"batch_norm must be one of {', '.join(BATCH_NORM_POLICIES)}; got {self.batch_norm!r}")
        for name, low in LEAST.items():
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least {low} and finite; got {getattr(self, name)}")
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding must be >= 0 pixels; got {self.crop_padding}")
        if self.hub_token is not None:
            raise ValueError("hub_token would end up in logs and files; log in with `hf auth login` or set HF_TOKEN instead")
        if self.hub_create_pr and (self.hub_model_id or not self.push_to_hub):
            raise ValueError("hub_create_pr pushes to the source's repository: give --push_to_hub and leave hub_model_id out")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor must stay 0: the defence computes its own loss")
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # or every loader warns
            self.use_cpu = self.use_cpu or self.bf16  # TrainingArguments wants to be told before it lets a CPU run in bf16
        super().__post_init__()
        unset_hf_deepspeed_config()  # ZeRO-3 would partition what is loaded now, before the defence has seen it
