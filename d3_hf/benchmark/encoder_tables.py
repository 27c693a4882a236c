"""Tables of a grid of encoders, from the rows of ``results.parquet`` alone."""

import json

import pandas

from ..evaluation.encoders import PROBES
from ..publishing.tables import PROBES as NAMES
from ..publishing.tables import markdown_table
from .tables import UNTOUCHED, by_defence, interval, under_legend

LEGEND = (
    "ACC / ASR / RA of a probe in percent: means over its draws of training images, ± half of Student's 95 % interval over "
    "them. Images of the target class are in none of ASR and RA. Of several seeds of a defence: the mean of all draws."
)
SHOWN = {"ACC": "accuracy", "ASR": "asr", "RA": "ra"}


def render_encoders(rows: pandas.DataFrame) -> str:
    """All tables of a grid of encoders: one per retain set, with a line per victim and defence, and the cells that failed.

    Args:
        rows: The content of ``results.parquet``.

    Returns:
        Markdown.
    """
    return under_legend(rows, LEGEND, table)


def table(rows: pandas.DataFrame) -> str:
    """One line per victim and defence, the victim and the untouched encoder first."""
    lines = []
    for victim, defence, chosen in by_defence(rows):
        rates = [" / ".join(_rate(chosen, f"{rate}_{probe}") for rate in SHOWN.values()) for probe in PROBES]
        seconds = "" if defence in UNTOUCHED else f"{chosen['seconds_training'].mean():.0f}"
        lines.append([victim, defence, *rates, seconds])
    head = ["victim", "defence", *(f"{NAMES[probe]}: {' / '.join(SHOWN)}" for probe in PROBES), "seconds"]
    return markdown_table(head, lines)


def _rate(rows: pandas.DataFrame, column: str) -> str:
    draws = [value for text in rows[f"{column}_seeds"] for value in json.loads(text)]
    return interval(100 * pandas.Series(draws))
