"""What a trainer makes of the data sets that it is given."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from transformers import PretrainedConfig, TrainingArguments
from transformers.trainer_utils import has_length

from ..data.augmentation import Augmentation
from ..data.preprocessing import Preprocessing
from ..data.retain import held_images, streamed_images, unlabelled_images, yields_ready
from ..data.samples import LABELS, check_kind
from ..data.streaming import StreamedImages
from ..data.training_images import TrainingImages
from .config import PurifyConfig
from .contract import Defence

logger = logging.getLogger(__name__)


def training_images(
    dataset: Any, defence: Defence, config: PretrainedConfig, args: PurifyConfig, preprocessing: Preprocessing
) -> Any:
    """Bring a retain set into the form that the loader reads; samples that are ready for the model stay as they are.

    Args:
        dataset: See `PurifyTrainer`.
        defence: Says how images are held and whether they may be streamed.
        config: Of the model whose classes the labels must be.
        args: The defence's configuration: augmentation, seeds, this process.
        preprocessing: Of the model.

    Raises:
        ValueError: The labels are not the model's; it is no data set, or of samples of another form; a stream where the defence
            takes none, or that cannot be used (see `StreamedImages`), or with ``average_last``; cutout or horizontal_flip for
            samples that are not augmented here.
    """
    seed = args.seed if args.data_seed is None else args.data_seed
    mean_color = tuple(min(max(round(255 * mean), 0), 255) for mean in preprocessing.mean)
    augmentation = Augmentation(args.crop_padding, args.horizontal_flip, seed, args.cutout, mean_color)
    if isinstance(dataset, torch.utils.data.IterableDataset):
        if not defence.streams:
            raise ValueError(f"{defence.method} looks at the retain set as a whole: load it without streaming=True")
        if args.average_last:
            raise ValueError("average_last averages epochs, and a stream has none: leave it out or load without streaming=True")
    if isinstance(dataset, datasets.IterableDataset) and not yields_ready(dataset):
        return streamed_images(dataset, config, preprocessing, augmentation, (args.process_index, args.world_size))
    images = held_images(dataset, config, preprocessing, augmentation, defence.images_class, "train_dataset")
    if isinstance(images, TrainingImages) or images is None:
        return images
    if unfit := [option for option in ("cutout", "horizontal_flip") if getattr(args, option)]:
        raise ValueError(f"{unfit[0]} is for images that the trainer augments: pass the retain set as a datasets.Dataset")
    return images


def evaluation_images(dataset: Any, config: PretrainedConfig, preprocessing: Preprocessing, name: str = "eval_dataset") -> Any:
    """Bring images to measure ACC on into the form that the loader reads.

    Args:
        dataset: As a retain set; or a dict of such, by the name that goes into the metrics' prefix.
        config: Of the model whose classes the labels must be.
        preprocessing: Of the model.
        name: What errors call the data set.

    Raises:
        ValueError: It is a stream, or see `held_images`.
    """
    if isinstance(dataset, dict):
        return {key: evaluation_images(part, config, preprocessing, f"{name}[{key!r}]") for key, part in dataset.items()}
    if isinstance(dataset, datasets.IterableDataset):
        raise ValueError(f"{name} is measured as a whole: load it without streaming=True")
    return held_images(dataset, config, preprocessing, name=name)


def prediction_images(dataset: Any, config: PretrainedConfig, preprocessing: Preprocessing) -> Any:
    """Bring images to predict into the form that the loader reads: as `evaluation_images`, also pictures without labels."""
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
        names = set(dataset.column_names)
        if "image" in names and not names & {"pixel_values", *LABELS}:
            return unlabelled_images(dataset, preprocessing)
    if isinstance(dataset, dict):
        check_kind(dataset, "test_dataset")
    return evaluation_images(dataset, config, preprocessing, "test_dataset")


def check_samples(images: Any, collate: Callable[[Any], Any], preprocessing: Preprocessing, name: str) -> None:
    """Make a batch of the first sample, so that what the trainer cannot read is said before it begins.

    Args:
        images: What `training_images` or `evaluation_images` returned; those of a generator are not touched.
        collate: The trainer's collator.
        preprocessing: Of the model, by which pixels that are not normalised are known.
        name: What errors call the data set.

    Raises:
        ValueError: A batch has no ``pixel_values`` or no labels, or see `Collator`.
    """
    if isinstance(images, dict):
        for key, part in images.items():
            check_samples(part, collate, preprocessing, f"{name}[{key!r}]")
    if images is None or isinstance(images, dict | torch.utils.data.IterableDataset):
        return
    try:
        batch = collate(images.__getitems__([0]) if isinstance(images, TrainingImages) else [images[0]])
    except ValueError as error:
        is_transformed = isinstance(images, datasets.Dataset) and images.format["type"] == "custom"
        how = " (with_format(None) takes its transform off)" if is_transformed else ""
        raise ValueError(f"{name}{how}: {error}") from error
    columns = batch if isinstance(batch, Mapping) else {}
    for column, dimensions in (("pixel_values", 4), ("labels", 1)):
        if not isinstance(found := columns.get(column), torch.Tensor) or found.ndim != dimensions:
            shapes = {"pixel_values": "(B, 3, h, w)", "labels": "int64 (B,)"}
            held = ", ".join(map(str, columns)) or f"a {type(batch).__name__}"
            raise ValueError(f"{name} needs a tensor column `{column}` in every batch, {shapes[column]}; found {held}")
    pixels = batch["pixel_values"]
    low, high = preprocessing.normalize(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    looks_raw = pixels.dtype != torch.uint8 and 0 <= pixels.min() and pixels.max() <= 1
    if looks_raw and (low.max() < 0 or high.min() > 1):
        logger.warning(
            "%s yields pixel_values in [0, 1], taken as ready for the model, which was trained on some in [%.2f, %.2f]: "
            "normalise them with mean %s and std %s, or hand over the pictures",
            name, low.min(), high.max(), preprocessing.mean, preprocessing.std,
        )  # fmt: skip


def check_evaluation(args: TrainingArguments, eval_dataset: Any, reports_accuracy: bool) -> None:
    """Refuse an evaluation that would fail in the middle of the training.

    Args:
        args: What to evaluate and when.
        eval_dataset: Of the trainer: images, or a dict of them.
        reports_accuracy: Whether the metrics are the trainer's own.

    Raises:
        ValueError: ``eval_on_start`` without images; ``metric_for_best_model`` names no metric that there will be.
    """
    if args.eval_on_start and eval_dataset is None:
        raise ValueError("eval_on_start measures eval_dataset: pass one")
    if (metric := args.metric_for_best_model) is None or eval_dataset is None:
        return
    prefixes = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else [""]
    offered = [f"eval_{prefix}{of}" for prefix in prefixes for of in ("accuracy", "loss")]
    asked = f"eval_{metric.removeprefix('eval_')}"
    if reports_accuracy and asked not in offered or not any(asked.startswith(f"eval_{prefix}") for prefix in prefixes):
        raise ValueError(f"metric_for_best_model={metric} will not be measured: it can be {', '.join(offered)}")


def check_same_images(images: Any, args: TrainingArguments) -> None:
    """Raise a ValueError in every process if they hold different images: each draws its share of one common order."""
    if args.world_size > 1:
        known, counted = isinstance(images, TrainingImages | StreamedImages), has_length(images)
        found = gather_object([images.fingerprint() if known else len(images) if counted else None])
        if len(set(found)) > 1:
            raise ValueError("the processes hold different retain sets: give all of them the same images, count and seed")
