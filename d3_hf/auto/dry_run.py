"""The dry run: what would be tried, with about how long it would take and how much memory; nothing is written."""

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from transformers import TrainerCallback

from ..training.trainer import PurifyTrainer
from .plan import Plan, Rung, as_text
from .trial import Refused, trial_of

try:
    import resource
except ImportError:  # Windows
    resource = None

TIMED = 3  # updates of a recipe, after a first one


@dataclass(frozen=True)
class Pace:
    """How long a recipe takes on this machine.

    Attributes:
        lead: Seconds until its first update is made, with all that it does before.
        update: Seconds of every further one.
    """

    lead: float
    update: float

    def seconds(self, updates: int) -> float:
        """Seconds of a training of so many updates, at least one."""
        return self.lead + (updates - 1) * self.update


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


def timed(trainer: PurifyTrainer) -> Pace | None:
    """Time the first updates of a training, which then stops; None of one that makes none. Errors: the training's."""
    clock = _Clock()
    trainer.add_callback(clock)
    started = time.perf_counter()
    try:
        trainer.train()
    except _Enough:
        pass
    if not clock.times:
        return None
    first, *further = clock.times
    return Pace(first - started, (further[-1] - first) / len(further) if further else 0.0)


def pace_of(plan: Plan, rung: Rung) -> Pace | None:
    """That of a trial; None of one that breaks before, as it will when it is tried."""
    with trial_of(plan, rung) as trainer:
        try:
            return timed(trainer)
        except OSError:
            raise
        except Exception:  # whatever a defence raises
            return None


def peak_memory(device: torch.device) -> tuple[float | None, str]:
    """The peak so far in MiB, None where it cannot be known, and of what it is."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20, "allocated on the GPU"
    if resource is None:
        return None, "unknown on this system"
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, "largest resident size of this process, from its start"


def dry_run(plan: Plan) -> dict[str, Any]:
    """Print the plan, about how long it would take and its peak memory.

    Every recipe is built, to see whether it fits the network. Of those that a walk within the budget can come to, up to five
    with a budget of three, the first updates are made and timed.

    Returns:
        `Plan.described`; ``minutes_of``, per recipe that was timed those of its trial; ``minutes``, of the longer of
        `Plan.longest_walks` and the purification by its most expensive recipe, without measuring; None where no update could be
        timed; ``peak_memory_mib``, None where it is unknown, and ``peak_memory_of``.
    """
    device = plan.args.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for rung in plan.rungs:
        if why := refusal(plan, rung):
            plan.left_out[rung.recipe.name] = why
    plan.next_rung({})  # raises where nothing can be tried
    walks = plan.longest_walks()
    reached = {rung.place: rung for walk in walks for rung in walk}
    paces = {}
    for place, rung in reached.items():
        if pace := pace_of(plan, rung):
            paces[place] = pace
        clear_device_cache(garbage_collection=True)  # or the peak would be of several
    minutes_of = {reached[place].recipe.name: pace.seconds(reached[place].updates) / 60 for place, pace in paces.items()}
    longest = max(walks, key=lambda walk: _minutes(walk, paces))
    minutes = _minutes(longest, paces) or None
    peak, what = peak_memory(device)
    if plan.args.process_index == 0:
        print(as_text(plan, minutes_of))
        if minutes:
            print(f"about {minutes:.1f} minutes: {len(longest)} trials and the purification; fewer if the ladder ends sooner")
        print("peak memory: " + (f"{peak:.0f} MiB {what}" if peak is not None else what))
    found = {"minutes": minutes, "minutes_of": minutes_of, "peak_memory_mib": peak, "peak_memory_of": what}
    return plan.described() | found


def _minutes(walk: list[Rung], paces: dict[int, Pace]) -> float:
    """Of a walk and the purification by its most expensive recipe, as far as they were timed."""
    timed = [(paces[rung.place], rung) for rung in walk if rung.place in paces]
    trials = sum(pace.seconds(rung.updates) for pace, rung in timed)
    return (trials + max((pace.seconds(rung.final_updates) for pace, rung in timed), default=0.0)) / 60
