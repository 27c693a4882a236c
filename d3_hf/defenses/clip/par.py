"""PAR on both towers of a CLIP: away from the suspicious features, up to a threshold, while the pretraining loss is minimised.

Singh, Croce, Hein: "Perturb and Recover: Fine-tuning for Effective Backdoor Removal from CLIP", arXiv 2412.00727. With f0 and
g0 the suspicious image and text tower, frozen, and P the means over the batch of ``||f(x) - f0(x)||^2`` and of
``||g(t) - g0(t)||^2`` of unit features,

    L = L_CLIP - w [h(P_images) + h(P_texts)],    h(P) = P if P <= tau, else 0 (value and gradient vanish)

Cost: two forward passes and one backward pass of both towers over each pair, and memory for two models. The defender owns
images with captions. `encoders.par` is the form for an image tower alone.

What differs from the authors' code: images are not augmented; the schedule is the one that all defences of a CLIP share here,
far fewer pairs and a higher learning rate than theirs. With ``feature_weight`` 0 it is `clip_fine_tuning`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...training.encoder_losses import batch_cut_off, clip_losses
from ...training.encoders import EncoderTrainer
from ...training.features import feature_distances
from ...training.pairs import PairConfig, PairTrainer


@dataclass
class CLIPPARConfig(PairConfig):
    """Arguments of PAR on both towers.

    Args:
        feature_weight: w >= 0. 0.5 (authors' code, for each tower).
        feature_threshold: tau in (0, 4]. 2.15 (authors' code), a little past orthogonality, which is 2.
    """

    output_dir: str | None = field(default="outputs/clip_par", metadata={"help": "Folder for the purified CLIP."})
    feature_weight: float = field(
        default=0.5, metadata={"help": "Weight of the distances of features; 0: plain fine-tuning.", "range": ">= 0 and finite"}
    )
    feature_threshold: float = field(
        default=2.15, metadata={"help": "Squared distance of features beyond which nothing is gained.", "range": "in (0, 4]"}
    )


class CLIPPARTrainer(PairTrainer):
    """Trainer of PAR on both towers; see `PairTrainer` for the arguments and `CLIPPARConfig` for the objective."""

    args: CLIPPARConfig
    method = "PAR on both towers"
    paper = "https://arxiv.org/abs/2412.00727"
    log_names = ("pretraining_loss", "image_distance", "text_distance")

    def prepare(self) -> None:
        """Keep the CLIP as it is now."""
        EncoderTrainer.prepare(self)

    def training_batch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As the base class; the features that the CLIP had for the pairs before are kept."""
        batch = super().training_batch(inputs)
        with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
            before = self.before(**{name: values for name, values in batch.items() if name != "labels"})
        self.images_before, self.texts_before = before.image_embeds, before.text_embeds
        return batch

    def pair_losses(self, images: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, list[Tensor]]:
        """CLIP's loss, less the distances that count."""
        pretraining = clip_losses(images, texts, scale)
        distances = [feature_distances(images, self.images_before), feature_distances(texts, self.texts_before)]
        gained = sum(batch_cut_off(of_tower, self.args.feature_threshold) for of_tower in distances)
        return pretraining - self.args.feature_weight * gained, [pretraining, *distances]
