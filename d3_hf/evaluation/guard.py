"""Guard rails: what a purified model must still do without a trigger.

Everything here is about images as they are: who defends does not know the trigger, and a rail that needed it could not be kept.
"""

import numpy as np
from torch import Tensor

from ..errors import join_names
from .guard_arguments import GuardArguments
from .measure import Measurement
from .metrics import accuracy
from .paired import PairedTable, paired_table

LOSE_LESS = "give more images, with D3 a larger --lambda_clean or --sam_rho 2, or a larger --max_accuracy_drop"


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
    table = paired_table(before.predictions, after.predictions, labels)
    if (allowed := guard.max_accuracy_drop) is not None and table.drop > allowed:
        said = _accuracy_line(table, allowed)
        reasons.append(f"{said}; to lose less, {LOSE_LESS}" if _is_uncertain(table, allowed) else f"{said}: {LOSE_LESS}")
    if guard.min_class_accuracy is not None:
        rates = class_rates(after.predictions, labels)
        low = [f"{class_names[k]} ({100 * rate:.1f} %)" for k, rate in rates.items() if rate < guard.min_class_accuracy]
        if low:
            reasons.append(
                f"ACC of {len(low)} of {len(rates)} classes is under min_class_accuracy, "
                f"{100 * guard.min_class_accuracy:g} %: {join_names(low)}"
            )
    if guard.min_agreement is not None:
        agreement = accuracy(after.predictions, before.predictions).value
        if agreement < guard.min_agreement:
            reasons.append(
                f"{100 * agreement:.1f} % of the predictions are those of the suspicious model, under min_agreement, "
                f"{100 * guard.min_agreement:g} %"
            )
    return reasons


def uncertain_rails(guard: GuardArguments, before: Measurement, after: Measurement, labels: Tensor) -> list[str]:
    """What to warn of: a rail that holds although the test images cannot tell whether it does.

    Only ``max_accuracy_drop`` is looked at: the drop that was measured is allowed, and its interval reaches beyond the limit.

    Args:
        guard: The rails.
        before: The suspicious model.
        after: The purified one, measured on the same images.
        labels: Their true classes, int64 (N,).

    Returns:
        One line for each such rail.
    """
    table = paired_table(before.predictions, after.predictions, labels)
    if (allowed := guard.max_accuracy_drop) is None or table.drop > allowed or not _is_uncertain(table, allowed):
        return []
    return [_accuracy_line(table, allowed)]


def _is_uncertain(table: PairedTable, allowed: float) -> bool:
    """Whether the interval of the drop lies on both sides of what is allowed."""
    low, high = table.interval()
    return low <= allowed < high


def _accuracy_line(table: PairedTable, allowed: float) -> str:
    """What became of ACC, and what was allowed."""
    low, high = table.interval()
    change, ends = ("fell", (low, high)) if table.drop >= 0 else ("rose", (-high, -low))
    said = (
        f"ACC {change} by {100 * abs(table.drop):.1f} points, 95 % interval [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}], from "
        f"{100 * table.before.value:.1f} % to {100 * table.after.value:.1f} %; max_accuracy_drop allows {100 * allowed:g}"
    )
    return f"cannot tell with {table.n} images: {said}; give more test images" if _is_uncertain(table, allowed) else said


def class_rates(predictions: np.ndarray, labels: Tensor) -> dict[int, float]:
    """ACC of each class that has images, by its number; ``predictions`` int (N,), ``labels`` int64 (N,)."""
    labels = labels.numpy()
    return {int(k): accuracy(predictions[labels == k], labels[labels == k]).value for k in np.unique(labels)}
