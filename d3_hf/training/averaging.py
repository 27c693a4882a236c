"""Averaging of weights over the end of a run, as stochastic weight averaging does it.

Izmailov, Podoprikhin, Garipov, Vetrov, Wilson: "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018,
arXiv 1803.05407: the plain mean of one snapshot per epoch, then BatchNorm statistics from one pass over the training images.
"""

from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerCallback

from ..data.retain import retain_batches
from ..models.batch_norm import reestimate_batch_norm

if TYPE_CHECKING:
    from .trainer import PurifyTrainer


class WeightAverage(TrainerCallback):
    """Averages the weights at the ends of the epochs in the last ``average_last`` of the updates, and puts the mean into the
    model when training ends: onto the defence's constraint set, with BatchNorm statistics of its own.

    Add it before the callback that ends the defence, which is to see the mean.

    Args:
        trainer: Its model, as handed over.

    Raises:
        ValueError: When training begins, if fewer than two snapshots would be taken.
        RuntimeError: When training ends, if it was stopped before the first snapshot.
    """

    def __init__(self, trainer: "PurifyTrainer"):
        self.trainer = trainer
        self.weights = AveragedModel(trainer.model)

    @property
    def snapshots(self) -> int:
        """How many snapshots the mean holds."""
        return int(self.weights.n_averaged)

    def on_train_begin(self, args, state, control, **kwargs):
        if args.average_last * state.num_train_epochs <= 1:
            raise ValueError(
                f"average_last={args.average_last} of {state.num_train_epochs} epochs is one snapshot, which is no average: "
                "raise average_last or num_train_epochs"
            )
        self.weights.n_averaged.zero_()

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.global_step > round((1 - args.average_last) * state.max_steps):
            self.weights.update_parameters(self.trainer.model)

    @torch.no_grad()
    def on_train_end(self, args, state, control, **kwargs):
        if not self.snapshots:
            raise RuntimeError(f"training stopped at step {state.global_step}, before average_last's share: nothing to average")
        model = self.trainer.model
        torch._foreach_copy_(list(model.parameters()), list(self.weights.module.parameters()))
        self.trainer.constrain()
        if args.batch_norm == "train":
            batches = retain_batches(self.trainer, "Re-estimating BatchNorm", augmented=True)
            reestimate_batch_norm(model, (batch["pixel_values"] for batch in batches))
        broadcast(model.state_dict())  # in place; processes may round the statistics differently
        self.trainer.accelerator.print(f"The weights are the mean of {self.snapshots} epochs' ends")
