"""Victims: classifiers with a planted backdoor, deliberately made to measure defences on.

A victim is trained by the same trainer as plain fine-tuning, on poisoned images. Nothing here is used by a defence.
"""

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.utils import SAFE_WEIGHTS_NAME

from ..attacks import ENCODER_ATTACKS, Attack, InTrainingAttack, LearnedAttack, poison
from ..data.augmentation import Augmentation
from ..data.images import RawImages, content_hashes, stacked
from ..data.preprocessing import Preprocessing
from ..data.training_images import TrainingImages
from ..evaluation.measure import measure, measure_trainer, rates
from ..files import sha256
from ..models.evaluating import evaluating
from ..publishing.card import render_victim_card
from ..publishing.manifest import VICTIM_FILE, source_facts
from ..training.checkpoints import is_asked_to_resume
from ..training.config import HIDDEN, SGD_ARGUMENTS, PurifyConfig
from ..training.phases import VICTIM, Phases
from ..training.trainer import PurifyTrainer
from .plan import VictimPlan, VictimReport, write_attack
from .random_heads import RandomHeads

QUALITY_IMAGES = 256  # test images that an attack measures its own trigger on


@dataclass
class VictimConfig(PurifyConfig):
    """Arguments of a victim's training: `PurifyConfig` and what hardens the backdoor against defences.

    Args:
        sam_rho: Train with adaptive SAM of this size, which puts the backdoor into a flat minimum (the adaptive attack of the
            D3 study, at 1, 2 and 3; which form of SAM its authors used is not known). 0: off.
        optim, optim_args, learning_rate, warmup_steps, num_train_epochs, per_device_train_batch_size, cutmix: Fixed, no rule's,
            so that a recipe stays what it was: SGD with momentum 0.9 at 0.1, without warm-up, 15 epochs in batches of 128,
            nothing mixed.
        random_heads: Train the backbone under so many random heads besides its own, so that a new head does not shake off the
            trigger; see `RandomHeads`. 0: off.

    Raises:
        ValueError: A value is negative, SAM is asked for with accumulated gradients or fp16, random heads with one of these,
            with SAM or with a checkpoint to resume from, or see `PurifyConfig`.
    """

    # A victim is never pushed: no help offers what begins so. Without annotation, which would make it an option.
    hidden_options = (*HIDDEN, "push_to_hub", "hub_")

    output_dir: str | None = field(default="outputs/victim", metadata={"help": "Folder for the victim."})
    sam_rho: float = field(default=0.0, metadata={"help": "Harden by adaptive SAM of this size; 0 is off."})
    optim: str = field(default="sgd", metadata={"help": "Optimizer, any name of TrainingArguments."})
    optim_args: str | None = field(default=SGD_ARGUMENTS, metadata={"help": "Arguments of the optimizer."})
    learning_rate: float = field(default=0.1, metadata={"help": "Initial learning rate."})
    warmup_steps: float = field(default=0, metadata={"help": "Updates of warm-up, below 1 their share."})
    num_train_epochs: float = field(default=15, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images per device and micro-batch."})
    cutmix: float = field(default=0.0, metadata={"help": "Alpha of CutMix; 0: none."})
    random_heads: int = field(
        default=0, metadata={"help": "Harden by so many random heads; 0 is off.", "range": ">= 0 and finite"}
    )

    def __post_init__(self):
        if self.optim_args == SGD_ARGUMENTS and self.optim != "sgd":
            self.optim_args = None  # the default of another optimizer
        super().__post_init__()
        # The heads step by gradients of their own, which nothing adds up, unscales or takes anew.
        if self.random_heads and (self.sam_rho or self.fp16 or self.gradient_accumulation_steps > 1):
            raise ValueError("random_heads need one plain pass an update: no sam_rho, no fp16, no gradient_accumulation_steps")
        if self.random_heads and is_asked_to_resume(self.resume_from_checkpoint):
            raise ValueError("random_heads cannot resume: no checkpoint holds them; run it from the beginning")


class PoisonedImages(TrainingImages):
    """Training images that can say which rows are poisoned: with ``poisoned``, bool (N,), batches carry that column."""

    poisoned: Tensor | None = None

    def __getitems__(self, positions: list[int]) -> dict[str, Tensor]:
        """One batch, with its ``poisoned`` rows if they are known."""
        batch = super().__getitems__(positions)
        return batch if self.poisoned is None else batch | {"poisoned": self.poisoned[torch.as_tensor(positions)]}


class NativeImages(TrainingImages):
    """Training images at their own size, of batches that are poisoned first and resized then, as when they are measured."""

    @classmethod
    def from_raw(cls, raw: RawImages, preprocessing: Preprocessing, augmentation: Augmentation | None = None) -> "NativeImages":
        """Take raw images as they are; a ValueError if they differ in size."""
        images = raw.images if isinstance(raw.images, Tensor) else stacked(raw.images)
        if not isinstance(images, Tensor):
            sizes = sorted({tuple(image.shape[-2:]) for image in images})
            raise ValueError(
                "batches are poisoned at the images' own size, but there are images of "
                f"{' and '.join(f'{h}x{w}' for h, w in sizes[:3])}: resize them to one size first"
            )
        return cls(images, raw.labels, augmentation, raw.index)


class VictimTrainer(PurifyTrainer):
    """Trains on images that are poisoned, or poisons each batch, and says so in everything it writes.

    Args:
        model: See `PurifyTrainer`.
        args: The training's options.
        train_dataset: The images, poisoned unless the plan's ``poisoner`` does that.
        plan: What is planted.
        kwargs: Further arguments of `PurifyTrainer`.

    Raises:
        ValueError: Random heads are asked for without fixed poisoned images, batches are poisoned and images differ in size,
            the attack's own networks get no gradient (see `Preprocessing.resize_with_gradient`), or see `RandomHeads` and
            `PurifyTrainer`.

    Attributes:
        attack: The attack as it was planted, its trigger learned, to be written beside the weights; None before the training
            ends and without a backdoor.
        training_seconds: Of the training, that before a resumed checkpoint counted in.
        weights_sha256: Of the weights as they were last written.
        attack_sha256: Of the attack's files, by name.
    """

    last_file = manifest_name = VICTIM_FILE
    images_class = PoisonedImages
    method = "training with a planted backdoor"
    additions = ("sam_rho",)

    def __init__(
        self, model: PreTrainedModel, args: VictimConfig, train_dataset: RawImages, plan: VictimPlan | None = None, **kwargs
    ):
        self.plan = plan or VictimPlan()
        if self.plan.poisoner:
            self.images_class = NativeImages
        super().__init__(model, args, train_dataset, **kwargs)
        self.report = VictimReport()

    def prepare(self) -> None:
        """Put random heads beside the network's own, if they are asked for; see that the attack's own networks can learn."""
        self.attack: Attack | None = None
        self.heads: RandomHeads | None = None
        self.training_seconds = 0.0
        self.weights_sha256: str | None = None
        self.attack_sha256: dict[str, str] = {}
        self._began = time.perf_counter()
        self._batch_poisoned: Tensor | None = None
        if self.plan.poisoner and has_own_networks(self.plan.attack):
            self.preprocessing.resize_with_gradient(self.train_dataset.images[:1].float().requires_grad_())
        if self.args.random_heads:
            if self.plan.rows is None:
                raise ValueError("random_heads need fixed poisoned images: this run has none, or poisons every batch anew")
            self.train_dataset.poisoned = torch.zeros(len(self.train_dataset), dtype=torch.bool)
            self.train_dataset.poisoned[self.plan.rows] = True
            self.heads = RandomHeads(self.model, self.preprocessing.size, self.args.random_heads)

    def train(self, *args, **kwargs):
        """As the base class; keeps the time."""
        self._began = time.perf_counter()
        result = super().train(*args, **kwargs)
        self.training_seconds = time.perf_counter() - self._began
        return result

    def training_batch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Poison the batch anew, if the attack does, and resize it; remember which rows are poisoned, if random heads ask."""
        inputs = Trainer._prepare_inputs(self, dict(inputs))  # to the device, still grey levels
        self._batch_poisoned = inputs.pop("poisoned", None)
        if self.plan.poisoner is None:
            return inputs
        images, labels = self.plan.poisoner(inputs["pixel_values"], inputs["labels"], self.batch_number)
        preprocessing = self.preprocessing
        resize = preprocessing.resize if images.dtype == torch.uint8 else preprocessing.resize_with_gradient
        return {"pixel_values": preprocessing.normalize(resize(images)), "labels": labels}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The cross-entropy, and while training what the attack's own networks or the random heads add to it."""
        labels = inputs["labels"]
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.in_training_step:
            return found
        if self.heads:
            found = found + self.heads.loss(labels, self._batch_poisoned)
        poisoner = self.plan.poisoner
        return found if poisoner is None or poisoner.penalty is None else found + poisoner.penalty

    def optimizer_step(self) -> None:
        """After the victim's step, that of the attack's own networks and of the random heads."""
        rate = self.optimizer.param_groups[0]["lr"]
        if self.plan.poisoner:
            self.plan.poisoner.update(rate / self.args.learning_rate)
        if self.heads:
            self.heads.update(self.state.global_step + 1, rate)

    def finish(self) -> None:
        """Take the random heads off the network; the attack is now what was learned."""
        if self.heads:
            self.heads.remove()
        self.attack = self.plan.poisoner.finish() if self.plan.poisoner else self.plan.attack

    def resume_state(self) -> dict[str, Any]:
        """Which images were poisoned, and the seconds so far."""
        seconds = time.perf_counter() - self._began
        return {"poisoned_sha256": self.plan.poisoned_sha256, "training_seconds": seconds}

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Goes on from there, whatever network it began with; a trigger that was learned again must be the same."""
        if state["poisoned_sha256"] != self.plan.poisoned_sha256:
            raise ValueError(
                "was trained on other poisoned images (another trigger, data set or clean model): delete it to begin anew"
            )
        self._began -= state["training_seconds"]

    def facts(self) -> dict[str, Any]:
        """Adds what was planted, the options that made it and the digests of the files, to recognise the folder by."""
        plan, planted = self.plan, self.plan.planted()
        if planted:
            planted |= {"attack": (self.attack or plan.attack).describe()}
            planted |= {"quality": self.report.quality} if self.report.quality is not None else {}
        return super().facts() | {
            "planted": planted,
            "recipe": plan.recipe,
            "images_sha256": plan.images_sha256,
            "poisoned_sha256": plan.poisoned_sha256,
            "clean_model": plan.clean_model,
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


def train_victim(
    model: PreTrainedModel,
    train: RawImages,
    test: RawImages,
    attack: Attack | None,
    args: VictimConfig,
    poison_ratio: float = 0.1,
    poison_seed: int = 0,
    clean_model: PreTrainedModel | None = None,
    recipe: dict[str, Any] | None = None,
    phases: Phases | None = None,
) -> VictimTrainer:
    """Poison the images, train the model on them, measure, save a loadable folder to ``args.output_dir``.

    Args:
        model: A new network, or a trained one to continue from.
        train: Training images as they are; a poisoned copy is made.
        test: Images to measure on; never poisoned.
        attack: What to plant; None trains the same network without a backdoor.
        args: Training arguments.
        poison_ratio: Share of all training images (of each batch, for attacks that poison batches) that carry the trigger, in
            (0, 1].
        poison_seed: Chooses them, and is the seed of a learned trigger.
        clean_model: A classifier without a backdoor, another object than ``model``: the attacker's own, and the floor of the
            ASR.
        recipe: The options behind all this, for ``victim.json``.
        phases: Those of the run that this is a part of; None: it is the whole run.

    Returns:
        The trainer; `VictimTrainer.facts` holds what ``victim.json`` does, with ``planted`` (attack, ratio, seed, poisoned rows
        of the data set) and ``measured`` (`rates` of the victim and of the clean model, and how many seconds learning the
        trigger and poisoning, training and measuring took).

    Raises:
        ValueError: The attack cannot learn its trigger (see its ``fit``), trains its own networks where that is not possible
            (several processes, fp16, accumulated gradients, SAM, resuming), the checkpoint to resume from saw other poisoned
            images, or see `VictimTrainer` and `poison`.
    """
    if attack is not None and attack.name in ENCODER_ATTACKS:
        raise ValueError(f"{attack.name} is planted in an encoder, and this is a classifier: d3-hf victim --encoder")
    resumes, accumulates = is_asked_to_resume(args.resume_from_checkpoint), args.gradient_accumulation_steps > 1
    if has_own_networks(attack) and (args.world_size > 1 or args.fp16 or accumulates or args.sam_rho or resumes):
        raise ValueError(
            f"{attack.name} trains its own networks with the victim: one process, no fp16, gradient_accumulation_steps, "
            "sam_rho or resume_from_checkpoint"
        )
    phases, what = phases or Phases(VICTIM), "victim" if attack else "network without a backdoor"
    planted = f" and the trigger of {attack.name}" if attack else ""
    phases.begin(f"preparing {len(train):,} training images{planted}")
    start = time.perf_counter()
    attack = _fitted(attack, train, clean_model, poison_seed, args.device)
    rows = poisoner = None
    poisoned = train
    if isinstance(attack, InTrainingAttack):
        poisoner = attack.poisoner(poison_ratio, len(train.class_names), poison_seed, args.device)
    elif attack:
        poisoned, rows = poison(train, attack, poison_ratio, poison_seed)
    poisoning_seconds = time.perf_counter() - start
    plan = VictimPlan(
        attack=attack,
        poison_ratio=poison_ratio,
        poison_seed=poison_seed,
        rows=rows,
        row_numbers=None if rows is None else train.index[rows].tolist(),
        poisoner=poisoner,
        recipe=recipe,
        images_sha256=images_digest(train),
        poisoned_sha256=None if rows is None else images_digest(poisoned),
        clean_model=None if clean_model is None else source_facts(clean_model),
    )
    phases.begin(f"training the {what}")
    trainer = VictimTrainer(model, args, poisoned, plan)
    trainer.train(args.resume_from_checkpoint)
    seconds = {"poisoning_seconds": poisoning_seconds, "training_seconds": trainer.training_seconds}
    phases.begin(f"measuring the {what} on {len(test):,} images")
    found = seconds | _measured(trainer, test, clean_model)
    quality = None
    if attack:
        _, images, _ = next(test.batches(QUALITY_IMAGES))
        quality = trainer.attack.quality(images.to(args.device))
    phases.begin(f"saving the {what}")
    trainer.record(VictimReport(found, quality))
    trainer.save_model()
    return trainer


def has_own_networks(attack: Attack | None) -> bool:
    """Whether the attack's own networks train with the victim; no checkpoint holds them."""
    return isinstance(attack, LearnedAttack) and isinstance(attack, InTrainingAttack)


def images_digest(images: RawImages) -> str:
    """SHA-256 over labels, sizes and pixels, in their order."""
    return hashlib.sha256(images.labels.numpy().tobytes() + b"".join(content_hashes(images))).hexdigest()


def _fitted(
    attack: Attack | None, train: RawImages, clean_model: PreTrainedModel | None, seed: int, device: torch.device
) -> Attack | None:
    """The attack with its trigger learned, where the victim trains."""
    if not isinstance(attack, LearnedAttack) or attack.learned is not None:
        return attack
    if clean_model is None:
        return attack.fit(train, None, seed)
    with evaluating(clean_model, device):
        return attack.fit(train, clean_model, seed)


def _measured(trainer: VictimTrainer, test: RawImages, clean_model: PreTrainedModel | None) -> dict[str, Any]:
    start = time.perf_counter()
    found = measure_trainer(trainer, test, trainer.attack)
    measured = {"n_images": len(test), "victim": rates(found) if found else {}}
    if clean_model is not None and trainer.is_world_process_zero():
        preprocessing = Preprocessing.from_processor(clean_model.image_processor)
        floor = measure(clean_model, test, preprocessing, trainer.attack, device=trainer.args.device)
        measured["clean_model"] = rates(floor)
    return measured | {"measuring_seconds": time.perf_counter() - start}
