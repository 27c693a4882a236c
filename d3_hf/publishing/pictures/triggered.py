"""Images with the trigger, and what both models answer."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from .drawing import RIGHT, WRONG, as_text, drawn, new_figure, save

MOST = 8  # images
LONGEST = 14  # characters of a class's name under a picture
OTHER = "#b8860b"


@dataclass(frozen=True, eq=False)
class TriggeredImages:
    """A few images as they are and with the trigger, and the classes that they are given with it, by name.

    Args:
        plain: The images as they are, each uint8 (3, H, W).
        triggered: The same with the trigger.
        truth: True class of each.
        wanted: What the attacker wants each called.
        before: What the suspicious model calls it with the trigger.
        after: What the purified one does.
    """

    plain: list[Tensor]
    triggered: list[Tensor]
    truth: list[str]
    wanted: list[str]
    before: list[str]
    after: list[str]


def draw_triggered(shown: TriggeredImages, file: Path) -> None:
    """Draw a column for each image: as it is under its class, and with the trigger over both answers."""
    count = len(shown.truth)
    figure = new_figure(1.35 * max(count, 3), 3.7)
    panels = figure.subplots(2, count, squeeze=False)
    for k in range(count):
        above, below = panels[:, k]
        for axes, image in ((above, shown.plain[k]), (below, shown.triggered[k])):
            axes.imshow(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
        as_text(above.set_title(drawn(shown.truth[k], LONGEST), fontsize=9))
        for line, (when, said) in enumerate((("before", shown.before[k]), ("after", shown.after[k]))):
            place = dict(xy=(0.5, 0), xycoords="axes fraction", xytext=(0, -5 - 26 * line), textcoords="offset points")
            colour = RIGHT if said == shown.truth[k] else WRONG if said == shown.wanted[k] else OTHER
            text = f"{when}:\n{drawn(said, LONGEST)}"
            as_text(below.annotate(text, **place, ha="center", va="top", fontsize=9, color=colour))
    panels[0, 0].set_ylabel("as it is", fontsize=9)
    panels[1, 0].set_ylabel("with the trigger", fontsize=9)
    save(figure, file)
