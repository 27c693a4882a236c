"""What the pruning defences share: retain accuracy, and passes with other weights than the model's own.

Every choice that these defences make (how many neurons, which threshold) is made on a seeded 80/20 split of the retain set:
what is searched or measured by neuron uses the 80 % (`tune`), what decides uses the accuracy on the 20 % (`validate`), as the
victim's accuracy there allows. Test images, eval_dataset and triggers are never read.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor
from torch.func import functional_call
from tqdm.auto import tqdm

from ...data.training_images import TrainingImages
from ...training.config import PurifyConfig
from ...training.trainer import PurifyTrainer

VALIDATION_SHARE = 0.2


def tune_and_validate(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Rows of a retain set of ``count`` images to search on (80 %) and to decide by (20 %), drawn uniformly.

    Raises:
        ValueError: Fewer than five images.
    """
    if count < 5:
        raise ValueError(f"the retain set has {count} images; at least 5 are needed to hold out 20 % for validation")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = round(VALIDATION_SHARE * count)
    return sorted(order[held_out:]), sorted(order[:held_out])


def check_functional(args: PurifyConfig) -> None:
    """Raise a ValueError for options that passes with other weights than the model's own cannot honour."""
    if args.fp16:
        raise ValueError("fp16 needs a loss scaler, which the extra gradients of this method bypass: use bf16 or float32")
    if args.activation_checkpointing or args.gradient_checkpointing:
        raise ValueError("activation checkpointing would recompute with the model's own weights: leave it off for this method")


@dataclass
class StagedConfig(PurifyConfig):
    """`PurifyConfig` and the tolerance of a method that chooses something on retain accuracy.

    Args:
        max_validation_drop: In [0, 1): how much of the victim's accuracy on the validation images a choice may cost, relative.
    """

    max_validation_drop: float = field(
        default=0.1, metadata={"help": "Relative loss of retain validation accuracy allowed.", "range": "in [0, 1)"}
    )


class StagedTrainer(PurifyTrainer):
    """A `PurifyTrainer` with stages of its own before, or instead of, the Trainer's loop.

    The stages run alike on every process, on the whole retain set, and `agree` hands on what the main process found: several
    processes speed up the Trainer's loop only.

    Raises:
        ValueError: There is no train_dataset, its length is unknown, or it has fewer than five images.

    Attributes:
        tune: Rows of the retain set to search on.
        validate: Rows to decide by.
        found: What the stages found, JSON-able: part of the manifest and of checkpoints.
        found_as: What the manifest calls it.
    """

    found_as = "pruning"

    def prepare(self) -> None:
        """Split the retain set."""
        if not isinstance(self.train_dataset, Sized):
            raise ValueError(f"{self.method} chooses on retain accuracy: train_dataset must be given and have a length")
        self.tune, self.validate = tune_and_validate(len(self.train_dataset), self.args.seed)
        self.found: dict[str, Any] = {}

    # Images ------------------------------------------------------------------------------------------------------------

    def images_at(self, rows: list[int]) -> Iterator[dict[str, Tensor]]:
        """Yield batches of the images at ``rows`` in order, not augmented, as the model takes them."""
        size = self.args.per_device_eval_batch_size
        return self.retain_batches(None, batches=[rows[i : i + size] for i in range(0, len(rows), size)])

    def tune_batches_per_epoch(self) -> int:
        """Number of batches that `tune_batches` yields: two images in each, unless batches of one are asked for."""
        size, count = self.args.per_device_train_batch_size, len(self.tune)
        return count if size == 1 else min(math.ceil(count / size), count // 2)

    def tune_batches(self, epoch: int) -> Iterator[dict[str, Tensor]]:
        """Yield the tuning images once, shuffled and augmented by seed and epoch, in batches of nearly equal size.

        Equal, because a last batch of one image has no batch statistics.
        """
        if isinstance(self.train_dataset, TrainingImages):
            self.train_dataset.set_epoch(epoch)
        order = torch.randperm(len(self.tune), generator=torch.Generator().manual_seed(self.args.seed + epoch))
        chunks = torch.tensor(self.tune)[order].tensor_split(self.tune_batches_per_epoch())
        return self.retain_batches(None, augmented=True, batches=[chunk.tolist() for chunk in chunks])

    def endless_tune_batches(self) -> Iterator[dict[str, Tensor]]:
        """Yield `tune_batches` of epoch 0, 1, 2, ... without end."""
        return itertools.chain.from_iterable(self.tune_batches(epoch) for epoch in itertools.count())

    # Passes with other weights -----------------------------------------------------------------------------------------

    def logits_with(self, tensors: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Logits (B, C), float32, of the model with some parameters and buffers replaced, by name; its own stay as they are."""
        with self.accelerator.autocast():
            output = functional_call(self.model, tensors, kwargs={"pixel_values": batch["pixel_values"]}, args=())
        return output.logits.float()

    def training_logits_with(self, tensors: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        """`logits_with` in training mode, BatchNorm as configured; running statistics not in ``tensors`` are not updated."""
        self.model.train()
        if self.args.batch_norm != "train":
            for module in self.batch_norms:
                module.eval()
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers() if name not in tensors}
        return self.logits_with(buffers | tensors, batch)

    @torch.no_grad()
    def accuracy(self, rows: list[int], tensors: dict[str, Tensor] | None = None) -> float:
        """Share of the images at ``rows`` that the model, with ``tensors`` in place of its own, classifies right."""
        self.model.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.args.device)
        for batch in self.images_at(rows):
            right += (self.logits_with(tensors or {}, batch).argmax(1) == batch["labels"]).sum()
        return right.item() / len(rows)

    def is_tolerable(self, accuracy: float, before: float) -> bool:
        """Whether an accuracy keeps the share of the victim's that ``max_validation_drop`` asks for."""
        return accuracy >= before * (1 - self.args.max_validation_drop)

    # What is found -----------------------------------------------------------------------------------------------------

    def progress(self, iterable: Iterable, description: str, total: int) -> tqdm:
        """A progress bar, on the main process only and silent with ``disable_tqdm``."""
        return tqdm(iterable, description, total, disable=self.args.disable_tqdm or not self.is_world_process_zero())

    def agree(self, found: Any) -> Any:
        """Overwrite tensors, in place, with those of the main process; rounding may have led others to other choices."""
        return broadcast(found)

    def accuracies(self, before: float, after: float) -> dict[str, Any]:
        """The part of `found` that says what a choice cost on the validation images."""
        names = ("validation_accuracy_before", "validation_accuracy_after", "validation_images")
        return dict(zip(names, (before, after, len(self.validate)), strict=True))

    def say(self, what: str) -> None:
        """Print what was done, and what it cost."""
        before, after = self.found["validation_accuracy_before"], self.found["validation_accuracy_after"]
        images = f"{self.found['validation_images']} held-out retain images"
        self.accelerator.print(f"{self.method} {what}: accuracy on {images} {before:.3f} -> {after:.3f}")

    def facts(self) -> dict[str, Any]:
        """Adds what was found."""
        return super().facts() | {self.found_as: self.found}

    def resume_state(self) -> dict[str, Any]:
        """Adds what was found."""
        return super().resume_state() | {"found": self.found}

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Goes on with what was found."""
        super().load_resume_state(state)
        self.found = state["found"]
