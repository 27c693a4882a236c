"""One trial: a copy of the suspicious model trained by a recipe on the tuning part, and measured on the validation part."""

import copy
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from accelerate.utils.memory import clear_device_cache
from transformers import TrainerCallback

from ..data.fitting import run_with_fitting_batch
from ..evaluation.measure import measure_trainer
from ..evaluation.paired import paired_table
from ..files import first_line
from ..models.head import NoOneHead, find_head
from ..training.trainer import PurifyTrainer
from .choose import Tried
from .plan import Plan, Rung
from .thoroughness import feature_distance, place

TIMED = 3  # updates of a dry run, after a first one


class Refused(ValueError):
    """A defence cannot work on the network, by its own word."""


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


def try_recipe(plan: Plan, rung: Rung, before: np.ndarray) -> Tried:
    """Try a recipe; called by all processes.

    Args:
        plan: The plan.
        rung: The recipe.
        before: What the suspicious model predicts of the validation images, int (N,).

    Returns:
        What was found, on the main process; the others know its name alone. What raises or diverges is broken and has its
        ``error``; with several processes, of which each may fail at another place, the error ends the run.

    Raises:
        Refused: See `trial_of`.
        OSError: Something cannot be read or written, which is no fault of the recipe.
    """
    started, name = time.perf_counter(), rung.recipe.name
    try:
        with trial_of(plan, rung) as trainer:
            trainer.train()
            after = measure_trainer(trainer, plan.validation)
            if after is None:
                return Tried(name, rung.place, 0.0)
            pair = paired_table(before, after.predictions, plan.validation.labels)
            scores, updates = _scores(plan, rung, trainer), trainer.state.global_step
            return Tried(name, rung.place, time.perf_counter() - started, pair, scores, updates)
    except (Refused, OSError):
        raise
    except Exception as error:  # whatever a defence raises: the other recipes go on
        if plan.args.world_size > 1:
            raise
        return Tried(name, rung.place, time.perf_counter() - started, error=first_line(error))
    finally:
        clear_device_cache(garbage_collection=True)  # a trainer and its callbacks hold each other


def _scores(plan: Plan, rung: Rung, trainer: PurifyTrainer) -> dict[str, float]:
    model = trainer.accelerator.unwrap_model(trainer.plain, keep_fp32_wrapper=False)  # without autocast, as it is measured
    found = {"place": place(rung.place)}
    try:
        head = find_head(plan.model, plan.preprocessing.size)
    except NoOneHead:
        return found
    distance = run_with_fitting_batch(
        lambda size: feature_distance(plan.model, model, head, plan.inputs(size, next(model.parameters()).device)),
        plan.args.per_device_eval_batch_size,
    )
    return found | {"feature_distance": distance}


# The dry run -----------------------------------------------------------------------------------------------------------


class _Enough(Exception):
    pass


class _Clock(TrainerCallback):
    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())
        if len(self.times) > TIMED:
            raise _Enough


def refusal(plan: Plan, rung: Rung) -> str | None:
    """Why a defence cannot work on the network; None where it can."""
    try:
        with trial_of(plan, rung):
            return None
    except Refused as reason:
        return str(reason)


def seconds_per_update(plan: Plan, rung: Rung) -> float | None:
    """Seconds of an update of a recipe, see `timed`."""
    with trial_of(plan, rung) as trainer:
        return timed(trainer)


def timed(trainer: PurifyTrainer) -> float | None:
    """Seconds of an update, over `TIMED` of a training that then stops; None of one with less than two."""
    clock = _Clock()
    trainer.add_callback(clock)
    try:
        trainer.train()
    except _Enough:
        pass
    times = clock.times
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
