"""Tables of a grid whose purified models relearn, from the rows of ``results.parquet`` alone."""

import json
import math
import statistics

import pandas

from ..publishing.tables import markdown_table
from .relearning import Curve, gaps, half_life
from .tables import RATES, UNTOUCHED, by_defence, interval, joined, under_legend

LEGEND = (
    "ACC / ASR / RA / PACC of the purified model, in percent. Relearned: mean ASR after the last step of the tuning, beside "
    "the twin's, which never had a backdoor. Gap: area between the model's and the twin's curve of ASR, in points, mean and "
    "half of the 95 % interval over all tunings; 0 or below shows no memory, and does not show that there is none. Half-life: "
    "median of the steps until ASR is half of the way from where it begins to 100, and the twin's."
)


def render_relearning(rows: pandas.DataFrame) -> str:
    """All tables: one per group of victims and retain set, and the cells that failed.

    Args:
        rows: The content of ``results.parquet``.

    Returns:
        Markdown.
    """
    return under_legend(rows, LEGEND, table)


def table(rows: pandas.DataFrame) -> str:
    """One line per victim, defence and number of poisoned images."""
    lines = []
    for victim, defence, chosen in by_defence(rows[~rows["defence"].isin(UNTOUCHED)]):
        rates = joined(chosen[list(RATES.values())].mean() * 100)
        lines += [[victim, defence, rates, *line] for line in relearned(chosen)]
    head = ["victim", "defence", " / ".join(RATES), "poisoned images", "relearned, twin", "gap", "half-life, twin"]
    return markdown_table(head, lines)


def relearned(rows: pandas.DataFrame) -> list[list[str]]:
    """For each number of poisoned images what the curves of one victim's and defence's cells came to."""
    pairs = [(_curves(row["curves"]), _curves(row["twin_curves"])) for _, row in rows.iterrows()]
    lines = []
    for count in dict.fromkeys(curve.poisoned for curve in pairs[0][0]):
        ours, theirs = ([c for pair in pairs for c in pair[side] if c.poisoned == count] for side in (0, 1))
        ends = [f"{100 * statistics.mean(curve.asr[-1] for curve in curves):.1f}" for curves in (ours, theirs)]
        gap = interval(100 * pandas.Series([value for pair in pairs for value in gaps(*pair)[count]]))
        halves = [_steps(statistics.median(half_life(c.steps, c.asr) for c in curves)) for curves in (ours, theirs)]
        lines.append([str(count), ", ".join(ends), gap, ", ".join(halves)])
    return lines


def _steps(number: float) -> str:
    return "never" if math.isinf(number) else f"{number:.0f}"


def _curves(text: str) -> list[Curve]:
    return [
        Curve(**{key: tuple(value) if isinstance(value, list) else value for key, value in c.items()}) for c in json.loads(text)
    ]
