"""A start between the public base and the suspicious model that was fine-tuned from it.

With theta_v the suspicious model and theta_b the base, over the body (all but the head):

    theta_0 = theta_b + keep (theta_v - theta_b)

the scalar form of Fine-mixing (Zhang, Lyu, Ma, Wang, Sun, "Fine-mixing: Mitigating Backdoors in Fine-tuned Language Models",
Findings of EMNLP 2022, arXiv 2210.09545), which keeps a random share of the coordinates where this keeps a share of each.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...models.base import load_base
from ...models.likely_bases import AUTO, find_base
from ...publishing.manifest import public_source
from ...training.reference import fingerprint


def between(base: list[Tensor], weights: list[Tensor], keep: float) -> list[Tensor]:
    """``theta_b + keep (theta_v - theta_b)`` of each weight: the base itself at 0, theta_v itself at 1."""
    return torch._foreach_lerp(base, weights, keep)


class BaseStart:
    """The start of one suspicious model.

    Args:
        model: The suspicious model, as it was handed over.
        base_model: What it was fine-tuned from: Hub id, folder or file, or ``"auto"``, see `find_base`.
        size: (H, W) of the images that the model accepts.
        revision: Branch, tag or commit of a Hub id.
        keep: Share in [0, 1] of ``theta_v - theta_b``.

    Raises:
        ValueError: The base cannot be loaded or is none of this model, see `load_base` and `find_base`; or a revision is given
            of one that is to be found.

    Attributes:
        base: The base, see `Base`.
    """

    def __init__(self, model: PreTrainedModel, base_model: str, size: tuple[int, int], revision: str | None, keep: float):
        if base_model == AUTO and revision is not None:
            raise ValueError(
                "base_revision is for a base that is named, and base_model is auto: name it, or leave base_revision out"
            )
        self.base = find_base(model, size) if base_model == AUTO else load_base(model, base_model, size, revision)
        self.keep = keep
        self._sha256 = fingerprint(self.base.weights.values())

    @torch.no_grad()
    def place(self, model: nn.Module) -> None:
        """Put the body of the suspicious model at the start, in place; BatchNorm statistics too."""
        state = model.state_dict()
        body = [state[name] for name in self.base.weights]
        base = [weight.to(own) for weight, own in zip(self.base.weights.values(), body, strict=True)]
        torch._foreach_copy_(body, between(base, body, self.keep))

    def said(self, resumed: bool) -> str:
        """What the base is, in a line."""
        return (
            f"{'goes on' if resumed else 'starts'} from {self.base.source.name}: the suspicious model is at relative distance "
            f"{self.base.relative_distance:.3f} from it, of which the start keeps {self.keep:g}"
        )

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it: where the base came from, how far the suspicious model is from it, what was kept."""
        return public_source(self.base.source) | {"relative_distance": self.base.relative_distance, "keep": self.keep}

    def resume_state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"base_sha256": self._sha256, "keep": self.keep}

    def check_resumed(self, state: dict[str, Any]) -> None:
        """Raise a ValueError if a checkpoint's run began elsewhere."""
        if state["base_sha256"] != self._sha256:
            raise ValueError("belongs to a run from another base, or from none: resume with its base_model and base_revision")
        if state["keep"] != self.keep:
            raise ValueError(f"belongs to a run that began with keep {state['keep']}: resume with it")
