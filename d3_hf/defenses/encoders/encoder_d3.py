"""D3 for encoders: as far from the suspicious encoder, in feature space, as what images mean to each other allows.

This project's own form of D3 (Wei, Liu, Zha, ICCV 2025, arXiv 2411.09585) where there is neither head nor label:

    min   -w mean h(d(x)) + lambda mean max(0, R(x) - epsilon),    d(x) = ||f(x) - f0(x)||^2 of unit features

with f0 the suspicious encoder and h the cut-off at tau, image by image. In place of the loss on labels stands R, how far the
cosines among a batch's views are from those that f0 gives them (`relation_losses`): a head that is trained afterwards asks for
these and not for where the features lie. It is zero at the start, so epsilon is what may be lost.

At f = f0 both gradients are zero: the matrices start beside it, by D3's ``near`` step of 1e-3 of their norm.

Cost: as PAR's. The defender owns images without triggers, no labels. What a rotation of all features can do, the distance does
not see: it may grow while the backdoor stays. The defaults were not tuned; on the one victim that they were measured on, PAR
keeps more ACC for as little ASR (model_cards/encoders.md).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...training.encoder_losses import relation_losses
from ...training.encoders import EncoderConfig, EncoderTrainer
from ...training.features import cut_off, feature_distances
from ..shared import geometry


@dataclass
class EncoderD3Config(EncoderConfig):
    """Arguments of D3 for encoders.

    Args:
        feature_weight: w > 0. 1, here: only its ratio to lambda counts.
        feature_threshold: tau in (0, 4]. 2.15: PAR's.
        lambda_relations: lambda > 0. 10, this project's, not tuned: R is at most 4 and mostly below 0.1.
        epsilon: >= 0, mean squared difference of cosines that is free. 0.01, this project's, not tuned: a tenth, squared.
    """

    output_dir: str | None = field(default="outputs/encoder_d3", metadata={"help": "Folder for the purified encoder."})
    feature_weight: float = field(
        default=1.0, metadata={"help": "Weight of the distance of features.", "range": "> 0 and finite"}
    )
    feature_threshold: float = field(
        default=2.15, metadata={"help": "Squared distance of features beyond which nothing is gained.", "range": "in (0, 4]"}
    )
    lambda_relations: float = field(
        default=10.0, metadata={"help": "Weight of what is lost of the relations among images.", "range": "> 0 and finite"}
    )
    epsilon: float = field(
        default=0.01, metadata={"help": "Squared difference of cosines that is free.", "range": ">= 0 and finite"}
    )


class EncoderD3Trainer(EncoderTrainer):
    """Trainer of D3 for encoders; see `EncoderTrainer` for the arguments and `EncoderD3Config` for the objective."""

    args: EncoderD3Config
    method = "D3 for encoders"
    paper = "https://arxiv.org/abs/2411.09585"
    log_names = ("relation_loss", "feature_distance")

    def start(self) -> None:
        """Take every trained matrix off its place by a small step."""
        generator = torch.Generator().manual_seed(self.args.seed)
        with torch.no_grad():
            for parameter in self.plain.parameters():
                if parameter.requires_grad and parameter.ndim > 1 and parameter.any():
                    parameter.copy_(geometry.warm_start(parameter.cpu(), "near", generator))

    def image_losses(self, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The hinge of the relations, less the distance that counts; of an image's two views the mean."""
        relations, distances = (
            relation_losses(features, self.features_before),
            feature_distances(features, self.features_before),
        )
        hinges = torch.relu(relations - self.args.epsilon)
        gained = cut_off(distances, self.args.feature_threshold)
        losses = self.args.lambda_relations * hinges - self.args.feature_weight * gained
        return losses.view(2, -1).mean(0), [relations.view(2, -1).mean(0), distances.view(2, -1).mean(0)]
