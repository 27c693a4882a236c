"""Guard rails: what a purified model must still do without a trigger.

Everything here is about images as they are: who defends does not know the trigger, and a rail that needed it could not be kept.
"""

from dataclasses import asdict, dataclass, field

import numpy as np
from torch import Tensor

from ..errors import join_names
from .measure import Measurement
from .metrics import accuracy


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


def class_rates(predictions: np.ndarray, labels: Tensor) -> dict[int, float]:
    """ACC of each class that has images, by its number; ``predictions`` int (N,), ``labels`` int64 (N,)."""
    labels = labels.numpy()
    return {int(k): accuracy(predictions[labels == k], labels[labels == k]).value for k in np.unique(labels)}
