"""Base tuning: go back to the public base that the suspicious model was fine-tuned from, or near it, and tune again from there.

With theta_v the suspicious model, theta_b its base and ``tau = theta_v - theta_b``, over the body (all but the head):

    theta_0 = theta_b + keep tau,    then    min_theta  E[CE(f(x), y)] + beta / 2 ||theta - theta_b||^2

The head is drawn anew, as FT-init does. ``keep = 0`` tunes the base alone: the control by which every other defence of a
fine-tuned model is to be read, since nothing of the victim's body is left in it. ``keep > 0`` is the scalar form of Fine-mixing
(Zhang, Lyu, Ma, Wang, Sun, "Fine-mixing: Mitigating Backdoors in Fine-tuned Language Models", Findings of EMNLP 2022, arXiv
2210.09545), which keeps a random share of the victim's coordinates where this keeps a share of each. With ``distillation`` the
suspicious model teaches: that brings back ACC that a small retain set cannot give, and perhaps what it does to such images (see
`PurifyConfig`). The pull to the base is that of RGA (ICLR 2026, on text).

Cost: as fine-tuning, one forward and one backward pass per update; with ``base_pull`` a copy of the body on the device.
Assumes a few labelled images without triggers, a base that is the ancestor, which is checked (`load_base`), and that has no
backdoor itself, which nothing here can check: a backdoor of the pre-training survives every setting. BatchNorm statistics start
where the weights do.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..models.base import load_base
from ..publishing.manifest import public_source
from ..training.reference import fingerprint
from .fine_tuning import FineTuningConfig, FineTuningTrainer
from .shared.selection import select_weights


@dataclass
class BaseTuningConfig(FineTuningConfig):
    """Arguments of base tuning; schedule and additions are those that all defences share.

    Args:
        base_model: Hub id, folder or weights file of what the suspicious model was fine-tuned from, with a head or without;
            required. Whoever names it vouches for it.
        base_revision: Branch, tag or commit of a Hub id; pin a commit to be sure of what is loaded.
        keep: Share in [0, 1] of tau that the start keeps. 0 (here): nothing of the victim's body. Fine-mixing looks for the
            smallest that serves ACC; more keeps more of the backdoor.
        reinitialize_head: Draw the head's weight anew, see `FineTuningConfig`. True (here): the head is the victim's own work,
            which no base can replace.
        base_pull: beta >= 0 (nats per squared unit of weight). 0 (here); 0.05 is RGA's, on text.

    Raises:
        ValueError: ``base_model`` is missing; see `PurifyConfig`.
    """

    output_dir: str | None = field(default="outputs/base_tuned", metadata={"help": "Folder for the tuned model."})
    base_model: str | None = field(
        default=None, metadata={"help": "Public model that the suspicious one was fine-tuned from: Hub id, folder or file."}
    )
    base_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base."})
    keep: float = field(default=0.0, metadata={"help": "Share of the fine-tuning that the start keeps.", "range": "in [0, 1]"})
    reinitialize_head: bool = field(default=True, metadata={"help": "Draw the head's weight anew first."})
    base_pull: float = field(
        default=0.0, metadata={"help": "beta: weight of the squared distance to the base.", "range": ">= 0 and finite"}
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.base_model:
            raise ValueError("base tuning needs base_model: the public model that the suspicious one was fine-tuned from")


def between(base: list[Tensor], weights: list[Tensor], keep: float) -> list[Tensor]:
    """``theta_b + keep (theta_v - theta_b)`` of each weight: the base itself at 0, theta_v itself at 1."""
    return torch._foreach_lerp(base, weights, keep)


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
        base: The base, see `Base`.
    """

    method = "base tuning"
    paper = "https://arxiv.org/abs/2210.09545"
    runs_sharded = False

    def prepare(self) -> None:
        """Load the base, and refuse what is none of this model."""
        args, size = self.args, self.preprocessing.size
        if args.reinitialize_head:
            select_weights(self.model, "head", size)
        self.base = load_base(self.model, args.base_model, size, args.base_revision)
        self._base_sha256 = fingerprint(self.base.weights.values())
        # Pairs of a trained weight and where it is pulled to.
        self._pulled = [
            (parameter, self.base.weights[name].to(parameter))
            for name, parameter in self.model.named_parameters()
            if args.base_pull and parameter.requires_grad and name in self.base.weights
        ]

    def start(self) -> None:
        """Put the body between base and victim, and draw the head anew."""
        state = self.model.state_dict()
        body = [state[name] for name in self.base.weights]
        base = [weight.to(own) for weight, own in zip(self.base.weights.values(), body, strict=True)]
        torch._foreach_copy_(body, between(base, body, self.args.keep))
        super().start()

    def announce(self, resumed: bool) -> None:
        """Say what the base is."""
        base, begins = self.base, "goes on" if resumed else "starts"
        self.accelerator.print(
            f"base tuning {begins} from {base.source.name}: the suspicious model is at relative distance "
            f"{base.relative_distance:.3f} from it, of which the start keeps {self.args.keep:g}"
        )

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
        """Adds the base: where it came from, how far the suspicious model is from it, how much of that was kept."""
        found = {"relative_distance": self.base.relative_distance, "keep": self.args.keep}
        return super().facts() | {"base": public_source(self.base.source) | found}

    def resume_state(self) -> dict[str, Any]:
        """Adds what the start was made of."""
        return super().resume_state() | {"base_sha256": self._base_sha256, "keep": self.args.keep}

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Goes on from there; raises a ValueError if the run began elsewhere."""
        super().load_resume_state(state)
        if state["base_sha256"] != self._base_sha256:
            raise ValueError("belongs to a run from another base: resume with its base_model and base_revision")
        if state["keep"] != self.args.keep:
            raise ValueError(f"belongs to a run that began with keep {state['keep']}: resume with it")
