"""The workflow: measure, train a defence, measure again, save, write the card, push."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from .attacks import Attack
from .data.images import RawImages
from .data.pairs import TEMPLATES
from .errors import GuardRailBroken
from .evaluation.class_order import order_contradiction
from .evaluation.encoders import SEEDS, measure_clip, measure_encoder
from .evaluation.guard import broken_rails, rails_of, recall_rows, uncertain_rails
from .evaluation.guard_arguments import GuardArguments
from .evaluation.measure import Measurement, measure, measure_trainer, measured_model, paired_results, rates, results
from .evaluation.retain_check import retain_warnings
from .labels import check_labels
from .models.source import preprocessing_of
from .publishing.manifest import source_facts
from .publishing.metadata import is_public
from .publishing.pictures.triggered import MOST, TriggeredImages
from .publishing.report import REJECTED, Report
from .training.encoders import EncoderTrainer
from .training.pairs import PairTrainer
from .training.phases import PURIFICATION, Phases
from .training.trainer import PurifyTrainer

logger = logging.getLogger(__name__)


def purify(
    trainer: PurifyTrainer,
    test: RawImages,
    attack: Attack | None = None,
    guard: GuardArguments | None = None,
    report: Report | None = None,
    audit: RawImages | None = None,
    clean_model: PreTrainedModel | None = None,
    show_images: bool | None = None,
    evidence: Callable[[PreTrainedModel], dict[str, Any]] | None = None,
    phases: Phases | None = None,
) -> Report:
    """Measure, train, measure again, save; push if ``trainer.args.push_to_hub``.

    The trigger is used for the two measurements only: the trainer was built without it and is not handed it. What makes the
    retain set look unfit is logged before the training and kept in the manifest; see `retain_warnings`. So is, after it, that
    the test images cannot tell whether ACC fell by more than is allowed; see `uncertain_rails`.

    Args:
        trainer: A defence's trainer, built from the suspicious model and the retain set.
        test: Images to measure on, disjoint from the retain set.
        attack: Trigger and target label to measure ASR, RA and PACC with; ``None`` measures ACC alone.
        guard: What the purified model must keep; ``None``: nothing.
        report: What the images measured on are called, for manifest and card.
        audit: Images that neither the training nor the choice of its settings saw: what becomes of ACC on them is evidence in
            manifest and card, and decides nothing.
        clean_model: A model without a backdoor that was trained alike, of `load_classifier`: its rates under the trigger are
            the floor, in a column of the table.
        show_images: Whether the card shows a few test images with the trigger. None: where they are of the Hub, as
            ``report.data`` says, or scikit-learn's digits; those of this machine do not leave it unasked.
        evidence: Looks at the purified model without a trigger, after it was measured and on the main process: what it returns
            stands in manifest and card, see `inspection.evidence.evidence_of`, and changes nothing of the model.
        phases: Those of the run that this is the end of; None: it is the whole run.

    Returns:
        The report, with what was found. ``results`` holds what ``all_results.json`` does: ``accuracy_before``,
        ``accuracy_after``, ``accuracy_drop``, with an attack also ``asr_*``, ``ra_*``, ``pacc_*``, ``trigger_drift_*`` and
        ``der``; fractions in [0, 1], each proportion with ``_ci95`` and ``_n``; empty on all but the main process.

    Raises:
        GuardRailBroken: A guard rail is broken. The model is then in ``rejected`` below ``output_dir``, with the reasons in its
            card and its manifest, and nothing was pushed.
        ValueError: The classes of ``test`` are not the model's, by their names or by what it predicts, see `check_labels` and
            `order_contradiction`.
        KeyboardInterrupt: It was interrupted; the message says how to go on.
    """
    report, phases = report or Report(), phases or Phases(PURIFICATION)
    check_labels(test.class_names, trainer.plain.config)
    if clean_model is not None:
        check_labels(test.class_names, clean_model.config)
    phases.begin(f"measuring the suspicious model on {len(test):,} images")
    before = measure_trainer(trainer, test, attack)
    contradiction = before and order_contradiction(before.predictions, test.labels, test.class_names, trainer.plain.config)
    (contradiction,) = broadcast_object_list([contradiction])
    if contradiction:
        raise ValueError(contradiction)
    audit_before = measure_trainer(trainer, audit) if audit else None
    if trainer.is_world_process_zero():
        found = retain_warnings(
            trainer.train_dataset,
            measured_model(trainer),
            trainer.preprocessing,
            test,
            before,
            trainer.args.per_device_eval_batch_size,
        )
        report = replace(report, warnings=tuple(found))
        for warning in report.warnings:
            logger.warning(warning)
    phases.begin(f"purifying by {trainer.method}")
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    training = time.perf_counter() - started
    phases.begin(f"measuring the purified model on {len(test):,} images")
    after = measure_trainer(trainer, test, attack)
    audit_after = measure_trainer(trainer, audit) if audit else None
    if trainer.is_world_process_zero():
        rails = rails_of(guard, before, after, test.labels, test.class_names) if guard else []
        for warning in uncertain_rails(rails):
            logger.warning(warning)
        shows = is_public(report.data) if show_images is None else show_images
        report = replace(
            report,
            warnings=(*report.warnings, *uncertain_rails(rails)),
            results=results(before, after, test.labels),
            trigger=attack.describe() if attack else None,
            n_images=len(test),
            seconds={"before": before.seconds, "training": training, "after": after.seconds},
            guard_rails=asdict(guard) if guard else None,
            rails=tuple(rail.as_dict() for rail in rails),
            rejected=tuple(broken_rails(rails)),
            classes=tuple(recall_rows(before.predictions, after.predictions, test.labels, test.class_names)),
            floor=_floor(clean_model, trainer, test, attack) if clean_model is not None else None,
            shown=_shown(test, attack, before, after) if attack and shows else None,
            audit=paired_results(audit_before, audit_after, audit.labels) if audit else {},
            evidence=evidence(measured_model(trainer)) if evidence else {},
        )
    (rejected,) = broadcast_object_list([report.rejected])
    phases.begin("saving the model with its card and evidence")
    trainer.record(replace(report, rejected=rejected))
    if rejected:
        folder = Path(trainer.args.output_dir) / REJECTED
        trainer.save_model(str(folder), _internal_call=True)
        raise GuardRailBroken(list(rejected), folder, report.results)
    return _published(trainer)


def purify_encoder(
    trainer: EncoderTrainer,
    probe: RawImages,
    test: RawImages,
    attack: Attack | None = None,
    report: Report | None = None,
    phases: Phases | None = None,
) -> Report:
    """Measure by probes, train, measure again, save; push if ``trainer.args.push_to_hub``.

    Args:
        trainer: Trainer of a defence of encoders, built from the suspicious encoder and images without labels.
        probe: Labelled images without any trigger, to train the probes on.
        test: Labelled images to measure on.
        attack: Trigger and target label to measure ASR and RA with; None measures ACC alone. The trainer is not handed it.
        report: What the images measured on are called, for manifest and card.
        phases: Those of the run that this is the end of; None: it is the whole run.

    Returns:
        The report. ``results`` holds what ``all_results.json`` does: `measure_encoder` of the encoder ``before`` and ``after``;
        empty on all but the main process.

    Raises:
        ValueError: See `measure_encoder`.
        KeyboardInterrupt: It was interrupted; the message says how to go on.
    """
    size = trainer.args.per_device_eval_batch_size

    def rates() -> dict[str, Any]:
        return measure_encoder(measured_model(trainer), probe, test, trainer.preprocessing, attack, batch_size=size)

    report = replace(report or Report(), probe={"images": len(probe), "seeds": len(SEEDS)})
    return _purify_features(trainer, "encoder", rates, len(test), attack, report, phases)


def purify_clip(
    trainer: PairTrainer,
    test: RawImages,
    attack: Attack | None = None,
    report: Report | None = None,
    phases: Phases | None = None,
) -> Report:
    """Measure zero-shot, train, measure again, save; push if ``trainer.args.push_to_hub``.

    Args:
        trainer: Trainer of a defence of a whole CLIP, built from the suspicious model and pairs.
        test: Labelled images to measure on; the names of their classes make the classifier.
        attack: See `purify_encoder`.
        report: See there.
        phases: See there.

    Returns:
        The report. ``results`` holds what ``all_results.json`` does: `measure_clip` of the CLIP ``before`` and ``after``; empty
        on all but the main process.

    Raises:
        ValueError: See `measure_clip`.
        KeyboardInterrupt: It was interrupted; the message says how to go on.
    """
    size = trainer.args.per_device_eval_batch_size

    def rates() -> dict[str, Any]:
        return measure_clip(measured_model(trainer), test, trainer.preprocessing, attack, batch_size=size)

    report = replace(report or Report(), zero_shot={"templates": list(TEMPLATES)})
    return _purify_features(trainer, "CLIP", rates, len(test), attack, report, phases)


def _purify_features(
    trainer: EncoderTrainer,
    kind: str,
    rates: Callable[[], dict[str, Any]],
    count: int,
    attack: Attack | None,
    report: Report,
    phases: Phases | None,
) -> Report:
    """What `purify_encoder` and `purify_clip` share: ``rates`` measures the trainer's model on ``count`` images."""
    phases, found, seconds = phases or Phases(PURIFICATION), {}, {}

    def measured(when: str) -> None:
        started = time.perf_counter()
        if trainer.is_world_process_zero():
            found[when] = rates()
        trainer.accelerator.wait_for_everyone()
        seconds[when] = time.perf_counter() - started

    phases.begin(f"measuring the suspicious {kind} on {count:,} images")
    measured("before")
    phases.begin(f"purifying by {trainer.method}")
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    seconds["training"] = time.perf_counter() - started
    phases.begin(f"measuring the purified {kind} on {count:,} images")
    measured("after")
    if trainer.is_world_process_zero():
        trigger = attack.describe() if attack else None
        report = replace(report, results=found, trigger=trigger, n_images=count, seconds=seconds)
    phases.begin(f"saving the {kind} with its card and evidence")
    trainer.record(report)
    return _published(trainer)


def _published(trainer: PurifyTrainer) -> Report:
    """Save, or push, which saves too; returns the trainer's report."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.save_model()
    return trainer.report


def _floor(model: PreTrainedModel, trainer: PurifyTrainer, test: RawImages, attack: Attack | None) -> dict:
    """The rates of a model without a backdoor on the same images."""
    batch, device = trainer.args.per_device_eval_batch_size, trainer.args.device
    found = measure(model, test, preprocessing_of(model), attack, batch, device)
    return {"source": source_facts(model), "rates": rates(found)}


def _shown(test: RawImages, attack: Attack, before: Measurement, after: Measurement) -> TriggeredImages:
    """The first image of each class that the attack counts, of eight classes at most."""
    counted = np.flatnonzero(attack.counted(test.labels).numpy())
    _, first = np.unique(test.labels.numpy()[counted], return_index=True)
    rows = np.sort(counted[first])[:MOST]
    labels = test.labels[rows]
    plain = [test.images[row] for row in rows.tolist()]

    def names(classes: np.ndarray) -> list[str]:
        return [test.class_names[k] for k in classes.tolist()]

    return TriggeredImages(
        plain=plain,
        triggered=[attack.trigger(image) for image in plain],
        truth=names(labels.numpy()),
        wanted=names(attack.poisoned_labels(labels, len(test.class_names)).numpy()),
        before=names(before.triggered_predictions[rows]),
        after=names(after.triggered_predictions[rows]),
    )
