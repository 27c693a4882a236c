"""ASR while a defence trains, for "how long until the backdoor is gone"; the defence is not told."""

import time

from transformers import TrainerCallback

from ..data.images import RawImages
from ..evaluation.measure import Trigger, measure
from .meters import PassMeter


class Watch(TrainerCallback):
    """The clock of a training that starts now, and ASR at the end of each epoch, with clock and pass meter stopped meanwhile.

    A defence with stages of its own before the Trainer's epochs is first seen when these begin, and one whose parameters are
    not a classifier meanwhile (TSC's curves) when they are.

    Args:
        trainer: A `PurifyTrainer`.
        images: Raw images to measure on; None to keep the time alone.
        attack: The victim's.
        meter: Counts the passes that the defence itself makes.

    Attributes:
        series: (seconds of training so far, ASR) for each measurement.
    """

    def __init__(self, trainer, images: RawImages | None, attack: Trigger, meter: PassMeter):
        self.trainer, self.images, self.attack, self.meter = trainer, images, attack, meter
        self.series: list[tuple[float, float]] = []
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return time.perf_counter() - self._started

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.images is None or not self.trainer.is_classifier:
            return
        seconds, counts = self.seconds, (self.meter.forward, self.meter.backward)
        # As the model trains, with autocast if it does: `measure_trainer` would take that off.
        found = measure(self.trainer.plain, self.images, self.trainer.preprocessing, self.attack, progress=False)
        self.series.append((seconds, found.asr.value))
        self.meter.forward, self.meter.backward = counts
        self._started = time.perf_counter() - seconds
