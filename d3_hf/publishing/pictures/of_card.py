"""Which pictures a card shows, under which names and words, and how they are drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..report import Report
from .classes import MOST, chosen_classes, draw_classes
from .training import draw_training, logged
from .triggered import draw_triggered

CLASSES, TRAINING, TRIGGERED = "purification_classes.png", "purification_training.png", "purification_triggered.png"
NAMES = (CLASSES, TRAINING, TRIGGERED)
CURVES = {"clean_loss": "Loss on the trusted images", "distance": "distance of the selected weights from their start"}


@dataclass(frozen=True)
class Picture:
    """A picture of a card.

    Attributes:
        name: Of its file, beside the card.
        caption: What it shows, for those too who do not see it.
        draw: Writes it to a file.
    """

    name: str
    caption: str
    draw: Callable[[Path], None]


def pictures_of(report: Report, log_history: Sequence[dict[str, Any]], epsilon: float | None = None) -> list[Picture]:
    """The pictures that can be drawn of a run, in the card's order.

    Args:
        report: What is known of it.
        log_history: Of its trainer's state.
        epsilon: See `draw_training`.
    """
    found = []
    if report.shown:
        caption = (
            "The first test image of each class with the trigger, and what both models answer: green the true class, red the "
            "attacker's, brown another one."
        )
        found.append(Picture(TRIGGERED, caption, partial(draw_triggered, report.shown)))
    if classes := chosen_classes(report.classes):
        more = sum(row["images"] > 0 for row in report.classes) > len(classes)
        which = f"the {MOST} classes whose accuracy changed most" if more else "each class"
        caption = f"ACC of {which} before and after, with the number of test images."
        found.append(Picture(CLASSES, caption, partial(draw_classes, report.classes)))
    if curves := logged(log_history):
        caption = f"{' and '.join(CURVES[key] for key in curves)} while training."
        found.append(Picture(TRAINING, caption, partial(draw_training, log_history, epsilon)))
    return found
