"""What a trainer makes of the data sets that it is given."""

from typing import Any

import datasets
from accelerate.utils import gather_object
from transformers import PretrainedConfig, TrainingArguments

from ..data.augmentation import Augmentation
from ..data.preprocessing import Preprocessing
from ..data.retain import held_images, streamed_images
from ..data.streaming import StreamedImages
from ..data.training_images import TrainingImages
from .config import PurifyConfig
from .contract import Defence


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
        ValueError: The labels are not the model's; a stream where the defence takes none, or that cannot be used (see
            `StreamedImages`), or with ``average_last``; cutout for samples that are not augmented here.
    """
    seed = args.seed if args.data_seed is None else args.data_seed
    mean_color = tuple(min(max(round(255 * mean), 0), 255) for mean in preprocessing.mean)
    augmentation = Augmentation(args.crop_padding, args.horizontal_flip, seed, args.cutout, mean_color)
    if isinstance(dataset, datasets.IterableDataset):
        if not defence.streams:
            raise ValueError(f"{defence.method} looks at the retain set as a whole: load it without streaming=True")
        if args.average_last:
            raise ValueError("average_last averages epochs, and a stream has none: leave it out or load without streaming=True")
        return streamed_images(dataset, config, preprocessing, augmentation, (args.process_index, args.world_size))
    images = held_images(dataset, config, preprocessing, augmentation, defence.images_class)
    if args.cutout and not isinstance(images, TrainingImages):
        raise ValueError("cutout is for images that the trainer augments: pass the retain set as a datasets.Dataset")
    return images


def evaluation_images(dataset: Any, config: PretrainedConfig, preprocessing: Preprocessing) -> Any:
    """Bring images to measure ACC on into the form that the loader reads; a ValueError if they are streamed."""
    if isinstance(dataset, datasets.IterableDataset):
        raise ValueError("eval_dataset is measured as a whole: load it without streaming=True")
    return held_images(dataset, config, preprocessing)


def check_same_images(images: Any, args: TrainingArguments) -> None:
    """Raise a ValueError in every process if they hold different images: each draws its share of one common order."""
    if args.world_size > 1:
        known = isinstance(images, TrainingImages | StreamedImages)
        found = gather_object([images.fingerprint() if known else len(images)])
        if len(set(found)) > 1:
            raise ValueError("the processes hold different retain sets: give all of them the same images, count and seed")
