"""Whether images fit a model: classes, size, how many there are of each, copies, labels that the model contradicts, ACC."""

from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ..data.images import RawImages, content_hashes
from ..evaluation.class_order import order_contradiction
from ..evaluation.confidence import Answers, answers
from ..evaluation.metrics import accuracy
from ..labels import check_labels, label_names_of, names_tell

BY_NAME = "by name"
BY_NUMBER = "by number: the names cannot tell, and what the model predicts does not contradict it"


def fitting_answers(model: PreTrainedModel, images: RawImages) -> Answers:
    """What a model says of images whose classes are its own.

    Raises:
        ValueError: The classes are not the model's, by their names or by what it predicts, see `check_labels` and
            `order_contradiction`; or see `answers`.
    """
    check_labels(images.class_names, model.config)
    found = answers(model, images)
    if said := order_contradiction(found.predicted, images.labels, images.class_names, model.config):
        raise ValueError(said)
    return found


def fit_facts(model: PreTrainedModel, images: RawImages, found: Answers) -> dict[str, Any]:
    """What is to be said of images and a model whose classes they are; JSON-able.

    Args:
        model: The model; its size and normalisation stand in `describe`.
        images: Of the model's classes.
        found: What the model says of them, see `fitting_answers`.

    Returns:
        How the ``classes`` of the images become the model's (``mapping``); ``images``, how many; ``sizes``, [height, width] of
        the smallest and the largest; ``per_class``: counts in the order of the classes, the ``fewest`` and ``most`` of a class,
        and which have ``none``; ``copies`` of other images, pixel by pixel; ``contradicted``, the share of which the model is
        over 0.9 sure that they are of another class than their label, and ``accuracy``, with ``_ci95`` and ``_n``.
    """
    names, labels = images.class_names, images.labels.numpy()
    counts = np.bincount(labels, minlength=len(names))
    digests = content_hashes(images)
    sizes = sorted({tuple(image.shape[1:]) for image in images.images}, key=lambda size: (size[0] * size[1], size))
    return {
        "classes": list(names),
        "model_classes": label_names_of(model.config),
        "mapping": BY_NAME if names_tell(names, model.config) else BY_NUMBER,
        "images": len(images),
        "sizes": [list(sizes[0]), list(sizes[-1])],
        "per_class": {
            "counts": counts.tolist(),
            "fewest": int(counts.min()),
            "most": int(counts.max()),
            "none": [name for name, count in zip(names, counts, strict=True) if not count],
        },
        "copies": len(digests) - len(set(digests)),
        **found.contradicted(labels).as_dict("contradicted"),
        **accuracy(found.predicted, labels).as_dict("accuracy"),
    }
