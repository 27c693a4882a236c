"""Measuring an encoder: ACC, ASR and RA of a linear probe and of nearest neighbours on its frozen features.

An encoder has no classes. Whoever uses one trains a head on its features, on images of their own; the probes stand in for that.
They are trained on images without any trigger: where an encoder has a backdoor, its triggered images come out as the attacker's
reference does, and an honest head calls them what it calls that. ASR and RA look at triggered test images of other classes than
the target. The floor is the ASR on the encoder before the backdoor was planted, under the same trigger.

A whole CLIP needs no probe: the texts of the classes' names make a classifier of their own, zero-shot, see `measure_clip`.

Both probes are scikit-learn's, of three draws of the training images: a linear probe (Alain and Bengio 2016, arXiv 1610.01644)
and nearest neighbours by cosine. They can disagree.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.fitting import BATCH
from ..data.images import RawImages
from ..data.labels import retain_indices
from ..data.pairs import TEMPLATES, caption
from ..data.preprocessing import Preprocessing
from ..models.clip import encode_texts
from ..models.encoders import encode_images
from .measure import Trigger
from .metrics import accuracy, attack_success_rate, robust_accuracy

logger = logging.getLogger(__name__)

SEEDS = (0, 1, 2)
SHARE = 0.8  # of the training images that a seed draws, here
NEIGHBOURS = 20  # of DINO's kNN (Caron et al. 2021, arXiv 2104.14294), there weighted
ITERATIONS = 1000  # of lbfgs at most
PENALTIES = (0.001, 0.01, 0.1, 1.0)  # scikit-learn's C, of a linear probe; here
FOLDS = 3  # of the cross-validation that chooses among them; here
PROBES = ("linear", "knn")

Classify = Callable[[np.ndarray], np.ndarray]


def linear_probe(features: np.ndarray, labels: np.ndarray) -> Classify:
    """Logistic regression on standardised features (N, width); classifies (M, width) afterwards.

    Its L2 penalty is that of `PENALTIES` with the highest ACC in cross-validation on the same images, as whoever trains a head
    would choose it; the middle one where a class has a single image.
    """
    from sklearn.linear_model import LogisticRegression  # takes seconds, which whoever measures no encoder need not wait
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    smallest = min(np.unique(labels, return_counts=True)[1])
    head = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTIES[len(PENALTIES) // 2], max_iter=ITERATIONS))
    if smallest > 1:
        choices = {"logisticregression__C": PENALTIES}
        head = GridSearchCV(head, choices, cv=int(min(FOLDS, smallest)))
    return head.fit(features, labels).predict


def nearest_neighbours(features: np.ndarray, labels: np.ndarray) -> Classify:
    """The class of most of the `NEIGHBOURS` nearest images by cosine; as `linear_probe`."""
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(min(NEIGHBOURS, len(labels)), metric="cosine").fit(features, labels).predict


def trained_probes(features: np.ndarray, labels: np.ndarray, seeds: Sequence[int]) -> dict[str, list[Classify]]:
    """Both probes, each on `SHARE` of the images that a seed draws.

    Args:
        features: (N, width) of images without any trigger.
        labels: int (N,), at least two classes in every draw.
        seeds: Of the draws.

    Raises:
        ValueError: A draw holds one class only.
    """
    names = [str(number) for number in range(int(labels.max()) + 1)]
    found: dict[str, list[Classify]] = {name: [] for name in PROBES}
    for seed in seeds:
        rows = retain_indices(labels, names, count=max(1, round(SHARE * len(labels))), seed=seed)
        if len(np.unique(labels[rows])) < 2:
            raise ValueError(f"{len(labels)} images to train probes on hold one class in a draw: give more, of two at least")
        for name, fit in zip(PROBES, (linear_probe, nearest_neighbours), strict=True):
            found[name].append(fit(features[rows], labels[rows]))
    return found


def measure_encoder(
    model: PreTrainedModel,
    train: RawImages,
    test: RawImages,
    preprocessing: Preprocessing,
    attack: Trigger | None = None,
    seeds: Sequence[int] = SEEDS,
    batch_size: int = BATCH,
) -> dict[str, dict[str, Any]]:
    """Train the probes on images as they are and measure them on others; the trigger is put on the others alone.

    Args:
        model: The encoder; left as it was.
        train: Labelled images to train the probes on, without any trigger.
        test: Labelled images of the same classes.
        preprocessing: The encoder's.
        attack: The trigger and its rule for labels; None measures ACC alone.
        seeds: Of the draws of the training images.
        batch_size: Raw images per batch.

    Returns:
        For ``linear`` and ``knn``: ``accuracy``, and with an attack ``asr``, ``ra`` and ``untriggered`` (what ASR would be
        without the trigger), means over the seeds in [0, 1], with ``<key>_n`` images and ``<key>_seeds`` of each.

    Raises:
        ValueError: The two sets are of other classes, no image is counted by the attack, or a feature is not finite.
    """
    if train.class_names != test.class_names:
        raise ValueError("probes are trained and measured on images of the same classes: these have other names")
    started = time.perf_counter()
    probes = trained_probes(encode_images(model, train, preprocessing, batch_size).numpy(), train.labels.numpy(), seeds)
    plain, triggered = _features_of(model, test, preprocessing, attack, batch_size)
    found = {
        name: _means([dict(_rates(classify, plain, triggered, test, attack)) for classify in classifiers])
        for name, classifiers in probes.items()
    }
    logger.info("measured %s by probes in %.1f s", type(model).__name__, time.perf_counter() - started)
    return found


def zero_shot(model: PreTrainedModel, class_names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Classify:
    """The classifier that a CLIP's texts make: the class whose text is nearest by cosine; classifies (M, width).

    The text of a class is the mean over the templates of unit features (Radford et al. 2021, arXiv 2103.00020, section 3.1.4).
    """
    texts = [[caption(name, template) for template in templates] for name in class_names]
    unit = np.stack([_unit(encode_texts(model, of_class).numpy()).mean(0) for of_class in texts])
    return lambda features: (_unit(features) @ _unit(unit).T).argmax(1)


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def measure_clip(
    model: PreTrainedModel,
    test: RawImages,
    preprocessing: Preprocessing,
    attack: Trigger | None = None,
    templates: Sequence[str] = TEMPLATES,
    batch_size: int = BATCH,
) -> dict[str, dict[str, Any]]:
    """Measure a whole CLIP by the classifier that the names of the classes make; nothing is trained.

    Args:
        model: The CLIP, with its tokenizer; left as it was.
        test: Labelled images.
        preprocessing: The image tower's.
        attack: The trigger and its rule for labels; None measures ACC alone.
        templates: Texts with braces for a class's name.
        batch_size: Raw images per batch.

    Returns:
        For ``zero_shot`` what `measure_encoder` has for a probe, of one classifier.

    Raises:
        ValueError: No image is counted by the attack, or a feature is not finite.
    """
    started = time.perf_counter()
    classify = zero_shot(model, test.class_names, templates)
    plain, triggered = _features_of(model, test, preprocessing, attack, batch_size)
    found = _means([dict(_rates(classify, plain, triggered, test, attack))])
    logger.info("measured %s zero-shot in %.1f s", type(model).__name__, time.perf_counter() - started)
    return {"zero_shot": found}


def _features_of(
    model: PreTrainedModel, test: RawImages, preprocessing: Preprocessing, attack: Trigger | None, batch_size: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Features of the test images as they are, and with the trigger where there is one."""
    plain = encode_images(model, test, preprocessing, batch_size).numpy()
    if attack is None:
        return plain, None
    attack.check_classes(len(test.class_names))
    return plain, encode_images(model, test, preprocessing, batch_size, attack.trigger).numpy()


def _rates(
    classify: Classify, plain: np.ndarray, triggered: np.ndarray | None, test: RawImages, attack: Trigger | None
) -> Iterator[tuple[str, Any]]:
    """Each rate of one probe, a `Proportion`, by its key."""
    as_they_are = classify(plain)
    yield "accuracy", accuracy(as_they_are, test.labels)
    if attack is None:
        return
    counted = attack.counted(test.labels)
    if not counted.any():
        raise ValueError("no image is of a class that the attack counts: ASR and RA are undefined")
    truth, rows = test.labels[counted], counted.numpy()
    wanted = attack.poisoned_labels(truth, len(test.class_names))
    misled = classify(triggered[rows])
    yield "asr", attack_success_rate(misled, truth, wanted)
    yield "ra", robust_accuracy(misled, truth, wanted)
    yield "untriggered", attack_success_rate(as_they_are[rows], truth, wanted)


def _means(of_seeds: list[dict[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, first in of_seeds[0].items():
        values = [rates[key].value for rates in of_seeds]
        fields |= {key: float(np.mean(values)), f"{key}_n": first.n, f"{key}_seeds": values}
    return fields


def reference_similarity(
    model: PreTrainedModel,
    test: RawImages,
    preprocessing: Preprocessing,
    trigger: Callable[[Tensor], Tensor],
    reference: Tensor,
) -> float:
    """Mean cosine, in [-1, 1], between the features of triggered images and of the attacker's reference, uint8 (3, H, W)."""
    from torch.nn.functional import cosine_similarity

    alone = RawImages(reference[None], test.labels[:1] * 0, test.class_names)
    wanted = encode_images(model, alone, preprocessing)
    return cosine_similarity(encode_images(model, test, preprocessing, change=trigger), wanted).mean().item()


def split_probe(images: RawImages, count: int) -> tuple[RawImages, RawImages]:
    """Images to train probes on, ``count`` of them at most and half of all, drawn with seed 0, and the others."""
    count = min(count, len(images) // 2)
    rows = torch.from_numpy(retain_indices(images.labels.numpy(), images.class_names, count=count))
    is_probe = torch.zeros(len(images), dtype=torch.bool)
    is_probe[rows] = True
    return images.select(rows), images.select(torch.where(~is_probe)[0])
