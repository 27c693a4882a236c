"""``d3-hf purify`` and the recipes: load, purify, print the table."""

from dataclasses import dataclass, field
from typing import Any

from ..data.labels import check_labels
from ..defenses.d3.trainer import D3Config, D3Trainer
from ..errors import GuardRailBroken
from ..evaluation.guard import GuardArguments
from ..evaluation.retain_check import FEW_IMAGES
from ..options.arguments import NO_IMAGES, AttackArguments, DataArguments, ModelArguments
from ..options.parser import parse_arguments
from ..publishing.manifest import REJECTED, public_name
from ..publishing.tables import results_table
from ..training.config import PurifyConfig
from ..training.trainer import PurifyTrainer
from ..victims.sets import make_victim
from ..workflow import purify


@dataclass
class DrillArguments:
    """What to do when no checkpoint is named.

    Args:
        victim_config: YAML of `make_victim`: a victim is made from it first and then purified (a fire drill).
    """

    victim_config: str | None = field(default=None, metadata={"help": "Make this victim first (a fire drill)."})


# What a run reads its options into, beside the defence's own Config.
OPTIONS = [ModelArguments, DataArguments, AttackArguments, DrillArguments, GuardArguments]


def main(
    argv: list[str] | None = None,
    config_class: type[PurifyConfig] = D3Config,
    trainer_class: type[PurifyTrainer] = D3Trainer,
) -> dict[str, Any]:
    """Run ``[CONFIG.yaml] --option value ...``: load, purify, print the table.

    Args:
        argv: Arguments without the program's name; default ``sys.argv[1:]``.
        config_class: Configuration of the defence.
        trainer_class: Its trainer.

    Returns:
        As `purify`.

    Raises:
        GuardRailBroken: See `purify`; ``max_accuracy_drop`` is five points unless it is given.
        ValueError: No checkpoint or no images are named, fp16 without a GPU, the default draws fewer than 10 images a class, or
            see `load_classifier`, `load_images` and the defence.
    """
    model_args, data_args, attack_args, drill, guard, args = parse_arguments([*OPTIONS, config_class], argv)
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16 is for a GPU and this run has none: use bf16, or leave it out")
    if model_args.model_name_or_path is None and drill.victim_config is None:
        raise ValueError("no checkpoint: give --model_name_or_path (a Hub id, a folder or a file)")
    if data_args.dataset_name is None:
        raise ValueError(NO_IMAGES)
    attack = attack_args.load()
    if model_args.model_name_or_path is None:
        victim = make_victim([drill.victim_config])
        model_args.model_name_or_path, attack = victim.folder, victim.attack
    model = model_args.load()
    retain, rest, test = data_args.load()
    if data_args.is_default_size:
        _refuse_few(len(retain), len(retain) + len(rest), len(test.class_names))
    check_labels(test.class_names, model.config)
    trainer = trainer_class(model=model, args=args, train_dataset=retain)
    trainer.data_source = data_args.dataset_name
    trainer.measured |= {"data": public_name(data_args.dataset_name), "split": data_args.measured_split}
    try:
        found = purify(trainer, test, attack, guard)
    except GuardRailBroken as broken:
        if broken.results:
            print_summary(trainer)
        raise
    if found:
        print_summary(trainer)
    return found


def _refuse_few(drawn: int, of: int, classes: int) -> None:
    if drawn < FEW_IMAGES * classes:
        raise ValueError(
            f"5 % of {of} images are {drawn}, fewer than {FEW_IMAGES} a class: give --retain_count or --retain_fraction; where "
            "there is no test split, what is left is measured on"
        )


def print_summary(trainer: PurifyTrainer) -> None:
    """Print ACC, ASR and RA before and after, the distances and the seconds, and where the purified model lies."""
    print(f"\n{results_table(trainer.results)}\n")
    for weight in trainer.facts().get("selected_weights", []):
        print(f"relative distance of {weight['name']}: {weight['relative_distance']:.3f}")
    seconds = trainer.measured["seconds"]
    print(", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
    what = "Rejected model" if REJECTED in trainer.measured else "Purified model"
    print(f"{what}, card and evidence: {trainer.args.output_dir}")
