"""Linear probing: only the head is trained, on features that stay as they are.

The control that asks whether a backdoor sits in the head alone; mode ``lp`` of Min et al., "Towards Stable Backdoor
Purification through Feature Shift Tuning", NeurIPS 2023, arXiv 2310.01875. The loss is the cross-entropy.

Cost: one forward pass per update and a backward pass through the head only. The defender owns a few labelled images without
triggers. It works on every network whose head can be found. The authors' code also lets BatchNorm statistics move and rescales
the head's weight to its first norm after each step; here the features do not move and the head is free.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

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

    def __post_init__(self):
        super().__post_init__()
        if self.batch_norm == "train":
            raise ValueError("linear probing keeps the features as they are: batch_norm must be frozen or eval, not train")


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

    def __init__(self, model, args: LinearProbingConfig, *arguments, **kwargs):
        super().__init__(model, args, *arguments, **kwargs)
        self.head_name = find_head(model, self.preprocessing.size)
        self.head = model.get_submodule(self.head_name)
        model.requires_grad_(False)
        self.head.requires_grad_(True)
        self._start = [p.detach().clone() for p in self.head.parameters()]

    def end_purification(self) -> None:
        """Raise if the head has not changed."""
        if all(torch.equal(p, start) for p, start in zip(self.head.parameters(), self._start, strict=True)):
            raise RuntimeError("the head has not changed: the model is not purified. Check learning_rate and num_train_epochs")

    def facts(self) -> dict[str, Any]:
        """Adds the names of the trained parameters."""
        return super().facts() | {"trained": [f"{self.head_name}.{name}" for name, _ in self.head.named_parameters()]}
