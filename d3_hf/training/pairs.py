"""`PairTrainer`: the trainer of a whole CLIP, on pairs of image and caption.

It is `EncoderTrainer` with a second tower: batches carry captions beside images, tokenised as they come, and the loss compares
the two. Without more it is fine-tuning by CLIP's own loss.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from ..data.pairs import Pairs, TrainingPairs
from ..data.preprocessing import Preprocessing
from ..models.clip import tokens
from ..models.kinds import is_clip
from ..models.source import image_processor_of
from .encoder_losses import clip_losses
from .encoders import EncoderConfig, EncoderTrainer

HIGHEST_SCALE = 100.0  # of cosines (Radford et al. 2021, section 2.5)


@dataclass
class PairConfig(EncoderConfig):
    """Arguments that all trainings of a whole CLIP share: CleanCLIP's schedule (authors' code), fixed, no rule's.

    One schedule for all methods, so that plain fine-tuning is the control of the others.

    Args:
        optim, learning_rate, weight_decay: AdamW at 1e-5, 0.1.
        num_train_epochs, per_device_train_batch_size: 10, 64: the negatives of a caption are those of its micro-batch.
        warmup_steps: A tenth of the updates, here; there 50 updates of many thousand, of which few pairs have no more.
    """

    output_dir: str | None = field(default="outputs/clip", metadata={"help": "Folder for the CLIP and its evidence."})
    optim: str = field(default="adamw_torch", metadata={"help": "Optimizer, any name of TrainingArguments."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Highest learning rate.", "range": ">= 0 and finite"})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay.", "range": ">= 0 and finite"})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Updates of warm-up, below 1 their share.", "range": ">= 0 and finite"}
    )
    num_train_epochs: float = field(default=10, metadata={"help": "Passes over the pairs.", "range": ">= 0 and finite"})
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Pairs per device and micro-batch, among which they are compared.", "range": ">= 1"}
    )
    cutmix: float = field(default=0.0, metadata={"help": "Not for pairs."})

    def __post_init__(self):
        super().__post_init__()
        if self.per_device_train_batch_size < 2:
            raise ValueError("per_device_train_batch_size must be at least 2: a pair is compared with others of its batch")


class PairTrainer(EncoderTrainer):
    """Trains both towers of a CLIP on pairs; a defence overrides `pair_losses`, and `inputs_of` where it changes the pairs.

    Losses compare pairs within a micro-batch of one process: accumulation and further processes add no negatives.

    Args:
        model: A whole CLIP; `load_clip` makes one.
        args: The method's configuration.
        train_dataset: Pairs without triggers: `Pairs`, or a `datasets.Dataset` with the columns ``image`` and ``text``.
        eval_dataset: None, as for `EncoderTrainer`; `measure_clip` measures.
        processing_class: Image processor. Default: the one `load_clip` left on the model.
        kwargs: See `PurifyTrainer`.

    Raises:
        ValueError: The model is no whole CLIP or has no tokenizer; images come without captions; or see `EncoderTrainer`.
    """

    args: PairConfig
    trains_pairs = True
    log_names = ("pretraining_loss",)

    def __init__(
        self,
        model: PreTrainedModel,
        args: PairConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs,
    ):
        if is_clip(model):
            tokens(model, ["a"])  # that there is no tokenizer is said before images are decoded
        processing_class = processing_class or image_processor_of(model)
        pairs = train_dataset
        if pairs is not None and not isinstance(pairs, TrainingPairs) and processing_class is not None:
            pairs = self.held(pairs_of(pairs), Preprocessing.from_processor(processing_class))
        super().__init__(model, args, pairs, eval_dataset, processing_class, **kwargs)
        self.retain_indices = pairs.sample_ids.tolist() if isinstance(pairs, TrainingPairs) else None

    def held(self, pairs: Pairs, preprocessing: Preprocessing) -> TrainingPairs:
        """The pairs in memory, images at the model's size."""
        return TrainingPairs.from_pairs(pairs, preprocessing)

    def prepare(self) -> None:
        """Nothing is kept of the model as it is now; a method that needs it overrides this with `EncoderTrainer.prepare`."""

    def training_batch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the model is shown: images, normalised, and tokens of captions."""
        inputs = Trainer._prepare_inputs(self, dict(inputs))
        captions = [self.train_dataset.captions[row] for row in inputs["captions"].tolist()]
        images, texts = self.inputs_of(inputs["pixel_values"], captions, self.generator())
        words = {name: values.to(images.device) for name, values in tokens(self.plain, texts).items()}
        return {"pixel_values": self.preprocessing.normalize(images), **words, "labels": inputs["labels"]}

    def inputs_of(self, images: Tensor, captions: list[str], generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """The images, uint8 (N, 3, h, w), and the M texts that go through the towers: here the B pairs as they are."""
        return images, captions

    def clean_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """This micro-batch's share of the window's mean of `pair_losses`."""
        losses, terms = self.pair_losses(outputs.image_embeds, outputs.text_embeds, self.plain.logit_scale.exp())
        sums = [term.detach().sum() for term in terms]
        self._sums += torch.stack([*sums, torch.full_like(losses[0], len(losses)).detach()])
        return losses.sum() / num_items_in_batch

    def pair_losses(self, images: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Each pair's loss (B,), and the terms (B,) that the log shows by `log_names`.

        Args:
            images: Features (N, width) of what `inputs_of` gave, projected.
            texts: The same of the texts, (M, width).
            scale: The model's own, which cosines are multiplied by.
        """
        losses = clip_losses(images, texts, scale)
        return losses, [losses]

    def optimizer_step(self) -> None:
        """Keep the scale of cosines at 100 at most."""
        with torch.no_grad():
            self.plain.logit_scale.clamp_(max=math.log(HIGHEST_SCALE))

    def write_own_files(self, folder: Any) -> None:
        """The tokenizer, so that `AutoProcessor` finds all it needs."""
        self.plain.tokenizer.save_pretrained(folder)

    def facts(self) -> dict[str, Any]:
        """Adds that the model is a CLIP."""
        return super().facts() | {"kind": "clip"}


def pairs_of(pairs: Any) -> Pairs:
    """Pairs in memory; a ValueError for images without captions and for what is no data set of pairs."""
    if isinstance(pairs, Pairs):
        return pairs
    if isinstance(pairs, datasets.Dataset):
        return Pairs.from_dataset(pairs)
    raise ValueError(
        "a CLIP is trained on images with captions: pass Pairs, or a datasets.Dataset with the columns `image` and `text`, not "
        f"a {type(pairs).__name__}; captioned(images) makes captions of class names"
    )
