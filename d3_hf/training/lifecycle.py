"""Where `Trainer` has no method to override it has a callback."""

from typing import Any

from transformers import TrainerCallback

from ..data.training_images import TrainingImages
from ..publishing.execution import execution_of


class Lifecycle(TrainerCallback):
    """Calls a `PurifyTrainer`'s ``begin``, ``optimizer_step`` and ``end``, sets its ``execution`` and its images' epoch."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        trainer.execution = execution_of(trainer)

    def on_train_begin(self, args, state, control, **kwargs):
        # Now: with the next configuration that is made, the state of the accelerator is no longer this run's.
        self.trainer.execution = execution_of(self.trainer)
        self.trainer.begin(resumed=state.global_step > 0)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate hands the epoch to the sampler and not to the data set, which draws its crops by it.
        if isinstance(self.trainer.train_dataset, TrainingImages):
            self.trainer.train_dataset.set_epoch(int(state.epoch or 0))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.optimizer_step()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.end()
