"""`EncoderTrainer`: the trainer of encoders, on images without labels.

It is `PurifyTrainer` in all but the loss: images come in and are made whole, files appear whole, runs resume exactly, manifest
and card are written. The images' labels, where a data set has some, are dropped before anything looks at them; batches carry
zeros in their place, by which the Trainer counts images.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from ..data import retain
from ..data.images import RawImages, decode_rows, stacked
from ..data.preprocessing import Preprocessing
from ..data.training_images import TrainingImages
from ..data.views import view
from ..models.kinds import encode, features_in, is_clip
from ..models.source import image_processor_of
from .config import PurifyConfig
from .trainer import PurifyTrainer

AUGMENTATIONS = ("crop_padding", "horizontal_flip", "cutout")  # of classifiers; an encoder sees views


@dataclass
class EncoderConfig(PurifyConfig):
    """Arguments that all trainings of encoders share: `PurifyConfig` without what is for labels.

    Args:
        crop_padding: 0: images are not augmented as a classifier's are; see `views`.

    Raises:
        ValueError: ``crop_padding``, ``horizontal_flip`` or ``cutout`` is given; or see `PurifyConfig`.
    """

    output_dir: str | None = field(default="outputs/encoder", metadata={"help": "Folder for the encoder and its evidence."})
    crop_padding: int = field(default=0, metadata={"help": "Not for encoders, which see views.", "range": ">= 0 and finite"})

    def __post_init__(self):
        super().__post_init__()
        if unfit := [name for name in AUGMENTATIONS if getattr(self, name)]:
            raise ValueError(f"{unfit[0]} is for classifiers, and an encoder is trained on views: leave it out")


class EncoderTrainer(PurifyTrainer):
    """Trains an encoder on two views of each image; a defence overrides `image_losses`.

    Losses that compare images do so within a micro-batch of one process: accumulation and further processes add no negatives.

    Args:
        model: An encoder; `load_encoder` makes one of any source.
        args: The method's configuration.
        train_dataset: Images without triggers: `RawImages`, or a `datasets.Dataset` with an Image column named ``image``.
            Labels are not looked at.
        processing_class: Image processor. Default: the one `load_encoder` left on the model.
        kwargs: See `PurifyTrainer`.

    Raises:
        ValueError: The model is a classifier; the images are of another form; there is one, or one in each batch; there is an
            ``eval_dataset`` (encoders are measured by probes, see `measure_encoder`); or see `PurifyTrainer`.

    Attributes:
        before: The encoder as it was handed over, frozen, in evaluation mode.
    """

    args: EncoderConfig
    trains_encoders = True
    trains_pairs = False  # see `pairs.PairTrainer`

    def __init__(
        self,
        model: PreTrainedModel,
        args: EncoderConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs,
    ):
        if is_clip(model) != self.trains_pairs:
            wanted = "a whole CLIP, which load_clip makes" if self.trains_pairs else "one tower alone, which load_encoder takes"
            raise ValueError(f"{type(model).__name__}: {self.method} trains {wanted}")
        if eval_dataset is not None:
            raise ValueError("an encoder has no ACC of its own: leave eval_dataset out, measure_encoder measures it by probes")
        processing_class = processing_class or image_processor_of(model)
        images = train_dataset
        if images is not None and processing_class is not None and not isinstance(images, TrainingImages):
            images = without_labels(images)
            images = self.images_class.from_raw(images, Preprocessing.from_processor(processing_class))
        super().__init__(model, args, images, None, processing_class, **kwargs)
        self.retain_indices = retain.column(train_dataset, "index")
        self.model_accepts_loss_kwargs = False  # an encoder computes no loss
        if self.train_dataset is not None and min(len(self.train_dataset), self.args.per_device_train_batch_size) < 2:
            raise ValueError(
                "images of a batch are told apart, and there is one in each: give more images, or a larger "
                "per_device_train_batch_size"
            )

    def prepare(self) -> None:
        """Keep the encoder as it is now."""
        self.before = copy.deepcopy(self.plain).requires_grad_(False).eval()

    def training_batch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Two views of each image, the first ones of all before the second ones, and what the encoder made of them before."""
        inputs = Trainer._prepare_inputs(self, dict(inputs))
        generator = self.generator()
        pixels = torch.cat([view(inputs["pixel_values"], generator) for _ in range(2)])
        return {"pixel_values": self.seen_before(pixels), "labels": inputs["labels"]}

    def generator(self) -> torch.Generator:
        """Of this micro-batch's draws: by seed, number of the batch and process alone, so that a resumed run repeats them."""
        place = self.batch_number * self.args.world_size + self.args.process_index
        return torch.Generator().manual_seed((self.args.seed * 1_000_003 + place) % (2**63 - 25))

    def seen_before(self, images: Tensor) -> Tensor:
        """Normalise uint8 (N, 3, h, w), and keep the features (N, width) that the encoder had for them before."""
        pixels = self.preprocessing.normalize(images)
        with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
            self.features_before = encode(self.before, pixels).float()
        return pixels

    def clean_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """This micro-batch's share of the window's mean of `image_losses`."""
        losses, terms = self.image_losses(features_in(self.plain, outputs))
        sums = [term.detach().sum() for term in terms]
        self._sums += torch.stack([*sums, torch.full_like(losses[0], len(losses)).detach()])
        return losses.sum() / num_items_in_batch

    def image_losses(self, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Each image's loss (B,), and the terms (B,) that the log shows by `log_names`.

        Args:
            features: (2 B, width) of both views; those of the encoder as it was are in ``features_before``.
        """
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Adds that the model is an encoder."""
        return super().facts() | {"kind": "encoder"}


def without_labels(images: Any) -> RawImages:
    """Images with zeros for labels.

    Args:
        images: `RawImages`; or a `datasets.Dataset` with a column ``image``.

    Raises:
        ValueError: It is neither, or a picture cannot be decoded.
    """
    if isinstance(images, datasets.Dataset) and "image" in images.column_names and images.format["type"] != "custom":
        pixels, index = stacked(decode_rows(images)), None
        if (rows := retain.column(images, "index")) is not None:
            index = torch.tensor(rows)
    elif isinstance(images, RawImages):
        pixels, index = images.images, images.index
    else:
        raise ValueError(
            f"an encoder is trained on images: pass RawImages or a datasets.Dataset with a column `image`, not a "
            f"{type(images).__name__}"
        )
    return RawImages(pixels, torch.zeros(len(pixels), dtype=torch.int64), ["unknown"], index)
