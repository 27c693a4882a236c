"""The split of a retain set: 60 % to tune on, 20 % to validate on, 20 % kept for an audit.

The images, class after class and in each class in drawn order, are dealt out in turn by `PATTERN`. Every class then has its
share in every part to within one image, and so has the whole. Two images of a class put at least one into the tuning part, five
at least one into each.

There is no cross-validation for classes with few images. What the floor looks at are the images that changed sides, over all
classes: its margin depends on how many there are in all, and 60 images of 43 classes are as many as 60 of ten. Folds would make
that margin smaller by the root of their number, and cost as many trainings.
"""

from dataclasses import dataclass

import numpy as np

TUNE, VALIDATE, AUDIT = 0, 1, 2
PATTERN = np.array([TUNE, VALIDATE, TUNE, AUDIT, TUNE])


@dataclass(frozen=True, eq=False)
class Split:
    """Three disjoint parts that cover a retain set: ascending positions in it, int64.

    Attributes:
        tune: What a trial trains on.
        validate: What it is measured on.
        audit: What neither a trial nor the purification sees.
    """

    tune: np.ndarray
    validate: np.ndarray
    audit: np.ndarray

    @property
    def retained(self) -> np.ndarray:
        """All but the audit: what the chosen recipe trains on."""
        return np.sort(np.concatenate([self.tune, self.validate]))

    def counts(self) -> dict[str, int]:
        """Images of each part by its name."""
        return {name: len(part) for name, part in vars(self).items()}


def split(labels: np.ndarray, seed: int) -> Split:
    """Deal a retain set out; an image that is the only one of its class goes to the tuning part.

    Args:
        labels: Classes, int (N,), at least 0.
        seed: At least 0; the same on every machine deals the same, see `data.labels.retain_indices`.

    Raises:
        ValueError: There are fewer images than give each part one.
    """
    if len(labels) < len(PATTERN):
        raise ValueError(f"a retain set of {len(labels)} images cannot be split into three parts: give more (--retain_count)")
    drawn = np.argsort(np.random.PCG64(seed).random_raw(len(labels)), kind="stable")
    by_class = drawn[np.argsort(labels[drawn], kind="stable")]
    dealt = by_class[np.bincount(labels)[labels[by_class]] > 1]
    part = np.full(len(labels), TUNE)
    part[dealt] = PATTERN[np.arange(len(dealt)) % len(PATTERN)]
    return Split(*(np.flatnonzero(part == number) for number in (TUNE, VALIDATE, AUDIT)))
