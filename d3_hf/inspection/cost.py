"""What a purification would cost here: some updates of a defence are timed on a copy of the model."""

import contextlib
import copy
import sys
import tempfile
from dataclasses import dataclass

from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedModel

from ..auto.dry_run import timed
from ..benchmark.meters import peak_memory, reset_peak_memory
from ..data.images import RawImages
from ..defenses import defence
from ..files import first_line
from ..training.schedule import updates_of

DEFENCES = ("d3", "ft_sam")


@dataclass(frozen=True)
class Cost:
    """What a defence would cost on this machine.

    Args:
        defence: Its name.
        images: Of the retain set.
        seconds_per_update: None where it was not timed.
        updates: Of the whole purification, by the network's schedule.
        why_not: Why it was not timed; None where it was.
        peak_memory_mib: The most that was in use meanwhile, in MiB, see `peak_memory`: of this whole process where it is not a
            GPU's; None where it is unknown or nothing was timed.
    """

    defence: str
    images: int
    seconds_per_update: float | None = None
    updates: int | None = None
    why_not: str | None = None
    peak_memory_mib: float | None = None

    @property
    def minutes(self) -> float | None:
        """Of the whole purification, without measuring."""
        return self.seconds_per_update and self.seconds_per_update * self.updates / 60


def cost_of(name: str, model: PreTrainedModel, retain: RawImages) -> Cost:
    """Time a defence with its defaults; the model is not changed and nothing is kept.

    Args:
        name: Of the defence, a key of `DEFENCES`.
        model: What would be purified.
        retain: The retain set.
    """
    config_class, trainer_class = defence(name)
    reset_peak_memory()
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            args = config_class(f"{folder}/timed", disable_tqdm=True)
            trainer = trainer_class(copy.deepcopy(model), args, retain)
            pace = timed(trainer)
            peak = peak_memory()
    except (ValueError, RuntimeError, FloatingPointError) as reason:
        return Cost(name, len(retain), why_not=first_line(reason))
    finally:
        clear_device_cache(garbage_collection=True)  # a trainer and its callbacks hold each other
    updates = updates_of(trainer.args, len(retain))
    if pace is None or not pace.update:
        return Cost(name, len(retain), updates=updates, why_not="its schedule has too few updates to time")
    return Cost(name, len(retain), pace.update, updates, peak_memory_mib=peak)
