"""FT and FT-init: plain fine-tuning on the retain set, the controls every other defence is read against.

Both minimise ``E[CE(f(x), y)]`` over all weights. FT is BackdoorBench's ``defense/ft.py``. FT-init draws the head anew first
(Min et al., "Towards Stable Backdoor Purification through Feature Shift Tuning", NeurIPS 2023): it separates what D3 owes to
its warm start from what it owes to the distance.

Cost: one forward and one backward pass per update. The defender owns a few labelled images without triggers, nothing else. FT
works on every network, FT-init on every one whose head can be found.
"""

from dataclasses import dataclass, field

import torch

from ..training.config import PurifyConfig
from ..training.trainer import PurifyTrainer
from .shared import geometry
from .shared.selection import select_weights


@dataclass
class FineTuningConfig(PurifyConfig):
    """Arguments of FT and FT-init.

    Args:
        reinitialize_head: Draw the head's weight anew before training, as D3's ``warm_start="random"`` does (uniform, rescaled
            to its norm; bias kept), seeded by ``seed``: FT-init. The FST authors draw the bias too and do not rescale.
    """

    output_dir: str | None = field(default="outputs/fine_tuned", metadata={"help": "Folder for the tuned model."})
    reinitialize_head: bool = field(default=False, metadata={"help": "FT-init: draw the head's weight anew first."})


class FineTuningTrainer(PurifyTrainer):
    """Trainer of FT and FT-init; see `PurifyTrainer` for the arguments.

    Raises:
        ValueError: FT-init: the head cannot be selected (see `select_weights`).
        RuntimeError: After training, when no weight has changed.
    """

    additions = ("cutmix", "distillation", "average_last", "sam_rho")
    runs_sharded = True
    streams = True

    @property
    def method(self) -> str:
        """FT, or FT-init where the head is drawn anew."""
        return "FT-init" if self.args.reinitialize_head else "FT"

    @property
    def paper(self) -> str:
        """That of FT is BackdoorBench's, that of FT-init FST's."""
        return "https://arxiv.org/abs/2310.01875" if self.args.reinitialize_head else "https://arxiv.org/abs/2206.12654"

    def start(self) -> None:
        """Draw the head anew for FT-init."""
        if self.args.reinitialize_head:
            (segment,) = select_weights(self.plain, "head", self.preprocessing.size)
            weight = segment.of(segment.parameter.detach())
            generator = torch.Generator().manual_seed(self.args.seed)
            weight.copy_(geometry.warm_start(weight.cpu(), "random", generator))
            self.placement.write([segment.parameter])
