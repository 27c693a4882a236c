"""Measuring a classifier before and after: ACC, ASR, RA and PACC in one pass, and DER.

DER is that of FT-SAM (Zhu et al., ICCV 2023, eq. 7); for the others see `metrics`.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer

from ..data.fitting import BATCH, run_with_fitting_batch
from ..data.images import RawImages
from ..models.evaluating import evaluating
from ..models.features import finite_logits
from .metrics import Proportion, accuracy, attack_success_rate, poisoned_accuracy, robust_accuracy, trigger_drift
from .paired import paired_table


@dataclass(frozen=True)
class Measurement:
    """What ``measure`` found.

    Args:
        accuracy: ACC over all images.
        asr: ASR over the triggered images that the attack counts; None when no attack was given.
        ra: RA over the same images; None when no attack was given.
        seconds: Wall-clock time of the measurement.
        forward_images: Images that went through the model, originals and triggered ones together.
        untriggered: The share of the same images, without the trigger, that are classified as the attacker wants: what ASR
            would be without an attack. None when no attack was given.
        pacc: PACC over the triggered images of all classes; None when no attack was given.
        trigger_drift: See `metrics.trigger_drift`, over the triggered images that the attack counts; None when no attack was
            given or it wants several classes of them (all-to-all), among which no single one is the trigger's new target.
        predictions: Predicted classes (N,) of the images as they are, for what compares two models; no rate of one.
        triggered_predictions: Those of the same images with the trigger, as the attack stamps it on any; None without attack.
    """

    accuracy: Proportion
    asr: Proportion | None
    ra: Proportion | None
    seconds: float
    forward_images: int
    untriggered: Proportion | None = None
    pacc: Proportion | None = None
    trigger_drift: Proportion | None = None
    predictions: np.ndarray | None = field(default=None, repr=False, compare=False)
    triggered_predictions: np.ndarray | None = field(default=None, repr=False, compare=False)


def rates(measurement: Measurement) -> dict[str, Any]:
    """``accuracy``, and with an attack ``asr``, ``ra``, ``pacc`` and ``untriggered``: fractions in [0, 1] with ``<key>_ci95``
    and ``<key>_n``; where it is defined also ``trigger_drift`` with ``trigger_drift_n``, without interval: it is a maximum."""
    fields = _fields(measurement)
    return fields if measurement.untriggered is None else fields | measurement.untriggered.as_dict("untriggered")


def _fields(measurement: Measurement, suffix: str = "") -> dict[str, Any]:
    """What `rates` and `results` share."""
    fields: dict[str, Any] = {}
    for key in ("accuracy", "asr", "ra", "pacc"):
        if (proportion := getattr(measurement, key)) is not None:
            fields |= proportion.as_dict(f"{key}{suffix}")
    if (drift := measurement.trigger_drift) is not None:
        fields |= {f"trigger_drift{suffix}": drift.value, f"trigger_drift{suffix}_n": drift.n}
    return fields


def predict(model: PreTrainedModel, images: Tensor, preprocessing: Callable[[Tensor], Tensor], what: str) -> np.ndarray:
    """Predicted classes (B,) of raw uint8 (B, 3, H, W); ``what`` these are, for the ValueError if a logit is not finite."""
    return finite_logits(model, images, preprocessing, what).argmax(-1).cpu().numpy()


class Trigger(Protocol):
    """What measuring needs of an attack; `d3_hf.attacks.Attack` is one."""

    def trigger(self, images: Tensor) -> Tensor:
        """Triggered copies of raw uint8 (B, 3, H, W)."""

    def counted(self, labels: Tensor) -> Tensor:
        """Which images are triggered and count, none that is what the attacker wants anyway: bool (N,) for true labels (N,)."""

    def poisoned_labels(self, labels: Tensor, num_classes: int) -> Tensor:
        """What the attacker wants them to be called."""

    def check_classes(self, num_classes: int) -> None:
        """Raises a ValueError if the attack's labels are not among the classes."""


def _triggered(attack: Trigger, images: Tensor) -> Tensor:
    triggered = attack.trigger(images)
    if triggered.dtype != torch.uint8 or triggered.shape != images.shape:
        raise ValueError(
            f"the trigger must return uint8 images of the shape it was given, {tuple(images.shape)}; got "
            f"{triggered.dtype} of shape {tuple(triggered.shape)}"
        )
    return triggered


def _check_labels(model: PreTrainedModel, labels: Tensor, attack: Trigger | None) -> None:
    classes = model.config.num_labels
    if len(labels) == 0:
        raise ValueError("there are no images to measure on")
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"the images' labels run from {labels.min()} to {labels.max()}, but the model has {classes} classes; "
            "measure on images of the model's own classes"
        )
    if attack is None:
        return
    attack.check_classes(classes)
    if not attack.counted(labels).any():
        raise ValueError(
            "no image is of a class that the attack counts (all-to-one: any but the target): ASR and RA are undefined"
        )


def measure(
    model: PreTrainedModel,
    images: RawImages,
    preprocessing: Callable[[Tensor], Tensor],
    attack: Trigger | None = None,
    batch_size: int = BATCH,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Measurement:
    """Measure ACC, and with an attack ASR, RA, PACC and drift, in one pass and without augmentation.

    The trigger acts on the raw images at native size, before any preprocessing. Each batch goes through the model once
    as it is and once with the trigger, on images that the attack does not count too: PACC is about all classes. The model is in
    eval mode meanwhile, in the precision of its weights; training flags and device are restored.

    Args:
        model: A classifier: ``model(pixel_values=...).logits`` is (B, C).
        images: Raw images with true labels.
        preprocessing: Turns uint8 (B, 3, H, W) into the model's input, on the images' device; a ``Preprocessing``.
        attack: The trigger and its rule for labels; None measures ACC only.
        batch_size: Raw images per batch, all of one size, see `RawImages.batches`; halved while they do not fit into memory.
        device: Where to compute; the model's own device when None.
        progress: Show a progress bar.

    Returns:
        The measurement.

    Raises:
        ValueError: There is no image that the attack counts, a label or the target is not one of the model's classes, the
            trigger changes dtype or shape, or a logit is not finite.
        RuntimeError: A single image does not fit into the device's memory.
    """
    _check_labels(model, images.labels, attack)
    device = torch.device(device) if device is not None else next(model.parameters()).device
    start = time.perf_counter()
    with evaluating(model, device):
        plain, triggered = run_with_fitting_batch(
            lambda size: _predictions(model, images, preprocessing, attack, size, device, progress), batch_size
        )
    acc = accuracy(plain, images.labels)
    if triggered is None:
        return Measurement(acc, None, None, time.perf_counter() - start, acc.n, predictions=plain)
    counted = attack.counted(images.labels)
    truth, found = images.labels[counted], triggered[counted.numpy()]
    wanted = attack.poisoned_labels(truth, model.config.num_labels)
    targets = wanted.unique().tolist()
    return Measurement(
        accuracy=acc,
        asr=attack_success_rate(found, truth, wanted),
        ra=robust_accuracy(found, truth, wanted),
        seconds=time.perf_counter() - start,
        forward_images=2 * acc.n,
        untriggered=attack_success_rate(plain[counted.numpy()], truth, wanted),
        pacc=poisoned_accuracy(triggered, images.labels),
        trigger_drift=trigger_drift(found, truth, targets[0]) if len(targets) == 1 else None,
        predictions=plain,
        triggered_predictions=triggered,
    )


@torch.inference_mode()
def _predictions(
    model: PreTrainedModel,
    images: RawImages,
    preprocessing: Callable[[Tensor], Tensor],
    attack: Trigger | None,
    batch_size: int,
    device: torch.device,
    progress: bool,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Predicted classes (N,) of the images as they are, and with the trigger, if there is one."""
    plain, triggered = np.full(len(images), -1), None if attack is None else np.full(len(images), -1)
    with tqdm(total=len(images), desc="Measuring", unit="image", disable=not progress) as bar:
        for rows, raw, labels in images.batches(batch_size):
            raw = raw.to(device)
            plain[rows.numpy()] = predict(model, raw, preprocessing, "clean images")
            if attack is not None:
                triggered[rows.numpy()] = predict(model, _triggered(attack, raw), preprocessing, "triggered images")
            bar.update(len(labels))
    return plain, triggered


def measured_model(trainer: Trainer) -> PreTrainedModel:
    """A `PurifyTrainer`'s model as it is measured, before and after alike: whole, without accelerate's autocast."""
    return trainer.accelerator.unwrap_model(trainer.plain, keep_fp32_wrapper=False)


def measure_trainer(trainer: Trainer, images: RawImages, attack: Trigger | None = None) -> Measurement | None:
    """Measure a `PurifyTrainer`'s model as it is now, in float32, on the main process; the others wait.

    In batches of the trainer's ``per_device_eval_batch_size``.

    Args:
        trainer: A `PurifyTrainer`; it is not handed the trigger.
        images: Raw images with true labels.
        attack: An `Attack`; None measures ACC only.

    Returns:
        The measurement on the main process, None on the others.
    """
    measured = None
    if trainer.is_world_process_zero():
        measured = measure(
            measured_model(trainer), images, trainer.preprocessing, attack, trainer.args.per_device_eval_batch_size
        )
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


def results(before: Measurement, after: Measurement, labels: Tensor | None = None) -> dict[str, Any]:
    """The content of ``all_results.json``: fractions in [0, 1] with ``<key>_ci95`` = [low, high] and ``<key>_n``.

    Args:
        before: The suspicious model.
        after: The purified one, measured on the same images.
        labels: Their true classes, int64 (N,); without them, or the predictions of one model, accuracy_drop is left out.

    Returns:
        accuracy_before, asr_before, ra_before, pacc_before, accuracy_after, asr_after, ra_after, pacc_after and der; without
        the keys of asr, ra, pacc and der when no trigger was measured. Where they are defined, trigger_drift_before and
        trigger_drift_after, without interval. Also accuracy_drop, ACC before minus ACC after in [-1, 1], with the interval of
        pairs, and accuracy_drop_p of McNemar's exact test, see `paired`.

    Raises:
        ValueError: Only one of them was measured with a trigger, or they counted different numbers of images.
    """
    if before.accuracy.n != after.accuracy.n:
        raise ValueError(
            f"before and after must be measured on the same images; got {before.accuracy.n} before and {after.accuracy.n} after"
        )
    fields: dict[str, Any] = {}
    for suffix, measurement in (("before", before), ("after", after)):
        fields |= _fields(measurement, f"_{suffix}")
    if before.asr is not None or after.asr is not None:
        fields["der"] = detoxification_effectiveness_rating(before, after)
    if labels is not None and before.predictions is not None and after.predictions is not None:
        fields |= paired_table(before.predictions, after.predictions, labels).as_dict("accuracy_drop")
    return fields


def paired_results(before: Measurement, after: Measurement, labels: Tensor) -> dict[str, Any]:
    """ACC of two models on the same images with the whole paired table: `results` without a trigger, and the four counts."""
    return results(before, after, labels) | asdict(paired_table(before.predictions, after.predictions, labels))
