"""Whether a retain set looks fit to purify with: hints before the training."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.fitting import run_with_fitting_batch
from ..data.images import RawImages, content_hashes
from ..data.preprocessing import Preprocessing
from ..data.training_images import TrainingImages
from ..errors import join_names
from ..models.evaluating import evaluating
from .measure import Measurement
from .metrics import accuracy

# When a retain set is called unfit. Nothing in the literature settles these; they are the project's own, meant as hints.
FEW_IMAGES = 10  # of a class
LOW_ACCURACY, ACCURACY_GAP = 0.5, 0.1
CONFIDENT, NOISE = 0.9, 0.1


def retain_warnings(
    retain: Any, model: PreTrainedModel, preprocessing: Preprocessing, test: RawImages, before: Measurement, batch_size: int
) -> list[str]:
    """What makes the retain set look unfit; costs one pass of it through the suspicious model.

    A class with fewer than 10 images. The suspicious model's accuracy on the retain set under 50 %, or more than 10 points
    under its ACC: the images are not prepared as the checkpoint's were, or labels mean something else. Likely label noise:
    more than 10 % of the images on which the suspicious model gives another class than their label over 0.9. More than 10 %
    that are copies of other images. Images that are also in the test set, compared at the model's size, pixel by pixel.

    Args:
        retain: The retain set. `TrainingImages` are looked at, without augmentation; ready-made samples and streams are not.
        model: The suspicious model.
        preprocessing: Its own.
        test: Images that are measured on.
        before: The model, measured on them.
        batch_size: Images in a batch; halved while they do not fit into memory.

    Returns:
        One line for each finding.
    """
    if not isinstance(retain, TrainingImages):
        return []
    found = []
    labels, names = retain.labels.numpy(), test.class_names
    counts = np.bincount(labels, minlength=len(names))
    if few := [f"{names[k]} ({count})" for k, count in enumerate(counts) if count < FEW_IMAGES]:
        found.append(
            f"the retain set has fewer than {FEW_IMAGES} images of {len(few)} of {len(names)} classes: {join_names(few)}; "
            "draw more, or a balanced set"
        )
    predicted, confidence = run_with_fitting_batch(lambda size: _look(model, retain.images, preprocessing, size), batch_size)
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
    if shared := _shared(digests, test, preprocessing, batch_size):
        found.append(
            f"{shared} {of} are also in the test set, which makes ACC and RA look better: take them out of one of the two"
        )
    return found


@torch.inference_mode()
def _look(
    model: PreTrainedModel, images: Tensor, preprocessing: Preprocessing, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted class and its probability, each (N,), of uint8 images (N, 3, h, w) at the model's size."""
    device = next(model.parameters()).device
    with evaluating(model, device):
        batches = tqdm(images.split(batch_size), "Looking at the retain set", unit="batch")
        logits = [model(pixel_values=preprocessing.normalize(batch.to(device))).logits.float().cpu() for batch in batches]
    confidence, predicted = torch.cat(logits).softmax(-1).max(-1)
    return predicted.numpy(), confidence.numpy()


def _shared(digests: list[bytes], test: RawImages, preprocessing: Preprocessing, batch_size: int) -> int:
    """How many images of the retain set, by their digests, the test set holds too, at the model's size."""
    known = set()
    for _, images, labels in test.batches(batch_size):
        known.update(content_hashes(RawImages(preprocessing.resize(images), labels, test.class_names)))
    return sum(digest in known for digest in digests)
