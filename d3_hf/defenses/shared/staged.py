"""What the pruning defences share: neurons, retain accuracy, and passes with other weights than the model's own.

Every choice that these defences make (how many neurons, which threshold) is made on a seeded 80/20 split of the retain set:
what is searched or measured by neuron uses the 80 % (`tune`), what decides uses the accuracy on the 20 % (`validate`), as the
victim's accuracy there allows. Test images, eval_dataset and triggers are never read.
"""

import itertools
import math
from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import DataLoader
from tqdm import tqdm

from ...data.training_images import TrainingImages, without_augmentation
from ...training.config import PurifyConfig, check_options
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


def check_drop(drop: float) -> None:
    """Raise a ValueError unless a relative loss of accuracy is in [0, 1)."""
    if not 0 <= drop < 1:
        raise ValueError(f"max_validation_drop must be in [0, 1), relative to the victim's accuracy; got {drop}")


def check_unlearning(args: Any) -> None:
    """Raise a ValueError unless the options of clean unlearning, ``unlearn_*``, are in range."""
    if not args.unlearn_learning_rate > 0:
        raise ValueError(f"unlearn_learning_rate must be > 0; got {args.unlearn_learning_rate}")
    check_options(args, ">= 1", "unlearn_epochs")
    if not 0 <= args.unlearn_accuracy < 1:
        raise ValueError(f"unlearn_accuracy must be in [0, 1); got {args.unlearn_accuracy}")


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

    Raises:
        ValueError: ``max_validation_drop`` is out of range.
    """

    max_validation_drop: float = field(default=0.1, metadata={"help": "Relative loss of retain validation accuracy allowed."})

    def __post_init__(self):
        check_drop(self.max_validation_drop)
        super().__post_init__()


class StagedTrainer(PurifyTrainer):
    """A `PurifyTrainer` with stages of its own before, or instead of, the Trainer's loop.

    The stages run alike on every process, on the whole retain set, and `agree` hands on what the main process found: several
    processes speed up the Trainer's loop only.

    Raises:
        ValueError: There is no train_dataset, its length is unknown, or it has fewer than five images.
    """

    def __init__(self, model, args: PurifyConfig, *arguments, **kwargs):
        super().__init__(model, args, *arguments, **kwargs)
        if not isinstance(self.train_dataset, Sized):
            raise ValueError(f"{self.method} chooses on retain accuracy: train_dataset must be given and have a length")
        self.tune, self.validate = tune_and_validate(len(self.train_dataset), args.seed)

    # Images ------------------------------------------------------------------------------------------------------------

    def _load(self, dataset: Any, batches: list[list[int]]) -> Iterator[dict[str, Any]]:
        # With a generator of its own the loader leaves the global one alone.
        loader = DataLoader(dataset, batch_sampler=batches, collate_fn=self.data_collator, generator=torch.Generator())
        return (self._prepare_inputs(batch) for batch in loader)

    def plain_batches(self, rows: list[int]) -> Iterator[dict[str, Any]]:
        """Yield the images at ``rows`` in order, not augmented, as the model takes them: pixel_values and labels."""
        dataset = without_augmentation(self.train_dataset)
        size = self.args.per_device_eval_batch_size
        return self._load(dataset, [rows[i : i + size] for i in range(0, len(rows), size)])

    def tune_batches_per_epoch(self) -> int:
        """Number of batches that `tune_batches` yields."""
        return math.ceil(len(self.tune) / self.args.per_device_train_batch_size)

    def tune_batches(self, epoch: int) -> Iterator[dict[str, Any]]:
        """Yield the tuning images once, shuffled and augmented by seed and epoch, in batches of nearly equal size.

        Equal, because a last batch of one image has no batch statistics.
        """
        if isinstance(self.train_dataset, TrainingImages):
            self.train_dataset.set_epoch(epoch)
        order = torch.randperm(len(self.tune), generator=torch.Generator().manual_seed(self.args.seed + epoch))
        chunks = torch.tensor(self.tune)[order].tensor_split(self.tune_batches_per_epoch())
        return self._load(self.train_dataset, [chunk.tolist() for chunk in chunks])

    def endless_tune_batches(self) -> Iterator[dict[str, Any]]:
        """Yield `tune_batches` of epoch 0, 1, 2, ... without end."""
        return itertools.chain.from_iterable(self.tune_batches(epoch) for epoch in itertools.count())

    # Passes with other weights -----------------------------------------------------------------------------------------

    def logits_with(self, tensors: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        """Logits (B, C), float32, of the model with some parameters and buffers replaced, by name; its own stay as they are."""
        with self.accelerator.autocast():
            output = functional_call(self.model, tensors, kwargs={"pixel_values": batch["pixel_values"]}, args=())
        return output.logits.float()

    def training_logits_with(self, tensors: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        """`logits_with` in training mode, BatchNorm as configured; running statistics not in ``tensors`` are not updated."""
        self.model.train()
        if self.args.batch_norm != "train":
            for module in self._batch_norms:
                module.eval()
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers() if name not in tensors}
        return self.logits_with(buffers | tensors, batch)

    @torch.no_grad()
    def accuracy(self, rows: list[int], tensors: dict[str, Tensor] | None = None) -> float:
        """Share of the images at ``rows`` that the model, with ``tensors`` in place of its own, classifies right."""
        self.model.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.args.device)
        for batch in self.plain_batches(rows):
            right += (self.logits_with(tensors or {}, batch).argmax(1) == batch["labels"]).sum()
        return right.item() / len(rows)

    def is_tolerable(self, accuracy: float, before: float) -> bool:
        """Whether an accuracy keeps the share of the victim's that ``max_validation_drop`` asks for."""
        return accuracy >= before * (1 - self.args.max_validation_drop)

    def progress(self, iterable, description: str, total: int) -> tqdm:
        """A progress bar, on the main process only and silent with ``disable_tqdm``."""
        disable = self.args.disable_tqdm or not self.is_world_process_zero()
        return tqdm(iterable, description, total, disable=disable)

    def unlearned_level(self, accuracy: float) -> float:
        """Accuracy at which the clean task counts as unlearned: as asked for, or that of always answering one class.

        Ascent often ends in one answer for all images. With few or unbalanced classes that is right more often than
        ``accuracy``, and ascending on would only end in infinite weights.
        """
        labels = torch.cat([batch["labels"] for batch in self.plain_batches(self.tune)])
        return max(accuracy, labels.bincount().max().item() / len(labels))

    def unlearning(self, learning_rate: float, weight_decay: float, epochs: int) -> Iterator[tuple[float, dict[str, Tensor]]]:
        """Clean unlearning: ascend the cross-entropy of the tuning images by SGD with momentum 0.9, on a copy of the weights.

        Yields:
            After each epoch the accuracy over the epoch's training batches, and the copy: every parameter and buffer by name.

        Raises:
            FloatingPointError: The loss is NaN or infinite.
        """
        trained = {n: p.detach().clone().requires_grad_() for n, p in self.model.named_parameters() if p.requires_grad}
        tensors = {name: value.detach().clone() for name, value in self._own_tensors().items() if name not in trained} | trained
        optimizer = torch.optim.SGD(trained.values(), learning_rate, momentum=0.9, weight_decay=weight_decay)
        for epoch in self.progress(range(epochs), "Unlearning", epochs):
            right = torch.zeros((), dtype=torch.int64, device=self.args.device)
            total = torch.zeros((), device=self.args.device)
            for batch in self.tune_batches(epoch):
                logits = self.training_logits_with(tensors, batch)
                loss = F.cross_entropy(logits, batch["labels"])
                optimizer.zero_grad()
                (-loss).backward()
                optimizer.step()
                right += (logits.argmax(1) == batch["labels"]).sum()
                total += loss.detach()
            if not torch.isfinite(total):
                raise FloatingPointError(f"unlearning diverged in epoch {epoch}: lower unlearn_learning_rate")
            yield right.item() / len(self.tune), tensors

    def unlearned_copy(self, weight_decay: float, evaluate: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Unlearn by the configuration's ``unlearn_*`` until the accuracy is at `unlearned_level`.

        Args:
            weight_decay: Of the ascent.
            evaluate: Judge by the accuracy on the tuning images in evaluation mode, not by that over the epoch's batches.

        Returns:
            Every parameter and buffer by name, and the epochs taken, the accuracy and the level.

        Raises:
            RuntimeError: The clean task is not unlearned within ``unlearn_epochs``.
            FloatingPointError: See `unlearning`.
        """
        args, level = self.args, self.unlearned_level(self.args.unlearn_accuracy)
        passes = self.unlearning(args.unlearn_learning_rate, weight_decay, args.unlearn_epochs)
        for epoch, (accuracy, tensors) in enumerate(passes, 1):
            if evaluate:
                accuracy = self.accuracy(self.tune, tensors)
            if accuracy <= level:
                copy = {name: tensor.detach() for name, tensor in tensors.items()}
                return copy, {"epochs": epoch, "accuracy": accuracy, "level": level}
        raise RuntimeError(
            f"{self.method} could not unlearn the clean task: accuracy {accuracy:.3f} > {level:.3f} after {epoch} epochs; "
            "raise unlearn_epochs or unlearn_learning_rate"
        )

    def _own_tensors(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    def agree(self, found: Any) -> Any:
        """Overwrite tensors, in place, with those of the main process; rounding may have led others to other choices."""
        return broadcast(found)
