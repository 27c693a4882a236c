"""Base tuning: go back to the public base that the suspicious model was fine-tuned from, or near it, and tune again from there.

With theta_v the suspicious model, theta_b its base and ``tau = theta_v - theta_b``, over the body (all but the head):

    theta_0 = theta_b + keep tau,    then    min_theta  E[CE(f(x), y)] + beta / 2 ||theta - theta_b||^2

``keep > 0`` is the scalar form of Fine-mixing (see `shared.base_start`), under the victim's own head. ``keep = 0`` tunes the
base alone under a head drawn anew, as FT-init does: the control by which every other defence of a fine-tuned model is to be
read, since nothing of the victim's body is left in it. With ``distillation`` the suspicious model teaches: that brings back ACC
that a small retain set cannot give, and what it does to such images (see `PurifyConfig`). The pull to the base is that of RGA
(ICLR 2026, on text).

Cost: as fine-tuning, one forward and one backward pass per update; with ``base_pull`` a copy of the body on the device.
Assumes a few labelled images without triggers, a base that is the ancestor, which is checked (`load_base`), and that has no
backdoor itself, which nothing here can check: a backdoor of the pre-training survives every setting. BatchNorm statistics start
where the weights do.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..models.likely_bases import NO_BASE
from .fine_tuning import FineTuningConfig, FineTuningTrainer
from .shared.base_start import BaseStart
from .shared.selection import select_weights


@dataclass
class BaseTuningConfig(FineTuningConfig):
    """Arguments of base tuning; schedule and additions are those that all defences share.

    Args:
        base_model: Hub id, folder or weights file of what the suspicious model was fine-tuned from, with a head or without, or
            ``"auto"`` to look among the public models of its architecture (see `likely_bases.find_base`);
            required. Whoever names it vouches for it.
        base_revision: Branch, tag or commit of a Hub id; pin a commit to be sure of what is loaded.
        keep: Share in [0, 1] of tau that the start keeps; 0: nothing of the victim's body. Fine-mixing looks for the smallest
            that serves ACC; more keeps more of the backdoor. 0.25 (here): what left none on a pretrained ViT
            (model_cards/vit.md).
        reinitialize_head: Draw the head's weight anew, see `FineTuningConfig`. None (here): where ``keep`` is 0, since the
            head is the victim's own work, which no base can replace; with more it fits the body.
        base_pull: beta >= 0 (nats per squared unit of weight). 0 (here); 0.05 is RGA's, on text.

    Raises:
        ValueError: ``base_model`` is missing; see `PurifyConfig`.
    """

    output_dir: str | None = field(default="outputs/base_tuned", metadata={"help": "Folder for the tuned model."})
    base_model: str | None = field(
        default=None,
        metadata={"help": "Public model that the suspicious one was fine-tuned from: id, folder or file; auto: look for it."},
    )
    base_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base."})
    keep: float = field(default=0.25, metadata={"help": "Share of the fine-tuning that the start keeps.", "range": "in [0, 1]"})
    reinitialize_head: bool | None = field(
        default=None, metadata={"help": "Draw the head's weight anew first; default: where keep is 0."}
    )
    base_pull: float = field(
        default=0.0, metadata={"help": "beta: weight of the squared distance to the base.", "range": ">= 0 and finite"}
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.base_model or self.base_model == NO_BASE:
            raise ValueError("base tuning needs base_model: the public model that the suspicious one was fine-tuned from")
        if self.reinitialize_head is None:
            self.reinitialize_head = self.keep == 0


def add_pull_gradient(gradients: list[Tensor], weights: list[Tensor], base: list[Tensor], coefficient: float) -> Tensor:
    """Add ``coefficient * (theta - theta_b)``, the gradient of ``coefficient / 2 ||theta - theta_b||^2``, in place.

    Returns:
        Scalar tensor ``||theta - theta_b||^2``, over all weights, on their device.
    """
    offsets = torch._foreach_sub(weights, base)
    torch._foreach_add_(gradients, offsets, alpha=coefficient)
    return torch.stack(torch._foreach_norm(offsets)).square().sum()


class BaseTuningTrainer(FineTuningTrainer):
    """Trainer of base tuning; see `PurifyTrainer` for the arguments.

    tau is that of the model as it is handed over: build the trainer from the suspicious model, also when resuming.

    Raises:
        ValueError: The base cannot be loaded or is none of this model (see `load_base`); the head cannot be selected (see
            `select_weights`); a checkpoint belongs to a run from another base or with another ``keep``.
        RuntimeError: After training, when no weight has changed since the start.

    Attributes:
        beginning: Where it starts, see `BaseStart`.
    """

    method = "base tuning"
    paper = "https://arxiv.org/abs/2210.09545"
    runs_sharded = False

    def prepare(self) -> None:
        """Load the base, and refuse what is none of this model."""
        args, size = self.args, self.preprocessing.size
        if args.reinitialize_head:
            select_weights(self.model, "head", size)
        self.beginning = BaseStart(self.model, args.base_model, size, args.base_revision, args.keep)
        # Pairs of a trained weight and where it is pulled to.
        base = self.beginning.base.weights
        self._pulled = [
            (parameter, base[name].to(parameter))
            for name, parameter in self.model.named_parameters()
            if args.base_pull and parameter.requires_grad and name in base
        ]

    def start(self) -> None:
        """Put the body between base and victim, and draw the head anew where that is asked for."""
        self.beginning.place(self.model)
        super().start()

    def announce(self, resumed: bool) -> None:
        """Say what the base is."""
        self.accelerator.print(f"base tuning {self.beginning.said(resumed)}")

    def finish_gradient(self, window_loss: Tensor) -> Tensor:
        """Add the gradient of the pull, known in closed form, to the weights that have one, and return the whole objective."""
        pulled = [(p.grad, p.detach(), origin) for p, origin in self._pulled if p.grad is not None]
        if not pulled:
            return window_loss
        beta = self.args.base_pull
        gradients, weights, base = map(list, zip(*pulled, strict=True))
        return window_loss + beta / 2 * add_pull_gradient(gradients, weights, base, beta * self.loss_scale)

    # The manifest and checkpoints --------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Adds the base, see `BaseStart.facts`."""
        return super().facts() | {"base": self.beginning.facts()}

    def resume_state(self) -> dict[str, Any]:
        """Adds what the start was made of."""
        return super().resume_state() | self.beginning.resume_state()

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Goes on from there; raises a ValueError if the run began elsewhere."""
        super().load_resume_state(state)
        self.beginning.check_resumed(state)
