"""Tables of victims that were read before and after, from the rows of ``results.parquet`` alone."""

import pandas

from ..benchmark.tables import UNTOUCHED, by_defence, under_legend
from ..evaluation.metrics import Proportion
from ..publishing.tables import markdown_table
from .verdicts import LEAST_ASR

LEGEND = (
    "Before: the victim, after: the purified model, each beside the zoo's twins, which were not purified. Stands out: the "
    "class by all signals together, how far, and p. Gone: there was an alarm before, and afterwards there is none or, where "
    "the backdoor has one target, another class stands out. A victim with an ASR below "
    f"{100 * LEAST_ASR:.0f} was planted in vain and is not counted."
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
            lines.append([victim, defence, *rates, *(_standing(row, when) for when in ("before", "after")), outcome(row)])
    for defence, chosen in cells.groupby("defence", sort=False):
        said += gone_of(defence, chosen)
    head = ["victim", "defence", "ACC", "ASR", "stands out before", "stands out after", "gone"]
    return "\n\n".join([markdown_table(head, lines), *said])


def outcome(row: dict) -> str:
    """Whether the class that an alarm was about no longer raises one, or why that is not asked."""
    if row["asr_before"] < LEAST_ASR:
        return "planted in vain"
    if not row["alarm_before"]:
        return "no alarm before"
    moved = isinstance(row["target"], str) and row["beside_after"] != row["beside_before"]
    return "yes" if not row["alarm_after"] or moved else "no"


def gone_of(defence: str, rows: pandas.DataFrame) -> list[str]:
    """A sentence on the alarms that are gone where the backdoor is, and one on those where it is not; those that there are."""
    said, outcomes = [], rows.apply(outcome, axis=1)
    asked, works = outcomes.isin(["yes", "no"]), rows["asr_after"] >= LEAST_ASR
    for words, chosen in (("below", outcomes[asked & ~works]), ("at least", outcomes[asked & works])):
        if len(chosen):
            share = Proportion(int((chosen == "yes").sum()), len(chosen))
            low, high = share.interval
            found = f"{share.successes} of {share.n} [{100 * low:.0f}, {100 * high:.0f} %]"
            said.append(f"{defence}, alarms before, ASR {words} {100 * LEAST_ASR:.0f} afterwards: gone in {found}.")
    return said


def _standing(row: dict, when: str) -> str:
    return f"{row[f'beside_{when}']}, {row[f'farthest_{when}']:.1f} ({row[f'p_{when}']:.2f})"
