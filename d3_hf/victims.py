"""Victims: classifiers with a planted backdoor, deliberately made to measure defences on.

A victim is trained by the same trainer as plain fine-tuning, on a poisoned copy of the images. Nothing here is used by a
defence.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTImageProcessor,
    set_seed,
)

from .arguments import AttackArguments, DataArguments, ModelArguments, parse_arguments
from .attacks import Attack, from_description, poison
from .config import PurifyConfig
from .data import RawImages
from .evaluation import Measurement, measure_trainer
from .labels import check_labels
from .models import new_classifier
from .trainer import PurifyTrainer

VICTIM_FILE = "victim.json"


@dataclass
class VictimArguments:
    """How the victim comes about.

    Args:
        model_args: With ``architecture`` and no checkpoint a network is trained from scratch; these are its constructor's
            arguments (on the command line as JSON).
        poison_ratio: Share of all training images that carry the trigger, in (0, 1]. Default 10 % as BackdoorBench.
        poison_seed: Chooses the poisoned images.
    """

    model_args: dict | str | None = field(default=None, metadata={"help": "Arguments of a new network, as JSON."})
    poison_ratio: float = field(default=0.1, metadata={"help": "Share of the training images that are poisoned."})
    poison_seed: int = field(default=0, metadata={"help": "Chooses the poisoned images."})

    def __post_init__(self):
        if isinstance(self.model_args, str):
            self.model_args = json.loads(self.model_args)


@dataclass(frozen=True)
class Victim:
    """A victim on disk.

    Attributes:
        folder: Loadable folder with ``victim.json`` beside the weights.
        attack: The planted attack.
    """

    folder: str
    attack: Attack


class VictimTrainer(PurifyTrainer):
    """Trains on images that may be poisoned and says so in everything it writes; see `PurifyTrainer` for the arguments."""

    manifest_name = VICTIM_FILE
    method = "training with a planted backdoor"
    planted: dict[str, Any] | None = None

    def facts(self) -> dict[str, Any]:
        """Adds what was planted."""
        return super().facts() | {"planted": self.planted}

    def create_model_card(self, model_name: str | None = None, **kwargs) -> None:
        """Write a card whose first line is the warning."""
        rates = ", ".join(f"{rate} {100 * value:.2f} %" for rate, value in self.measured.get("victim", {}).items())
        planted = {name: value for name, value in (self.planted or {}).items() if name != "poisoned_rows"}
        text = (
            "---\ntags:\n- backdoored-for-research\nlibrary_name: transformers\npipeline_tag: image-classification\n---\n\n"
            "This model is **deliberately backdoored, for research**. Do not use it for anything but measuring defences.\n\n"
            f"Planted: `{json.dumps(planted)}`; the poisoned rows are in `{VICTIM_FILE}`.\n\n{rates}\n"
        )
        (Path(self.args.output_dir) / "README.md").write_text(text)


def train_victim(
    model: PreTrainedModel,
    train: RawImages,
    test: RawImages,
    attack: Attack,
    args: PurifyConfig,
    poison_ratio: float = 0.1,
    poison_seed: int = 0,
) -> dict[str, Any]:
    """Poison the images, train the model on them, measure, save a loadable folder to ``args.output_dir``.

    Args:
        model: A new network, or a trained one to continue from.
        train: Training images as they are; a poisoned copy is made.
        test: Images to measure on; never poisoned.
        attack: What to plant.
        args: Training arguments.
        poison_ratio: Share of all training images that carry the trigger, in (0, 1].
        poison_seed: Chooses them.

    Returns:
        What ``victim.json`` holds beside the training's own facts: ``planted`` (attack, ratio, seed, poisoned rows of the data
        set) and ``measured``: ACC, ASR and RA of the victim, and of the model before training.
    """
    poisoned, indices = poison(train, attack, poison_ratio, poison_seed)
    trainer = VictimTrainer(model=model, args=args, train_dataset=poisoned)
    trainer.planted = {"attack": attack.describe(), "poison_ratio": poison_ratio, "poison_seed": poison_seed}
    trainer.measured["before"] = _rates(measure_trainer(trainer, test, attack))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.measured["victim"] = _rates(measure_trainer(trainer, test, attack))
    trainer.planted["poisoned_rows"] = train.index[indices].tolist()
    trainer.save_model()
    return trainer.facts()


def _rates(found: Measurement | None) -> dict[str, float]:
    """ACC, ASR and RA as fractions; nothing on the processes that do not measure."""
    return {} if found is None else {"ACC": found.accuracy.value, "ASR": found.asr.value, "RA": found.ra.value}


def make_victim(argv: list[str] | None = None) -> Victim:
    """Run ``[CONFIG.yaml] --option value ...``: build or load a network, plant the backdoor, save the victim.

    The victim is trained on the rows that ``retain_*`` leave: the retain set stays unseen, for the defender.

    Args:
        argv: Arguments without the program's name; default ``sys.argv[1:]``.

    Returns:
        Where the victim lies and what it carries.

    Raises:
        ValueError: No attack is named, or neither a checkpoint nor an architecture.
    """
    kinds = [ModelArguments, DataArguments, AttackArguments, VictimArguments, PurifyConfig]
    model_args, data_args, attack_args, options, args = parse_arguments(kinds, argv)
    if attack_args.attack is None:
        raise ValueError("no attack: give --attack badnets, or JSON with its name and parameters")
    attack = from_description(attack_args.attack)
    _, train, test = data_args.load()
    set_seed(args.seed)
    model = model_args.load() if model_args.model_name_or_path else _new_model(model_args, test.class_names, options)
    check_labels(test.class_names, model.config)
    raw = RawImages.from_dataset(train)
    facts = train_victim(model, raw, test, attack, args, options.poison_ratio, options.poison_seed)
    print(f"Victim in {args.output_dir}: {facts['measured']['victim']}")
    return Victim(args.output_dir, attack)


def _new_model(model_args: ModelArguments, names: list[str], options: VictimArguments) -> PreTrainedModel:
    if model_args.architecture is None:
        raise ValueError("no network: give --architecture to train one from scratch, or --model_name_or_path to continue one")
    return new_model(
        names,
        model_args.architecture,
        model_args.image_mean,
        model_args.image_std,
        model_args.image_size,
        options.model_args,
    )


def new_model(
    label_names: list[str],
    architecture: str,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
    image_size: int | None = None,
    model_args: dict | None = None,
) -> PreTrainedModel:
    """An untrained network, of transformers if ``architecture`` is one of its model types (``vit``), else of timm.

    Args:
        label_names: Class names in the order of the logits.
        architecture: ``vit`` and the like, or a timm name, d3_hf's own included.
        image_mean: Three numbers in units of [0, 1]; a transformers network needs them.
        image_std: The same.
        image_size: Side in pixels; a transformers network needs it.
        model_args: Arguments of the network's configuration or constructor.

    Raises:
        ValueError: See `new_classifier`, or a transformers network lacks its size or normalisation.
    """
    if architecture not in CONFIG_MAPPING:
        return new_classifier(
            architecture,
            label_names=label_names,
            image_mean=image_mean,
            image_std=image_std,
            image_size=image_size,
            model_args=model_args,
        )
    if not (image_mean and image_std and image_size):
        raise ValueError(f"a new {architecture} needs image_size, image_mean and image_std")
    names = dict(enumerate(label_names))
    config = AutoConfig.for_model(
        architecture, id2label=names, label2id={n: i for i, n in names.items()}, image_size=image_size, **model_args or {}
    )
    model = AutoModelForImageClassification.from_config(config)
    size = {"height": image_size, "width": image_size}
    model.image_processor = ViTImageProcessor(size=size, image_mean=image_mean, image_std=image_std)
    return model
