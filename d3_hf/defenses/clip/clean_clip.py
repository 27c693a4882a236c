"""CleanCLIP: CLIP's loss, and each modality learning for itself, which a trigger tied to a text does not survive.

Bansal et al.: "CleanCLIP: Mitigating Data Poisoning Attacks in Multimodal Contrastive Learning", ICCV 2023, arXiv 2303.03323.
With I~ a view of the image I, T~ a changed caption T, and InfoNCE in one direction at one scale of cosines,

    L = w1/2 [InfoNCE(I -> T) + InfoNCE(T -> I)] + w2/2 [InfoNCE(I -> I~) + InfoNCE(T -> T~)]

Cost: one forward and one backward pass of both towers over twice the pairs. The defender owns images with captions. It was
reported to fail on victims whose pretraining had a term of one modality, and on structured triggers (arXiv 2311.14948,
2412.00727).

What differs from the authors' code: captions are changed by dropping and swapping words, in place of EDA, which also puts in
synonyms of WordNet; views are those of `data.views`.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...data.views import view
from ...training.encoder_losses import clip_losses, info_nce
from ...training.pairs import PairConfig, PairTrainer

DROPPED = 0.1  # of the words of a caption: EDA's share (Wei and Zou 2019, arXiv 1901.11196), as in the authors' code


@dataclass
class CleanCLIPConfig(PairConfig):
    """Arguments of CleanCLIP.

    Args:
        pair_weight: w1 >= 0, of CLIP's own loss. 1 (authors' code).
        modality_weight: w2 >= 0, of the terms of one modality. 1 (authors' code).
    """

    output_dir: str | None = field(default="outputs/clean_clip", metadata={"help": "Folder for the purified CLIP."})
    pair_weight: float = field(default=1.0, metadata={"help": "Weight of CLIP's own loss.", "range": ">= 0 and finite"})
    modality_weight: float = field(
        default=1.0, metadata={"help": "Weight of the terms of one modality.", "range": ">= 0 and finite"}
    )


class CleanCLIPTrainer(PairTrainer):
    """Trainer of CleanCLIP; see `PairTrainer` for the arguments and `CleanCLIPConfig` for the objective."""

    args: CleanCLIPConfig
    method = "CleanCLIP"
    paper = "https://arxiv.org/abs/2303.03323"
    log_names = ("pretraining_loss", "image_loss", "text_loss")

    def inputs_of(self, images: Tensor, captions: list[str], generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """The pairs as they are, then a view of each image and a changed form of each caption."""
        changed = [changed_caption(caption, generator) for caption in captions]
        return torch.cat([images, view(images, generator)]), [*captions, *changed]

    def pair_losses(self, images: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, list[Tensor]]:
        """CLIP's loss on the pairs as they are, and the terms of one modality."""
        (plain, views), (captions, changed) = images.chunk(2), texts.chunk(2)
        pretraining = clip_losses(plain, captions, scale)
        of_images, of_texts = info_nce(plain, views, scale), info_nce(captions, changed, scale)
        losses = self.args.pair_weight * pretraining + self.args.modality_weight * (of_images + of_texts) / 2
        return losses, [pretraining, of_images, of_texts]


def changed_caption(caption: str, generator: torch.Generator) -> str:
    """A caption with two of its words swapped and each dropped with a chance of a tenth; one at least stays.

    Args:
        caption: Words between spaces; a single one stays as it is.
        generator: CPU generator of the draws.
    """
    words = caption.split()
    if len(words) < 2:
        return caption
    one, other = torch.randperm(len(words), generator=generator)[:2].tolist()
    words[one], words[other] = words[other], words[one]
    kept = (torch.rand(len(words), generator=generator) >= DROPPED).tolist()
    return " ".join(word for word, stays in zip(words, kept, strict=True) if stays) or words[0]
