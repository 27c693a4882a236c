"""TSC, Two-stage Symmetry Connectivity: leave the backdoored weights along curves that lead to permuted copies of them.

Peng et al., "Circumventing Backdoor Space via Weight Symmetry", ICML 2025, arXiv 2506.07467. Exchanging hidden units gives
other weights with the same function. Weights A and B are joined by a quadratic Bezier curve

    gamma(t) = (1 - t)^2 A + 2 t (1 - t) M + t^2 B

whose control point M is trained on trusted images at random t. One round has two stages. *Amplify* the loss on poisoned images:
A is the model, B its copy with the units taken as far away as possible, theta_1 = gamma(t*). *Recover* accuracy: A is the model
with its units aligned with theta_1, B is theta_1, and gamma(t*) is the model for the next round, fine-tuned before it begins.

Needs: trusted labelled images (retain set), no trigger. Cost: one forward and one backward pass a step, as fine-tuning, for
``2 * rounds * curve_epochs + (rounds - 1) * finetune_epochs`` epochs (1,220 by default); a round adds three forward passes over
the retain set to match units and, with BatchNorm, two to re-estimate statistics. Memory: four copies of the weights more.

Differs from the published code: the units are found from the network's structure (`permutation.py`) and so exist for ViTs too
(an extension of this project), and for VGG's last convolution and classifier; all layers are matched in one pass, which is
equivalent; activations are compared in evaluation mode, those of a residual stream at every layer that writes to it; the
learning rate is stepped per update, its period is the curve's length; biases and normalisation are not decayed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ...models.batch_norm import reestimate_batch_norm
from ...training.config import SGD_ARGUMENTS, PurifyConfig
from ...training.reference import UNMOVED
from ...training.trainer import PurifyTrainer
from .curve import Curve, relative_distance
from .matching import correlate, match, matched
from .permutation import find_structure, permute


def cosine(epochs: float, period: float) -> float:
    """Factor of the learning rate after some epochs: from 1 to 0 at the period, and back up to 1 at twice the period."""
    return 0.5 * (1 + math.cos(math.pi * epochs / period))


@dataclass
class TSCConfig(PurifyConfig):
    """Arguments of TSC. (README) marks the authors' example on CIFAR-10, (code) their program.

    Args:
        rounds: Rounds of two stages, >= 1. 3 (code).
        curve_position: t* in (0, 1), the point taken of each curve. 0.4 (README).
        curve_epochs: Epochs of one curve, >= 1. 200 (README); 100 is the default of their YAML.
        learning_rate: Of a curve. 0.02 (README).
        per_device_train_batch_size: 256 (README).
        weight_decay: On the control point. 5e-4 (code).
        curve_decay: L2 regularisation ``curve_decay / 2 * ||gamma(t)||^2`` of the curve's point, >= 0. 1e-4 (code).
        curve_period: Epochs in which a curve's learning rate falls to 0 on a cosine, >= 1; ``None``: curve_epochs (here). The
            code has 100 whatever the epochs, so that with 200 the rate climbs back to its start: 100 reproduces that.
        finetune_epochs: Epochs of fine-tuning between rounds, >= 0. 10 (code).
        finetune_learning_rate: Its learning rate, on a cosine to 0, > 0. 1e-4 (code).
        optim, optim_args: SGD with momentum 0.9 (code), also where the rule for the network is another.
        num_train_epochs: Of all stages together; follows from the above. Leave it alone.

    Raises:
        ValueError: ``num_train_epochs`` does not follow from the others; ``max_steps``, a warm-up or another schedule is given;
            ``batch_norm`` is not ``"train"`` (points of a curve have no running statistics); ``eval_strategy`` is not ``"no"``
            (while a curve is trained the weights are its control point, no classifier); see `PurifyConfig`.
    """

    output_dir: str | None = field(default="outputs/tsc", metadata={"help": "Folder for the purified model and its evidence."})
    rounds: int = field(default=3, metadata={"help": "Rounds of two curves.", "range": ">= 1"})
    curve_position: float = field(default=0.4, metadata={"help": "t*: the point taken of each curve.", "range": "in (0, 1)"})
    curve_epochs: int = field(default=200, metadata={"help": "Passes over the retain set for one curve.", "range": ">= 1"})
    learning_rate: float = field(
        default=0.02, metadata={"help": "Initial learning rate of a curve.", "range": "> 0 and finite"}
    )
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Schedule of each stage: cosine.", "choices": ("cosine",)}
    )
    optim: str = field(default="sgd", metadata={"help": "Optimizer, any name of TrainingArguments."})
    optim_args: str | None = field(default=SGD_ARGUMENTS, metadata={"help": "Arguments of the optimizer."})
    warmup_steps: float = field(default=0, metadata={"help": "None: each stage has its own cosine schedule."})
    batch_norm: str = field(default="train", metadata={"help": "BatchNorm while training: train.", "choices": ("train",)})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Images per device and micro-batch."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay, on a curve that of its control point."})
    curve_decay: float = field(
        default=1e-4, metadata={"help": "L2 regularisation of the point on the curve.", "range": ">= 0 and finite"}
    )
    curve_period: int | None = field(
        default=None,
        metadata={
            "help": "Epochs in which a curve's rate falls to 0; default curve_epochs, published code 100.",
            "range": ">= 1",
        },
    )
    finetune_epochs: int = field(
        default=10, metadata={"help": "Passes of fine-tuning between rounds.", "range": ">= 0 and finite"}
    )
    finetune_learning_rate: float = field(
        default=1e-4, metadata={"help": "Initial learning rate of fine-tuning.", "range": "> 0 and finite"}
    )
    num_train_epochs: float = field(default=0, metadata={"help": "Epochs of all stages together: computed."})

    def __post_init__(self):
        super().__post_init__()
        for name, fits, needs in (
            ("max_steps", self.max_steps <= 0, "left alone: the stages are counted in epochs"),
            ("warmup_steps", self.warmup_steps == 0, "0: each stage has its own cosine schedule"),
            ("eval_strategy", self.eval_strategy == "no", "no: a curve's control point is no classifier"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {needs}; got {getattr(self, name)!r}")
        epochs = sum(length for _, length in self.stages())
        if self.num_train_epochs not in (0, epochs):
            raise ValueError(
                f"num_train_epochs follows from rounds, curve_epochs and finetune_epochs ({epochs} here): set those; "
                f"got {self.num_train_epochs}"
            )
        self.num_train_epochs = epochs

    def stages(self) -> list[tuple[str, int]]:
        """Kind (``amplify``, ``recover``, ``fine-tune``) and epochs of each stage, in order."""
        one = [("amplify", self.curve_epochs), ("recover", self.curve_epochs), ("fine-tune", self.finetune_epochs)]
        return [stage for stage in (one * self.rounds)[:-1] if stage[1]]


class TSCTrainer(PurifyTrainer):
    """Trainer of TSC; see `PurifyTrainer` for the arguments.

    All stages are one training run. While a curve is trained the model's parameters are its control point; `training_step`
    moves them to a random point of the curve (one per update, the same in all processes), `finish_gradient` moves them back.

    Raises:
        ValueError: The network's hidden units cannot be permuted (see `find_structure`); a parameter is frozen or not float32.
        RuntimeError: Training ended before the last curve, or the model is the permuted victim.

    Attributes:
        structure: The hidden units that may be exchanged.
        stage: Number of the stage; -1 before the first.
        history: Of each curve so far its kind, the correlation of the matched units and the distance of its ends.
        curve: The one that is trained; None while the model is fine-tuned.
    """

    method = "TSC"
    paper = "https://arxiv.org/abs/2506.07467"

    def prepare(self) -> None:
        """Find which hidden units may be exchanged."""
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad or parameter.dtype != torch.float32:
                raise ValueError(
                    f"TSC moves every weight, in float32: {name} is {parameter.dtype}"
                    f"{'' if parameter.requires_grad else ' and frozen'}; load the model in float32 with nothing frozen"
                )
        self.structure = find_structure(self.model, self.preprocessing.size)
        self.start()

    def start(self) -> None:
        """Before the first stage."""
        self.stage, self.history = -1, []
        self.curve: Curve | None = None

    def announce(self, resumed: bool) -> None:
        """Say which units move."""
        self.accelerator.print(f"TSC permutes {len(self.structure.groups)} groups of hidden units")
        for line in self.structure.fixed:
            self.accelerator.print(f"TSC leaves in place: {line}")

    @property
    def is_classifier(self) -> bool:
        """Not while a curve is trained: the parameters are its control point."""
        return self.curve is None

    # Stages ------------------------------------------------------------------------------------------------------------

    def stage_of(self, epochs: float) -> tuple[int, float]:
        """Number of the stage after so many epochs of the whole run, and the epochs since it began."""
        stages = self.args.stages()
        for stage, (_, length) in enumerate(stages):
            if epochs < length or stage == len(stages) - 1:
                return stage, epochs
            epochs -= length

    def enter_stage(self, epoch: int) -> None:
        """Begin the stage that an epoch, counted over all stages, belongs to, unless it has begun."""
        stage = self.stage_of(epoch)[0]
        if stage == self.stage:
            return
        if self.curve:
            victim = self.curve.start  # of the amplifying curve: what the recovering one aligns
            self._leave_curve()
        self.stage, kind = stage, self.args.stages()[stage][0]
        self.optimizer.state.clear()
        if kind == "fine-tune":
            return
        broadcast(self.model.state_dict())  # in place: each process has BatchNorm statistics of its own
        model = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        other = model if kind == "amplify" else victim
        correlations = correlate(self.model, self.structure, model, other, self._pixels("Comparing units"))
        orders = match(self.structure, correlations, maximize=kind == "recover")
        permuted = broadcast(permute(other, self.structure, orders))  # equal activations may round differently elsewhere
        ends = (model, permuted) if kind == "amplify" else (permuted, model)
        self.curve = Curve(self.model, *ends)
        self.curve.begin()
        distance = relative_distance(*self.curve.end_weights())
        record = {"stage": kind, "correlation": matched(correlations, orders), "distance": distance}
        self.history.append(record)
        self.accelerator.print(
            f"TSC stage {stage + 1} of {len(self.args.stages())} ({kind}): matched units correlate "
            f"{record['correlation']:.3f}, relative distance of the curve's ends {distance:.3f}"
        )

    def _leave_curve(self) -> None:
        """Make the model the curve's point at t*, with BatchNorm statistics of its own."""
        self.curve.move_to(self.args.curve_position)
        self.curve = None
        reestimate_batch_norm(self.model, self._pixels("Re-estimating BatchNorm"))

    def _pixels(self, purpose: str) -> Iterator[Tensor]:
        """All retain images, augmented as in training, in order: every process sees the same."""
        return (batch["pixel_values"] for batch in self.retain_batches(purpose, augmented=True))

    # Training a curve --------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        """On an epoch's first step begin its stage; on an update's first move the parameters to a random point of the curve."""
        self.enter_stage(self.state.global_step // (self.state.max_steps // int(self.args.num_train_epochs)))
        if self.curve and not self.curve.is_at_point:
            self.curve.move_to(np.random.default_rng([self.args.seed, self.state.global_step]).random())
        return super().training_step(model, inputs, num_items_in_batch)

    def finish_gradient(self, window_loss: Tensor) -> Tensor:
        """Turn the gradient at the curve's point into that of the control point, and move the parameters back to it."""
        if self.curve is None:
            return window_loss
        squares = torch.stack(torch._foreach_norm(self.curve.weights())).square().sum()
        self.curve.move_back(self.args.curve_decay * self.loss_scale)
        return window_loss + self.args.curve_decay / 2 * squares

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The stages' cosines in a row, stepped per update."""
        if self.lr_scheduler is None:
            steps = num_training_steps // int(self.args.num_train_epochs)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: self.rate(step / steps))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def rate(self, epochs: float) -> float:
        """Learning rate after so many epochs of the whole run, as a share of ``learning_rate``."""
        stage, passed = self.stage_of(epochs)
        kind, length = self.args.stages()[stage]
        if kind == "fine-tune":
            return self.args.finetune_learning_rate / self.args.learning_rate * cosine(passed, length)
        return cosine(passed, self.args.curve_period or length)

    # The end, the manifest and checkpoints -----------------------------------------------------------------------------

    def finish(self) -> None:
        """Take the point of the last curve."""
        stages = self.args.stages()
        if self.stage != len(stages) - 1:
            raise RuntimeError(f"training stopped in stage {self.stage + 1} of {len(stages)}: the model is not purified")
        (aligned, _), weights = self.curve.end_weights(), self.curve.weights()
        self._leave_curve()
        self._moved = relative_distance(aligned, weights)

    def check_moved(self) -> None:
        """Raise a RuntimeError if the last curve ended where it began: at the aligned victim."""
        if not self._moved > UNMOVED:
            raise RuntimeError("the weights are those of the permuted victim: the model is not purified")

    def facts(self) -> dict[str, Any]:
        """Adds the curves, the number of groups of units, and the units that stayed in place."""
        groups, fixed = len(self.structure.groups), self.structure.fixed
        return super().facts() | {"stages": self.history, "unit_groups": groups, "fixed_units": fixed}

    def resume_state(self) -> dict[str, Any]:
        """Adds the stage, the curves so far, and the ends of the one that is trained."""
        ends = {"start": self.curve.start, "end": self.curve.end} if self.curve else {}
        tensors = {f"{end}.{name}": tensor for end, state in ends.items() for name, tensor in state.items()}
        return super().resume_state() | {"stage": self.stage, "history": self.history, "ends": list(ends)} | tensors

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        super().load_resume_state(state)
        self.stage, self.history = state["stage"], state["history"]
        names, device = list(self.model.state_dict()), self.args.device
        ends = [{name: state[f"{end}.{name}"].to(device) for name in names} for end in state["ends"]]
        self.curve = Curve(self.model, *ends) if ends else None
