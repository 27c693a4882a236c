"""S4, canaries: how fast does a model learn small backdoors of our own?

A canary is a patch for each class, a grid of 3 x 3 cells drawn at random in black and white, at the bottom right. A copy
descends the cross-entropy of images of other classes that carry the patch of a class against that class, see `paths`, on all
canaries at once, until 80 % of the images yield. With q_t,c the mean probability of c over the images with its patch after t of
T steps, which stays what it is after the last that is taken,

    score_c = 1/(T + 1) sum_t q_t,c,    statistic = max_c score_c

in [0, 1]: for how much of the way the canary that takes fastest works. A patch that comes near to a backdoor's own works from
the start: that is counted.

Source: that a model with a backdoor takes another one sooner is what BackFlush (arXiv 2605.12529) claims of language models,
"susceptibility amplification" (abstract); that it holds for image classifiers has not been shown, nor measured here. Patches,
steps and score are this project's.

Cost: at most 12 passes over 50 images, or one of each class if that is more, forward and backward; memory for two models. Blind
to: backdoors that make others no easier to learn and that no patch in that corner comes near to. Scores measure how soon a
network moves, not how one class differs from the others: only beside those of twins do they mean anything, of the same
training, since a network that was trained longer moves more slowly. Like `anti_learning` it depends on how hidden units are
scaled.
"""

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.images import RawImages
from ..data.training_images import resized
from ..models.source import preprocessing_of
from .finding import Finding
from .paths import BATCH, DOWN, check_path, path_of, some_of_each

STEPS, IMAGES = 12, 50
TAKEN = 0.8  # share of the images
CELLS, SIDES = 3, 32  # cells of a patch along a side; how many of them the image's side holds


def patches(classes: int, cell: int) -> Tensor:
    """The patch of each class, uint8 (C, 3, 3 cell, 3 cell), black and white: the same for every model."""
    drawn = torch.randint(0, 2, (classes, 1, CELLS, CELLS), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return (255 * drawn).expand(-1, 3, -1, -1).repeat_interleave(cell, 2).repeat_interleave(cell, 3)


def stamped(images: Tensor, canaries: Tensor, classes: int) -> Tensor:
    """Images with the patches of some classes.

    Args:
        images: uint8 (N, 3, h, w), at least 3 pixels high and wide.
        canaries: Whose patch each gets, int64 (N,).
        classes: How many there are.

    Returns:
        A new tensor of the same shape.
    """
    cell = max(1, min(images.shape[-2:]) // SIDES)
    side, found = CELLS * cell, images.clone()
    found[:, :, -side:, -side:] = patches(classes, cell)[canaries]
    return found


def canaries_of(labels: Tensor, classes: int) -> Tensor:
    """The class of the patch that each image gets, int64 (N,): never its own; those of one class get one after the other."""
    found = torch.empty_like(labels)
    for k in labels.unique():
        rows = (labels == k).nonzero()[:, 0]
        found[rows] = (k + 1 + torch.arange(len(rows)) % (classes - 1)) % classes
    return found


def soonness(path: np.ndarray, steps: int) -> np.ndarray:
    """The score of each class, (C,), from its mean probabilities at the beginning and after each step taken, (1 + t, C)."""
    stays = np.repeat(path[-1:], steps + 1 - len(path), axis=0)
    return np.concatenate([path, stays]).mean(0)


def canary(model: PreTrainedModel, images: RawImages, steps: int = STEPS, batch_size: int = BATCH) -> Finding:
    """Plant canaries in a copy of a model, and read how fast they take.

    Args:
        model: A classifier of `load_classifier`; not changed, a copy is.
        images: Of every class, without triggers as far as is known; the first of each are taken, 50 in all, or one of each.
        steps: At most so many, at least 1.
        batch_size: Images in a pass, at least 1; halved while they do not fit into memory.

    Returns:
        Scores are in [0, 1]; the statistic is the highest, not how far it stands out. ``details`` has ``path``, the mean
        probability of each class under its patch at the beginning and after each step, (1 + t, C), and ``taken``, the share of
        the images that yield then, (1 + t,).

    Raises:
        ValueError: ``steps`` is out of range; see `check_comparable` and `preprocessing_of`; a logit is not finite; a weight is
            computed by a hook, so that the model cannot be copied.
        FloatingPointError: The planting diverged.
        RuntimeError: A single image does not fit into the device's memory.
    """
    check_path(model, images, steps)
    preprocessing, classes = preprocessing_of(model), len(images.class_names)
    taken = some_of_each(images, max(IMAGES, classes))
    wanted = canaries_of(taken.labels, classes)
    pixel_values = preprocessing.normalize(stamped(resized(taken, preprocessing), wanted, classes))

    def share(logits: Tensor) -> float:
        return (logits.argmax(1) == wanted).double().mean().item()

    found = path_of(model, pixel_values, wanted, DOWN, steps, batch_size, is_over=lambda logits: share(logits) >= TAKEN)
    chances = torch.stack(found).softmax(2)  # (1 + t, N, C)
    path = np.stack([chances[:, wanted == k, k].mean(1).numpy() for k in range(classes)], 1)
    scores = soonness(path, steps)
    suspect, names = int(scores.argmax()), list(images.class_names)
    details = {"path": path, "taken": np.array([share(logits) for logits in found])}
    return Finding("canary", scores, float(scores[suspect]), suspect, names, details)
