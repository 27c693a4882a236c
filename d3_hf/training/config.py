"""What every defence shares: `PurifyConfig`, a `transformers.TrainingArguments` with the field's defaults."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

logger = logging.get_logger(__name__)

SGD_ARGUMENTS = "momentum=0.9"
# Options that `schedule.RULES` settles where they are None, and what stands in for them while the library checks the others.
BY_RULE: dict[str, Any] = {
    "optim": "sgd",
    "optim_args": None,
    "learning_rate": 0.1,
    "warmup_steps": 0,
    "per_device_train_batch_size": 128,
    "num_train_epochs": 15,
    "cutmix": 0.0,
}
BATCH_NORM_POLICIES = ("train", "eval", "frozen")
# What a number must be, as errors say it: the metadata "range" of an option.
RANGES: dict[str, Callable[[float], bool]] = {
    ">= 0 and finite": lambda value: 0 <= value < math.inf,
    "> 0 and finite": lambda value: 0 < value < math.inf,
    ">= 1": lambda value: 1 <= value < math.inf,
    "in (0, 1]": lambda value: 0 < value <= 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in (0, 1)": lambda value: 0 < value < 1,
    "in (0, 4]": lambda value: 0 < value <= 4,
}
# Of options that the Trainer declares.
TRAINER_RANGES = {
    "weight_decay": ">= 0 and finite",
    "gradient_accumulation_steps": ">= 1",
    "seed": ">= 0 and finite",
}
# Options that a purification cannot honour, which no help offers; some raise, see `PurifyConfig`.
HIDDEN = (
    "do_eval",
    "eval_",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "label_smoothing_factor",
    "hub_token",
    "deepspeed",
)


def declared(kind: type, key: str) -> dict[str, Any]:
    """What the fields of a configuration declare under a metadata key, by the field's name.

    A field that is declared again with another default keeps what it does not say anew.
    """
    kinds = [base for base in reversed(kind.__mro__) if issubclass(base, PurifyConfig)]
    own = [f for base in kinds for f in fields(base) if f.name in base.__annotations__]
    return {f.name: f.metadata[key] for f in own if key in f.metadata}


def check_declared(args: TrainingArguments) -> None:
    """Check every option against the ``range`` or the ``choices`` that its field declares; of a list, which must not be empty,
    each element.

    Raises:
        ValueError: A value is not among them; the message names the option.
    """
    for name, needed in (TRAINER_RANGES | declared(type(args), "range")).items():
        value = getattr(args, name)
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(number is None or RANGES[needed](number) for number in numbers):
            raise ValueError(f"{name} must be {needed}; got {value}")
    for name, choices in declared(type(args), "choices").items():
        if (value := getattr(args, name)) is not None and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")


def two_digits(rate: float) -> float:
    """A learning rate that a rule computes, as people write it."""
    return float(f"{rate:.2g}")


def on_cnns(**options: Any) -> dict[str, dict[str, Any]]:
    """The ``by_network`` of a method that was published, with these, on convolutions: on LayerNorm they do not fit."""
    return {"BatchNorm": options, "no normalisation": options}


def launched_precision(given: Mapping[str, Any]) -> dict[str, bool]:
    """``bf16`` or ``fp16`` where ``accelerate launch --mixed_precision`` asks for it and none of the two options is given."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION")
    return {asked: True} if asked in ("bf16", "fp16") and not (given.get("bf16") or given.get("fp16")) else {}


@dataclass
class PurifyConfig(TrainingArguments):
    """Arguments shared by all defences: `TrainingArguments` with a schedule that fits the network, and what can be added to
    raise a defence, all of it off.

    Only what differs from these is listed. (BB) marks BackdoorBench's common defence settings, (code) those of
    the D3 authors' ``defense/d3.py``, (here) what served best in model_cards/proof.md. What is None is settled when the trainer
    is made, by the network's layers and the number of images; see `schedule.RULES`, which has the sources.

    Args:
        output_dir: Where the purified model and its evidence go.
        optim: By rule. With another optimizer than the rule's give its ``learning_rate`` too.
        optim_args: By rule; momentum 0.9 (BB) where SGD is given, none for another.
        learning_rate: By rule.
        warmup_steps: By rule.
        per_device_train_batch_size: By rule, which counts the images of all processes in an update.
        num_train_epochs: By rule, which counts updates: few images are passed over more often. ``max_steps`` wins over both.
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
        cutout: Side in pixels, >= 0, of a square of each training image that is blanked at a random place, at the model's size;
            0: none. 16 for CIFAR-10 (DeVries and Taylor 2017, arXiv 1708.04552). As there, the square is zero after
            normalisation, here up to half a grey level: it is filled with the image processor's mean colour.
        cutmix: Alpha >= 0 of CutMix, see `d3_hf.training.mixing`; 0: none. By rule where the method's loss fits it. Losses are
            then those above the shared label's own entropy, so that epsilon means what it does without.
        distillation: Weight >= 0 of ``T^2 KL(suspicious model || model)``, T = 2, mean over the window's images, against the
            cross-entropy (Hinton et al. 2015, arXiv 1503.02531; its value is to be tried). The suspicious model runs in
            evaluation mode on the same augmented images: one more forward pass, memory for two models. It is meant to restore
            ordinary behaviour, and it pulls towards the outputs of a model that nobody trusts: only images that are sure to
            carry no trigger may be trained on, and what a backdoor does to such images is kept with the rest.
        average_last: Share of the updates, in [0, 1), at whose end the saved weights are the mean over the ends of its epochs
            (Izmailov et al. 2018, arXiv 1803.05407, one snapshot per epoch, the last 25 % there; a cosine to zero leaves less
            to average than their high constant rate). BatchNorm statistics are then re-estimated on the retain set, augmented
            as in training, if ``batch_norm="train"``; else they stay. What is evaluated on the way is not averaged.
        sam_rho: Size >= 0 of the neighbourhood whose highest loss is minimised, by adaptive SAM (`d3_hf.training.sam`), which
            doubles the passes; 0: off. 2 is FT-SAM's for CIFAR-10. D3's distance has no part in it and is that of the weights.

    Raises:
        ValueError: An option is not what its field declares, see `check_declared`; ``hub_token`` is given (it would be written
            into logs: log in or set ``HF_TOKEN``); ``hub_create_pr`` without ``push_to_hub`` or with ``hub_model_id``;
            ``optim_args`` is not name=value; ``label_smoothing_factor`` is not 0 (the loss is the method's own);
            ``average_last`` is combined with checkpoints, which would not hold the mean; ``sam_rho`` with accumulated
            gradients or fp16.
    """

    output_dir: str | None = field(
        default="outputs/purified", metadata={"help": "Folder for the purified model and its evidence."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace another run's results or checkpoints in output_dir."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Highest learning rate; by the network's rule.", "range": ">= 0 and finite"}
    )
    num_train_epochs: float | None = field(
        default=None,
        metadata={"help": "Passes over the images that are trained on; by the network's rule.", "range": ">= 0 and finite"},
    )
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Images per device and micro-batch; by the network's rule.", "range": ">= 1"}
    )
    per_device_eval_batch_size: int = field(
        default=256, metadata={"help": "Images per device and batch in evaluation.", "range": ">= 1"}
    )
    optim: str | None = field(
        default=None, metadata={"help": "Optimizer, any name of TrainingArguments; by the network's rule."}
    )
    optim_args: str | None = field(default=None, metadata={"help": "Arguments of the optimizer."})
    warmup_steps: float | None = field(
        default=None,
        metadata={"help": "Updates of warm-up, below 1 their share; by the network's rule.", "range": ">= 0 and finite"},
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "Clip the gradient to this norm; 0 does not clip.", "range": ">= 0 and finite"}
    )
    batch_norm: str = field(
        default="train",
        metadata={"help": "BatchNorm while training: train, eval or frozen.", "choices": BATCH_NORM_POLICIES},
    )
    crop_padding: int = field(
        default=4, metadata={"help": "Zero padding in pixels before the random crop.", "range": ">= 0 and finite"}
    )
    horizontal_flip: bool = field(default=False, metadata={"help": "Flip half of the training images."})
    cutout: int = field(
        default=0,
        metadata={"help": "Side in pixels of a blanked square in each training image; 0: none.", "range": ">= 0 and finite"},
    )
    cutmix: float | None = field(
        default=None, metadata={"help": "Alpha of CutMix, 0: none; by the network's rule.", "range": ">= 0 and finite"}
    )
    distillation: float = field(
        default=0.0,
        metadata={"help": "Weight of the divergence from the suspicious model's outputs.", "range": ">= 0 and finite"},
    )
    average_last: float = field(
        default=0.0, metadata={"help": "Share of the run, at its end, over which to average weights.", "range": "in [0, 1)"}
    )
    sam_rho: float = field(
        default=0.0,
        metadata={"help": "Minimise the highest loss within this size (adaptive SAM); 0: off.", "range": ">= 0 and finite"},
    )
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

    # Without annotation, which would make them options.
    hidden_options = HIDDEN
    # The method's own options, which go before those of the network's rule, by the rule's name; see `on_cnns`. A
    # function says it of how many images there are.
    by_network = {}

    def __post_init__(self):
        check_declared(self)
        if self.hub_token is not None:
            raise ValueError("hub_token would end up in logs and files; log in with `hf auth login` or set HF_TOKEN instead")
        if self.hub_create_pr and (self.hub_model_id or not self.push_to_hub):
            raise ValueError("hub_create_pr pushes to the source's repository: give --push_to_hub and leave hub_model_id out")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor must stay 0: the defence computes its own loss")
        if self.optim_args and any(pair.count("=") != 1 for pair in self.optim_args.split(",")):  # as the Trainer splits it
            raise ValueError(f"optim_args must be name=value, or several with commas between them; got {self.optim_args!r}")
        for name, value in launched_precision(vars(self)).items():  # so that what an option would refuse is, and is recorded
            setattr(self, name, value)
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # or every loader warns
            self.use_cpu = self.use_cpu or self.bf16  # TrainingArguments wants to be told before it lets a CPU run in bf16
        open_options = [name for name in BY_RULE if getattr(self, name) is None]
        for name in open_options:
            setattr(self, name, BY_RULE[name])
        super().__post_init__()
        for name in open_options:
            setattr(self, name, None)
        self._take_accumulation()
        self._take_one_gpu()
        if self.average_last and self.save_strategy != SaveStrategy.NO:
            raise ValueError("average_last with checkpoints: they would not hold the mean; leave save_strategy at 'no'")
        if self.sam_rho and not self.has_whole_gradients:
            raise ValueError("sam_rho needs whole, unscaled gradients: leave gradient_accumulation_steps at 1 and fp16 off")

    @property
    def has_whole_gradients(self) -> bool:
        """Whether each backward pass is of a whole update, unscaled, as sharpness-aware steps need it."""
        return self.gradient_accumulation_steps == 1 and not self.fp16

    def _take_one_gpu(self) -> None:
        """Use one of several GPUs where no processes were launched: nn.DataParallel would cut batches and their loss apart."""
        if self.n_gpu > 1:
            logger.warning_once(
                f"one of {self.n_gpu} GPUs is used: --num_processes {self.n_gpu} uses all (in Python start the script with "
                "`accelerate launch`)"
            )
            self._n_gpu = 1

    def _take_accumulation(self) -> None:
        """Make an option of the steps that accelerator_config may hold, as the Trainer does later, when nothing is checked."""
        given = self.accelerator_config.gradient_accumulation_kwargs
        if given and self.gradient_accumulation_steps == 1:
            self.gradient_accumulation_steps = given.get("num_steps", 1)
            kept = {name: value for name, value in given.items() if name != "num_steps"}
            self.accelerator_config.gradient_accumulation_kwargs = kept

    @classmethod
    def own_options(cls) -> list[str]:
        """Names of the options that this configuration declares itself, and of those that all defences share."""
        kinds = [kind for kind in cls.__mro__ if issubclass(kind, PurifyConfig)]
        return list(dict.fromkeys(name for kind in reversed(kinds) for name in kind.__annotations__))
