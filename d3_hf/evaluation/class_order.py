"""Whether a model counts its classes as the data set does, where names cannot say so: asked of what it predicts."""

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from transformers import PreTrainedConfig

from ..labels import label_names_of, names_tell

MOST, TIMES, CHANCE = 0.5, 2.0, 1e-4  # the project's own, see `order_contradiction`


def order_contradiction(
    predictions: ArrayLike, labels: ArrayLike, class_names: Sequence[str], config: PreTrainedConfig
) -> str | None:
    """What to say of a data set whose classes the model plainly knows, but under other numbers.

    Only where names cannot tell (`d3_hf.labels.names_tell`): a model with ``LABEL_3`` in place of names, or data with numbers.

    The rule must not refuse a poor or a backdoored model by chance. The images of each class are dealt out to two halves in
    turn; the permutation of the classes that fits one half best is scored on the other, which did not choose it. Over both
    halves that permutation must (1) have a mean recall over 0.5, (2) at least twice that of the classes as they are, and (3) be
    right on so many more of the images on which only one of the two is, that a fair coin would do so once in 10,000 times at
    most: fourteen to none, for instance. The mean recall counts classes alike, so that a model which always says the same
    never passes (2). A backdoored model classifies images without its trigger right, which no permutation betters; a class with
    one image says nothing.

    Args:
        predictions: Predicted classes (N,) of images as they are, in ``[0, len(class_names))``.
        labels: Their labels (N,).
        class_names: The data set's classes, as many as the model's; see `d3_hf.labels.check_labels`.
        config: The model's.

    Returns:
        That the numbers contradict each other, and the whole class map that would fit; None where they do not, or nothing
        can be told.
    """
    from scipy.stats import binomtest

    if names_tell(class_names, config):
        return None
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    half, fitted = _dealt(labels), np.empty_like(predictions)
    for number in (0, 1):
        own = half == number
        fitted[own] = _best_order(predictions[~own], labels[~own], len(class_names))[labels[own]]
    fits, agrees = predictions == fitted, predictions == labels
    recall, better, worse = _mean_recall(fits, labels), int(np.sum(fits & ~agrees)), int(np.sum(agrees & ~fits))
    if not better or recall <= MOST or recall < TIMES * _mean_recall(agrees, labels):
        return None
    if binomtest(better, better + worse, alternative="greater").pvalue > CHANCE:
        return None
    order = _best_order(predictions, labels, len(class_names))
    class_map = json.dumps(dict(zip(class_names, order.tolist(), strict=True)), ensure_ascii=False)
    now, then = 100 * agrees.mean(), 100 * np.mean(predictions == order[labels])
    return (
        f"the model gives {now:.1f} % of {len(labels)} images the number of their class, and would give {then:.1f} % if the "
        f"classes were in another order; neither its names ({label_names_of(config)[0]}, ...) nor the data set's "
        f"({class_names[0]}, ...) tell which is right: give the model its names, --class_names (in Python label_names), or the "
        f"data set the order that fits, --class_map FILE.json (in Python map_classes): {class_map}"
    )


def _dealt(labels: np.ndarray) -> np.ndarray:
    """0 or 1 for each image (N,): within each class by turns."""
    half = np.empty(len(labels), np.int64)
    for number in np.unique(labels):
        rows = np.flatnonzero(labels == number)
        half[rows] = np.arange(len(rows)) % 2
    return half


def _best_order(predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """For each class (C,) its number in the model: the permutation that fits most images, if several the least one."""
    from scipy.optimize import linear_sum_assignment

    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predictions), 1)
    _, order = linear_sum_assignment(counts * (classes + 1) + np.eye(classes, dtype=np.int64), maximize=True)
    return order


def _mean_recall(right: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean([right[labels == number].mean() for number in np.unique(labels)]))
