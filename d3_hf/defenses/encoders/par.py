"""PAR, Perturb and Recover: move an encoder's features away from those that it has, while it goes on as it was pretrained.

Singh, Croce, Hein: "Perturb and Recover: Fine-tuning for Effective Backdoor Removal from CLIP", arXiv 2412.00727. With f0 the
suspicious encoder, frozen, and P the mean over the batch of ``||f(x) - f0(x)||^2`` of unit features,

    L = L_pretraining - w h(P),    h(P) = P if P <= tau, else 0 (value and gradient vanish)

Cost: two forward passes and one backward pass over two views of each image, and memory for two encoders. The defender owns
images without triggers, no labels.

What differs from the authors' code: theirs is for CLIP, with the contrastive loss of image and text and a second h for the text
tower. Here an encoder of images stands alone: the pretraining loss is NT-Xent of two views, on the features, since a checkpoint
brings no projector. With ``feature_weight`` 0 it is plain fine-tuning by that loss, the control.
"""

from dataclasses import dataclass, field

from torch import Tensor

from ...training.encoder_losses import batch_cut_off, nt_xent
from ...training.encoders import EncoderConfig, EncoderTrainer
from ...training.features import feature_distances


@dataclass
class PARConfig(EncoderConfig):
    """Arguments of PAR.

    Args:
        feature_weight: w >= 0. 0.5 (authors' code, for each tower).
        feature_threshold: tau in (0, 4]. 2.15 (authors' code), a little past orthogonality, which is 2.
        temperature: Of NT-Xent. 0.5 (SimCLR on CIFAR-10).
    """

    output_dir: str | None = field(default="outputs/par", metadata={"help": "Folder for the purified encoder."})
    feature_weight: float = field(
        default=0.5, metadata={"help": "Weight of the distance of features; 0: plain fine-tuning.", "range": ">= 0 and finite"}
    )
    feature_threshold: float = field(
        default=2.15, metadata={"help": "Squared distance of features beyond which nothing is gained.", "range": "in (0, 4]"}
    )
    temperature: float = field(default=0.5, metadata={"help": "Temperature of NT-Xent.", "range": "> 0 and finite"})


class PARTrainer(EncoderTrainer):
    """Trainer of PAR; see `EncoderTrainer` for the arguments and `PARConfig` for the objective."""

    args: PARConfig
    method = "PAR"
    paper = "https://arxiv.org/abs/2412.00727"
    log_names = ("pretraining_loss", "feature_distance")

    def image_losses(self, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """NT-Xent, less the distance that counts; of an image's two views the mean."""
        first, second = features.chunk(2)
        pretraining = nt_xent(first, second, self.args.temperature)
        distances = feature_distances(features, self.features_before)
        gained = batch_cut_off(distances, self.args.feature_threshold).view(2, -1).mean(0)
        return pretraining - self.args.feature_weight * gained, [pretraining, distances.view(2, -1).mean(0)]
