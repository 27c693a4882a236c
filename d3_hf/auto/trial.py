"""One trial: a copy of the suspicious model trained by a recipe on the tuning part, and measured on the validation part."""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedModel

from ..data.fitting import run_with_fitting_batch
from ..evaluation.class_order import order_contradiction
from ..evaluation.measure import measure, measure_trainer, measured_model
from ..evaluation.paired import paired_table
from ..files import first_line
from ..models.head import NoOneHead, find_head
from ..training.trainer import PurifyTrainer
from .choose import Tried
from .early import EarlyStop, GivenUp
from .plan import Plan, Rung
from .thoroughness import evenness, feature_distance, place, reluctance


class Refused(ValueError):
    """A defence cannot work on the network, by its own word."""


def predictions_before(plan: Plan, progress: bool = False) -> np.ndarray:
    """What the suspicious model predicts of the validation images, int (N,).

    All images but the audit's are looked at, so that classes in another order are refused before anything is trained.

    Raises:
        ValueError: See `order_contradiction`.
    """
    rows = plan.split.retained
    images = plan.images.select(rows)
    size, device = plan.args.per_device_eval_batch_size, plan.args.device
    found = measure(plan.model, images, plan.preprocessing, batch_size=size, device=device, progress=progress)
    if said := order_contradiction(found.predictions, images.labels, images.class_names, plan.model.config):
        raise ValueError(said)
    return found.predictions[np.isin(rows, plan.split.validate)]


@contextmanager
def trial_of(plan: Plan, rung: Rung) -> Iterator[PurifyTrainer]:
    """Inside, the trainer of a trial, which has a folder of its own and keeps nothing.

    Raises:
        Refused: The defence refuses the network or the images at construction.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = plan.trial_trainer(rung, copy.deepcopy(plan.model), f"{folder}/trial")
        except ValueError as reason:
            raise Refused(first_line(reason)) from None
        yield trainer


def try_recipe(
    plan: Plan,
    rung: Rung,
    before: np.ndarray,
    stops_early: bool = True,
    keep: Callable[[PreTrainedModel], Any] | None = None,
) -> Tried:
    """Try a recipe; called by all processes.

    Args:
        plan: The plan.
        rung: The recipe.
        before: What the suspicious model predicts of the validation images, int (N,).
        stops_early: Whether a trial that is hopeless on its way ends there, see `early`.
        keep: Is handed the trained model once all that is returned was found; of a trial that ran to its end.

    Returns:
        What was found, on the main process; the others know its name alone. What raises or diverges is broken and has its
        ``error``; with several processes, of which each may fail at another place, the error ends the run.

    Raises:
        Refused: See `trial_of`.
        OSError: Something cannot be read or written, which is no fault of the recipe.
    """
    try:
        return _try_recipe(plan, rung, before, stops_early, keep)
    finally:
        clear_device_cache(garbage_collection=True)  # a trainer and its callbacks hold each other


def _try_recipe(
    plan: Plan, rung: Rung, before: np.ndarray, stops_early: bool, keep: Callable[[PreTrainedModel], Any] | None
) -> Tried:
    started, name = time.perf_counter(), rung.recipe.name
    try:
        with trial_of(plan, rung) as trainer:
            if stops_early:
                trainer.add_callback(EarlyStop(trainer, plan.validation, before, plan.max_accuracy_drop))
            try:
                trainer.train()
            except GivenUp as stop:
                seconds, updates = time.perf_counter() - started, trainer.state.global_step
                return Tried(name, rung.place, seconds, stop.pair, updates=updates, stopped_at=stop.share)
            after = measure_trainer(trainer, plan.validation)
            if after is None:
                return Tried(name, rung.place, 0.0)
            pair = paired_table(before, after.predictions, plan.validation.labels)
            model = measured_model(trainer)
            scores, seconds = _scores(plan, rung, model), time.perf_counter() - started
            if keep:
                keep(model)
            return Tried(name, rung.place, seconds, pair, scores, trainer.state.global_step)
    except (Refused, OSError):
        raise
    except Exception as error:  # whatever a defence raises: the other recipes go on
        if plan.args.world_size > 1:
            raise
        return Tried(name, rung.place, time.perf_counter() - started, error=first_line(error))


def _scores(plan: Plan, rung: Rung, model: PreTrainedModel) -> dict[str, float]:
    found, images = {"place": place(rung.place)}, plan.images.select(plan.split.retained)
    for score in (evenness, reluctance):
        with suppress(ValueError, FloatingPointError, RuntimeError):  # where the signal cannot be read, as `read_signal` has it
            found[score.__name__] = score(model, images)
    try:
        head = find_head(plan.model, plan.preprocessing.size)
    except NoOneHead:
        return found
    distance = run_with_fitting_batch(
        lambda size: feature_distance(plan.model, model, head, plan.inputs(size, next(model.parameters()).device)),
        plan.args.per_device_eval_batch_size,
    )
    return found | {"feature_distance": distance}
