"""Tables of a zoo, from the rows of ``results.parquet`` alone."""

import json
import math
from collections.abc import Iterator

import pandas

from ..assurance.calibration import ALARM_AT, twins_needed
from ..benchmark.tables import UNKNOWN, framed
from ..evaluation.metrics import Proportion
from ..publishing.tables import markdown_table
from .study import CALIBRATE, JUDGE
from .verdicts import (
    BACKDOORED,
    IN_VAIN,
    KEY,
    LEAST_ASR,
    TOGETHER,
    TRUSTED,
    alarm_rate,
    auroc,
    correlation,
    of_half,
    read,
    signals_in,
    target_rate,
    verdicts,
)

LEGEND = (
    "The null are the twins of the half `calibrate`, on which the test was chosen; everything else is of the half `judge`, "
    "unless the column says otherwise. AUROC: of how far a model stands out beside the twins; alone: of how far its class "
    "stands out of its other classes, without twins. Hit: a model with a backdoor gets p <= 0.05; false alarm: one without "
    "does; brackets: Wilson's 95 % interval. At target: the class that stands out is the attacker's, of models whose "
    "backdoor has one target, with an alarm or without. Rank correlation: Spearman's, of how far a model stands out with "
    "the ASR, over all models in which a backdoor was planted. Each row is a test of its own: of several, one is small by "
    f"chance more often than it says, and only the last has one p for all. Models with an ASR below {100 * LEAST_ASR:.0f} "
    "are planted in vain: neither with a backdoor nor without."
)


def render_zoo(rows: pandas.DataFrame) -> str:
    """The tables of a zoo: the signals and the test by all, hits by kind of backdoor, misses and false alarms, failures.

    Args:
        rows: The content of its ``results.parquet``.

    Returns:
        Markdown; rates in percent.

    Raises:
        ValueError: See `verdicts`.
    """
    return framed(rows, lambda _: _of_zoo(rows), "zoo")


def _of_zoo(rows: pandas.DataFrame) -> Iterator[str]:
    done, found = read(rows), verdicts(rows)
    if len(done):
        yield LEGEND
    for (retain, seed), _ in done.groupby(KEY, sort=False) if len(done) else ():
        yield f"## {retain}, seed {seed:.0f}"
        of_both = found[(found["retain"] == retain) & (found["seed"] == seed)] if len(found) else found
        judged = of_half(of_both, JUDGE)
        if not len(judged):
            yield "No p: there are no twins in the half `calibrate`, or no models in the half `judge`."
            continue
        yield from [counts(judged), signals_table(of_both), "### By kind of backdoor", plantings_table(judged)]
        yield from exceptions(judged)


def counts(found: pandas.DataFrame) -> str:
    """How many models of `judge` there are of which sort, and the seconds that reading one takes."""
    seconds = found["seconds_reading"]
    sorts = [f"{(found['state'] == state).sum()} {words}" for state, words in _SORTS.items()]
    twins, images = int(found["twins"].iloc[0]), json.loads(found["kind"].iloc[0])["images"]
    enough = "" if twins >= (needed := twins_needed(ALARM_AT)) else f" No alarm is possible: that takes {needed} twins."
    return (
        f"{twins} twins; suspects: {', '.join(sorts)}. {images} images; reading a model took {seconds.mean():.0f} s, at most "
        f"{seconds.max():.0f}.{enough}"
    )


_SORTS = {BACKDOORED: "with a backdoor", TRUSTED: "without", IN_VAIN: "planted in vain"}


def signals_table(found: pandas.DataFrame) -> str:
    """One line per signal, and one for all together, of models of both halves, see `verdicts`."""
    lines, judged = [], of_half(found, JUDGE)
    for signal in [*signals_in(found), TOGETHER]:
        column, alone, shown = f"farthest: {signal}", UNKNOWN, ""
        if signal != TOGETHER:
            seconds = [json.loads(findings)[signal].get("seconds") for findings in judged["findings"]]
            known = [one for one in seconds if one is not None]
            shown = f"{sum(known) / len(known):.1f}" if known else ""
            alone = _number(auroc(judged, f"statistic: {signal}"))
        area = [alone, _number(auroc(of_half(found, CALIBRATE), column)), _number(auroc(judged, column))]
        name = f"**{signal}**" if signal == TOGETHER else signal
        lines.append([name, *area, *_rates(judged, signal), _number(correlation(judged, column)), shown])
    areas = ["AUROC alone", "AUROC, calibrate", "AUROC"]
    head = ["signal", *areas, "hits", "false alarms", "at target", "rank correlation with ASR", "seconds"]
    return markdown_table(head, lines)


def _rates(found: pandas.DataFrame, signal: str) -> list[str]:
    hits, false_alarms = alarm_rate(found, BACKDOORED, signal), alarm_rate(found, TRUSTED, signal)
    return [_share(hits), _share(false_alarms), _share(target_rate(found, signal))]


def plantings_table(found: pandas.DataFrame) -> str:
    """One line per kind of backdoor: ASR, hits of the test by all signals, how often it is at the target, its misses."""
    lines = []
    planted = found[found["state"] != TRUSTED]
    for kind, group in planted.groupby("planting", sort=False):
        hits, counted = alarm_rate(group, BACKDOORED), group[group["state"] == BACKDOORED]
        missed = [_named(row) for _, row in counted[~counted["alarm"].astype(bool)].iterrows()]
        lines.append(
            [
                kind,
                " / ".join(f"{100 * asr:.1f}" for asr in group["asr"]),
                f"{hits.successes} of {hits.n}" if hits else UNKNOWN,
                _of(target_rate(group)),
                ", ".join(missed) or ("none" if hits else ""),
            ]
        )
    return markdown_table(["backdoor", "ASR", "hits", "at target", "missed (p)"], lines)


def exceptions(found: pandas.DataFrame) -> list[str]:
    """A line that names the false alarms, and one that names the models planted in vain; those that there are."""
    false = found[(found["state"] == TRUSTED) & found["alarm"].astype(bool)]
    vain = found[found["state"] == IN_VAIN]
    said = []
    if len(false):
        named = [f"{_named(row)} for {row[f'beside: {TOGETHER}']}" for _, row in false.iterrows()]
        said.append(f"False alarms: {'; '.join(named)}.")
    if len(vain):
        said.append(f"Planted in vain: {', '.join(f'{row.victim} (ASR {100 * row.asr:.1f})' for row in vain.itertuples())}.")
    return said


def _named(row: pandas.Series) -> str:
    return f"{row['victim'].rpartition('/')[2]} ({_number(row[f'p: {TOGETHER}'])})"


def _share(found: Proportion | None) -> str:
    """``87.5 [69.0, 95.7] of 24``."""
    if found is None:
        return UNKNOWN
    low, high = found.interval
    return f"{100 * found.value:.1f} [{100 * low:.1f}, {100 * high:.1f}] of {found.n}"


def _of(found: Proportion | None) -> str:
    return f"{found.successes} of {found.n}" if found else UNKNOWN


def _number(value: float) -> str:
    return UNKNOWN if math.isnan(value) else f"{value:.2f}"
