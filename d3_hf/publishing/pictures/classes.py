"""Accuracy of each class before and after."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .drawing import AFTER, BEFORE, as_text, drawn, new_figure, save

MOST = 20  # classes; of more those whose accuracy changed most


def chosen_classes(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `evaluation.guard.recall_rows` that are drawn: of classes that have images, in their order."""
    seen = [row for row in rows if row["images"]]
    kept = sorted(range(len(seen)), key=lambda k: -abs(seen[k]["after"] - seen[k]["before"]))[:MOST]
    return [seen[k] for k in sorted(kept)]


def draw_classes(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw two bars for each class of `chosen_classes`, with the number of its images."""
    rows = chosen_classes(rows)
    figure = new_figure(7, 1.1 + 0.36 * len(rows))
    axes, places = figure.subplots(), range(len(rows))
    for shift, key, colour in ((-0.19, "before", BEFORE), (0.19, "after", AFTER)):
        axes.barh([k + shift for k in places], [100 * row[key] for row in rows], 0.36, color=colour, label=key)
    axes.set_yticks(places, [f"{drawn(row['class'])} ({row['images']})" for row in rows])
    for label in axes.get_yticklabels():
        as_text(label)
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("ACC of the class (%)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    save(figure, file)
