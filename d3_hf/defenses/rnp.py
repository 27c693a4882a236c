"""RNP, Reconstructive Neuron Pruning: unlearn the clean task, see which filters recover it, prune those that are not needed.

Li, Lyu, Ma, Wang, Jiang: "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023, arXiv 2305.14876.

1. Unlearn: theta_u maximises the cross-entropy of a copy of the victim on clean images until its accuracy falls to a level.
2. Recover: with theta_u fixed, masks m in [0, 1] on the BatchNorm scales minimise the cross-entropy, min_m L(m gamma_u).
3. Prune: gamma = 0 in the victim where m <= threshold.

Cost: one forward and backward pass per update in both stages, then at most 20 forward passes over 20 % of the retain set.
Assumes a few clean images (the authors use 1 % of the training set) and a network with BatchNorm. Differs from the published
code: the threshold is chosen on held-out retain images (BackdoorBench saves 0.7 and also lists the best by test ASR); no
gradient clip, since theirs runs before the backward pass and does nothing; unlearning that misses its level is an error.
"""

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from .shared.masks import MaskConfig, MaskPruningTrainer, masked
from .shared.unlearning import unlearned_copy


@dataclass
class RNPConfig(MaskConfig):
    """Arguments of RNP; see also `MaskConfig`.

    Args:
        learning_rate: Of the masks; 0.04, which is the authors' 0.2 times the factor 0.2 that they put before the loss.
        num_train_epochs: Passes of the recovery; 20 (BackdoorBench).
        unlearn_learning_rate: Of the ascent, > 0; 0.01, with momentum 0.9 and weight decay 5e-4 (authors' code).
        unlearn_epochs: At most so many passes of the ascent, >= 1; 20 (BackdoorBench).
        unlearn_accuracy: Stop the ascent when the accuracy over an epoch's batches is at most this, in [0, 1), or that of
            always answering the most frequent class; 0.2 (authors' code, on ten classes).
    """

    output_dir: str | None = field(default="outputs/rnp", metadata={"help": "Folder for the pruned model."})
    learning_rate: float = field(default=0.04, metadata={"help": "Learning rate of the masks."})
    num_train_epochs: float = field(default=20, metadata={"help": "Passes of the recovery over four fifths of the retain set."})
    unlearn_learning_rate: float = field(
        default=0.01, metadata={"help": "Learning rate of the unlearning.", "range": "> 0 and finite"}
    )
    unlearn_epochs: int = field(default=20, metadata={"help": "Largest number of passes of the unlearning.", "range": ">= 1"})
    unlearn_accuracy: float = field(
        default=0.2, metadata={"help": "Accuracy at which the unlearning stops.", "range": "in [0, 1)"}
    )


class RNPTrainer(MaskPruningTrainer):
    """Trainer of RNP; see `PurifyTrainer` for the arguments and `MaskPruningTrainer` for further errors.

    Raises:
        RuntimeError: The clean task is not unlearned within ``unlearn_epochs``.
        FloatingPointError: Unlearning diverged.
    """

    method = "RNP"
    paper = "https://arxiv.org/abs/2305.14876"

    def start(self) -> None:
        """Unlearn the clean task on a copy of the victim."""
        self.unlearned, self.unlearned_facts = unlearned_copy(self, weight_decay=5e-4, evaluate=False)
        self.unlearned_scales = {
            name: (self.unlearned[f"{name}.weight"], self.unlearned[f"{name}.bias"]) for name in self.scales
        }

    def mask_loss(self, masks: dict[str, Tensor], batch: dict) -> Tensor:
        """Cross-entropy of the unlearned network with masked scales."""
        logits = self.training_logits_with(self.unlearned | masked(self.unlearned_scales, masks), batch)
        return F.cross_entropy(logits, batch["labels"])

    def prune(self, masks: dict[str, Tensor]) -> None:
        """Prune the victim; the unlearned copy is no longer needed."""
        super().prune(masks)
        self.found["unlearning"] = self.unlearned_facts
        del self.unlearned, self.unlearned_scales
