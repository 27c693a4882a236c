"""TSC for encoders: the rounds of `tsc`, with a loss that needs no labels and with the features left where they are.

Peng et al., "Circumventing Backdoor Space via Weight Symmetry", ICML 2025, arXiv 2506.07467, which has a form for SimCLR. All
of it is in `tsc/trainer.py` but these two:

* The curve's control point is trained by NT-Xent of two views of each image. Both views go through the network in one pass and
  so at the same t.
* What the encoder returns is what heads and probes read, and no exchange may change it. The units of the last residual stream,
  of a ViT the only one, stay in place: channels inside of blocks, neurons of MLPs and heads of attention move, and of a CNN the
  streams of all stages but the last.

Cost: as TSC's, over two views of each image. The defender owns images without triggers, no labels.

What differs from the authors' code, for images of CIFAR-10's size: NT-Xent is on the features, since a checkpoint brings no
projector, and so nothing has to warm one up; two views there are of two networks, each with a t of its own; every batch is a
step, where there a step waits for images that a small set does not have; ViTs are an extension of this project. On a network
without BatchNorm no statistics are estimated again after a curve, and nothing else makes up for it. None of the defaults is
measured yet.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...data.retain import retain_batches
from ...data.views import view
from ...training.config import on_cnns
from ...training.encoder_losses import nt_xent
from ...training.encoders import EncoderConfig, EncoderTrainer
from ..tsc.trainer import TSCConfig, TSCTrainer


@dataclass
class EncoderTSCConfig(TSCConfig, EncoderConfig):
    """Arguments of TSC for encoders; those that are not listed are `TSCConfig`'s. (README) and (code) as there, of SimCLR.

    Args:
        temperature: Of NT-Xent. 0.5 (code).
        curve_position: 0.25 (README); 0.4 is the default of their code.
        learning_rate, optim: Of a curve, by the network's rule: with LayerNorm that of fine-tuning, without its warm-up; else
            0.002 (README), with AdamW for their Adam.
        per_device_train_batch_size: 256 (code).
        weight_decay: 1e-6 (code).
        curve_decay: 5e-5 (code).
        finetune_learning_rate: 5e-5 (code).
        crop_padding: 0: images are seen as views.

    Raises:
        ValueError: See `TSCConfig` and `EncoderConfig`.
    """

    output_dir: str | None = field(default="outputs/encoder_tsc", metadata={"help": "Folder for the purified encoder."})
    temperature: float = field(default=0.5, metadata={"help": "Temperature of NT-Xent.", "range": "> 0 and finite"})
    curve_position: float = field(default=0.25, metadata={"help": "t*: the point taken of each curve.", "range": "in (0, 1)"})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Initial learning rate of a curve; by the network's rule.", "range": "> 0 and finite"}
    )
    optim: str | None = field(
        default=None, metadata={"help": "Optimizer, any name of TrainingArguments; by the network's rule."}
    )
    optim_args: str | None = field(default=None, metadata={"help": "Arguments of the optimizer."})
    weight_decay: float = field(default=1e-6, metadata={"help": "Weight decay, on a curve that of its control point."})
    curve_decay: float = field(
        default=5e-5, metadata={"help": "L2 regularisation of the point on the curve.", "range": ">= 0 and finite"}
    )
    finetune_learning_rate: float = field(
        default=5e-5, metadata={"help": "Initial learning rate of fine-tuning.", "range": "> 0 and finite"}
    )
    crop_padding: int = field(default=0, metadata={"help": "Not for encoders, which see views.", "range": ">= 0 and finite"})

    by_network = on_cnns(optim="adamw_torch", optim_args=None, learning_rate=2e-3)


class EncoderTSCTrainer(TSCTrainer, EncoderTrainer):
    """Trainer of TSC for encoders: stages as `TSCTrainer` has them, images and loss as `EncoderTrainer`.

    Raises:
        ValueError: See `TSCTrainer` and `EncoderTrainer`.
        RuntimeError: See `TSCTrainer`.
    """

    args: EncoderTSCConfig
    log_names = ("pretraining_loss",)

    def seen_before(self, images: Tensor) -> Tensor:
        """Normalise uint8 (N, 3, h, w)."""
        return self.preprocessing.normalize(images)

    def image_losses(self, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """NT-Xent at the point of the curve; of an image's two views the mean."""
        losses = nt_xent(*features.chunk(2), self.args.temperature)
        return losses, [losses]

    def _pixels(self, purpose: str) -> Iterator[Tensor]:
        """A view of each retain image, in order: every process sees the same."""
        args, generator = self.args, torch.Generator().manual_seed(self.args.seed)
        is_silent = args.disable_tqdm or not self.is_world_process_zero()
        size = args.per_device_train_batch_size
        for batch in retain_batches(self.train_dataset, size, self.data_collator, purpose, is_silent=is_silent):
            yield self.preprocessing.normalize(view(batch["pixel_values"].to(args.device), generator))
