"""The floor: how far validation ACC may fall before a recipe is out.

Both models saw the same n images. With b of them right before and wrong after, and c the other way round, the fall and its
standard error for matched pairs are

    d = (b - c) / n,      SE = sqrt(b + c - (b - c)^2 / n) / n

(Agresti, "Categorical Data Analysis", section on comparing dependent proportions; b and c are McNemar's counts, 1947): the mean
of b times 1, c times -1 and else 0, and the root of their variance over n. A recipe keeps the floor if

    d + SE <= the largest allowed fall.

One standard error is the rule of Breiman et al. ("Classification and Regression Trees", 1984) for choosing by a validation set:
wide enough that one image more or less does not decide, while 95 % on 60 images would refuse every model that answers three of
them otherwise. Images that both models answer alike add nothing to SE: a model equal to the suspicious one keeps every floor,
however few images there are. Intervals of the score kind would not give that.
"""

from dataclasses import dataclass

import numpy as np

STANDARD_ERRORS = 1.0  # in the margin; the study of the rule decides


@dataclass(frozen=True)
class Paired:
    """Two models on the same images.

    Attributes:
        n: Images, at least 1.
        lost: b, right before and wrong after.
        gained: c, wrong before and right after.
    """

    n: int
    lost: int
    gained: int

    @classmethod
    def of(cls, before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> "Paired":
        """Count predictions of the suspicious and the purified model against the true classes; each int (N,)."""
        was, now = before == labels, after == labels
        return cls(len(labels), int(np.sum(was & ~now)), int(np.sum(now & ~was)))

    @property
    def drop(self) -> float:
        """d, the fall of ACC; negative where it rose."""
        return (self.lost - self.gained) / self.n

    @property
    def standard_error(self) -> float:
        """SE of `drop`."""
        return (self.lost + self.gained - (self.lost - self.gained) ** 2 / self.n) ** 0.5 / self.n


def keeps_floor(pair: Paired, max_accuracy_drop: float) -> bool:
    """Whether the fall and its margin stay within what is allowed.

    Args:
        pair: The counts.
        max_accuracy_drop: Allowed fall in [0, 1].
    """
    return pair.drop + STANDARD_ERRORS * pair.standard_error <= max_accuracy_drop


def images_needed(max_accuracy_drop: float) -> int:
    """Validation images without which a single one would be more than is allowed."""
    return int(np.ceil(1 / max_accuracy_drop)) if max_accuracy_drop else 1
