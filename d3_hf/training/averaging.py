"""Averaging of weights over the end of a run, as stochastic weight averaging does it.

Izmailov, Podoprikhin, Garipov, Vetrov, Wilson: "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018,
arXiv 1803.05407: the plain mean of one snapshot per epoch, then BatchNorm statistics from one pass over the training images.
"""

from collections.abc import Callable, Iterable

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerCallback

from ..models.batch_norm import reestimate_batch_norm


class WeightAverage(TrainerCallback):
    """Averages the weights at the ends of the epochs in the last ``average_last`` of the updates, and puts the mean into the
    model when training ends: onto the defence's constraint set, with BatchNorm statistics of its own.

    Add it before the callback that ends the defence, which is to see the mean.

    Args:
        model: As handed over.
        constrain: Brings the model's weights onto the defence's constraint set.
        batches: Yields the retain set, augmented, as batches with ``pixel_values``.

    Raises:
        ValueError: When training begins, if fewer than two snapshots would be taken.
        RuntimeError: When training ends, if it was stopped before the first snapshot.
    """

    def __init__(self, model: nn.Module, constrain: Callable[[], None], batches: Callable[[], Iterable[dict[str, Tensor]]]):
        self.model, self.constrain, self.batches = model, constrain, batches
        self.weights = AveragedModel(model)

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
            self.weights.update_parameters(self.model)

    @torch.no_grad()
    def on_train_end(self, args, state, control, **kwargs):
        if not self.snapshots:
            raise RuntimeError(f"training stopped at step {state.global_step}, before average_last's share: nothing to average")
        torch._foreach_copy_(list(self.model.parameters()), list(self.weights.module.parameters()))
        self.constrain()
        if args.batch_norm == "train":
            reestimate_batch_norm(self.model, (batch["pixel_values"] for batch in self.batches()))
        broadcast(self.model.state_dict())  # in place; processes may round the statistics differently
        if PartialState().is_main_process:
            print(f"The weights are the mean of {self.snapshots} epochs' ends")
