"""The workflow: measure, train a defence, measure again, save, write the card, push."""

import logging
import time
from dataclasses import asdict, replace
from pathlib import Path

from accelerate.utils import broadcast_object_list

from .attacks import Attack
from .data.images import RawImages
from .errors import GuardRailBroken
from .evaluation.class_order import order_contradiction
from .evaluation.encoders import SEEDS, measure_encoder
from .evaluation.guard import broken_rails, uncertain_rails
from .evaluation.guard_arguments import GuardArguments
from .evaluation.measure import measure_trainer, paired_results, results
from .evaluation.retain_check import retain_warnings
from .labels import check_labels
from .publishing.report import REJECTED, Report
from .training.encoders import EncoderTrainer
from .training.trainer import PurifyTrainer

logger = logging.getLogger(__name__)


def purify(
    trainer: PurifyTrainer,
    test: RawImages,
    attack: Attack | None = None,
    guard: GuardArguments | None = None,
    report: Report | None = None,
    audit: RawImages | None = None,
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
    report = report or Report()
    check_labels(test.class_names, trainer.plain.config)
    before = measure_trainer(trainer, test, attack)
    contradiction = before and order_contradiction(before.predictions, test.labels, test.class_names, trainer.plain.config)
    (contradiction,) = broadcast_object_list([contradiction])
    if contradiction:
        raise ValueError(contradiction)
    audit_before = measure_trainer(trainer, audit) if audit else None
    if trainer.is_world_process_zero():
        found = retain_warnings(
            trainer.train_dataset,
            trainer.accelerator.unwrap_model(trainer.plain, keep_fp32_wrapper=False),  # without autocast, as it is measured
            trainer.preprocessing,
            test,
            before,
            trainer.args.per_device_eval_batch_size,
        )
        report = replace(report, warnings=tuple(found))
        for warning in report.warnings:
            logger.warning(warning)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    training = time.perf_counter() - started
    after = measure_trainer(trainer, test, attack)
    audit_after = measure_trainer(trainer, audit) if audit else None
    if trainer.is_world_process_zero():
        uncertain = uncertain_rails(guard, before, after, test.labels) if guard else []
        for warning in uncertain:
            logger.warning(warning)
        report = replace(
            report,
            warnings=(*report.warnings, *uncertain),
            results=results(before, after, test.labels),
            trigger=attack.describe() if attack else None,
            n_images=len(test),
            seconds={"before": before.seconds, "training": training, "after": after.seconds},
            guard_rails=asdict(guard) if guard else None,
            rejected=tuple(broken_rails(guard, before, after, test.labels, test.class_names)) if guard else (),
            audit=paired_results(audit_before, audit_after, audit.labels) if audit else {},
        )
    (rejected,) = broadcast_object_list([report.rejected])
    trainer.record(replace(report, rejected=rejected))
    if rejected:
        folder = Path(trainer.args.output_dir) / REJECTED
        trainer.save_model(str(folder), _internal_call=True)
        raise GuardRailBroken(list(rejected), folder, report.results)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.save_model()
    return trainer.report


def purify_encoder(
    trainer: EncoderTrainer, probe: RawImages, test: RawImages, attack: Attack | None = None, report: Report | None = None
) -> Report:
    """Measure by probes, train, measure again, save; push if ``trainer.args.push_to_hub``.

    Args:
        trainer: Trainer of a defence of encoders, built from the suspicious encoder and images without labels.
        probe: Labelled images without any trigger, to train the probes on.
        test: Labelled images to measure on.
        attack: Trigger and target label to measure ASR and RA with; None measures ACC alone. The trainer is not handed it.
        report: What the images measured on are called, for manifest and card.

    Returns:
        The report. ``results`` holds what ``all_results.json`` does: `measure_encoder` of the encoder ``before`` and ``after``;
        empty on all but the main process.

    Raises:
        ValueError: See `measure_encoder`.
        KeyboardInterrupt: It was interrupted; the message says how to go on.
    """
    report, found, seconds = report or Report(), {}, {}

    def measured(when: str) -> None:
        started = time.perf_counter()
        if trainer.is_world_process_zero():
            encoder = trainer.accelerator.unwrap_model(trainer.plain, keep_fp32_wrapper=False)
            size = trainer.args.per_device_eval_batch_size
            found[when] = measure_encoder(encoder, probe, test, trainer.preprocessing, attack, batch_size=size)
        trainer.accelerator.wait_for_everyone()
        seconds[when] = time.perf_counter() - started

    measured("before")
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    seconds["training"] = time.perf_counter() - started
    measured("after")
    if trainer.is_world_process_zero():
        trigger, used = attack.describe() if attack else None, {"images": len(probe), "seeds": len(SEEDS)}
        report = replace(report, results=found, trigger=trigger, n_images=len(test), seconds=seconds, probe=used)
    trainer.record(report)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.save_model()
    return trainer.report
