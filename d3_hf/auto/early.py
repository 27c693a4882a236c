"""Early stop: a trial whose ACC lies so low on its way that the rest of its schedule will hardly bring it back ends there.

The learning rate decays, so that most of what a warm start costs comes back late: a trial at half of its updates may be far
below the floor and end above it. It is given up only where two things hold at once: it breaks the floor, and its validation ACC
is below a share of the suspicious model's that no recovery from it is expected of, a quarter at half of the updates and half at
three quarters of them. Not measured: the shares are chosen so low that a trial which they end would be surprising if it did not
end broken, and what they save are the recipes that destroy a network.

The cost are two passes over the validation part, forward alone: 1,000 images of 2,500 retained ones where 300 updates of 128
take 38,400 forward and backward.
"""

import math

import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from ..data.images import RawImages
from ..evaluation.measure import measure
from ..evaluation.paired import PairedTable, paired_table
from ..training.trainer import PurifyTrainer
from .floor import keeps_floor

# The share of the suspicious model's validation ACC below which a trial is given up, by the share of its updates.
LEAST = {1 / 2: 1 / 4, 3 / 4: 1 / 2}


class GivenUp(Exception):
    """A trial ends here.

    Attributes:
        pair: What its validation ACC has come to.
        share: Of its updates that it has made, a key of `LEAST`.
    """

    def __init__(self, pair: PairedTable, share: float):
        super().__init__(f"given up after {100 * share:g} % of the updates")
        self.pair, self.share = pair, share


def is_hopeless(pair: PairedTable, share: float, max_accuracy_drop: float) -> bool:
    """Whether a trial is to be given up.

    Args:
        pair: The suspicious model and the trial's as it is now, on the validation images.
        share: Of its updates that it has made, a key of `LEAST`.
        max_accuracy_drop: See `keeps_floor`.
    """
    return not keeps_floor(pair, max_accuracy_drop) and pair.after.value < LEAST[share] * pair.before.value


def checks_at(updates: int) -> dict[int, float]:
    """After which updates of a trial it is looked at, with the share of `LEAST` that each is; never after the last."""
    found = {math.ceil(share * updates): share for share in LEAST}
    return {update: share for update, share in found.items() if update < updates}


class EarlyStop(TrainerCallback):
    """Raises `GivenUp` in all processes where a trial is hopeless; draws no random number and leaves the model as it is.

    A method whose parameters are no classifier at that moment is not looked at.

    Args:
        trainer: Of the trial.
        images: The validation images.
        before: What the suspicious model predicts of them, int (N,).
        max_accuracy_drop: See `keeps_floor`.
    """

    def __init__(self, trainer: PurifyTrainer, images: RawImages, before: np.ndarray, max_accuracy_drop: float):
        self.trainer, self.images, self.before, self.max_accuracy_drop = trainer, images, before, max_accuracy_drop

    def on_step_end(self, args, state, control, **kwargs):
        share = checks_at(state.max_steps).get(state.global_step)
        if share is None or not self.trainer.is_classifier:
            return
        (pair,) = broadcast_object_list([self._pair()])
        if is_hopeless(pair, share, self.max_accuracy_drop):
            raise GivenUp(pair, share)

    def _pair(self) -> PairedTable | None:
        """On the main process; as the model trains, with autocast if it does: `measure_trainer` would take that off."""
        trainer = self.trainer
        trainer.placement.read()
        if not trainer.is_world_process_zero():
            return None
        size = trainer.args.per_device_eval_batch_size
        found = measure(trainer.plain, self.images, trainer.preprocessing, batch_size=size, progress=False)
        return paired_table(self.before, found.predictions, self.images.labels)
