"""FST, Feature Shift Tuning: draw the head anew and keep it away from the old one, so that the features must shift.

Min, Qin, Shen, Cheng: "Towards Stable Backdoor Purification through Feature Shift Tuning", NeurIPS 2023, arXiv 2310.01875:

    min_{theta, w}  E[CE(f(x), y)] + alpha <w, w_ori>    subject to  ||w||_F = C = ||w_ori||_F

with w the head's weight and ``w_ori`` its value in the suspicious model. w and the head's bias start from U(-s, s), s = 1 /
sqrt(in_features); every parameter is trained; after each step ``w <- w C / ||w||`` (not before the first).

Cost: one forward and one backward pass per update, as plain fine-tuning. The defender owns a few labelled images without
triggers. It works on every network whose head can be found; with many classes and few images the new head costs accuracy
(the authors' advice: small alpha, more images). What differs from the authors' code: the cosine is stepped per update, not
per epoch.

FST and D3. On the sphere ``D^2 = 2 C^2 - 2 <w, w_ori>``, so D3 on the head is FST with ``alpha = 1 / (lambda D)`` per unit of
clean loss, which adapts as D grows, and with a hinge on that loss. At a random start D = 1.41 C: ``alpha = 0.71 / (lambda C)``
is the FST to compare with; the authors' alpha is not normalised, its pull grows with C^2. On networks with LayerNorm both
have the same schedule; elsewhere give FST D3's for a comparison on equal terms.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..training.config import PurifyConfig, on_cnns
from ..training.reference import UNMOVED
from ..training.trainer import PurifyTrainer
from .shared import geometry
from .shared.selection import select_weights


@dataclass
class FSTConfig(PurifyConfig):
    """Arguments of FST; on networks with BatchNorm with the paper's schedule.

    Args:
        alpha: alpha >= 0, weight of the inner product against the cross-entropy (nats per squared unit of weight). 0.2, the
            paper's for CIFAR-10; 0.1 for GTSRB, 0.001 for CIFAR-100 and Tiny ImageNet.
        learning_rate: Published: 0.01 for CIFAR-10 and GTSRB; 0.001 for CIFAR-100 and Tiny ImageNet.
        num_train_epochs: Published: 10 for CIFAR-10; 15 elsewhere.
        per_device_train_batch_size: Published: 128, the authors' script.

    Raises:
        ValueError: See `PurifyConfig`.
    """

    output_dir: str | None = field(default="outputs/fst", metadata={"help": "Folder for the purified model."})
    alpha: float = field(
        default=0.2, metadata={"help": "alpha: weight of the inner product with the old head.", "range": ">= 0 and finite"}
    )

    by_network = on_cnns(learning_rate=0.01, num_train_epochs=10, per_device_train_batch_size=128)


def inner_product(weight: Tensor, original: Tensor) -> Tensor:
    """``<w, w_ori>``: the sum of the products of all entries, a scalar."""
    return (weight * original).sum()


def draw_uniform(shape: torch.Size, in_features: int, generator: torch.Generator) -> Tensor:
    """A float32 tensor from U(-s, s) with ``s = 1 / sqrt(in_features)``, drawn on the CPU."""
    return (2 * torch.rand(shape, generator=generator) - 1) / in_features**0.5


class FSTTrainer(PurifyTrainer):
    """Trainer of FST; see `PurifyTrainer` for the arguments and `FSTConfig` for the objective.

    ``w_ori`` is the head of the model as it is handed over: build the trainer from the suspicious model, also when resuming
    from a checkpoint of an interrupted run.

    Raises:
        ValueError: The head cannot be selected (see `select_weights`), or a checkpoint belongs to another suspicious model.
        RuntimeError: After training, when the head has not moved from its new start.
    """

    method = "FST"
    paper = "https://arxiv.org/abs/2310.01875"
    additions = ("cutmix",)
    streams = True

    def prepare(self) -> None:
        """Find the head and keep ``w_ori``."""
        (self.segment,) = select_weights(self.model, "head", self.preprocessing.size)
        self.bias = self.model.get_submodule(self.segment.name.removesuffix(".weight")).bias
        self.reference = self.weight().clone()
        self.radius = self.reference.norm()

    def weight(self) -> Tensor:
        """The head's weight w as a detached view that shares memory with the model."""
        return self.segment.of(self.segment.parameter.detach())

    def start(self) -> None:
        """Draw the head anew."""
        weight, bias = self._drawn()
        self.weight().copy_(weight)
        if self.bias is not None:
            self.bias.detach().copy_(bias)

    def _drawn(self) -> tuple[Tensor, Tensor]:
        """Weight and bias where they start, by the seed."""
        generator = torch.Generator().manual_seed(self.args.seed)
        shape, in_features = self.reference.shape, self.reference[0].numel()
        return tuple(draw_uniform(s, in_features, generator).to(self.reference) for s in (shape, shape[:1]))

    def finish_gradient(self, window_loss: Tensor) -> Tensor:
        """Add ``alpha w_ori``, the gradient of the inner product, and return the whole objective."""
        self.segment.of(self.segment.parameter.grad).add_(self.reference, alpha=self.args.alpha * self.loss_scale)
        return window_loss + self.args.alpha * inner_product(self.weight(), self.reference)

    def optimizer_step(self) -> None:
        """After the optimizer's step, the projection onto the sphere of radius C."""
        geometry.project([self.weight()], [self.radius], "sphere")

    def check_moved(self) -> None:
        """Raise if the head is where it was drawn, brought to the sphere."""
        start, _ = self._drawn()
        moved = (self.weight() - start * (self.radius / start.norm())).norm() / self.radius
        if not moved > UNMOVED:
            raise RuntimeError("the head has not moved: the model is not purified. Check learning_rate and num_train_epochs")

    # What the log and the manifest say ---------------------------------------------------------------------------------

    def relative_distance(self) -> float:
        """``||w - w_ori|| / ||w_ori||``: D3's measure, at most 2 on the sphere."""
        return ((self.weight() - self.reference).norm() / self.radius).item()

    def step_statistics(self) -> dict[str, float]:
        """``distance``: the relative distance of the head, as D3 logs it."""
        return {"distance": self.relative_distance()}

    def facts(self) -> dict[str, Any]:
        """Adds the head with radius and relative distance."""
        distance = self.relative_distance()
        selected = {"name": self.segment.name, "initial_norm": self.radius.item(), "relative_distance": distance}
        return super().facts() | {"selected_weights": [selected]}
