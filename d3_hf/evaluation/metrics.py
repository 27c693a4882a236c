"""ACC, ASR, RA and PACC, each a proportion with its count and interval, and the drift of a trigger.

ACC is the accuracy on all clean images. ASR and RA look at the same triggered images, those that the attacker wants called
something else than they are (all-to-one: whose true label is not the target): ASR is the share classified as wanted, RA (robust
accuracy) the share still given the true label. A low ASR alone does not show a repaired model: it may have learnt to avoid the
target and still be led astray by the trigger. Definitions follow BackdoorBench (Wu et al., NeurIPS 2022).

PACC and the drift show a trigger that only changed its target ("trigger shifting" in RGA: Zhao et al., ICLR 2026). PACC looks
at triggered images of all classes, the target's too, which such a trigger leads away from the label that it used to yield.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from transformers import EvalPrediction


@dataclass(frozen=True)
class Proportion:
    """A share of counted cases.

    Args:
        successes: Cases that count, 0 to ``n``.
        n: All cases, at least 1.

    Raises:
        ValueError: The counts are out of range; a proportion of no cases has no value.
    """

    successes: int
    n: int

    def __post_init__(self) -> None:
        if self.n < 1 or not 0 <= self.successes <= self.n:
            raise ValueError(f"a proportion needs n >= 1 cases and 0 to n successes; got {self.successes} of {self.n}")

    @property
    def value(self) -> float:
        """The share, in [0, 1]."""
        return self.successes / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval (low, high), in [0, 1]."""
        from scipy.stats import binomtest  # scipy takes seconds, which whoever measures nothing need not wait

        interval = binomtest(self.successes, self.n).proportion_ci(confidence_level=0.95, method="wilson")
        return float(interval.low), float(interval.high)

    def as_dict(self, key: str) -> dict[str, Any]:
        """``{key: value, key_ci95: [low, high], key_n: n}``, the form in which result files carry a proportion."""
        return {key: self.value, f"{key}_ci95": list(self.interval), f"{key}_n": self.n}


def _classes(predictions: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.ndim != 1 or predictions.shape != labels.shape:
        raise ValueError(
            "predictions and labels must be two equally long lists of class indices; got shapes "
            f"{predictions.shape} and {labels.shape}"
        )
    return predictions, labels


def _misled(predictions: ArrayLike, labels: ArrayLike, wanted: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions, labels and wanted classes of the images that the attacker wants called something else than they are."""
    predictions, labels = _classes(predictions, labels)
    wanted = np.asarray(wanted)
    if wanted.shape not in ((), labels.shape):
        raise ValueError(f"wanted must be one class, or one for each of {len(labels)} images; got shape {wanted.shape}")
    wanted = np.broadcast_to(wanted, labels.shape)
    counted = labels != wanted
    if not counted.any():
        raise ValueError("every image's true label is what the attacker wants: ASR and RA are undefined")
    return predictions[counted], labels[counted], wanted[counted]


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> Proportion:
    """ACC: the share of images given their true label.

    Args:
        predictions: Predicted classes (N,), integers.
        labels: True classes (N,), integers.

    Raises:
        ValueError: The shapes differ or are not (N,), or N is 0.
    """
    predictions, labels = _classes(predictions, labels)
    return Proportion(int((predictions == labels).sum()), len(labels))


def attack_success_rate(predictions: ArrayLike, labels: ArrayLike, wanted: ArrayLike) -> Proportion:
    """ASR: the share of triggered images classified as the attacker wants, without those that are of that class anyway.

    Args:
        predictions: Predicted classes of the triggered images (N,), integers.
        labels: True classes of the same images (N,), integers.
        wanted: What the attacker wants them to be called: the target label, or (N,) one class for each.

    Raises:
        ValueError: The shapes are not these, or no image is of another class than the attacker wants.
    """
    predictions, _, wanted = _misled(predictions, labels, wanted)
    return accuracy(predictions, wanted)


def robust_accuracy(predictions: ArrayLike, labels: ArrayLike, wanted: ArrayLike) -> Proportion:
    """RA: the share of the triggered images that ASR counts which are given their true label; ASR + RA <= 1.

    Args:
        predictions: Predicted classes of the triggered images (N,), integers.
        labels: True classes of the same images (N,), integers.
        wanted: What the attacker wants them to be called: the target label, or (N,) one class for each.

    Raises:
        ValueError: The shapes are not these, or no image is of another class than the attacker wants.
    """
    predictions, labels, _ = _misled(predictions, labels, wanted)
    return accuracy(predictions, labels)


def poisoned_accuracy(predictions: ArrayLike, labels: ArrayLike) -> Proportion:
    """PACC: the share of triggered images of all classes, the target's among them, that are given their true label.

    RGA (Zhao et al., ICLR 2026). For all-to-all backdoors it equals RA.

    Args:
        predictions: Predicted classes of the triggered images (N,), integers.
        labels: True classes of the same images (N,), integers.

    Raises:
        ValueError: The shapes differ or are not (N,), or N is 0.
    """
    return accuracy(predictions, labels)


def trigger_drift(predictions: ArrayLike, labels: ArrayLike, target: int) -> Proportion:
    """The largest share of the triggered images that ASR counts which are wrongly given one and the same class, not the target.

    With predictions p_i and labels y_i of the n images with y_i != target::

        max over classes k != target of  #{i: p_i = k, y_i != k} / n

    Near 1: the trigger yields another class now. A model that ignores the trigger has a drift too, of the mistakes that it
    makes anyway: compare with that of a model without a backdoor. The class was chosen by its count: as an estimate of the
    maximum this is a little high, and its interval none of the maximum.

    Args:
        predictions: Predicted classes of the triggered images (N,), integers.
        labels: True classes of the same images (N,), integers.
        target: The one class that the attacker wants.

    Raises:
        ValueError: The shapes differ or are not (N,), or no image is of another class than the target.
    """
    predictions, labels, _ = _misled(predictions, labels, target)
    others = predictions[(predictions != labels) & (predictions != target)]
    return Proportion(int(np.bincount(others).max(initial=0)), len(labels))


def compute_metrics(eval_prediction: EvalPrediction) -> dict[str, float]:
    """ACC for a Trainer's ``compute_metrics``: ``{"accuracy": share}``.

    Args:
        eval_prediction: ``predictions`` are logits (N, C), or the first of what the model returned, or classes (N,) where
            ``preprocess_logits_for_metrics`` made them; ``label_ids`` true classes (N,).

    Raises:
        ValueError: A logit is not finite.
    """
    found = eval_prediction.predictions
    logits = np.asarray(found[0] if isinstance(found, tuple) else found)  # beside them, hidden states
    if not np.isfinite(logits).all():
        raise ValueError("the model's logits are not finite (NaN or infinite): its weights are broken")
    predicted = logits if logits.ndim == 1 else logits.argmax(-1)
    return {"accuracy": accuracy(predicted, eval_prediction.label_ids).value}
