"""``d3-hf purify`` and the recipes: load, purify, print the table."""

import argparse
import contextlib
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..auto.config import AutoConfig
from ..defenses import CLIP_DEFENCES, DEFENCES, ENCODER_DEFENCES, configuration, defence
from ..errors import GuardRailBroken
from ..evaluation.guard_arguments import GuardArguments
from ..options.arguments import NO_IMAGES, AttackArguments, DataArguments, ModelArguments
from ..options.parser import parse_arguments, parse_part
from ..publishing.card_arguments import CardArguments
from . import purify_clip, purify_encoder
from .summary import print_summary, refuse_fp16_without_gpu

if TYPE_CHECKING:  # what does more than read options is loaded when they are read: help and mistakes answer sooner
    from transformers import PreTrainedModel

    from ..data.load import LoadedImages
    from ..training.config import PurifyConfig
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


@dataclass
class EvidenceArguments:
    """What is looked at besides.

    Args:
        evidence: Look at the model before and after without the trigger, for the card: six passes over at most 300 of the
            images that are measured on.
    """

    evidence: bool = field(default=True, metadata={"help": "Look for evidence without the trigger too, for the card."})


# What a run reads its options into, beside the defence's own Config.
OPTIONS = [ModelArguments, DataArguments, AttackArguments, DrillArguments, GuardArguments, CardArguments, EvidenceArguments]


def run(argv: list[str]) -> dict[str, Any]:
    """Run ``[--defence NAME] [CONFIG.yaml] --option value ...``: load, purify by D3 or another method, print the table.

    A method that can start near the public base does so on a network with LayerNorm, where one of the public models of its
    architecture is the ancestor, see `find_base`; ``--base_model none`` starts from the suspicious model itself.

    With ``--defence auto`` the method and its settings are chosen first, see `choose_recipe`, which gets model and retain set
    and nothing else. What it kept for the audit is measured before and after, and stands in for test images where the retain
    set is all there is.

    A method of encoders needs no labels, see `purify_encoder.run`; one of a whole CLIP captions, see `purify_clip.run`. Where a
    method has a form for each kind of model, the checkpoint's kind says which options there are.

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
    if chosen.defence in ENCODER_DEFENCES and (chosen.defence not in DEFENCES or _names_encoder(argv)):
        return purify_encoder.run(chosen.defence, argv)
    if chosen.defence in CLIP_DEFENCES:
        return purify_clip.run(chosen.defence, argv)
    config_class = AutoConfig if chosen.defence == AUTO else configuration(chosen.defence)
    options = parse_arguments([*OPTIONS, config_class], argv)
    _check(*options)
    return _run(chosen.defence, *options)


def _names_encoder(argv: list[str]) -> bool:
    """Whether the options name a checkpoint, and it is an encoder; options about other things are not looked at."""
    from ..models.differences import EncoderFound

    model_args = parse_part(ModelArguments, argv)
    if model_args.model_name_or_path is None:
        return False
    try:
        model_args.of(model_args.model_name_or_path, model_args.revision).load()
    except EncoderFound:
        return True
    except ValueError:  # no number of classes can be read off an encoder's bare file; what else is wrong the run says itself
        with contextlib.suppress(ValueError):
            model_args.load_encoder()
            return True
    return False


def _check(model_args, data_args, attack_args, drill, guard, card_args, extra, args) -> None:
    """Refuse what can be refused before anything is loaded."""
    refuse_fp16_without_gpu(args)
    if model_args.model_name_or_path is None and drill.victim_config is None:
        raise ValueError("no checkpoint: give --model_name_or_path (a Hub id, a folder or a file)")
    if data_args.dataset_name is None:
        raise ValueError(NO_IMAGES)
    if model_args.model_name_or_path is None and attack_args.attack:
        raise ValueError("--attack is that of the victim in a drill, which --victim_config says: give one of the two")
    if isinstance(args, AutoConfig) and args.dry_run and model_args.model_name_or_path is None:
        raise ValueError("--dry_run writes nothing, a victim neither: make it first and give --model_name_or_path")


def _run(method, model_args, data_args, attack_args, drill, guard, card_args, extra, args) -> dict[str, Any]:
    from ..auto.dry_run import dry_run
    from ..auto.plan import make_plan
    from ..auto.run import choose_recipe
    from ..inspection.evidence import evidence_of
    from ..publishing.details import CardDetails
    from ..publishing.manifest import public_name, source_facts
    from ..publishing.report import Report
    from ..training.phases import PURIFICATION, VICTIM, Phases
    from ..victims.record import clean_model_of
    from ..victims.sets import make_victim

    attack, is_drill = attack_args.load(), model_args.model_name_or_path is None
    made_in = attack_args.folder
    tried = 1 + args.auto_budget if isinstance(args, AutoConfig) else 0
    phases = Phases(VICTIM * is_drill + tried + PURIFICATION)
    if is_drill:
        victim = make_victim([drill.victim_config], phases=phases)
        model_args.model_name_or_path, attack, made_in = victim.folder, victim.attack, Path(victim.folder)
    model = _classifier(model_args, method)
    CardDetails(**card_args.details()).check(source_facts(model), has_results=False)
    place = card_args.clean_model or (made_in and clean_model_of(made_in))
    clean_model = model_args.of(place).load() if place else None
    images = _images(data_args, model, clean_model, needs_test=not isinstance(args, AutoConfig))
    test, audit = images.test, None
    report = Report(data=public_name(images.source), configuration=images.configuration, split=images.split)
    _settle_base(model, args)
    if isinstance(args, AutoConfig):
        plan = make_plan(model, images.retain, args, guard.max_accuracy_drop, images.source)
        if args.dry_run:
            return dry_run(plan)
        choice = choose_recipe(plan, phases)
        trainer, report, audit = plan.trainer(choice.rung), replace(report, chosen=choice.facts), plan.audit
        if test is None:
            logger.warning("no test images: measuring on %s", AUDIT_SPLIT)
            test, report = audit, replace(report, split=AUDIT_SPLIT)
    else:
        _, trainer_class = defence(method)
        trainer = trainer_class(model=model, args=args, train_dataset=images.retain, data_source=images.source)
    trainer.describe(**card_args.details())
    evidence = (lambda purified: evidence_of(purified, model_args.load, audit or test)) if extra.evidence else None
    looks = dict(clean_model=clean_model, show_images=card_args.show_images, evidence=evidence, phases=phases)
    return _purify(trainer, test, attack, guard, report, audit, **looks)


def _purify(trainer: "PurifyTrainer", *measured: Any, **looks: Any) -> dict[str, Any]:
    """Call `purify` and print what came of it, also where a guard rail rejects the model."""
    from ..workflow import purify

    try:
        report = purify(trainer, *measured, **looks)
    except GuardRailBroken as broken:
        if broken.results:
            print_summary(trainer, broken.folder)
        raise
    if report.results:
        print_summary(trainer, Path(trainer.args.output_dir))
    return report.results


def _classifier(model_args: ModelArguments, method: str) -> "PreTrainedModel":
    """Load the suspicious model; of an encoder say which methods there are for it."""
    from ..models.differences import EncoderFound

    try:
        return model_args.load()
    except EncoderFound as error:
        raise ValueError(
            f"{error.where} is an encoder without a head ({error.reason}), and {method} needs labels and a head: for encoders "
            f"there are --defence {', '.join(ENCODER_DEFENCES)}; or give it a new head first, --new_head of d3-hf victim"
        ) from error


def _images(
    data_args: DataArguments, model: "PreTrainedModel", clean_model: "PreTrainedModel | None", needs_test: bool
) -> "LoadedImages":
    """Load the images, enough of each class by default, of the models' classes."""
    from ..labels import check_labels

    images = data_args.load(model.config, needs_test=needs_test)
    class_names = images.retain.features["label"].names
    if data_args.is_default_size:
        _refuse_few(len(images.retain), len(images.retain) + len(images.rest), len(class_names))
    check_labels(class_names, model.config)
    if clean_model is not None:
        check_labels(class_names, clean_model.config)
    return images


def _settle_base(model: "PreTrainedModel", args: "PurifyConfig") -> None:
    """Where the method can start near the public base and none is named, look for it, on networks that this was measured on."""
    from ..models.likely_bases import NO_BASE, find_base, likely_bases
    from ..models.source import preprocessing_of
    from ..training.schedule import rule_of

    if not hasattr(args, "base_model"):
        return
    if args.base_model == NO_BASE:
        args.base_model = None
        return
    if args.base_model is not None or rule_of(model).name != "LayerNorm" or not (names := likely_bases(model)):
        return
    try:
        source = find_base(model, preprocessing_of(model).size).source
    except ValueError as reason:
        logger.warning("not starting near a public base, which removes more (is it %s?): %s", " or ".join(names), reason)
        return
    args.base_model, args.base_revision = source.name, source.revision
    logger.warning(
        "starting near %s, which this was fine-tuned from, by its weights; not so with --base_model none", source.name
    )


def _refuse_few(drawn: int, of: int, classes: int) -> None:
    from ..evaluation.retain_check import FEW_IMAGES

    if drawn < FEW_IMAGES * classes:
        raise ValueError(
            f"5 % of {of} images are {drawn}, fewer than {FEW_IMAGES} a class: give --retain_count or --retain_fraction; where "
            "there is no test split, what is left is measured on"
        )
