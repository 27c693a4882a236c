"""What a classifier says of each image and how sure it is: for labels that it contradicts, and for two models that disagree."""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.fitting import BATCH, run_with_fitting_batch
from ..data.images import RawImages
from ..models.evaluating import evaluating
from ..models.features import finite_logits
from ..models.source import preprocessing_of
from .metrics import Proportion
from .retain_check import CONFIDENT


@dataclass(frozen=True, eq=False)
class Answers:
    """What a classifier says of images.

    Args:
        predicted: Class of each image, int64 (N,).
        confidence: Its probability, float32 (N,).
    """

    predicted: np.ndarray
    confidence: np.ndarray

    @property
    def is_confident(self) -> np.ndarray:
        """Which of them it gives over 0.9, bool (N,)."""
        return self.confidence > CONFIDENT

    def contradicted(self, labels: np.ndarray) -> Proportion:
        """The share of images (N,) of which it is over 0.9 sure that they are of another class than their label."""
        return Proportion(int(np.sum((self.predicted != labels) & self.is_confident)), len(labels))


def confident_flips(before: Answers, after: Answers) -> np.ndarray:
    """On which images two classifiers are both over 0.9 sure, and disagree: bool (N,)."""
    return before.is_confident & after.is_confident & (before.predicted != after.predicted)


def answers(model: PreTrainedModel, images: RawImages, batch_size: int = BATCH) -> Answers:
    """Ask a classifier, in evaluation mode and where it is; it is left as it was.

    Args:
        model: A classifier of `load_classifier`.
        images: Raw images.
        batch_size: Images in a pass, at least 1; halved while they do not fit into memory.

    Raises:
        ValueError: A logit is not finite, or see `preprocessing_of`.
        RuntimeError: A single image does not fit into the device's memory.
    """
    with evaluating(model):
        return run_with_fitting_batch(lambda size: _ask(model, images, size), batch_size)


@torch.inference_mode()
def _ask(model: PreTrainedModel, images: RawImages, batch_size: int) -> Answers:
    preprocessing, device = preprocessing_of(model), next(model.parameters()).device
    predicted, confidence = np.empty(len(images), np.int64), np.empty(len(images), np.float32)
    with tqdm(total=len(images), desc="Asking the model", unit="image") as bar:
        for rows, raw, labels in images.batches(batch_size):
            logits = finite_logits(model, raw.to(device), preprocessing, "clean images").float()
            predicted[rows.numpy()] = logits.argmax(-1).cpu().numpy()
            confidence[rows.numpy()] = logits.softmax(-1).amax(-1).cpu().numpy()
            bar.update(len(labels))
    return Answers(predicted, confidence)
