"""Distillation: keep the outputs on trusted images near those of the model as it was handed over.

Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531. Per image

    T^2 KL(softmax(z_t / T) || softmax(z / T))

with z_t the logits of the teacher and z those of the model in training. The teacher is the suspicious model itself. On images
without triggers it shows its ordinary behaviour, which the few labels of a retain set cannot spell out; but whatever it answers
there the model is pulled towards, and where a backdoor shows on such images, that is pulled along.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.features import recorded_input
from . import reference

# T, one of the values that Hinton et al. try (1, 2, 5 and 10 in section 4). Fixed: T^2 keeps the gradient's size, so that the
# weight of the whole term is the number to choose.
TEMPERATURE = 2.0


def distillation_losses(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """``T^2 KL(teacher || student)`` per image, in nats.

    Args:
        logits: Of the model in training, (B, C), any float dtype; computed in float32.
        teacher_logits: Of the teacher, (B, C); no gradient should be wanted.

    Returns:
        float32 (B,), at least 0 up to rounding.
    """
    student = F.log_softmax(logits.float() / TEMPERATURE, 1)
    teacher = F.log_softmax(teacher_logits.float() / TEMPERATURE, 1)
    return TEMPERATURE**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


class Teacher:
    """A frozen copy of a model, in evaluation mode with the BatchNorm statistics it has now.

    Args:
        model: What is copied.
        layer: Name of a layer whose input is kept too, see `features`.

    Attributes:
        model: The copy.
        sha256: Fingerprint of its parameters and buffers.
        features: What the layer read of the batch last looked at; None without one.
    """

    def __init__(self, model: nn.Module, layer: str | None = None):
        self.layer, self.features = layer, None
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.sha256 = reference.fingerprint(self.model.state_dict().values())

    @torch.no_grad()
    def look(self, pixel_values: Tensor) -> None:
        """Run the batch (B, 3, h, w) that is to be compared on."""
        if self.layer is None:
            self._logits = self.model(pixel_values=pixel_values).logits
            return
        with recorded_input(self.model.get_submodule(self.layer)) as features:
            self._logits = self.model(pixel_values=pixel_values).logits
        (self.features,) = features

    def losses(self, logits: Tensor) -> Tensor:
        """`distillation_losses` (B,) of a model that ran the batch last looked at."""
        return distillation_losses(logits, self._logits)
