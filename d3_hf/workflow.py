"""The workflow: measure, train a defence, measure again, save, write the card, push."""

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from .attacks import Attack
from .data.images import RawImages
from .errors import GuardRailBroken
from .evaluation.guard import GuardArguments, broken_rails
from .evaluation.measure import measure_trainer, results
from .evaluation.retain_check import retain_warnings
from .publishing.manifest import REJECTED
from .training.trainer import PurifyTrainer

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
