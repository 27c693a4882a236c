"""Linear probing: only the head is trained, on features that stay as they are.

The control that asks whether a backdoor sits in the head alone; mode ``lp`` of Min et al., "Towards Stable Backdoor
Purification through Feature Shift Tuning", NeurIPS 2023, arXiv 2310.01875. The loss is the cross-entropy.

Cost: one forward pass per update and a backward pass through the head only. The defender owns a few labelled images without
triggers. It works on every network whose head can be found. The authors' code also lets BatchNorm statistics move and rescales
the head's weight to its first norm after each step; here the features do not move and the head is free.
"""

from dataclasses import dataclass, field
from typing import Any

from ..models.head import find_head
from ..training.config import PurifyConfig
from ..training.trainer import PurifyTrainer


@dataclass
class LinearProbingConfig(PurifyConfig):
    """Arguments of linear probing: `PurifyConfig` with the features kept.

    Args:
        batch_norm: ``"frozen"`` or ``"eval"``, the same here: running statistics are used and kept, scale and shift are not
            trained.

    Raises:
        ValueError: ``batch_norm="train"``, which would move the features; see `PurifyConfig`.
    """

    output_dir: str | None = field(default="outputs/linear_probing", metadata={"help": "Folder for the tuned model."})
    batch_norm: str = field(
        default="frozen", metadata={"help": "BatchNorm while training: frozen or eval.", "choices": ("frozen", "eval")}
    )


class LinearProbingTrainer(PurifyTrainer):
    """Trainer of linear probing; see `PurifyTrainer` for the arguments.

    All parameters but the head's weight and bias are frozen in ``model`` and stay so after training.

    Raises:
        ValueError: The head cannot be found; see `find_head`.
        RuntimeError: After training, when the head has not changed.
    """

    method = "linear probing"
    paper = "https://arxiv.org/abs/2310.01875"
    streams = True

    def prepare(self) -> None:
        """Freeze all but the head."""
        self.head_name = find_head(self.model, self.preprocessing.size)
        self.head = self.model.get_submodule(self.head_name)
        self.model.requires_grad_(False)
        self.head.requires_grad_(True)

    def facts(self) -> dict[str, Any]:
        """Adds the names of the trained parameters."""
        return super().facts() | {"trained": [f"{self.head_name}.{name}" for name, _ in self.head.named_parameters()]}
