"""NAD, Neural Attention Distillation: pull the student's attention towards that of a teacher fine-tuned on trusted images.

Li, Lyu, Koren, Lyu, Li, Ma: "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks", ICLR 2021,
arXiv 2101.05930. Teacher: a copy of the victim fine-tuned on the retain set, then fixed. Student: the victim, which minimises

    CE(S(x), y) + sum_l beta_l mean_i (A_l^S(x) - A_l^T(x))_i^2,    A_l = a_l / ||a_l||_2,    a_l,i = sum_c |F_l,c,i|^p

with F_l the features that stage l hands on, c its channels and i its positions.

Stages are found by running one black image, not by names: those of a convolutional network that reduce the image, or blocks
of a ViT, whose patch tokens are compared; see `stages`. Any other structure (windowed attention, for example) is refused.

Cost: the teacher's fine-tuning once; then per update two forward passes and one backward pass (fine-tuning: one and one), and
memory for two models. The defender owns a few labelled images without triggers.

What differs from the authors' and BackdoorBench's code: a third term there compares 1x1 maps, which are all equal, and is
dropped; the learning rate follows the shared schedule in place of their hard-coded steps (BackdoorBench: 0.01, from epoch 20
on 1e-4); whatever the features' size, the mean over positions makes the same beta weigh less on a finer grid, as in theirs.
"""

import contextlib
import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...training.config import PurifyConfig
from ...training.trainer import PurifyTrainer
from ..shared.apart import trainer_apart
from .stages import find_stages, record_features


@dataclass
class NADConfig(PurifyConfig):
    """Arguments of NAD; the schedule of teacher and student is the shared one.

    Args:
        attention_weights: beta_l >= 0 of the last stages, in the order of the network; as many stages are compared as there
            are weights. 500 and 1000: BackdoorBench's for the last two stages of PreAct-ResNet18, on 32x32 images.
        attention_power: p >= 1. 2 (paper, BackdoorBench).
        teacher_epochs: >= 1, passes over the retain set of the teacher's fine-tuning. 10 (paper, BackdoorBench).

    Raises:
        ValueError: Activation checkpointing is on, which would run the stages twice; see `PurifyConfig`.
    """

    output_dir: str | None = field(default="outputs/nad", metadata={"help": "Folder for the purified model."})
    attention_weights: list[float] = field(
        default_factory=lambda: [500.0, 1000.0],
        metadata={"help": "beta: weight of each of the last stages, in order.", "range": ">= 0 and finite"},
    )
    attention_power: float = field(
        default=2.0, metadata={"help": "p: power of the features in an attention map.", "range": ">= 1"}
    )
    teacher_epochs: float = field(
        default=10, metadata={"help": "Passes over the retain set to make the teacher.", "range": ">= 1"}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.activation_checkpointing:
            raise ValueError("NAD reads features while the model runs: leave activation_checkpointing off")


# The mathematics -------------------------------------------------------------------------------------------------------


def attention_map(features: Tensor, power: float) -> Tensor:
    """Map features (B, channels, positions) to float32 (B, positions): ``sum_c |F_c|^p``, of L2 norm 1 per image."""
    return F.normalize(features.float().abs().pow(power).sum(1), dim=1)


def attention_distance(student: Tensor, teacher: Tensor, power: float) -> Tensor:
    """Mean over positions of the squared difference of two attention maps; features (B, channels, positions) to (B,)."""
    return (attention_map(student, power) - attention_map(teacher, power)).square().mean(1)


# The trainer -----------------------------------------------------------------------------------------------------------


class NADTrainer(PurifyTrainer):
    """Trainer of NAD; see `PurifyTrainer` for the arguments and `NADConfig` for the objective.

    `train` makes the teacher first. The teacher is not stored in checkpoints but made again when resuming, from the same seed:
    build the trainer from the suspicious model then too.

    Raises:
        ValueError: The network's stages are not found or fewer than the weights; a checkpoint belongs to another model.
        RuntimeError: After training, when no weight has changed.

    Attributes:
        stages: Whose attention is compared.
        teacher: The suspicious model, from the beginning of `train` on fine-tuned.
    """

    method = "NAD"
    paper = "https://arxiv.org/abs/2101.05930"

    def prepare(self) -> None:
        """Find the stages, and copy the suspicious model for the teacher."""
        found, weights = find_stages(self.model, self.preprocessing.size), self.args.attention_weights
        if len(weights) > len(found):
            raise ValueError(
                f"attention_weights has {len(weights)} values and {type(self.model).__name__} {len(found)} stages "
                f"({', '.join(stage.name for stage in found)}): give at most one value per stage"
            )
        self.stages = found[-len(weights) :]
        self.teacher, self._is_taught = copy.deepcopy(self.model), False

    # The teacher -------------------------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        """As the base class; the features of both models are recorded while it runs."""
        with contextlib.ExitStack() as self._recording:
            return super().train(*args, **kwargs)

    def announce(self, resumed: bool) -> None:
        """Make the teacher, say what is compared, and begin to record it."""
        if not self._is_taught:
            self._teach()
        theirs = [replace(stage, module=self.teacher.get_submodule(stage.name)) for stage in self.stages]
        self._student_features, self._teacher_features = (
            self._recording.enter_context(record_features(stages)) for stages in (self.stages, theirs)
        )
        names = ", ".join(f"{stage.name} ({stage.grid[0]}x{stage.grid[1]})" for stage in self.stages)
        self.accelerator.print(f"NAD compares the attention of {names}")

    def _teach(self) -> None:
        epochs, model = self.args.teacher_epochs, copy.deepcopy(self.teacher)  # which stays as it is if this is interrupted
        self.accelerator.print(f"NAD fine-tunes the teacher for {epochs:g} epochs")
        with trainer_apart(self, PurifyTrainer, model, epochs) as teaching:
            teaching.train()
        self.teacher, self._is_taught = model.requires_grad_(False).eval(), True

    # The loss ----------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """While training the teacher sees the batch first."""
        if self.in_training_step:
            with torch.no_grad(), self.accelerator.autocast():
                self.teacher(pixel_values=inputs["pixel_values"])
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def sample_loss(self, cross_entropy: Tensor) -> Tensor:
        """The cross-entropy and the weighted distances of the image's attention maps."""
        pairs = [(self._student_features[stage.name], self._teacher_features[stage.name]) for stage in self.stages]
        distances = [attention_distance(*pair, self.args.attention_power) for pair in pairs]
        weighted = sum(weight * d for weight, d in zip(self.args.attention_weights, distances, strict=True))
        self._attention_loss = weighted.detach().mean()
        return cross_entropy + weighted

    # What the log and the manifest say ---------------------------------------------------------------------------------

    def step_statistics(self) -> dict[str, float]:
        """``attention_loss``: the weighted distances of the latest micro-batch of the main process."""
        return {"attention_loss": self._attention_loss.item()}

    def facts(self) -> dict[str, Any]:
        """Adds the stages that are compared."""
        stages = [{"name": s.name, "grid": s.grid, "form": "patch tokens" if s.tokens else "feature map"} for s in self.stages]
        return super().facts() | {"attention_stages": stages}
