"""FT-SAM: fine-tuning by sharpness-aware minimisation, which shrinks the weights that a backdoor leans on.

Zhu, Wei, Shen, Fan, Wu: "Enhancing Fine-Tuning based Backdoor Defense with Sharpness-Aware Minimization", ICCV 2023, arXiv
2304.11823. Each update solves, to first order,

    min_w  max_{||T^-1 e||_2 <= rho}  L(w + e),    T = diag(|w|),

by ``e = rho T^2 g / ||T g||_2`` at ``g = grad L(w)`` (`training.sam`) and a step of the optimizer along ``grad L(w + e)``.

Cost: two forward and two backward passes per update, twice plain fine-tuning. The defender owns a few labelled images without
triggers, nothing else; the authors draw them class-balanced (`retain_split(..., balanced=True)`). It works on every network.

What differs from the authors' code in BackdoorBench: its learning rate is stepped per batch with a period of 200 batches,
whatever the number of epochs, so that it oscillates; here it is the cosine of all defences, one half period over the whole
run, stepped per update. Its gradient decomposition (off there too) and the eta added to |w| are left out.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..training.config import PurifyConfig
from ..training.trainer import PurifyTrainer


@dataclass
class FTSAMConfig(PurifyConfig):
    """Arguments of FT-SAM; the schedule is the shared one (the authors': 100 epochs, lr 0.01, batch 256, weight decay 5e-4).

    Args:
        rho: rho > 0, size of the neighbourhood in units of the weights themselves. 2, the paper's for CIFAR-10; it takes 8 for
            Tiny ImageNet and GTSRB, all on PreAct-ResNet18.
        label_smoothing: In [0, 1): share of the label's mass spread over all classes in the loss that is minimised. 0.1, the
            authors' code for CIFAR-10 (as the KL divergence to the smoothed label, which has the same gradient); 0 there for
            GTSRB and Tiny ImageNet, and in the paper's formula.

    Raises:
        ValueError: Gradients are accumulated or fp16 is on; see `PurifyConfig`.
    """

    output_dir: str | None = field(default="outputs/ft_sam", metadata={"help": "Folder for the purified model."})
    rho: float = field(default=2.0, metadata={"help": "rho: size of the adaptive neighbourhood.", "range": "> 0 and finite"})
    label_smoothing: float = field(
        default=0.1, metadata={"help": "Share of the label spread over all classes.", "range": "in [0, 1)"}
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.has_whole_gradients:
            raise ValueError("FT-SAM needs whole, unscaled gradients: leave gradient_accumulation_steps at 1 and fp16 off")


class FTSAMTrainer(PurifyTrainer):
    """Trainer of FT-SAM; see `PurifyTrainer` for the arguments.

    The log's ``loss`` is what is minimised, the smoothed loss at ``w + e``; ``clean_loss`` is the cross-entropy at ``w``.

    Raises:
        RuntimeError: After training, when no weight has changed.
    """

    method = "FT-SAM"
    paper = "https://arxiv.org/abs/2304.11823"
    additions = ("cutmix",)
    streams = True

    @property
    def sam_rho(self) -> float:
        """rho: here it is no addition but the method."""
        return self.args.rho

    def clean_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The cross-entropy, while training against the smoothed label: ``(1 - s) CE + s mean_c(-log p_c)``."""
        loss = super().clean_loss(outputs, labels, num_items_in_batch)
        smoothing = self.args.label_smoothing
        if not self.in_training_step or not smoothing:
            return loss
        uniform = -outputs.logits.float().log_softmax(1).mean(1).sum() / num_items_in_batch
        return (1 - smoothing) * loss + smoothing * uniform
