"""S3, anti-learning: which class does a model lean to while it unlearns clean images?

A copy ascends the cross-entropy of at most 50 images, see `paths`, until its accuracy on them is at chance. After each step t
the mean log-probability of every class c over those that are of another class is written down, l_t,c. With T such steps,

    score_c = 1/T sum_t z_t,c,    z_t,c = (l_t,c - median_c' l_t,c') / (1.4826 MAD_c' l_t,c')

the whole path, not its end: on a pretrained ViT the backdoor's class led the first steps and another one those at chance. Steps
of rising length look at the beginning as closely as at the end, and with z none counts more because log-probabilities are
far apart there.

Source: the locator of LMR (Yang et al., CVPR 2026; see `d3_hf/defenses/lmr.py`, which votes where this takes means), written
from published notes. That the images of a class do not count for it (they are what is unlearned), z, the steps and the number
of images are this project's.

Cost: at most 16 passes over 50 images, forward and backward; memory for two models. Blind to: backdoors of all classes, weak
ones, and some strong ones: NAD's published WideResNet leans to the frogs, and its backdoor's class is the dogs. A network
without a backdoor leans to a class too: only twins tell what is usual. Unlike the signals on the head, the path depends on how
hidden units are scaled, since its steps do.
"""

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.images import RawImages
from ..data.training_images import resized
from ..models.source import preprocessing_of
from .features import class_weights
from .finding import Finding, outlier_scores
from .paths import BATCH, UP, check_path, path_of, some_of_each

STEPS, IMAGES = 16, 50


def at_chance(accuracy: float, classes: int) -> bool:
    """Whether an accuracy is at most that of always answering one class; of classes that count alike, 1 / C."""
    return accuracy <= (1 + 1e-9) / classes


def lean(path: np.ndarray) -> np.ndarray:
    """The score of each class, (C,), from the mean log-probabilities after each step, (T, C)."""
    return np.stack([outlier_scores(step) for step in path]).mean(0)


def share_of_others(labels: Tensor, classes: int) -> np.ndarray:
    """What each image counts for each class, float64 (C, N): nothing for its own, for the others as `class_weights` has it."""
    counted = class_weights(labels) * (labels.numpy() != np.arange(classes)[:, None])
    return counted / counted.sum(1, keepdims=True)


def anti_learning(model: PreTrainedModel, images: RawImages, steps: int = STEPS, batch_size: int = BATCH) -> Finding:
    """Look for a class that a model leans to while it unlearns.

    Args:
        model: A classifier of `load_classifier`; not changed, a copy is.
        images: Of every class, without triggers as far as is known; the first of each class are taken, 50 in all.
        steps: At most so many, at least 1.
        batch_size: Images in a pass, at least 1; halved while they do not fit into memory.

    Returns:
        Scores are robust z. ``details`` has ``path``, the mean log-probability of each class after each step, (T, C), and the
        ``accuracy`` then, (T,), in which classes count alike.

    Raises:
        ValueError: ``steps`` is out of range; see `check_comparable` and `preprocessing_of`; a logit is not finite; a weight is
            computed by a hook, so that the model cannot be copied.
        FloatingPointError: Unlearning diverged.
        RuntimeError: A single image does not fit into the device's memory.
    """
    check_path(model, images, steps)
    preprocessing, taken = preprocessing_of(model), some_of_each(images, IMAGES)
    pixel_values, labels = preprocessing.normalize(resized(taken, preprocessing)), taken.labels
    weights, classes = class_weights(labels), len(images.class_names)

    def accuracy(logits: Tensor) -> float:
        return float(weights @ (logits.argmax(1) == labels).double().numpy())

    def is_over(logits: Tensor) -> bool:
        return at_chance(accuracy(logits), classes)

    found = path_of(model, pixel_values, labels, UP, steps, batch_size, is_over)[1:]
    share = share_of_others(labels, classes)
    chances = torch.stack(found).log_softmax(2).numpy()  # (T, N, C)
    path = np.einsum("cn,tnc->tc", share, chances)
    details = {"path": path, "accuracy": np.array([accuracy(logits) for logits in found])}
    return Finding.of("anti_learning", lean(path), images.class_names, **details)
