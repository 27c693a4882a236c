"""Distillation into a fresh student, after MIMIC: the suspicious encoder teaches an untrained copy of its network.

Han et al.: "Mutual Information Guided Backdoor Mitigation for Pre-trained Encoders" (MIMIC), IEEE TIFS 2025. The student starts
from weights of its own and so carries nothing of the teacher but what it shows on images without triggers:

    L = NT-Xent(student's views) - w s(f(x), f0(x))

Cost: as PAR's, and many passes: the student knows nothing. With few images a large network stays far below its teacher.

What differs from the authors' code: their third term, attention maps of four layers weighted by mutual information, is left
out, and so are its weights; NT-Xent is on the features, without a projector; the schedule is the shared one.
"""

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.wrapper import Wrapped
from ...training.encoder_losses import nt_xent
from ...training.encoders import EncoderConfig, EncoderTrainer


@dataclass
class MimicConfig(EncoderConfig):
    """Arguments of the distillation.

    Args:
        teacher_weight: w > 0. 10, this project's, not tuned.
        temperature: Of NT-Xent. 0.5 (SimCLR on CIFAR-10).
    """

    output_dir: str | None = field(default="outputs/mimic", metadata={"help": "Folder for the purified encoder."})
    teacher_weight: float = field(
        default=10.0, metadata={"help": "Weight of the likeness to the suspicious encoder.", "range": "> 0 and finite"}
    )
    temperature: float = field(default=0.5, metadata={"help": "Temperature of NT-Xent.", "range": "> 0 and finite"})


class MimicTrainer(EncoderTrainer):
    """Trainer of the distillation; see `EncoderTrainer` for the arguments and `MimicConfig` for the objective.

    Raises:
        ValueError: The encoder is a wrapped module, of which no new one can be made.
    """

    args: MimicConfig
    method = "MIMIC-like distillation"
    paper = "https://arxiv.org/abs/2406.03508"
    log_names = ("pretraining_loss", "similarity")

    def prepare(self) -> None:
        """Refuse what no student can be made of."""
        super().prepare()
        if isinstance(self.plain, Wrapped):
            raise ValueError("mimic makes a student from the configuration, which says nothing of a wrapped module: take par")

    def start(self) -> None:
        """Put an untrained student in the suspicious encoder's place."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.args.seed)
            student = type(self.plain)(copy.deepcopy(self.plain.config))
        self.plain.load_state_dict(student.state_dict())

    def image_losses(self, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """NT-Xent of the student, less its likeness to the teacher; of an image's two views the mean."""
        first, second = features.chunk(2)
        pretraining = nt_xent(first, second, self.args.temperature)
        alike = F.cosine_similarity(features.float(), self.features_before, dim=1).view(2, -1).mean(0)
        return pretraining - self.args.teacher_weight * alike, [pretraining, alike]
