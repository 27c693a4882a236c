"""Measuring a classifier: ACC, ASR, RA and DER, each proportion with its count and interval.

ACC is the accuracy on all clean images. ASR and RA look at the same triggered images, those whose true label is not
the target: ASR is the share classified as the target, RA (robust accuracy) the share still given the true label. A low
ASR alone does not show a repaired model: it may have learnt to avoid the target and still be led astray by the
trigger. Definitions follow BackdoorBench (Wu et al., NeurIPS 2022) and, for DER, FT-SAM (Zhu et al., ICCV 2023, eq.
7).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import binomtest
from torch import Tensor
from tqdm.auto import tqdm
from transformers import EvalPrediction, PreTrainedModel, Trainer

from .data import RawImages


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
        interval = binomtest(self.successes, self.n).proportion_ci(confidence_level=0.95, method="wilson")
        return float(interval.low), float(interval.high)

    def as_dict(self, key: str) -> dict[str, Any]:
        """``{key: value, key_ci95: [low, high], key_n: n}``, the form in which result files carry a proportion."""
        return {key: self.value, f"{key}_ci95": list(self.interval), f"{key}_n": self.n}


@dataclass(frozen=True)
class Measurement:
    """What ``measure`` found.

    Args:
        accuracy: ACC over all images.
        asr: ASR over the triggered images whose true label is not the target; None when no trigger was given.
        ra: RA over the same images; None when no trigger was given.
        seconds: Wall-clock time of the measurement.
        forward_images: Images that went through the model, originals and triggered ones together.
    """

    accuracy: Proportion
    asr: Proportion | None
    ra: Proportion | None
    seconds: float
    forward_images: int


def _classes(predictions: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.ndim != 1 or predictions.shape != labels.shape:
        raise ValueError(
            "predictions and labels must be two equally long lists of class indices; got shapes "
            f"{predictions.shape} and {labels.shape}"
        )
    return predictions, labels


def _non_target(predictions: ArrayLike, labels: ArrayLike, target_label: int) -> tuple[np.ndarray, np.ndarray]:
    predictions, labels = _classes(predictions, labels)
    kept = labels != target_label
    if not kept.any():
        raise ValueError(f"no image has a true label other than the target {target_label}: ASR and RA are undefined")
    return predictions[kept], labels[kept]


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


def attack_success_rate(predictions: ArrayLike, labels: ArrayLike, target_label: int) -> Proportion:
    """ASR: the share of triggered images classified as the target, without those that are of the target class anyway.

    Args:
        predictions: Predicted classes of the triggered images (N,), integers.
        labels: True classes of the same images (N,), integers.
        target_label: The attacker's class.

    Raises:
        ValueError: The shapes differ or are not (N,), or no image has another true label than the target.
    """
    predictions, _ = _non_target(predictions, labels, target_label)
    return Proportion(int((predictions == target_label).sum()), len(predictions))


def robust_accuracy(predictions: ArrayLike, labels: ArrayLike, target_label: int) -> Proportion:
    """RA: the share of the triggered images that ASR counts which are given their true label; ASR + RA <= 1.

    Args:
        predictions: Predicted classes of the triggered images (N,), integers.
        labels: True classes of the same images (N,), integers.
        target_label: The attacker's class.

    Raises:
        ValueError: The shapes differ or are not (N,), or no image has another true label than the target.
    """
    return accuracy(*_non_target(predictions, labels, target_label))


def compute_metrics(eval_prediction: EvalPrediction) -> dict[str, float]:
    """ACC for a Trainer's ``compute_metrics``: ``{"accuracy": share}``.

    Args:
        eval_prediction: ``predictions`` are logits (N, C), ``label_ids`` true classes (N,).

    Raises:
        ValueError: A logit is not finite.
    """
    logits = np.asarray(eval_prediction.predictions)
    if not np.isfinite(logits).all():
        raise ValueError("the model's logits are not finite (NaN or infinite): its weights are broken")
    return {"accuracy": accuracy(logits.argmax(-1), eval_prediction.label_ids).value}


@contextmanager
def _evaluating(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Eval mode on ``device`` inside; afterwards each module's training flag and the model's device are restored."""
    training = {module: module.training for module in model.modules()}
    home = next(model.parameters()).device
    model.to(device).eval()
    try:
        yield
    finally:
        model.to(home)
        for module, flag in training.items():
            module.training = flag


def _predict(model: PreTrainedModel, images: Tensor, preprocessing: Callable[[Tensor], Tensor], what: str) -> np.ndarray:
    logits = model(pixel_values=preprocessing(images)).logits
    if not torch.isfinite(logits).all():
        raise ValueError(f"the model's logits on {what} are not finite (NaN or infinite): its weights are broken")
    return logits.argmax(-1).cpu().numpy()


def _triggered(trigger: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    triggered = trigger(images)
    if triggered.dtype != torch.uint8 or triggered.shape != images.shape:
        raise ValueError(
            f"the trigger must return uint8 images of the shape it was given, {tuple(images.shape)}; got "
            f"{triggered.dtype} of shape {tuple(triggered.shape)}"
        )
    return triggered


def _check_labels(model: PreTrainedModel, labels: Tensor, target_label: int | None) -> None:
    classes = model.config.num_labels
    if len(labels) == 0:
        raise ValueError("there are no images to measure on")
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"the images' labels run from {labels.min()} to {labels.max()}, but the model has {classes} classes; "
            "measure on images of the model's own classes"
        )
    if target_label is None:
        return
    if not 0 <= target_label < classes:
        raise ValueError(f"target_label {target_label} is out of range: the model has classes 0 to {classes - 1}")
    if (labels == target_label).all():
        raise ValueError(f"no image has a true label other than the target {target_label}: ASR and RA are undefined")


def measure(
    model: PreTrainedModel,
    images: RawImages,
    preprocessing: Callable[[Tensor], Tensor],
    trigger: Callable[[Tensor], Tensor] | None = None,
    target_label: int | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Measurement:
    """Measure ACC, and with a trigger ASR and RA, in one pass and without augmentation.

    The trigger acts on the raw images at native size, before any preprocessing. Each batch goes through the model once
    as it is and its non-target images once more with the trigger: 1.9 forward passes per image for ten equally large
    classes. The model is in eval mode meanwhile, in the precision of its weights; training flags and device are
    restored.

    Args:
        model: A classifier: ``model(pixel_values=...).logits`` is (B, C).
        images: Raw images with true labels.
        preprocessing: Turns uint8 (B, 3, H, W) into the model's input, on the images' device; a ``Preprocessing``.
        trigger: Turns raw uint8 images into triggered ones, such as ``attack.trigger``; None measures ACC only.
        target_label: The class that the attacker wants; given exactly when ``trigger`` is.
        batch_size: Raw images per batch. Images of different sizes go through one by one.
        device: Where to compute; the model's own device when None.
        progress: Show a progress bar.

    Returns:
        The measurement.

    Raises:
        ValueError: Only one of ``trigger`` and ``target_label`` is given, there is no image whose true label is not
            the target, a label or the target is not one of the model's classes, the trigger changes dtype or shape, or
            a logit is not finite.
    """
    if (trigger is None) != (target_label is None):
        raise ValueError("trigger and target_label belong together: give both to measure ASR and RA, or neither")
    _check_labels(model, images.labels, target_label)
    device = torch.device(device) if device is not None else next(model.parameters()).device
    start = time.perf_counter()
    predicted, triggered_predicted, triggered_labels = [], [], []
    bar = tqdm(total=len(images), desc="Measuring", unit="image", disable=not progress)
    with bar, torch.inference_mode(), _evaluating(model, device):
        for raw, labels in images.batches(batch_size):
            raw = raw.to(device)
            predicted.append(_predict(model, raw, preprocessing, "clean images"))
            if trigger is not None and (labels != target_label).any():
                kept = labels != target_label
                triggered = _triggered(trigger, raw[kept.to(device)])
                triggered_predicted.append(_predict(model, triggered, preprocessing, "triggered images"))
                triggered_labels.append(labels[kept].numpy())
            bar.update(len(labels))
    asr = ra = None
    if trigger is not None:
        attacked, truth = np.concatenate(triggered_predicted), np.concatenate(triggered_labels)
        asr, ra = attack_success_rate(attacked, truth, target_label), robust_accuracy(attacked, truth, target_label)
    acc = accuracy(np.concatenate(predicted), images.labels)
    return Measurement(acc, asr, ra, time.perf_counter() - start, acc.n + (asr.n if asr else 0))


def measure_trainer(trainer: Trainer, images: RawImages, attack: Any = None) -> Measurement | None:
    """Measure a `PurifyTrainer`'s model as it is now, in float32, on the main process; the others wait.

    Args:
        trainer: A `PurifyTrainer`; it is not handed the trigger.
        images: Raw images with true labels.
        attack: An `Attack`; None measures ACC only.

    Returns:
        The measurement on the main process, None on the others.
    """
    measured = None
    if trainer.is_world_process_zero():
        trigger, target = (attack.trigger, attack.target_label) if attack else (None, None)
        # accelerate leaves its autocast on the model after training: without it before and after are measured alike.
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        measured = measure(model, images, trainer.preprocessing, trigger, target)
    trainer.accelerator.wait_for_everyone()
    return measured


def detoxification_effectiveness_rating(before: Measurement, after: Measurement) -> float:
    """DER = (max(0, ASR drop) - max(0, ACC drop) + 1) / 2, in [0, 1]; 0.5 means that nothing was gained.

    FT-SAM (Zhu et al., ICCV 2023), eq. 7. A rise of ACC earns nothing, a rise of ASR costs nothing. One of the two
    versions in BackdoorBench's code adds the loss of accuracy instead of subtracting it; this is the right one.

    Args:
        before: The suspicious model.
        after: The purified one, measured on the same images.

    Raises:
        ValueError: One of them was measured without a trigger, or they counted different numbers of images.
    """
    if before.asr is None or after.asr is None:
        raise ValueError("DER needs the ASR before and after: measure both with the trigger")
    if (before.accuracy.n, before.asr.n) != (after.accuracy.n, after.asr.n):
        raise ValueError(
            f"before and after must be measured on the same images; got {before.accuracy.n} clean and {before.asr.n} "
            f"triggered before, {after.accuracy.n} and {after.asr.n} after"
        )
    asr_drop = before.asr.value - after.asr.value
    accuracy_drop = before.accuracy.value - after.accuracy.value
    return (max(0.0, asr_drop) - max(0.0, accuracy_drop) + 1) / 2


def results(before: Measurement, after: Measurement) -> dict[str, Any]:
    """The content of ``all_results.json``: fractions in [0, 1] with ``<key>_ci95`` = [low, high] and ``<key>_n``.

    Args:
        before: The suspicious model.
        after: The purified one, measured on the same images.

    Returns:
        accuracy_before, asr_before, ra_before, accuracy_after, asr_after, ra_after and der; without the asr, ra and
        der keys when no trigger was measured.

    Raises:
        ValueError: Only one of them was measured with a trigger, or they counted different numbers of images.
    """
    if before.accuracy.n != after.accuracy.n:
        raise ValueError(
            f"before and after must be measured on the same images; got {before.accuracy.n} before and {after.accuracy.n} after"
        )
    proportions = {
        "accuracy_before": before.accuracy,
        "asr_before": before.asr,
        "ra_before": before.ra,
        "accuracy_after": after.accuracy,
        "asr_after": after.asr,
        "ra_after": after.ra,
    }
    fields: dict[str, Any] = {}
    for key, proportion in proportions.items():
        if proportion is not None:
            fields.update(proportion.as_dict(key))
    if before.asr is not None or after.asr is not None:
        fields["der"] = detoxification_effectiveness_rating(before, after)
    return fields
