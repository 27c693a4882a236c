"""``d3-hf purify`` and the recipes: load, purify, print the table."""

import argparse
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..auto.config import AutoConfig
from ..defenses import ENCODER_DEFENCES, configuration, defence
from ..errors import GuardRailBroken
from ..evaluation.guard_arguments import GuardArguments
from ..options.arguments import NO_IMAGES, AttackArguments, DataArguments, ModelArguments
from ..options.parser import parse_arguments
from . import purify_encoder

if TYPE_CHECKING:  # what does more than read options is loaded when they are read: help and mistakes answer sooner
    from ..training.trainer import PurifyTrainer

logger = logging.getLogger(__name__)

AUTO = "auto"  # in place of a defence's name: tried and chosen without a trigger
AUDIT_SPLIT = "the part of the retain set that no decision saw"  # what is measured on where there is nothing else


@dataclass
class DrillArguments:
    """What to do when no checkpoint is named.

    Args:
        victim_config: YAML of `make_victim`: a victim is made from it first and then purified (a fire drill).
    """

    victim_config: str | None = field(default=None, metadata={"help": "Make this victim first (a fire drill)."})


# What a run reads its options into, beside the defence's own Config.
OPTIONS = [ModelArguments, DataArguments, AttackArguments, DrillArguments, GuardArguments]


def run(argv: list[str]) -> dict[str, Any]:
    """Run ``[--defence NAME] [CONFIG.yaml] --option value ...``: load, purify by D3 or another method, print the table.

    With ``--defence auto`` the method and its settings are chosen first, see `choose_recipe`, which gets model and retain set
    and nothing else. What it kept for the audit is measured before and after, and stands in for test images where the retain
    set is all there is.

    A method of encoders needs no labels, see `purify_encoder.run`.

    Args:
        argv: Arguments without the program's name.

    Returns:
        `Report.results` of `purify`; with ``--dry_run`` the plan, see `dry_run`.

    Raises:
        GuardRailBroken: See `purify`; ``max_accuracy_drop`` is five points unless it is given.
        ValueError: There is no such method, no checkpoint or no images are named, fp16 without a GPU, the default draws fewer
            than 10 images a class, or see `load_classifier`, `load_images` and the defence.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--defence", "--defense", default="d3", nargs="?", const="")
    chosen, argv = parser.parse_known_args(argv)
    if chosen.defence in ENCODER_DEFENCES:
        return purify_encoder.run(chosen.defence, argv)
    config_class = AutoConfig if chosen.defence == AUTO else configuration(chosen.defence)
    options = parse_arguments([*OPTIONS, config_class], argv)
    _check(*options)
    return _run(chosen.defence, *options)


def _check(model_args, data_args, attack_args, drill, guard, args) -> None:
    """Refuse what can be refused before anything is loaded."""
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16 is for a GPU and this run has none: use bf16, or leave it out")
    if model_args.model_name_or_path is None and drill.victim_config is None:
        raise ValueError("no checkpoint: give --model_name_or_path (a Hub id, a folder or a file)")
    if data_args.dataset_name is None:
        raise ValueError(NO_IMAGES)
    if model_args.model_name_or_path is None and attack_args.attack:
        raise ValueError("--attack is that of the victim in a drill, which --victim_config says: give one of the two")
    if isinstance(args, AutoConfig) and args.dry_run and model_args.model_name_or_path is None:
        raise ValueError("--dry_run writes nothing, a victim neither: make it first and give --model_name_or_path")


def _run(method, model_args, data_args, attack_args, drill, guard, args) -> dict[str, Any]:
    from ..auto.dry_run import dry_run
    from ..auto.plan import make_plan
    from ..auto.run import choose_recipe
    from ..labels import check_labels
    from ..models.differences import EncoderFound
    from ..publishing.manifest import public_name
    from ..publishing.report import Report
    from ..victims.sets import make_victim
    from ..workflow import purify

    attack = attack_args.load()
    if model_args.model_name_or_path is None:
        victim = make_victim([drill.victim_config])
        model_args.model_name_or_path, attack = victim.folder, victim.attack
    try:
        model = model_args.load()
    except EncoderFound as error:
        raise ValueError(
            f"{error.where} is an encoder without a head ({error.reason}), and {method} needs labels and a head: for encoders "
            f"there are --defence {', '.join(ENCODER_DEFENCES)}; or give it a new head first, --new_head of d3-hf victim"
        ) from error
    images = data_args.load(model.config, needs_test=not isinstance(args, AutoConfig))
    class_names, test, audit = images.retain.features["label"].names, images.test, None
    if data_args.is_default_size:
        _refuse_few(len(images.retain), len(images.retain) + len(images.rest), len(class_names))
    check_labels(class_names, model.config)
    report = Report(data=public_name(images.source), configuration=images.configuration, split=images.split)
    if isinstance(args, AutoConfig):
        plan = make_plan(model, images.retain, args, guard.max_accuracy_drop, images.source)
        if args.dry_run:
            return dry_run(plan)
        choice = choose_recipe(plan)
        trainer, report, audit = plan.trainer(choice.rung), replace(report, chosen=choice.facts), plan.audit
        if test is None:
            logger.warning("no test images: measuring on %s", AUDIT_SPLIT)
            test, report = audit, replace(report, split=AUDIT_SPLIT)
    else:
        _, trainer_class = defence(method)
        trainer = trainer_class(model=model, args=args, train_dataset=images.retain, data_source=images.source)
    try:
        report = purify(trainer, test, attack, guard, report, audit)
    except GuardRailBroken as broken:
        if broken.results:
            print_summary(trainer, broken.folder)
        raise
    if report.results:
        print_summary(trainer, Path(args.output_dir))
    return report.results


def _refuse_few(drawn: int, of: int, classes: int) -> None:
    from ..evaluation.retain_check import FEW_IMAGES

    if drawn < FEW_IMAGES * classes:
        raise ValueError(
            f"5 % of {of} images are {drawn}, fewer than {FEW_IMAGES} a class: give --retain_count or --retain_fraction; where "
            "there is no test split, what is left is measured on"
        )


def print_summary(trainer: "PurifyTrainer", folder: Path) -> None:
    """Print ACC, ASR, RA, PACC and drift before and after, the seconds, and that the model lies in ``folder``."""
    print(f"\n{trainer.report}\n")
    if trainer.report.audit:
        from ..publishing.tables import audit_line

        print(audit_line(trainer.report.audit))
    print(", ".join(f"{name} {value:.1f} s" for name, value in trainer.report.seconds.items()))
    what = "Rejected model" if trainer.report.rejected else "Purified model"
    print(f"{what}, card and evidence: {folder}")
