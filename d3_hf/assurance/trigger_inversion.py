"""Trigger inversion: which class does the smallest mask with a pattern turn all images into?

Neural Cleanse's first two stages, `inversion` has the formula: for every class the smallest mask m (h, w) and a pattern p
(3, h, w) of pixels, fitted to 80 % of the images and checked on the others. The score is -||m||_1, that of a class that no
trigger reaches the lowest of all. A patch that yields a class needs no mask larger than itself.

Source: Neural Cleanse (Wang et al., IEEE S&P 2019); the defence of that name uses the same search. Batches of 32 are this
project's: few images then make enough steps of Adam.

Cost: for each class up to 80 passes over the images, forward and backward, to the pixels: the dearest of the signals. Blind to:
triggers that are spread over the image (blended, warped, sinusoidal) or differ from image to image, which need masks as large
as ordinary classes do; backdoors of all classes. Where the classes differ much in how near they are to the others, one of them
stands out in a network without a backdoor. Only what the network computes counts, not how.
"""

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.fitting import run_with_fitting_batch
from ..data.images import RawImages
from ..data.preprocessing import Preprocessing
from ..models.evaluating import evaluating
from ..models.features import finite_logits
from ..models.source import preprocessing_of
from .finding import Finding, check_comparable
from .inversion import Schedule, norm_scores, random_start, reverse_trigger, split_rows, stamped_logits

SCHEDULE = Schedule()
BATCH = 32  # images in a step
SEED = 0  # of split and starts


@torch.no_grad()
def batches_of(model: PreTrainedModel, images: RawImages, preprocessing: Preprocessing, batch_size: int) -> list[torch.Tensor]:
    """Images at the model's size, uint8 (B, 3, h, w), on its device; a ValueError if the model's logits are not finite."""
    device, batches = next(model.parameters()).device, []
    for _, raw, _ in images.batches(batch_size):
        batches.append(preprocessing.resize(raw.to(device)))
        finite_logits(model, batches[-1], preprocessing.normalize, "clean images")
    return batches


@torch.enable_grad()
def invert_all(
    model: PreTrainedModel, images: RawImages, preprocessing: Preprocessing, schedule: Schedule, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The triggers of all classes, mask and pattern, float32 (C, 4, h, w), and which of them work, bool (C,)."""

    def attack(batch, mask, pattern):
        return stamped_logits(model, preprocessing, preprocessing.normalize(batch), mask, pattern)

    fit, validate = (
        batches_of(model, images.select(rows), preprocessing, batch_size) for rows in split_rows(len(images), SEED)
    )
    found = []
    for target in tqdm(range(model.config.num_labels), "Reversing triggers", unit="class"):
        start = random_start(preprocessing.size, target, SEED).to(fit[0].device)
        trigger, works = reverse_trigger(attack, fit, validate, target, start, schedule)
        found.append((trigger.cpu().numpy(), works))
    triggers, reached = zip(*found, strict=True)
    return np.stack(triggers), np.array(reached)


def trigger_inversion(
    model: PreTrainedModel, images: RawImages, schedule: Schedule = SCHEDULE, batch_size: int = BATCH
) -> Finding:
    """Look for a class that a small trigger turns all images into.

    Args:
        model: A classifier of `load_classifier`; left as it was.
        images: Of every class, without triggers as far as is known; 200 to 2,500.
        schedule: How to search.
        batch_size: Images in a step of the search, at least 1; results depend on it. Halved while they do not fit into memory.

    Returns:
        Scores are -||m||_1 in pixels at the model's size. ``details`` has the norms of the masks that were found, ``norms``,
        and which of them work, ``reached``, (C,) each; and of the most suspicious class the trigger as two pictures of values
        in (0, 1): its ``mask``, float32 (h, w), and its ``pattern``, float32 (3, h, w).

    Raises:
        ValueError: A logit is not finite; see `check_comparable` and `preprocessing_of`.
        RuntimeError: A single image does not fit into the device's memory.
    """
    check_comparable(model, images)
    preprocessing = preprocessing_of(model)
    with evaluating(model):
        triggers, reached = run_with_fitting_batch(
            lambda size: invert_all(model, images, preprocessing, schedule, size), batch_size
        )
    norms = triggers[:, 0].sum((1, 2), dtype=np.float64)
    scores = norm_scores(norms, reached)
    found = Finding.of("trigger_inversion", scores, images.class_names, norms=norms, reached=reached)
    mask, pattern = np.split(triggers[found.suspect_class], [1])
    found.details.update(mask=mask[0], pattern=pattern)
    return found
