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
however few images there are. Newcombe's interval, which the guard rails state (`evaluation.paired`), would not give that.
"""

import math

from ..evaluation.paired import PairedTable

STANDARD_ERRORS = 1.0  # in the margin; the study of the rule decides


def standard_error(table: PairedTable) -> float:
    """SE of the fall of ACC, see above."""
    b, c, n = table.lost, table.gained, table.n
    return math.sqrt(b + c - (b - c) ** 2 / n) / n


def keeps_floor(table: PairedTable, max_accuracy_drop: float) -> bool:
    """Whether the fall and its margin stay within what is allowed.

    Args:
        table: The suspicious and the purified model on the validation images.
        max_accuracy_drop: Allowed fall in [0, 1].
    """
    return table.drop + STANDARD_ERRORS * standard_error(table) <= max_accuracy_drop


def images_needed(max_accuracy_drop: float) -> int:
    """Validation images without which a single one would be more than is allowed."""
    return math.ceil(1 / max_accuracy_drop) if max_accuracy_drop else 1
