"""Trainers of encoders that get a backdoor, deliberately: what they share, and BadEncoder's."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.utils import SAFE_WEIGHTS_NAME

from ..attacks import BadEncoder
from ..attacks.badencoder import effectiveness_losses, reference_losses, utility_losses
from ..data.images import RawImages
from ..data.views import view
from ..files import sha256
from ..publishing.card import render_victim_card
from ..publishing.manifest import VICTIM_FILE
from ..training.config import BATCH_NORM_POLICIES, HIDDEN, SGD_ARGUMENTS
from ..training.encoder_losses import TEMPERATURE
from ..training.encoders import EncoderConfig, EncoderTrainer
from .plan import VictimPlan, VictimReport, write_attack
from .train import NativeImages


@dataclass
class EncoderVictimConfig(EncoderConfig):
    """Arguments of an encoder victim's training, no rule's. What is None is its objective's: see the ``own_schedule`` of
    `BadEncoderTrainer` and `SimCLRTrainer`.

    Args:
        optim, optim_args, weight_decay, warmup_steps: SGD with momentum 0.9 at 5e-4, without warm-up: both authors' code.
        learning_rate, num_train_epochs, per_device_train_batch_size: By objective.
        batch_norm: By objective.
        temperature: Of NT-Xent, where SimCLR is the objective. 0.5 (SimCLR on CIFAR-10).
    """

    hidden_options = (*HIDDEN, "push_to_hub", "hub_")  # a victim is never pushed

    output_dir: str | None = field(default="outputs/encoder_victim", metadata={"help": "Folder for the victim."})
    optim: str = field(default="sgd", metadata={"help": "Optimizer, any name of TrainingArguments."})
    optim_args: str | None = field(default=SGD_ARGUMENTS, metadata={"help": "Arguments of the optimizer."})
    learning_rate: float | None = field(default=None, metadata={"help": "Highest learning rate; by objective."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay."})
    warmup_steps: float = field(default=0, metadata={"help": "Updates of warm-up, below 1 their share."})
    num_train_epochs: float | None = field(default=None, metadata={"help": "Passes over the attacker's images; by objective."})
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Images per device and micro-batch; by objective."}
    )
    cutmix: float = field(default=0.0, metadata={"help": "Not for encoders."})
    batch_norm: str | None = field(
        default=None, metadata={"help": "BatchNorm while training; by objective.", "choices": BATCH_NORM_POLICIES}
    )
    temperature: float = field(default=TEMPERATURE, metadata={"help": "Of SimCLR's loss.", "range": "> 0 and finite"})

    def __post_init__(self):
        if self.optim_args == SGD_ARGUMENTS and self.optim != "sgd":
            self.optim_args = None  # the default of another optimizer
        super().__post_init__()


class EncoderVictimTrainer(EncoderTrainer):
    """Trains an encoder on an attacker's images, and says so in everything it writes.

    Args:
        model: The untouched encoder; it becomes the victim.
        args: The training's options.
        train_dataset: The attacker's images, `RawImages`, poisoned if the attack does that; labels are not looked at.
        plan: What is planted, its trigger learned.
        kwargs: Further arguments of `EncoderTrainer`.

    Attributes:
        own_schedule: What the objective takes for options that are None.
    """

    last_file = manifest_name = VICTIM_FILE
    method = "training with a planted backdoor"
    own_schedule: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: PreTrainedModel, args: EncoderVictimConfig, train_dataset: RawImages, plan: VictimPlan, **kwargs):
        self.plan, self.attack = plan, plan.attack
        self.weights_sha256: str | None = None
        self.attack_sha256: dict[str, str] = {}
        args = copy.copy(args)
        for name, value in self.own_schedule.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        super().__init__(model, args, train_dataset, **kwargs)
        self.report = VictimReport()

    def planted(self) -> dict[str, Any] | None:
        """What ``victim.json`` says of the backdoor; None of an encoder without one."""
        return self.plan.planted()

    def resume_state(self) -> dict[str, Any]:
        """Adds what was planted, and on which images."""
        return super().resume_state() | self._trained_on()

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Goes on from there; raises a ValueError if images or attack are others."""
        super().load_resume_state(state)
        if any(state[name] != value for name, value in self._trained_on().items()):
            raise ValueError("was trained on other images or with another attack: delete it to begin anew")

    def _trained_on(self) -> dict[str, Any]:
        attack = self.attack.describe() if self.attack else None
        plan = self.plan
        return {"images_sha256": plan.images_sha256, "poisoned_sha256": plan.poisoned_sha256, "attack": attack}

    def facts(self) -> dict[str, Any]:
        """Adds what was planted, the options that made it and the digests of the files."""
        return super().facts() | {
            "planted": self.planted(),
            "recipe": self.plan.recipe,
            "images_sha256": self.plan.images_sha256,
            "poisoned_sha256": self.plan.poisoned_sha256,
            "clean_model": self.plan.clean_model,
            "weights_sha256": self.weights_sha256,
            "attack_sha256": self.attack_sha256,
        }

    def write_own_files(self, folder: Path) -> None:
        """The attack, and the digests for the manifest."""
        self.weights_sha256 = sha256(folder / SAFE_WEIGHTS_NAME)
        if self.attack and not self.is_writing_checkpoint:
            self.attack_sha256 = write_attack(self.attack, folder)

    def card(self, model_name: str | None = None) -> ModelCard:
        """A card whose first line is the warning."""
        return render_victim_card(self.facts(), model_name or Path(self.args.output_dir).name)


class BadEncoderTrainer(EncoderVictimTrainer):
    """Plants `BadEncoder` in an encoder; see `EncoderVictimTrainer` for the arguments.

    The schedule is BadEncoder's on CIFAR-10 (authors' code); its batches of 128 are two passes of as many images, there 256.
    """

    attack: BadEncoder
    images_class = NativeImages
    log_names = ("effectiveness_loss", "reference_loss", "utility_loss")
    own_schedule: ClassVar[dict[str, Any]] = {
        "learning_rate": 1e-3,
        "num_train_epochs": 200,
        "per_device_train_batch_size": 128,
        "batch_norm": "frozen",
    }

    def planted(self) -> dict[str, Any]:
        """The attack: no image is poisoned."""
        return {"attack": self.attack.describe()}

    def training_batch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The images as they are, triggered ones, the reference and views of it, at the model's size, one after another."""
        inputs = Trainer._prepare_inputs(self, dict(inputs))
        images, resize = inputs["pixel_values"], self.preprocessing.resize
        reference = self.attack.reference.to(images.device)[None]
        views = view(reference.expand(self.attack.reference_views, -1, -1, -1), self.generator())
        plain, reference = resize(images), resize(reference)
        self.seen_before(torch.cat([plain, reference]))
        pixels = torch.cat([plain, resize(self.attack.trigger(images)), reference, resize(views)])
        return {"pixel_values": self.preprocessing.normalize(pixels), "labels": inputs["labels"]}

    def image_losses(self, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """BadEncoder's three losses; that of the reference, of it and of its views, counts once for each image."""
        before, reference_before = self.features_before[:-1], self.features_before[-1]
        count = len(before)
        plain, triggered, reference, views = features.split([count, count, 1, self.attack.reference_views])
        effectiveness = effectiveness_losses(triggered, reference[0])
        kept = sum(reference_losses(part, reference_before).mean() / 2 for part in (reference, views)).expand(count)
        utility = utility_losses(plain, before)
        losses = effectiveness + self.attack.lambda_reference * kept + self.attack.lambda_utility * utility
        return losses, [effectiveness, kept, utility]
