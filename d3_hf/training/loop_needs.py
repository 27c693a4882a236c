"""What a network needs of the loop that trains it: a last batch of more than one image, and DDP that knows what is unused."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from ..data.streaming import StreamedImages
from ..models.probe import logits_reach_all, smallest_training_batch


def leaves_one_image(trainer: Any) -> bool:
    """Whether each epoch ends in a batch of one image that the network cannot be trained on.

    With several processes accelerate fills the last batches up with images of the first ones, unless ``even_batches`` is off.

    Args:
        trainer: A `PurifyTrainer` that has not begun: its model, images, batch size, processes and ``batch_norm``.

    Raises:
        ValueError: No batch can be trained on (one image in each, or in all); or see `smallest_training_batch`.
    """
    model, args, images, image_size = trainer.model, trainer.args, trainer.train_dataset, trainer.preprocessing.size
    if images is None:
        return False
    with trainer.accelerator.autocast():
        if smallest_training_batch(model, image_size, args.batch_norm) == 1:
            return False
    size, count = args.per_device_train_batch_size, len(images) if has_length(images) else None
    if args.accelerator_config.split_batches:
        size //= args.world_size
    if size <= 1 or count == 1:
        what = "per_device_train_batch_size is 1" if size <= 1 else "there is 1 image"
        raise ValueError(
            f"BatchNorm in {type(model).__name__} cannot normalise one image of {image_size[0]}x{image_size[1]} pixels alone, "
            f"and {what}: give more, or set batch_norm to eval"
        )
    is_filled = args.world_size > 1 and args.accelerator_config.even_batches
    return count is not None and count % size == 1 and not is_filled


def expect_unused_parameters(trainer: Any) -> None:
    """Let DDP look for parameters without a gradient where there are some: in its second step it would fail otherwise."""
    args, accelerator = trainer.args, trainer.accelerator
    if args.world_size > 1 and not trainer.is_fsdp_enabled:
        with accelerator.autocast():
            if not logits_reach_all(trainer.model, trainer.preprocessing.size):
                args.ddp_find_unused_parameters = accelerator.ddp_handler.find_unused_parameters = True


def training_loader(trainer: Any, make: Callable[[], DataLoader]) -> DataLoader:
    """What a `PurifyTrainer` reads in training: a stream shares itself out among the processes.

    Args:
        trainer: Its images, arguments, and ``drops_last`` as `leaves_one_image` found it.
        make: The base class's ``get_train_dataloader``.
    """
    images, args = trainer.train_dataset, trainer.args
    if isinstance(images, StreamedImages):
        return images.loader(args, trainer.data_collator)
    asked = args.dataloader_drop_last
    if trainer.drops_last and not asked:
        trainer.accelerator.print(
            f"{len(images)} images in batches of {args.per_device_train_batch_size} leave one that BatchNorm cannot normalise: "
            "each epoch leaves another one out"
        )
    with loading(args, asked or trainer.drops_last, args.dataloader_in_order):
        return make()


@contextlib.contextmanager
def loading(args: TrainingArguments, drop_last: bool = False, in_order: bool = True) -> Iterator[None]:
    """Inside, loaders are made with these; as they are here, no image is left out and none changes its place."""
    before = args.dataloader_drop_last, args.dataloader_in_order
    args.dataloader_drop_last, args.dataloader_in_order = drop_last, in_order
    try:
        yield
    finally:
        args.dataloader_drop_last, args.dataloader_in_order = before
