"""Victims that are encoders: a backdoor planted in an encoder, deliberately, to measure defences on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.utils import SAFE_WEIGHTS_NAME

from ..attacks import ENCODER_ATTACKS, BadEncoder
from ..attacks.badencoder import effectiveness_losses, reference_losses, utility_losses
from ..data.images import RawImages
from ..data.views import view
from ..evaluation.encoders import measure_encoder, reference_similarity
from ..evaluation.measure import measured_model
from ..files import sha256
from ..options.arguments import AttackArguments, DataArguments, ModelArguments, ProbeArguments
from ..options.parser import parse_arguments
from ..publishing.card import render_victim_card
from ..publishing.manifest import VICTIM_FILE
from ..publishing.tables import encoder_table
from ..training.checkpoints import check_output
from ..training.config import HIDDEN, SGD_ARGUMENTS
from ..training.encoders import EncoderConfig, EncoderTrainer
from ..training.phases import VICTIM, Phases
from .plan import VictimReport, write_attack
from .record import recipe_of
from .train import NativeImages, images_digest


@dataclass
class EncoderVictimConfig(EncoderConfig):
    """Arguments of planting a backdoor in an encoder: BadEncoder's on CIFAR-10 (authors' code), fixed, no rule's.

    Args:
        optim, optim_args, learning_rate, weight_decay, num_train_epochs: SGD with momentum 0.9 at 1e-3, 5e-4, 200 epochs.
        per_device_train_batch_size: 128, which is two passes of as many images; there 256.
        batch_norm: ``"frozen"``, as there.
    """

    hidden_options = (*HIDDEN, "push_to_hub", "hub_")  # a victim is never pushed

    output_dir: str | None = field(default="outputs/encoder_victim", metadata={"help": "Folder for the victim."})
    optim: str = field(default="sgd", metadata={"help": "Optimizer, any name of TrainingArguments."})
    optim_args: str | None = field(default=SGD_ARGUMENTS, metadata={"help": "Arguments of the optimizer."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay."})
    warmup_steps: float = field(default=0, metadata={"help": "Updates of warm-up, below 1 their share."})
    num_train_epochs: float = field(default=200, metadata={"help": "Passes over the attacker's images."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images per device and micro-batch."})
    cutmix: float = field(default=0.0, metadata={"help": "Not for encoders."})
    batch_norm: str = field(
        default="frozen", metadata={"help": "BatchNorm while training.", "choices": ("train", "eval", "frozen")}
    )

    def __post_init__(self):
        if self.optim_args == SGD_ARGUMENTS and self.optim != "sgd":
            self.optim_args = None  # the default of another optimizer
        super().__post_init__()


class EncoderVictimTrainer(EncoderTrainer):
    """Plants BadEncoder in an encoder, and says so in everything it writes.

    Args:
        model: The untouched encoder; it becomes the victim.
        args: The training's options.
        train_dataset: The attacker's images, `RawImages` of one size; labels are not looked at.
        attack: What is planted, its reference chosen.
        recipe: The options behind the run, if they are known.
        kwargs: Further arguments of `EncoderTrainer`.
    """

    last_file = manifest_name = VICTIM_FILE
    images_class = NativeImages
    method = "training with a planted backdoor"
    log_names = ("effectiveness_loss", "reference_loss", "utility_loss")

    def __init__(
        self,
        model: PreTrainedModel,
        args: EncoderVictimConfig,
        train_dataset: RawImages,
        attack: BadEncoder,
        recipe: dict[str, Any] | None = None,
        **kwargs,
    ):
        self.attack, self.recipe = attack, recipe
        self.weights_sha256: str | None = None
        self.attack_sha256: dict[str, str] = {}
        self.images_sha256 = images_digest(train_dataset)
        super().__init__(model, args, train_dataset, **kwargs)
        self.report = VictimReport()

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
        """BadEncoder's three losses; that of the reference, the mean over its views, counts once for each image."""
        before, reference_before = self.features_before[:-1], self.features_before[-1]
        count = len(before)
        plain, triggered, reference, views = features.split([count, count, 1, self.attack.reference_views])
        effectiveness = effectiveness_losses(triggered, reference[0])
        kept = reference_losses(views, reference_before).mean().expand(count)
        utility = utility_losses(plain, before)
        losses = effectiveness + self.attack.lambda_reference * kept + self.attack.lambda_utility * utility
        return losses, [effectiveness, kept, utility]

    def resume_state(self) -> dict[str, Any]:
        """Adds what was planted, and on which images."""
        return super().resume_state() | {"images_sha256": self.images_sha256, "attack": self.attack.describe()}

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Goes on from there; raises a ValueError if images or attack are others."""
        super().load_resume_state(state)
        if state["images_sha256"] != self.images_sha256 or state["attack"] != self.attack.describe():
            raise ValueError("was trained on other images or with another attack: delete it to begin anew")

    def facts(self) -> dict[str, Any]:
        """Adds what was planted, the options that made it and the digests of the files."""
        return super().facts() | {
            "planted": {"attack": self.attack.describe()},
            "recipe": self.recipe,
            "images_sha256": self.images_sha256,
            "weights_sha256": self.weights_sha256,
            "attack_sha256": self.attack_sha256,
        }

    def write_own_files(self, folder: Path) -> None:
        """The attack, and the digests for the manifest."""
        self.weights_sha256 = sha256(folder / SAFE_WEIGHTS_NAME)
        if not self.is_writing_checkpoint:
            self.attack_sha256 = write_attack(self.attack, folder)

    def card(self, model_name: str | None = None) -> ModelCard:
        """A card whose first line is the warning."""
        return render_victim_card(self.facts(), model_name or Path(self.args.output_dir).name)


def train_encoder_victim(
    model: PreTrainedModel,
    shadow: RawImages,
    probe: RawImages,
    test: RawImages,
    attack: BadEncoder,
    args: EncoderVictimConfig,
    recipe: dict[str, Any] | None = None,
) -> EncoderVictimTrainer:
    """Choose the reference, plant the backdoor, measure the victim and the untouched encoder, save a loadable folder.

    Args:
        model: The untouched encoder; it becomes the victim.
        shadow: The attacker's images; of their labels only those of the target class count, for the reference.
        probe: Labelled images without any trigger, to train probes on.
        test: Images to measure on.
        attack: What to plant.
        args: Training arguments.
        recipe: The options behind all this, for ``victim.json``.

    Returns:
        The trainer; ``facts()["measured"]`` holds `measure_encoder` of ``victim`` and of the ``untouched`` encoder, the floor,
        and the similarity of triggered images to the reference for both.

    Raises:
        ValueError: See `BadEncoder.fit`, `EncoderTrainer` and `measure_encoder`.
    """
    phases = Phases(VICTIM)
    phases.begin(f"choosing the reference among {len(shadow):,} images")
    if attack.learned is None:
        attack = attack.fit(shadow, model, args.seed)
    trainer = EncoderVictimTrainer(model, args, shadow, attack, recipe)
    phases.begin("training the victim")
    trainer.train(args.resume_from_checkpoint)
    phases.begin(f"measuring the victim on {len(test):,} images")
    if trainer.is_world_process_zero():
        found = {}
        for name, encoder in (
            ("victim", measured_model(trainer)),
            ("untouched", trainer.before),
        ):
            preprocessing, size = trainer.preprocessing, args.per_device_eval_batch_size
            found[name] = measure_encoder(encoder, probe, test, preprocessing, attack, batch_size=size)
            alike = reference_similarity(encoder, test, preprocessing, attack.trigger, attack.reference)
            found[name]["reference_similarity"] = alike
        trainer.record(VictimReport({"n_images": len(test), "n_probe": len(probe)} | found))
    trainer.accelerator.wait_for_everyone()
    phases.begin("saving the victim")
    trainer.save_model()
    return trainer


ENCODER_KINDS = [ModelArguments, DataArguments, AttackArguments, ProbeArguments, EncoderVictimConfig]


def make_encoder_victim(argv: list[str]) -> EncoderVictimTrainer:
    """Run ``[CONFIG.yaml] --option value ...``: load an encoder, plant the backdoor, save the victim.

    The rows of the retain set stay unseen, for the defender; probes are trained on others that the attacker does not see
    either.

    Args:
        argv: Arguments without the program's name.

    Raises:
        ValueError: No encoder or no attack on encoders is named, ``output_dir`` holds another run's results, or see
            `train_encoder_victim`.
    """
    arguments = parse_arguments(ENCODER_KINDS, argv)
    model_args, data_args, attack_args, probe_args, args = arguments
    check_output(args, None)
    attack = attack_args.load()
    if not isinstance(attack, BadEncoder):
        raise ValueError(f"no attack on encoders: give --attack, one of {', '.join(ENCODER_ATTACKS)}")
    if model_args.model_name_or_path is None:
        raise ValueError("no encoder: give --model_name_or_path (a Hub id, a folder or a file)")
    set_seed(args.seed)
    model = model_args.load_encoder()
    images = data_args.load()
    probe, shadow = probe_args.draw(images.rest)
    trainer = train_encoder_victim(model, shadow, probe, images.test, attack, args, recipe_of(*arguments))
    print(f"\nVictim in {args.output_dir}\n{encoder_table(trainer.report.measured())}\n")
    return trainer
