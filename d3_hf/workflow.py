"""The workflow: measure, train a defence, measure again, save, write the card, push."""

import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from .arguments import NO_IMAGES, AttackArguments, DataArguments, ModelArguments, parse_arguments
from .attacks import Attack
from .card import results_table
from .config import PurifyConfig
from .data import RawImages
from .defenses.d3 import D3Config, D3Trainer
from .errors import GuardRailBroken
from .evaluation import measure_trainer, results
from .guard import FEW_IMAGES, GuardArguments, broken_rails, retain_warnings
from .labels import check_labels
from .manifest import REJECTED, public_name
from .trainer import PurifyTrainer
from .victim_sets import make_victim

logger = logging.getLogger(__name__)


def purify(
    trainer: PurifyTrainer, test: RawImages, attack: Attack | None = None, guard: GuardArguments | None = None
) -> dict[str, Any]:
    """Measure, train, measure again, save; push if ``trainer.args.push_to_hub``.

    The trigger is used for the two measurements only: the trainer was built without it and is not handed it. What makes the
    retain set look unfit is logged before the training and kept in the manifest; see `guard.retain_warnings`.

    Args:
        trainer: A defence's trainer, built from the suspicious model and the retain set.
        test: Images to measure on, disjoint from the retain set.
        attack: Trigger and target label to measure ASR and RA with; ``None`` measures ACC alone.
        guard: What the purified model must keep; ``None``: nothing.

    Returns:
        What ``all_results.json`` holds: ``accuracy_before``, ``accuracy_after``, with an attack also ``asr_*``, ``ra_*`` and
        ``der``; fractions in [0, 1], each proportion with ``_ci95`` and ``_n``. Empty on all but the main process.

    Raises:
        GuardRailBroken: A guard rail is broken. The model is then in ``rejected`` below ``output_dir``, with the reasons in its
            card and its manifest, ``trainer.args.output_dir`` names that folder, and nothing was pushed.
        KeyboardInterrupt: It was interrupted; the message says how to go on.
    """
    before = measure_trainer(trainer, test, attack)
    if trainer.is_world_process_zero():
        trainer.measured["warnings"] = retain_warnings(trainer, test, before)
        for warning in trainer.measured["warnings"]:
            logger.warning(warning)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    training = time.perf_counter() - started
    after = measure_trainer(trainer, test, attack)
    reasons = []
    if trainer.is_world_process_zero():
        trainer.results = results(before, after)
        reasons = broken_rails(guard, before, after, test.labels, test.class_names) if guard else []
        trainer.measured |= {
            "trigger": attack.describe() if attack else None,
            "n_images": len(test),
            "seconds": {"before": before.seconds, "training": training, "after": after.seconds},
            "guard_rails": asdict(guard) if guard else None,
        }
    (reasons,) = broadcast_object_list([reasons])
    if reasons:
        trainer.measured[REJECTED] = reasons
        trainer.args.output_dir = str(Path(trainer.args.output_dir) / REJECTED)
        trainer.args.push_to_hub = False
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.save_model()
    if reasons:
        raise GuardRailBroken(reasons, Path(trainer.args.output_dir), trainer.results or {})
    return trainer.results or {}


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
