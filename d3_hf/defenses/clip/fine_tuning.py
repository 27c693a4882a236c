"""Fine-tuning by CLIP's own loss, on pairs without triggers: the control of the other defences of a whole CLIP.

    L = 1/2 [InfoNCE(images -> texts) + InfoNCE(texts -> images)]    (Radford et al. 2021, arXiv 2103.00020)

at the model's own scale of cosines, which is trained too and kept at 100 at most. Cost: one forward and one backward pass of
both towers over each pair. The defender owns images with captions. Images are not augmented.
"""

from dataclasses import dataclass, field

from ...training.pairs import PairConfig, PairTrainer


@dataclass
class CLIPFineTuningConfig(PairConfig):
    """Arguments of fine-tuning a CLIP: see `PairConfig`."""

    output_dir: str | None = field(default="outputs/clip_fine_tuning", metadata={"help": "Folder for the purified CLIP."})


class CLIPFineTuningTrainer(PairTrainer):
    """Trainer of fine-tuning by CLIP's loss; see `PairTrainer` for the arguments."""

    args: CLIPFineTuningConfig
    method = "fine-tuning by CLIP's loss"
    paper = "https://arxiv.org/abs/2103.00020"
