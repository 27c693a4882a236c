"""Tables of victims that were read before and after, from the rows of ``results.parquet`` alone."""

import pandas

from ..benchmark.tables import UNTOUCHED, by_defence, under_legend
from ..evaluation.metrics import Proportion
from ..publishing.tables import markdown_table
from .verdicts import LEAST_ASR

LEGEND = (
    "Before: the victim, after: the purified model, each beside the zoo's twins, which were not purified. Stands out: the "
    "class by all signals together, how far, and p. Gone: there was an alarm before, and afterwards there is none or another "
    "class stands out."
)


def render_after(rows: pandas.DataFrame) -> str:
    """All tables: one per group of victims and retain set, and the cells that failed.

    Args:
        rows: The content of ``results.parquet``.

    Returns:
        Markdown.
    """
    return under_legend(rows, LEGEND, table)


def table(rows: pandas.DataFrame) -> str:
    """One line per cell, and for each defence how many alarms are gone, by whether the backdoor is."""
    cells = rows[~rows["defence"].isin(UNTOUCHED)]
    lines, said = [], []
    for victim, defence, chosen in by_defence(cells):
        for row in chosen.to_dict("records"):
            rates = [f"{100 * row[f'{key}_before']:.1f} -> {100 * row[f'{key}_after']:.1f}" for key in ("accuracy", "asr")]
            gone = ("yes" if is_gone(row) else "no") if row["alarm_before"] else "no alarm before"
            lines.append([victim, defence, *rates, *(_standing(row, when) for when in ("before", "after")), gone])
    for defence, chosen in cells.groupby("defence", sort=False):
        said += gone_of(defence, chosen)
    head = ["victim", "defence", "ACC", "ASR", "stands out before", "stands out after", "gone"]
    return "\n\n".join([markdown_table(head, lines), *said])


def is_gone(row: dict) -> bool:
    """Whether the class that an alarm was about no longer raises one."""
    return not row["alarm_after"] or row["suspect_after"] != row["suspect_before"]


def gone_of(defence: str, rows: pandas.DataFrame) -> list[str]:
    """A sentence on the alarms that are gone where the backdoor is, and one on those where it is not; those that there are."""
    alarmed = rows[rows["alarm_before"].astype(bool)]
    said = []
    for words, chosen in (
        ("at most", alarmed[alarmed["asr_after"] <= LEAST_ASR]),
        ("over", alarmed[alarmed["asr_after"] > LEAST_ASR]),
    ):
        if len(chosen):
            share = Proportion(sum(is_gone(row) for row in chosen.to_dict("records")), len(chosen))
            low, high = share.interval
            found = f"{share.successes} of {share.n} [{100 * low:.0f}, {100 * high:.0f} %]"
            said.append(f"{defence}, alarms before, ASR {words} {100 * LEAST_ASR:.0f} afterwards: gone in {found}.")
    return said


def _standing(row: dict, when: str) -> str:
    return f"{row[f'suspect_{when}']}, {row[f'farthest_{when}']:.1f} ({row[f'p_{when}']:.2f})"
