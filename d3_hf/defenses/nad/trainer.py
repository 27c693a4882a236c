"""NAD, Neural Attention Distillation: pull the student's attention towards that of a teacher fine-tuned on trusted images.

Li, Lyu, Koren, Lyu, Li, Ma: "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks", ICLR 2021,
arXiv 2101.05930. Teacher: a copy of the victim fine-tuned on the retain set, then fixed. Student: the victim, which minimises

    CE(S(x), y) + sum_l beta_l mean_i (A_l^S(x) - A_l^T(x))_i^2,    A_l = a_l / ||a_l||_2,    a_l,i = sum_c |F_l,c,i|^p

with F_l the features that stage l hands on, c its channels and i its positions.

Stages are found by running one black image, not by names. Of a convolutional network a stage is the last module in the row
from image to logits that gives features of one height and width, at least two of them; later features of one pixel are
left out, because a normalised map of one number is constant. Of a ViT, and this form is this project's, the features are the
hidden states of the patch tokens; class and register tokens are left out. The last block is left out as well, since a head
that reads the class token never sees what it does to the patches; the others are divided into four stages like a ResNet's.
Any other structure (windowed attention, for example) is refused.

Cost: the teacher's fine-tuning once; then per update two forward passes and one backward pass (fine-tuning: one and one), and
memory for two models. The defender owns a few labelled images without triggers.

What differs from the authors' and BackdoorBench's code: a third term there compares 1x1 maps, which are all equal, and is
dropped; the learning rate follows the shared schedule in place of their hard-coded steps (BackdoorBench: 0.01, from epoch 20
on 1e-4); whatever the features' size, the mean over positions makes the same beta weigh less on a finer grid, as in theirs.
"""

import copy
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ...training import reference
from ...training.config import PurifyConfig, check_options
from ...training.trainer import MANIFEST, PurifyTrainer
from .stages import find_stages, recorded


@dataclass
class NADConfig(PurifyConfig):
    """Arguments of NAD; the schedule of teacher and student is the shared one.

    Args:
        attention_weights: beta_l >= 0 of the last stages, in the order of the network; as many stages are compared as there
            are weights. 500 and 1000: BackdoorBench's for the last two stages of PreAct-ResNet18, on 32x32 images.
        attention_power: p >= 1. 2 (paper, BackdoorBench).
        teacher_epochs: >= 1, passes over the retain set of the teacher's fine-tuning. 10 (paper, BackdoorBench).

    Raises:
        ValueError: A value is out of range; activation checkpointing is on, which would run the stages twice.
    """

    output_dir: str | None = field(default="outputs/nad", metadata={"help": "Folder for the purified model."})
    attention_weights: list[float] = field(
        default_factory=lambda: [500.0, 1000.0], metadata={"help": "beta: weight of each of the last stages, in order."}
    )
    attention_power: float = field(default=2.0, metadata={"help": "p: power of the features in an attention map."})
    teacher_epochs: float = field(default=10, metadata={"help": "Passes over the retain set to make the teacher."})

    def __post_init__(self):
        super().__post_init__()
        if not self.attention_weights or not all(0 <= weight < math.inf for weight in self.attention_weights):
            raise ValueError(f"attention_weights must be numbers >= 0, at least one; got {self.attention_weights}")
        if not 1 <= self.attention_power < math.inf:
            raise ValueError(f"attention_power must be >= 1 and finite; got {self.attention_power}")
        check_options(self, ">= 1", "teacher_epochs")
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
    """

    method = "NAD"
    paper = "https://arxiv.org/abs/2101.05930"

    def __init__(self, model, args: NADConfig, *arguments, **kwargs):
        super().__init__(model, args, *arguments, **kwargs)
        found = find_stages(model, self.preprocessing.size)
        if len(args.attention_weights) > len(found):
            raise ValueError(
                f"attention_weights has {len(args.attention_weights)} values and {type(model).__name__} {len(found)} stages "
                f"({', '.join(stage.name for stage in found)}): give at most one value per stage"
            )
        self.stages = found[-len(args.attention_weights) :]
        self.teacher: nn.Module | None = None
        self._start = reference.remembered(model)
        self.reference_sha256 = reference.fingerprint(model.state_dict().values())

    def train(self, *args, **kwargs):
        """Make the teacher, then train the student; arguments and result are those of `Trainer.train`."""
        if self.teacher is None:
            self.teacher = self._make_teacher()
        theirs = [replace(stage, module=self.teacher.get_submodule(stage.name)) for stage in self.stages]
        with recorded(self.stages) as self._student_features, recorded(theirs) as self._teacher_features:
            return super().train(*args, **kwargs)

    def _make_teacher(self) -> nn.Module:
        # A copy, not a new instance: making one would reset the accelerator's state.
        args = copy.copy(self.args)
        args.num_train_epochs, args.max_steps = self.args.teacher_epochs, -1
        args.save_strategy, args.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
        args.push_to_hub = args.eval_on_start = args.load_best_model_at_end = False
        self.accelerator.print(f"NAD fine-tunes the teacher for {args.num_train_epochs:g} epochs")
        teaching = PurifyTrainer(
            copy.deepcopy(self.model), args, self.train_dataset, None, self.processing_class, data_collator=self.data_collator
        )
        teaching.train()
        return teaching.model.requires_grad_(False).eval()

    def begin_purification(self, resumed: bool) -> None:
        """Say what is compared."""
        names = ", ".join(f"{stage.name} ({stage.grid[0]}x{stage.grid[1]})" for stage in self.stages)
        self.accelerator.print(f"NAD compares the attention of {names}")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """While training the teacher sees the batch first."""
        if self.model.training:
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

    def step_statistics(self) -> dict[str, float]:
        """``attention_loss``: the weighted distances of the latest micro-batch of the main process."""
        return {"attention_loss": self._attention_loss.item()}

    def end_purification(self) -> None:
        """Raise if no weight changed."""
        reference.check_changed(self.model, self._start)

    def facts(self) -> dict[str, Any]:
        """Adds the stages that are compared and the suspicious model's fingerprint."""
        stages = [{"name": s.name, "grid": s.grid, "form": "patch tokens" if s.tokens else "feature map"} for s in self.stages]
        return super().facts() | {"attention_stages": stages, "reference_sha256": self.reference_sha256}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        reference.check_fingerprint(
            Path(resume_from_checkpoint) / MANIFEST,
            self.reference_sha256,
            needed="the suspicious model that the run began with, from which the teacher is made again",
        )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
