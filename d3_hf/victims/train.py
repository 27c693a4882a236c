"""Victims: classifiers with a planted backdoor, deliberately made to measure defences on.

A victim is trained by the same trainer as plain fine-tuning, on poisoned images. Nothing here is used by a defence.
"""

import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import SAFE_WEIGHTS_NAME

from ..attacks import ATTACK_FILE, LEARNED_FILE, Attack, InTrainingAttack, LearnedAttack, poison, save_attack
from ..attacks.in_training import BatchPoisoner
from ..data.images import RawImages, content_hashes
from ..data.preprocessing import Preprocessing
from ..data.training_images import TrainingImages
from ..evaluation.measure import measure, measure_trainer, rates
from ..files import sha256
from ..models.evaluating import evaluating
from ..publishing.card import render_victim_card
from ..publishing.manifest import source_of
from ..training.checkpoints import is_asked_to_resume
from ..training.config import PurifyConfig
from ..training.trainer import PurifyTrainer
from .random_heads import RandomHeads

VICTIM_FILE = "victim.json"
QUALITY_IMAGES = 256  # test images that an attack measures its own trigger on


@dataclass
class VictimConfig(PurifyConfig):
    """Arguments of a victim's training: `PurifyConfig` and what hardens the backdoor against defences.

    Args:
        sam_rho: Train with adaptive SAM of this size, which puts the backdoor into a flat minimum (the adaptive attack of the
            D3 study, at 1, 2 and 3; which form of SAM its authors used is not known). 0: off.
        random_heads: Train the backbone under so many random heads besides its own, so that a new head does not shake off the
            trigger; see `RandomHeads`. 0: off.

    Raises:
        ValueError: A value is negative, SAM is asked for with accumulated gradients or fp16, random heads with one of these,
            with SAM or with a checkpoint to resume from, or see `PurifyConfig`.
    """

    # A victim is never pushed: no help offers what begins so. Without annotation, which would make it an option.
    hidden_options = ("push_to_hub", "hub_")

    output_dir: str | None = field(default="outputs/victim", metadata={"help": "Folder for the victim."})
    sam_rho: float = field(default=0.0, metadata={"help": "Harden by adaptive SAM of this size; 0 is off."})
    random_heads: int = field(default=0, metadata={"help": "Harden by so many random heads; 0 is off."})

    def __post_init__(self):
        if self.random_heads < 0:
            raise ValueError(f"random_heads must be >= 0; got {self.random_heads}")
        # The heads step by gradients of their own, which nothing adds up, unscales or takes anew.
        if self.random_heads and (self.sam_rho or self.fp16 or self.gradient_accumulation_steps > 1):
            raise ValueError("random_heads need one plain pass an update: no sam_rho, no fp16, no gradient_accumulation_steps")
        if self.random_heads and is_asked_to_resume(self.resume_from_checkpoint):
            raise ValueError("random_heads cannot resume: no checkpoint holds them; run it from the beginning")
        super().__post_init__()


class PoisonedImages(TrainingImages):
    """Training images that can say which rows are poisoned: with ``poisoned``, bool (N,), batches carry that column."""

    poisoned: Tensor | None = None

    def __getitems__(self, positions: list[int]) -> dict[str, Tensor]:
        """One batch, with its ``poisoned`` rows if they are known."""
        batch = super().__getitems__(positions)
        return batch if self.poisoned is None else batch | {"poisoned": self.poisoned[torch.as_tensor(positions)]}


class VictimTrainer(PurifyTrainer):
    """Trains on images that are poisoned, or poisons each batch, and says so in everything it writes.

    Args:
        model: See `PurifyTrainer`.
        args: The training's options.
        train_dataset: The images, poisoned unless ``poisoner`` does that.
        poisoned_rows: Positions of the poisoned ones, int64; random heads need them.
        poisoner: Poisons every batch anew.
        kwargs: Further arguments of `PurifyTrainer`.

    Raises:
        ValueError: Random heads are asked for without ``poisoned_rows``, or see `RandomHeads` and `PurifyTrainer`.

    Attributes:
        attack: The attack as it was planted, its trigger learned, to be written beside the weights; None before the training
            ends and without a backdoor.
        planted: What ``victim.json`` says of it: description, ratio, seed, poisoned rows, `Attack.quality`.
        recipe: The options behind the run, if they are known.
        origin: What the victim was made of, to recognise it elsewhere: ``images_sha256`` of the training images before the
            attack, ``poisoned_sha256`` of them after it (None if every batch is poisoned anew), and ``clean_model``, the source
            of the attacker's own classifier.
        began: When the training began by `time.perf_counter`, the time before a resumed checkpoint counted in; None outside it.
        weights_sha256: Of the weights as they were last written.
        attack_sha256: Of the attack's files, by name.
    """

    manifest_name = VICTIM_FILE
    images_class = PoisonedImages
    method = "training with a planted backdoor"
    additions = ("sam_rho",)

    def __init__(
        self,
        model: PreTrainedModel,
        args: VictimConfig,
        train_dataset: RawImages,
        poisoned_rows: Tensor | None = None,
        poisoner: BatchPoisoner | None = None,
        **kwargs,
    ):
        super().__init__(model, args, train_dataset, **kwargs)
        self.poisoner, self.heads = poisoner, None
        self.planted: dict[str, Any] | None = None
        self.recipe: dict[str, Any] | None = None
        self.attack: Attack | None = None
        self.origin: dict[str, Any] = {}
        self.began: float | None = None
        self.weights_sha256: str | None = None
        self.attack_sha256: dict[str, str] = {}
        if args.random_heads:
            if poisoned_rows is None:
                raise ValueError("random_heads need fixed poisoned images: this run has none, or poisons every batch anew")
            self.train_dataset.poisoned = torch.zeros(len(train_dataset), dtype=torch.bool)
            self.train_dataset.poisoned[poisoned_rows] = True
            self.heads = RandomHeads(model, self.preprocessing.size, args.random_heads)
        self._batch_poisoned: Tensor | None = None

    def _prepare_inputs(self, inputs):
        if self.model.training and self.poisoner:
            inputs = Trainer._prepare_inputs(self, inputs)  # to the device, still grey levels
            images, labels = self.poisoner(inputs["pixel_values"], inputs["labels"], self.state.global_step)
            images = images if images.dtype == torch.uint8 else self.preprocessing.normalize(images)
            inputs = {"pixel_values": images, "labels": labels}
        inputs = super()._prepare_inputs(inputs)
        self._batch_poisoned = inputs.pop("poisoned", None)
        return inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The cross-entropy, and while training what the attack's own networks or the random heads add to it."""
        labels = inputs["labels"]
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            return found
        if self.heads:
            found = found + self.heads.loss(labels, self._batch_poisoned)
        return found if self.poisoner is None or self.poisoner.penalty is None else found + self.poisoner.penalty

    def optimizer_step(self, step):
        """The victim's step, then that of the attack's own networks and of the random heads."""
        result = step()
        if self.poisoner:
            self.poisoner.update(self.optimizer.param_groups[0]["lr"] / self.args.learning_rate)
        if self.heads:
            self.heads.update(self.state.global_step + 1, self.optimizer.param_groups[0]["lr"])
        return result

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        file = Path(resume_from_checkpoint) / self.manifest_name
        record = json.loads(file.read_text()) if file.is_file() else {}
        # A trigger that is learned again must be the one that the checkpoint was trained on.
        if record.get("poisoned_sha256") != self.origin.get("poisoned_sha256"):
            raise ValueError(
                f"{resume_from_checkpoint} was trained on other poisoned images (another trigger, data set or clean model): "
                "delete it to begin anew"
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.began is not None:
            self.began -= record.get("measured", {}).get("training_seconds", 0)

    def end_purification(self) -> None:
        """Takes the random heads off the network."""
        if self.heads:
            self.heads.remove()

    def facts(self) -> dict[str, Any]:
        """Adds what was planted, the options that made it and the digests of the files, to recognise the folder by."""
        digests = {"weights_sha256": self.weights_sha256, "attack_sha256": self.attack_sha256}
        facts = super().facts() | {"planted": self.planted, "recipe": self.recipe} | self.origin | digests
        if self.began is not None:
            facts["measured"] = self.measured | {"training_seconds": time.perf_counter() - self.began}
        return facts

    def write_files(self, folder: Path, state_dict: dict | None = None) -> None:
        """Adds the attack, and remembers the digests for the manifest."""
        if self.attack:
            save_attack(self.attack, folder)
            files = [folder / name for name in (ATTACK_FILE, LEARNED_FILE)]
            self.attack_sha256 = {file.name: sha256(file) for file in files if file.is_file()}
        super().write_files(folder, state_dict)
        self.weights_sha256 = sha256(folder / SAFE_WEIGHTS_NAME)

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

    Returns:
        The trainer; `VictimTrainer.facts` holds what ``victim.json`` does, with ``planted`` (attack, ratio, seed, poisoned rows
        of the data set) and ``measured`` (ACC, ASR and RA of the victim and of the clean model, and how many seconds learning
        the trigger and poisoning, training and measuring took).

    Raises:
        ValueError: The attack cannot learn its trigger (see its ``fit``), poisons batches of images that are not of the
            model's size, trains its own networks where that is not possible (several processes, fp16, accumulated gradients,
            SAM, resuming), the checkpoint to resume from saw other poisoned images, or see `poison`.
    """
    resumes, accumulates = is_asked_to_resume(args.resume_from_checkpoint), args.gradient_accumulation_steps > 1
    if has_own_networks(attack) and (args.world_size > 1 or args.fp16 or accumulates or args.sam_rho or resumes):
        raise ValueError(
            f"{attack.name} trains its own networks with the victim: one process, no fp16, gradient_accumulation_steps, "
            "sam_rho or resume_from_checkpoint"
        )
    start = time.perf_counter()
    attack = _fitted(attack, train, clean_model, poison_seed, args.device)
    rows = poisoner = None
    poisoned = train
    if isinstance(attack, InTrainingAttack):
        poisoner = attack.poisoner(poison_ratio, len(train.class_names), poison_seed, args.device)
    elif attack:
        poisoned, rows = poison(train, attack, poison_ratio, poison_seed)
    poisoning_seconds = time.perf_counter() - start
    trainer = VictimTrainer(model, args, poisoned, rows, poisoner)
    if poisoner:
        _check_sizes(attack, train, trainer.preprocessing.size)
    # Before the training, so that a checkpoint knows whose it is.
    trainer.recipe = recipe
    trainer.origin = {
        "images_sha256": images_digest(train),
        "poisoned_sha256": None if rows is None else images_digest(poisoned),
        "clean_model": None if clean_model is None else source_of(clean_model),
    }
    if attack:
        trainer.planted = {
            "attack": attack.describe(),
            "poison_ratio": poison_ratio,
            "poison_seed": poison_seed,
            "poisoned_rows": "anew in every batch" if rows is None else train.index[rows].tolist(),
        }
    trainer.began = time.perf_counter()
    trainer.train(args.resume_from_checkpoint)
    trainer.measured |= {"poisoning_seconds": poisoning_seconds, "training_seconds": time.perf_counter() - trainer.began}
    trainer.began = None
    trainer.attack = poisoner.finish() if poisoner else attack
    trainer.measured |= _measured(trainer, test, clean_model)
    if attack:
        images, _ = next(test.batches(QUALITY_IMAGES))
        trainer.planted["quality"] = trainer.attack.quality(images.to(args.device))
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


def _check_sizes(attack: Attack, train: RawImages, size: tuple[int, int]) -> None:
    shapes = {tuple(image.shape[-2:]) for image in train.images}
    if shapes != {tuple(size)}:
        raise ValueError(
            f"{attack.name} poisons batches at the model's size {size[0]}x{size[1]}, but there are images of "
            f"{' and '.join(f'{h}x{w}' for h, w in sorted(shapes)[:3])}: give image_size, or resize the images first"
        )
