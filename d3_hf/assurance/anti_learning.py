"""S3, anti-learning: which class does a model lean to while it unlearns clean images?

A copy in evaluation mode ascends the cross-entropy of the images by plain SGD, its gradient clipped to norm 1. After each step
t the mean log-probability of every class over a fixed set of images, l_t,c, is written down, until the accuracy on that set is
at chance. With T such steps,

    score_c = 1/T sum_t (l_t,c - median_c' l_t,c')

the whole path, not its end: on a pretrained ViT the backdoor's class led the first steps and another one those at chance.

The learning rates are tried from the smallest, each from the model as it was, and the first that reaches chance within the
steps is read; if none does, the last. A small one follows the path closely, but which is small depends on the network.

Source: the locator of LMR (Yang et al., CVPR 2026; see `d3_hf/defenses/lmr.py`, which votes where this takes means), written
from published notes; the learning rates start at what those recommend. Clip, steps and sizes are this project's.

Cost: for each learning rate tried at most 60 steps of 128 images forward and backward and 128 forward; memory for two models.
Blind to: backdoors of all classes, and weak ones; also to some strong ones, since losing the images of the backdoor's class
raises the loss as winning those of the others does: a small network with a shortcut to one class leaned away from it at one
learning rate, to it at ten times that. A network without a backdoor leans to a class too: a clean ResNet-20 leaned to the dogs
of CIFAR-10 farther than NAD's published WideResNet, whose backdoor's class that is. Only twins tell what is usual. Unlike the
signals on the head, the path depends on how hidden units are scaled, since the steps of SGD do.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..data.fitting import run_with_fitting_batch
from ..data.images import RawImages
from ..data.preprocessing import Preprocessing
from ..models.computed import refuse_hooked
from ..models.features import finite_logits
from ..models.source import preprocessing_of
from .features import class_weights
from .finding import Finding, check_comparable

LEARNING_RATES = (1e-4, 1e-3, 1e-2, 1e-1)
STEPS, STEP_IMAGES, WATCHED_IMAGES = 60, 128, 128
MOST_GRADIENT = 1.0
BATCH = 32  # images in a pass that keeps its graph


def at_chance(accuracy: float, classes: int) -> bool:
    """Whether an accuracy is at most that of always answering one class; of classes that count alike, 1 / C."""
    return accuracy <= (1 + 1e-9) / classes


def lean(path: np.ndarray) -> np.ndarray:
    """The score of each class, (C,), from the mean log-probabilities after each step, (T, C)."""
    return (path - np.median(path, axis=1, keepdims=True)).mean(0)


def watched_images(images: RawImages) -> RawImages:
    """The first images of each class: `WATCHED_IMAGES` in all where there are as many, but one of each class at least."""
    each = max(1, WATCHED_IMAGES // len(images.class_names))
    rows = [(images.labels == k).nonzero()[:each, 0] for k in range(len(images.class_names))]
    return images.select(torch.cat(rows))


class Ascent:
    """A copy of a model that ascends the cross-entropy of images.

    Args:
        model: What is copied, and stays as it is.
        images: What it ascends on, in an order that is always the same.
        watched: What it is watched on.
        preprocessing: The model's.
        learning_rate: Of SGD.
        batch_size: Images in a pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        images: RawImages,
        watched: RawImages,
        preprocessing: Preprocessing,
        learning_rate: float,
        batch_size: int,
    ):
        self.model = copy.deepcopy(model).eval().requires_grad_(True)
        self.images, self.watched, self.preprocessing, self.batch_size = images, watched, preprocessing, batch_size
        self.device = next(self.model.parameters()).device
        self.optimizer = torch.optim.SGD(self.model.parameters(), learning_rate)
        self.generator, self.rows = torch.Generator().manual_seed(0), torch.empty(0, dtype=torch.int64)

    def next_rows(self) -> Tensor:
        """The images of the next step: each comes once before any comes again; a rest that fills no step is left out."""
        size = min(STEP_IMAGES, len(self.images))
        if len(self.rows) < size:
            self.rows = torch.randperm(len(self.images), generator=self.generator)
        rows, self.rows = self.rows[:size], self.rows[size:]
        return rows

    @torch.enable_grad()
    def step(self) -> None:
        """One step of SGD up the mean cross-entropy, the gradient of all its passes clipped together."""
        self.optimizer.zero_grad()
        images = self.images.select(self.next_rows())
        for _, raw, labels in images.batches(self.batch_size):
            logits = self.model(pixel_values=self.preprocessing(raw.to(self.device))).logits.float()
            loss = F.cross_entropy(logits, labels.to(self.device), reduction="sum") / len(images)
            (-loss).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MOST_GRADIENT)
        self.optimizer.step()

    @torch.no_grad()
    def look(self) -> tuple[np.ndarray, float]:
        """Mean log-probability of each class, float64 (C,), and accuracy over the watched images, whose classes count alike.

        Raises:
            ValueError: A logit is not finite.
        """
        share, found, right = class_weights(self.watched.labels), 0.0, 0.0
        for rows, raw, labels in self.watched.batches(self.batch_size):
            logits = finite_logits(self.model, raw.to(self.device), self.preprocessing, "clean images").double().cpu()
            found += share[rows] @ logits.log_softmax(1).numpy()
            right += share[rows] @ (logits.argmax(1) == labels).double().numpy()
        return found, right


def ascent_path(ascent: Ascent, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascend until the accuracy on the watched images is at chance, 1 / C, but at most so many steps.

    Returns:
        After each step `Ascent.look`: mean log-probabilities (T, C) and accuracies (T,).

    Raises:
        ValueError: A logit of the model as it was is not finite.
        FloatingPointError: A step led to one that is not.
    """
    ascent.look()
    path, accuracies = [], []
    for _ in range(steps):
        ascent.step()
        try:
            found, right = ascent.look()
        except ValueError as error:
            rate = ascent.optimizer.param_groups[0]["lr"]
            raise FloatingPointError(f"unlearning diverged at learning rate {rate:g}: give smaller learning_rates") from error
        path.append(found)
        accuracies.append(right)
        if at_chance(right, len(found)):
            break
    return np.stack(path), np.array(accuracies)


def anti_learning(
    model: PreTrainedModel,
    images: RawImages,
    steps: int = STEPS,
    learning_rates: Sequence[float] = LEARNING_RATES,
    batch_size: int = BATCH,
) -> Finding:
    """Look for a class that a model leans to while it unlearns.

    Args:
        model: A classifier of `load_classifier`; not changed, a copy is.
        images: Of every class, without triggers as far as is known.
        steps: At most so many for each learning rate, at least 1.
        learning_rates: In the order in which they are tried, each above 0.
        batch_size: Images in a pass, at least 1; halved while they do not fit into memory.

    Returns:
        Scores are in nats. ``details`` has ``path``, the mean log-probability of each class after each step, (T, C); the
        ``accuracy`` then, (T,); and the ``learning_rate`` of this path.

    Raises:
        ValueError: ``steps`` or ``learning_rates`` are out of range; see `check_comparable` and `preprocessing_of`; a logit is
            not finite; a weight is computed by a hook, so that the model cannot be copied.
        FloatingPointError: Unlearning diverged.
        RuntimeError: A single image does not fit into the device's memory.
    """
    if steps < 1 or not learning_rates or min(learning_rates) <= 0:
        raise ValueError(f"steps and learning_rates must be above 0; got {steps} and {learning_rates}")
    check_comparable(model, images)
    refuse_hooked(model)
    preprocessing, watched = preprocessing_of(model), watched_images(images)
    for rate in learning_rates:
        path, accuracies = run_with_fitting_batch(
            lambda size, rate=rate: ascent_path(Ascent(model, images, watched, preprocessing, rate, size), steps), batch_size
        )
        if at_chance(accuracies[-1], path.shape[1]):
            break
    details = {"path": path, "accuracy": accuracies, "learning_rate": np.array(rate)}
    return Finding.of("anti_learning", lean(path), images.class_names, **details)
