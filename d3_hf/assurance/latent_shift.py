"""S2, latent minimal shift: which class does the shortest common shift of the features reach?

In the head's standardised coordinates (see `features`), for each class k over the n images i of other classes:

    minimise ||s||_2    such that, for at least 95 % of them,    z_ik - z_ij + (W'_k - W'_j) s >= 0 for all j != k

with z_i the logits of image i. The score is -||s_k||. A trigger that acts as one shift of what the head reads, whatever it does
to the pixels, makes the shift to its class at most as long as itself.

Source: Iwahana et al., arXiv 2511.08944 (abstract): the minimal latent perturbation of each class as a convex quadratic
programme, and the poisoned class as the outlying small norm. The constraints are this project's.

Margins are linear in s, so a set of images that is to be moved asks only for the worst of its margins against each j: C - 1
constraints, however many images. For one such set the problem is a least distance programme, solved exactly by non-negative
least squares (Lawson and Hanson, Solving Least Squares Problems, 1974, ch. 23). Which 95 % to move is what makes it hard. They
are found by leaving out one image after the other: each time that which holds the constraint of the largest multiplier, at
which s would shorten fastest (greedy constraint removal: Campi and Garatti, J. Optim. Theory Appl. 148, 2011).

The result moves at least 95 %, and for the images that are left no shift is shorter. Among all sets of 95 % it need not be the
best: in random problems of 3 or 4 classes, small enough for a search of all shifts, s was up to 20 % too long, by 3 % on
average. Nothing is drawn, and s changes little when margins do.

Cost: one pass over the images; then C N / 20 small programmes, each of which grows with C cubed (C = 10, N = 1,000: a second or
two; hours for many hundreds of classes). Blind to: triggers that move different images in different directions (input-aware
ones, all-to-all); channels that are silent on the images; a head that was drawn anew, while the features hold the backdoor
still. The shift need not be one that any image can cause.
"""

import math

import numpy as np
from scipy.optimize import nnls
from transformers import PreTrainedModel

from ..data.fitting import BATCH
from ..data.images import RawImages
from .features import read_standard_head
from .finding import Finding

SHARE = 0.95  # of the images, to be moved; this project's
MOST_CLASSES = 200  # more take hours
UNREACHABLE = 1e-12  # of the programme's residual: below this it is rounding, and s would be a million times its scale


def least_norm(matrix: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """The shortest s with ``matrix s >= bounds``.

    Args:
        matrix: float64 (M, D).
        bounds: float64 (M,).

    Returns:
        s, float64 (D,), or None if there is none; and for each constraint, (M,), a multiple of by how much the squared length
        grows with its bound, or of what it adds to the contradiction.
    """
    highest, longest = bounds.max(), np.linalg.norm(matrix, axis=1).max() or 1.0
    if highest <= 0:
        return np.zeros(matrix.shape[1]), np.zeros(len(bounds))
    system = np.vstack([matrix.T / longest, bounds / highest])
    goal = np.zeros(len(system))
    goal[-1] = 1
    multipliers, _ = nnls(system, goal, maxiter=30 * len(bounds))
    residual = system @ multipliers - goal
    if -residual[-1] < UNREACHABLE:
        return None, multipliers
    return residual[:-1] / -residual[-1] * highest / longest, multipliers


def smallest_shift(margins: np.ndarray, differences: np.ndarray) -> np.ndarray | None:
    """The s of one class.

    Args:
        margins: ``z_ik - z_ij`` of the n images of other classes, float64 (n, C - 1).
        differences: ``W'_k - W'_j``, float64 (C - 1, D).

    Returns:
        float64 (D,); None if no shift reaches the class, whose row lies among the others'.
    """
    basis, triangle = np.linalg.qr(differences.T)  # s lies in the span of the differences, which are few
    shift, multipliers = least_norm(triangle.T, -margins.min(0))
    for _ in range(len(margins) - math.ceil(SHARE * len(margins))):
        margins = np.delete(margins, margins[:, multipliers.argmax()].argmin(), axis=0)
        shift, multipliers = least_norm(triangle.T, -margins.min(0))
    return None if shift is None else basis @ shift


def shift_norms(weight: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``||s_k||`` of every class, float64 (C,); infinite where no shift reaches it.

    Args:
        weight: W', (C, D).
        logits: (N, C).
        labels: (N,), of at least two classes.
    """
    norms = np.full(len(weight), np.inf)
    for k in range(len(weight)):
        others = np.arange(len(weight)) != k
        margins = logits[labels != k, k, None] - logits[labels != k][:, others]
        shift = smallest_shift(margins, weight[k] - weight[others])
        norms[k] = np.inf if shift is None else np.linalg.norm(shift)
    return norms


def latent_shift(model: PreTrainedModel, images: RawImages, batch_size: int = BATCH) -> Finding:
    """Look for a class that a short shift of the features reaches.

    Args:
        model: A classifier of `load_classifier`; left as it was.
        images: Of every class, without triggers as far as is known; 500 to 2,500.
        batch_size: Images in a pass, at least 1; halved while they do not fit into memory.

    Returns:
        Scores are -||s_k||, in standard deviations of the features; a class that no shift reaches is given the lowest of those
        that one does. ``details`` has ``norms``, (C,), infinite for such a class.

    Raises:
        ValueError: See `check_comparable`, `preprocessing_of` and `read_head`.
    """
    head = read_standard_head(model, images, batch_size)
    norms = shift_norms(head.weight, head.logits, head.labels)
    scores = -np.minimum(norms, norms[np.isfinite(norms)].max())
    return Finding.of("latent_shift", scores, images.class_names, norms=norms)
