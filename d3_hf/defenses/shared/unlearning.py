"""Clean unlearning, with which RNP, TSBD and LMR begin: a copy of the model that has lost the clean task.

They declare ``unlearn_learning_rate``, ``unlearn_epochs`` and ``unlearn_accuracy``, with defaults of their own.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .staged import StagedTrainer


def unlearned_level(trainer: StagedTrainer) -> float:
    """Accuracy at which the clean task counts as unlearned: ``unlearn_accuracy``, or that of always answering one class.

    Ascent often ends in one answer for all images. With few or unbalanced classes that is right more often than
    ``unlearn_accuracy``, and ascending on would only end in infinite weights.
    """
    labels = torch.cat([batch["labels"] for batch in trainer.images_at(trainer.tune)])
    return max(trainer.args.unlearn_accuracy, labels.bincount().max().item() / len(labels))


def ascent(
    trainer: StagedTrainer, optimizer_of: Callable[[list[Tensor]], torch.optim.Optimizer]
) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Ascend the cross-entropy of the tuning images on a copy of the model's tensors.

    Args:
        trainer: Its model, which stays as it is, images, and option ``unlearn_epochs``.
        optimizer_of: Makes the optimizer of the copy's trained tensors.

    Yields:
        After each step the logits (B, C) that it was taken from, detached, their labels, and the copy: every parameter and
        buffer by name, changed by the next step.

    Raises:
        FloatingPointError: The loss is NaN or infinite.
    """
    model = trainer.model
    trained = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = {name: value.detach().clone() for name, value in own.items() if name not in trained} | trained
    optimizer, epochs = optimizer_of(list(trained.values())), trainer.args.unlearn_epochs
    for epoch in trainer.progress(range(epochs), "Unlearning", epochs):
        for batch in trainer.tune_batches(epoch):
            logits = trainer.training_logits_with(tensors, batch)
            loss = F.cross_entropy(logits, batch["labels"])
            if not torch.isfinite(loss):
                raise FloatingPointError(f"unlearning diverged in epoch {epoch}: lower unlearn_learning_rate")
            optimizer.zero_grad()
            (-loss).backward()
            optimizer.step()
            yield logits.detach(), batch["labels"], tensors


def unlearning(trainer: StagedTrainer, weight_decay: float) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """`ascent` by SGD with momentum 0.9, epoch by epoch.

    Args:
        trainer: See `ascent`; the learning rate is its option ``unlearn_learning_rate``.
        weight_decay: Of the ascent.

    Yields:
        After each epoch the accuracy over the epoch's training batches, and the copy.

    Raises:
        FloatingPointError: See `ascent`.
    """
    options = {"lr": trainer.args.unlearn_learning_rate, "momentum": 0.9, "weight_decay": weight_decay}
    steps = ascent(trainer, lambda tensors: torch.optim.SGD(tensors, **options))
    for _ in range(trainer.args.unlearn_epochs):
        right = torch.zeros((), dtype=torch.int64, device=trainer.args.device)
        for logits, labels, tensors in itertools.islice(steps, trainer.tune_batches_per_epoch()):  # noqa: B007
            right += (logits.argmax(1) == labels).sum()
        yield right.item() / len(trainer.tune), tensors


def unlearned_copy(trainer: StagedTrainer, weight_decay: float, evaluate: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`unlearning` until the accuracy is at `unlearned_level`.

    Args:
        trainer: See `unlearning`.
        weight_decay: Of the ascent.
        evaluate: Judge by the accuracy on the tuning images in evaluation mode, not by that over the epoch's batches.

    Returns:
        Every parameter and buffer by name, and the epochs taken, the accuracy and the level.

    Raises:
        RuntimeError: The clean task is not unlearned within ``unlearn_epochs``.
        FloatingPointError: See `unlearning`.
    """
    level = unlearned_level(trainer)
    for epoch, (accuracy, tensors) in enumerate(unlearning(trainer, weight_decay), 1):
        if evaluate:
            accuracy = trainer.accuracy(trainer.tune, tensors)
        if accuracy <= level:
            copy = {name: tensor.detach() for name, tensor in tensors.items()}
            return copy, {"epochs": epoch, "accuracy": accuracy, "level": level}
    raise RuntimeError(
        f"{trainer.method} could not unlearn the clean task: accuracy {accuracy:.3f} > {level:.3f} after {epoch} epochs; "
        "raise unlearn_epochs or unlearn_learning_rate"
    )
