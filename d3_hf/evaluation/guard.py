"""Guard rails: what a purified model must still do without a trigger.

Everything here is about images as they are: who defends does not know the trigger, and a rail that needed it could not be kept.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import join_names
from .guard_arguments import GuardArguments
from .measure import Measurement
from .metrics import accuracy
from .paired import PairedTable, paired_table

LOSE_LESS = "give more images, with D3 a smaller --learning_rate, or a larger --max_accuracy_drop"


@dataclass(frozen=True)
class Rail:
    """A guard rail that is on, and what became of it.

    Args:
        name: Its option, see `GuardArguments`.
        limit: What the option says, a share.
        found: What was measured, a share: of ``min_class_accuracy`` the lowest of a class.
        holds: Whether the limit is kept; a value exactly at it is.
        is_certain: Whether the images tell; of ``max_accuracy_drop`` alone more is known than ``holds``.
        said: What happened, in a line: of a rail that is broken why the model is rejected, of one that is uncertain a warning.
    """

    name: str
    limit: float
    found: float
    holds: bool
    is_certain: bool
    said: str = ""

    def as_dict(self) -> dict[str, Any]:
        """All but the line, for the manifest."""
        return {name: value for name, value in asdict(self).items() if name != "said"}


def rails_of(
    guard: GuardArguments, before: Measurement, after: Measurement, labels: Tensor, class_names: list[str]
) -> list[Rail]:
    """What became of each rail that is on.

    Args:
        guard: The rails. A ``max_accuracy_drop`` of 1 is off.
        before: The suspicious model.
        after: The purified one, measured on the same images.
        labels: Their true classes, int64 (N,).
        class_names: In the order of the labels.
    """
    found = []
    if (allowed := guard.max_accuracy_drop) is not None and allowed < 1:
        found.append(_accuracy_rail(paired_table(before.predictions, after.predictions, labels), allowed))
    if (least := guard.min_class_accuracy) is not None:
        rates = class_rates(after.predictions, labels)
        low = [f"{class_names[k]} ({100 * rate:.1f} %)" for k, rate in rates.items() if rate < least]
        said = (
            f"ACC of {len(low)} of {len(rates)} classes is under min_class_accuracy, {100 * least:g} %: {join_names(low)}"
            if low
            else ""
        )
        found.append(Rail("min_class_accuracy", least, min(rates.values()), not low, True, said))
    if (least := guard.min_agreement) is not None:
        agreement = accuracy(after.predictions, before.predictions).value
        share, limit = f"{100 * agreement:.1f} %", f"{100 * least:g} %"
        said = f"{share} of the predictions are those of the suspicious model, under min_agreement, {limit}"
        found.append(Rail("min_agreement", least, agreement, agreement >= least, True, "" if agreement >= least else said))
    return found


def _accuracy_rail(table: PairedTable, allowed: float) -> Rail:
    holds, is_certain, said = table.drop <= allowed, not _is_uncertain(table, allowed), _accuracy_line(table, allowed)
    if not holds:
        said = f"{said}: {LOSE_LESS}" if is_certain else f"{said}; to lose less, {LOSE_LESS}"
    return Rail("max_accuracy_drop", allowed, table.drop, holds, is_certain, "" if holds and is_certain else said)


def broken_rails(rails: list[Rail]) -> list[str]:
    """Why a purified model is to be rejected, a line for each rail that is broken; empty when all hold."""
    return [rail.said for rail in rails if not rail.holds]


def uncertain_rails(rails: list[Rail]) -> list[str]:
    """What to warn of, a line for each rail that holds although the test images cannot tell whether it does."""
    return [rail.said for rail in rails if rail.holds and not rail.is_certain]


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


def recall_rows(before: np.ndarray, after: np.ndarray, labels: Tensor, class_names: list[str]) -> list[dict[str, Any]]:
    """ACC of each class before and after, None of one without images: ``class``, ``images``, ``before``, ``after``; JSON-able.

    Args:
        before: Predicted classes (N,) of the suspicious model.
        after: Those of the purified one.
        labels: True classes, int64 (N,).
        class_names: In the order of the labels.
    """
    first, second = class_rates(before, labels), class_rates(after, labels)
    counts = labels.bincount(minlength=len(class_names)).tolist()
    return [
        {"class": name, "images": counts[k], "before": first.get(k), "after": second.get(k)}
        for k, name in enumerate(class_names)
    ]
