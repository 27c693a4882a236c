"""Guard rails: what a purified model must still do without a trigger, and whether a retain set looks fit to purify with.

Everything here is about images as they are: who defends does not know the trigger, and a rail that needed it could not be kept.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .data import RawImages, TrainingImages, content_hashes
from .evaluation import Measurement, accuracy, evaluating
from .labels import listed
from .preprocessing import Preprocessing
from .trainer import PurifyTrainer

# When a retain set is called unfit. Nothing in the literature settles these; they are the project's own, meant as hints.
FEW_IMAGES = 10  # of a class
LOW_ACCURACY, ACCURACY_GAP = 0.5, 0.1
CONFIDENT, NOISE = 0.9, 0.1
BATCH = 256


@dataclass
class GuardArguments:
    """When a purified model is rejected; shares in [0, 1] of the test images as they are, so 0.05 is five points.

    Args:
        max_accuracy_drop: Points of ACC that the purification may cost. 0.05 in the recipes and on the command line (here);
            1 turns it off. `workflow.purify` has no rails unless it is given some.
        min_class_accuracy: ACC that every class must keep; a class without test images is passed over. Default off.
        min_agreement: Share of the test images on which the purified model must predict what the suspicious one did, be it
            right or wrong. Default off.

    Raises:
        ValueError: A value is not in [0, 1].
    """

    max_accuracy_drop: float | None = field(default=0.05, metadata={"help": "Reject if ACC falls by more; 0.05 is 5 points."})
    min_class_accuracy: float | None = field(default=None, metadata={"help": "Reject if the ACC of any class is lower."})
    min_agreement: float | None = field(default=None, metadata={"help": "Reject if fewer predictions stay the same."})

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], as 0.05 for five points; got {value}")


def broken_rails(
    guard: GuardArguments, before: Measurement, after: Measurement, labels: Tensor, class_names: list[str]
) -> list[str]:
    """Why a purified model is to be rejected.

    Args:
        guard: The rails. A value exactly at its limit holds.
        before: The suspicious model.
        after: The purified one, measured on the same images.
        labels: Their true classes, int64 (N,).
        class_names: In the order of the labels.

    Returns:
        One line for each rail that is broken; empty when all hold.
    """
    reasons = []
    drop = (before.accuracy.successes - after.accuracy.successes) / after.accuracy.n
    if guard.max_accuracy_drop is not None and drop > guard.max_accuracy_drop:
        reasons.append(
            f"ACC fell by {100 * drop:.1f} points, from {100 * before.accuracy.value:.1f} % to "
            f"{100 * after.accuracy.value:.1f} %; max_accuracy_drop allows {100 * guard.max_accuracy_drop:g}: "
            "give more images, with D3 a larger --lambda_clean or --sam_rho 2, or a larger --max_accuracy_drop"
        )
    if guard.min_class_accuracy is not None:
        rates = class_rates(after.predictions, labels)
        low = [f"{class_names[k]} ({100 * rate:.1f} %)" for k, rate in rates.items() if rate < guard.min_class_accuracy]
        if low:
            reasons.append(
                f"ACC of {len(low)} of {len(rates)} classes is under min_class_accuracy, "
                f"{100 * guard.min_class_accuracy:g} %: {listed(low)}"
            )
    if guard.min_agreement is not None:
        agreement = accuracy(after.predictions, before.predictions).value
        if agreement < guard.min_agreement:
            reasons.append(
                f"{100 * agreement:.1f} % of the predictions are those of the suspicious model, under min_agreement, "
                f"{100 * guard.min_agreement:g} %"
            )
    return reasons


def class_rates(predictions: np.ndarray, labels: Tensor) -> dict[int, float]:
    """ACC of each class that has images, by its number; ``predictions`` int (N,), ``labels`` int64 (N,)."""
    labels = labels.numpy()
    return {int(k): accuracy(predictions[labels == k], labels[labels == k]).value for k in np.unique(labels)}


def retain_warnings(trainer: PurifyTrainer, test: RawImages, before: Measurement) -> list[str]:
    """What makes the retain set look unfit; costs one pass of it through the suspicious model.

    A class with fewer than 10 images. The suspicious model's accuracy on the retain set under 50 %, or more than 10 points
    under its ACC: the images are not prepared as the checkpoint's were, or labels mean something else. Likely label noise:
    more than 10 % of the images on which the suspicious model gives another class than their label over 0.9. More than 10 %
    that are copies of other images. Images that are also in the test set, compared at the model's size, pixel by pixel.

    Args:
        trainer: Its ``train_dataset`` is looked at, without augmentation, if it is `TrainingImages`; ready-made samples are not
            looked at.
        test: Images that are measured on.
        before: The suspicious model, measured on them.

    Returns:
        One line for each finding.
    """
    retain = trainer.train_dataset
    if not isinstance(retain, TrainingImages):
        return []
    found = []
    labels, names = retain.labels.numpy(), test.class_names
    counts = np.bincount(labels, minlength=len(names))
    if few := [f"{names[k]} ({count})" for k, count in enumerate(counts) if count < FEW_IMAGES]:
        found.append(
            f"the retain set has fewer than {FEW_IMAGES} images of {len(few)} of {len(names)} classes: {listed(few)}; "
            "draw more, or a balanced set"
        )
    model = trainer.accelerator.unwrap_model(trainer.plain, keep_fp32_wrapper=False)
    predicted, confidence = _look(model, retain.images, trainer.preprocessing)
    rate, of = accuracy(predicted, labels).value, f"of the {len(labels)} images of the retain set"
    if rate < LOW_ACCURACY or rate < before.accuracy.value - ACCURACY_GAP:
        found.append(
            f"the suspicious model classifies {100 * rate:.1f} % {of} right, and {100 * before.accuracy.value:.1f} % of the "
            "test images: check that size, mean and std are the checkpoint's and the labels mean the same"
        )
    noisy = np.mean((predicted != labels) & (confidence > CONFIDENT))
    if noisy > NOISE:
        found.append(
            f"on {100 * noisy:.1f} % {of} the suspicious model is more than {100 * CONFIDENT:.0f} % sure of another class than "
            "their label: the labels may be wrong"
        )
    digests = content_hashes(RawImages(retain.images, retain.labels, names))
    if (copies := len(digests) - len(set(digests))) > NOISE * len(digests):
        found.append(f"{copies} {of} are copies of others: draw a set of different images")
    if shared := _shared(digests, test, trainer.preprocessing):
        found.append(
            f"{shared} {of} are also in the test set, which makes ACC and RA look better: take them out of one of the two"
        )
    return found


@torch.inference_mode()
def _look(model: Any, images: Tensor, preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """Predicted class and its probability, each (N,), of uint8 images (N, 3, h, w) at the model's size."""
    device = next(model.parameters()).device
    with evaluating(model, device):
        batches = tqdm(images.split(BATCH), "Looking at the retain set", unit="batch")
        logits = [model(pixel_values=preprocessing.normalize(batch.to(device))).logits.float().cpu() for batch in batches]
    confidence, predicted = torch.cat(logits).softmax(-1).max(-1)
    return predicted.numpy(), confidence.numpy()


def _shared(digests: list[bytes], test: RawImages, preprocessing: Preprocessing) -> int:
    """How many images of the retain set, by their digests, the test set holds too, at the model's size."""
    known = set()
    for images, labels in test.batches(BATCH):
        known.update(content_hashes(RawImages(preprocessing.resize(images), labels, test.class_names)))
    return sum(digest in known for digest in digests)
