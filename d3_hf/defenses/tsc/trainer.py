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

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from ...data.retain import retain_batches
from ...models.batch_norm import reestimate_batch_norm
from ...training.config import PurifyConfig
from ...training.reference import UNMOVED
from ...training.trainer import MANIFEST, PurifyTrainer
from .matching import correlate, match, matched
from .permutation import State, find_structure, permute

ENDPOINTS = "curve.safetensors"


def bezier(t: float, start: list[Tensor], control: list[Tensor], end: list[Tensor]) -> list[Tensor]:
    """Point ``gamma(t) = (1 - t)^2 A + 2 t (1 - t) M + t^2 B`` of a quadratic Bezier curve.

    Args:
        t: Position in [0, 1].
        start: A, one tensor per weight.
        control: M.
        end: B.

    Returns:
        New tensors.
    """
    point = torch._foreach_mul(start, (1 - t) ** 2)
    torch._foreach_add_(point, control, alpha=control_share(t))
    torch._foreach_add_(point, end, alpha=t**2)
    return point


def control_share(t: float) -> float:
    """``d gamma(t) / d M = 2 t (1 - t)``, by which a gradient at the curve's point becomes one of the control point."""
    return 2 * t * (1 - t)


def relative_distance(first: list[Tensor], second: list[Tensor]) -> float:
    """``||second - first|| / ||first||`` over all weights together."""
    length, size = (torch.stack(torch._foreach_norm(t)).norm() for t in (torch._foreach_sub(second, first), first))
    return (length / size).item()


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
        num_train_epochs: Of all stages together; follows from the above. Leave it alone.

    Raises:
        ValueError: A value is out of its range; ``num_train_epochs`` does not follow from the others; ``max_steps``, a warm-up
            or another schedule is given; ``batch_norm`` is not ``"train"`` (points of a curve have no running statistics);
            ``eval_strategy`` is not ``"no"`` (while a curve is trained the weights are its control point, no classifier).
    """

    output_dir: str | None = field(default="outputs/tsc", metadata={"help": "Folder for the purified model and its evidence."})
    rounds: int = field(default=3, metadata={"help": "Rounds of two curves."})
    curve_position: float = field(default=0.4, metadata={"help": "t*: the point taken of each curve."})
    curve_epochs: int = field(default=200, metadata={"help": "Passes over the retain set for one curve."})
    learning_rate: float = field(default=0.02, metadata={"help": "Initial learning rate of a curve."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Images per device and micro-batch."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay, on a curve that of its control point."})
    curve_decay: float = field(default=1e-4, metadata={"help": "L2 regularisation of the point on the curve."})
    curve_period: int | None = field(
        default=None,
        metadata={"help": "Epochs in which a curve's rate falls to 0; default curve_epochs, published code 100."},
    )
    finetune_epochs: int = field(default=10, metadata={"help": "Passes of fine-tuning between rounds."})
    finetune_learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate of fine-tuning."})
    num_train_epochs: float = field(default=0, metadata={"help": "Epochs of all stages together: computed."})

    def __post_init__(self):
        for name, fits, needs in (
            ("rounds", self.rounds >= 1, ">= 1"),
            ("curve_position", 0 < self.curve_position < 1, "in (0, 1)"),
            ("curve_epochs", self.curve_epochs >= 1, ">= 1"),
            ("curve_decay", self.curve_decay >= 0, ">= 0"),
            ("curve_period", self.curve_period is None or self.curve_period >= 1, "None or >= 1"),
            ("finetune_epochs", self.finetune_epochs >= 0, ">= 0"),
            ("finetune_learning_rate", self.finetune_learning_rate > 0, "> 0"),
            ("learning_rate", self.learning_rate > 0, "> 0"),
            ("max_steps", self.max_steps <= 0, "left alone: the stages are counted in epochs"),
            ("warmup_steps", self.warmup_steps == 0, "0: each stage has its own cosine schedule"),
            ("lr_scheduler_type", self.lr_scheduler_type == "cosine", "cosine: each stage has its own"),
            ("batch_norm", self.batch_norm == "train", "train: points of a curve have no running statistics"),
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
        super().__post_init__()

    def stages(self) -> list[tuple[str, int]]:
        """Kind (``amplify``, ``recover``, ``fine-tune``) and epochs of each stage, in order."""
        one = [("amplify", self.curve_epochs), ("recover", self.curve_epochs), ("fine-tune", self.finetune_epochs)]
        return [stage for stage in (one * self.rounds)[:-1] if stage[1]]


class _EnterStages(TrainerCallback):
    def __init__(self, trainer: "TSCTrainer"):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.enter_stage(state.global_step // (state.max_steps // int(args.num_train_epochs)))


class TSCTrainer(PurifyTrainer):
    """Trainer of TSC; see `PurifyTrainer` for the arguments.

    All stages are one training run. While a curve is trained the model's parameters are its control point; `training_step`
    moves them to a random point of the curve (one per update, the same in all processes), `finish_gradient` moves them back.

    Raises:
        ValueError: The network's hidden units cannot be permuted (see `find_structure`); a parameter is frozen or not float32.
        RuntimeError: Training ended before the last curve, or the model is the permuted victim.
    """

    method = "TSC"
    paper = "https://arxiv.org/abs/2506.07467"

    def __init__(self, model, args: TSCConfig, *arguments, **kwargs):
        super().__init__(model, args, *arguments, **kwargs)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or parameter.dtype != torch.float32:
                raise ValueError(
                    f"TSC moves every weight, in float32: {name} is {parameter.dtype}"
                    f"{'' if parameter.requires_grad else ' and frozen'}; load the model in float32 with nothing frozen"
                )
        self.structure = find_structure(model, self.preprocessing.size)
        self.stage, self.history = -1, []
        self.start: State | None = None  # A with its buffers while a curve is trained
        self.end: State | None = None  # B
        self._t: float | None = None  # position on the curve where the parameters are; None: they are the control point
        self.add_callback(_EnterStages(self))

    @property
    def is_classifier(self) -> bool:
        """Not while a curve is trained: the parameters are its control point."""
        return self.start is None

    # Stages ------------------------------------------------------------------------------------------------------------

    def begin_purification(self, resumed: bool) -> None:
        """Forget an earlier run, and say which units move."""
        if not resumed:
            self.stage, self.history, self.start, self.end = -1, [], None, None
        self._t = None
        self.accelerator.print(f"TSC permutes {len(self.structure.groups)} groups of hidden units")
        for line in self.structure.fixed:
            self.accelerator.print(f"TSC leaves in place: {line}")

    def stage_of(self, epochs: float) -> tuple[int, float]:
        """Number of the stage after so many epochs of the whole run, and the epochs since it began."""
        stages = self.args.stages()
        for stage, (_, length) in enumerate(stages):
            if epochs < length or stage == len(stages) - 1:
                return stage, epochs
            epochs -= length

    def enter_stage(self, epoch: int) -> None:
        """Called at the beginning of each epoch, counted over all stages: begin the stage that the epoch belongs to."""
        stage = self.stage_of(epoch)[0]
        if stage == self.stage:
            return
        victim = self.start  # of the amplifying curve: what the recovering one aligns
        if self.start is not None:
            self._leave_curve()
        self.stage, kind = stage, self.args.stages()[stage][0]
        self.optimizer.state.clear()
        if kind == "fine-tune":
            return
        broadcast(self.model.state_dict())  # in place: each process has BatchNorm statistics of its own
        model = self._state()
        other = model if kind == "amplify" else victim
        correlations = correlate(self.model, self.structure, model, other, self._pictures("Comparing units"))
        orders = match(self.structure, correlations, maximize=kind == "recover")
        permuted = broadcast(permute(other, self.structure, orders))  # equal activations may round differently elsewhere
        self.start, self.end = (model, permuted) if kind == "amplify" else (permuted, model)
        torch._foreach_copy_(self._weights(), torch._foreach_lerp(*self._ends(), 0.5))
        record = {"stage": kind, "correlation": matched(correlations, orders), "distance": relative_distance(*self._ends())}
        self.history.append(record)
        self.accelerator.print(
            f"TSC stage {stage + 1} of {len(self.args.stages())} ({kind}): matched units correlate "
            f"{record['correlation']:.3f}, relative distance of the curve's ends {record['distance']:.3f}"
        )

    @torch.no_grad()
    def _leave_curve(self) -> None:
        """Make the model the curve's point at t*, with BatchNorm statistics of its own."""
        weights, (start, end) = self._weights(), self._ends()
        torch._foreach_copy_(weights, bezier(self.args.curve_position, start, weights, end))
        self.start = self.end = None
        reestimate_batch_norm(self.model, self._pictures("Re-estimating BatchNorm"))

    def _pictures(self, purpose: str):
        """All retain images, augmented as in training, in order: every process sees the same."""
        return (batch["pixel_values"] for batch in retain_batches(self, purpose, augmented=True))

    def _state(self) -> State:
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def _weights(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.model.parameters()]

    def _ends(self) -> tuple[list[Tensor], list[Tensor]]:
        """A and B, in the order of `_weights`."""
        names = [name for name, _ in self.model.named_parameters()]
        return [self.start[name] for name in names], [self.end[name] for name in names]

    # Training a curve --------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        """On the first micro-batch of an update to a curve, move the parameters to a random point of it."""
        if self.start is not None and self._t is None:
            self._t = np.random.default_rng([self.args.seed, self.state.global_step]).random()
            weights, (start, end) = self._weights(), self._ends()
            self._control = [weight.clone() for weight in weights]
            torch._foreach_copy_(weights, bezier(self._t, start, self._control, end))
        return super().training_step(model, inputs, num_items_in_batch)

    def finish_gradient(self, window_loss: Tensor) -> Tensor:
        """Turn the gradient at the curve's point into that of the control point, and move the parameters back to it."""
        if self.start is None:
            return window_loss
        weights = self._weights()
        objective = window_loss + self.args.curve_decay / 2 * torch.stack(torch._foreach_norm(weights)).square().sum()
        for parameter, weight in zip(self.model.parameters(), weights, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(weight, alpha=self.args.curve_decay * self.loss_scale).mul_(control_share(self._t))
        torch._foreach_copy_(weights, self._control)
        self._t = self._control = None
        return objective

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

    def end_purification(self) -> None:
        """Take the point of the last curve; raise if it is not the last, or is where the curve began."""
        stages = self.args.stages()
        if self.stage != len(stages) - 1:
            raise RuntimeError(f"training stopped in stage {self.stage + 1} of {len(stages)}: the model is not purified")
        aligned, _ = self._ends()
        self._leave_curve()
        if not relative_distance(aligned, self._weights()) > UNMOVED:
            raise RuntimeError("the weights are those of the permuted victim: the model is not purified")

    def facts(self) -> dict:
        """Adds the stages that were begun, the number of groups of units, and the units that stayed in place."""
        return super().facts() | {
            "stage": self.stage,
            "stages": self.history,
            "unit_groups": len(self.structure.groups),
            "fixed_units": self.structure.fixed,
        }

    def write_files(self, folder: Path, state_dict: dict | None = None) -> None:
        """Adds the endpoints of the curve."""
        super().write_files(folder, state_dict)
        if self.start is not None:
            ends = {f"{end}.{n}": t.cpu().clone() for end in ("start", "end") for n, t in getattr(self, end).items()}
            save_file(ends, folder / ENDPOINTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        manifest = json.loads((folder / MANIFEST).read_text())
        self.stage, self.history, self.start, self.end = manifest["stage"], manifest["stages"], None, None
        if (folder / ENDPOINTS).is_file():
            ends = load_file(folder / ENDPOINTS, device=str(self.args.device))
            names = self.model.state_dict()
            self.start, self.end = ({n: ends[f"{end}.{n}"] for n in names} for end in ("start", "end"))
