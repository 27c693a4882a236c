"""ASR while a defence trains, for "how long until the backdoor is gone"; the defence is not told."""

import time

from transformers import TrainerCallback

from ..data import RawImages
from ..evaluation import Trigger, measure
from .meters import PassMeter


class Watch(TrainerCallback):
    """Measures ASR at the end of each epoch, with clock and pass meter stopped.

    A defence with stages of its own before the Trainer's epochs is first seen when these begin.

    Args:
        trainer: A `PurifyTrainer`.
        images: Raw images to measure on.
        attack: The victim's.
        meter: Counts the passes that the defence itself makes.

    Attributes:
        series: (seconds of training so far, ASR) for each measurement, after `start`.
        paused: Seconds spent on measuring.
    """

    def __init__(self, trainer, images: RawImages, attack: Trigger, meter: PassMeter):
        self.trainer, self.images, self.attack, self.meter = trainer, images, attack, meter
        self.series: list[tuple[float, float]] = []
        self.paused = 0.0
        self.started = time.perf_counter()

    def look(self) -> None:
        """Measure now."""
        begun = time.perf_counter()
        counts = self.meter.forward, self.meter.backward
        # As the model trains, with autocast if it does: `measure_trainer` would take that off.
        found = measure(self.trainer.plain, self.images, self.trainer.preprocessing, self.attack, progress=False)
        self.meter.forward, self.meter.backward = counts
        self.series.append((begun - self.started - self.paused, found.asr.value))
        self.paused += time.perf_counter() - begun

    def on_epoch_end(self, args, state, control, **kwargs):
        self.look()
