"""Tables of a benchmark in the form of the papers, from the rows of ``results.parquet`` alone."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import methodcaller

import pandas

from ..publishing.tables import markdown_table

RATES = {"ACC": "accuracy_after", "ASR": "asr_after", "RA": "ra_after", "PACC": "pacc_after"}
DRIFT = "trigger_drift_after"
UNTOUCHED = ("victim", "twin without backdoor")
MISSING = "missing_cells"  # the column that says, in every row, how many cells of the grid have none
NOT_MADE = ", not made yet when this was written; run it again to make them"
# The worst of several victims and seeds: the lowest ACC, RA and PACC, and the highest ASR, each by itself.
WORST = {"ACC": "min", "ASR": "max", "RA": "min", "PACC": "min"}
UNKNOWN = "–"  # of a mean or a worst case over cells of which one was made before this was measured


def render(rows: pandas.DataFrame) -> str:
    """All tables of a benchmark.

    Args:
        rows: The content of ``results.parquet``.

    Returns:
        Markdown. How many cells are missing, if any are. Per group of victims and retain set a table of ACC / ASR / RA / PACC
        per victim with average and worst case; then every victim with mean and 95 % interval over seeds, trigger drift, DER and
        cost; where ASR was watched, the seconds that it took to fall; then the cells that failed. Rates in percent; `UNKNOWN`
        where a cell was made by a version that did not measure PACC and drift, or the attack has none (all-to-all).
    """
    return framed(rows, _of_benchmark)


def _of_benchmark(done: pandas.DataFrame) -> Iterator[str]:
    done = done.reindex(columns=done.columns.union([RATES["PACC"], DRIFT], sort=False))  # a table of an earlier version
    for title, chosen in titled(done):
        yield from [title, overview(chosen), *remarks(chosen), details(chosen)]
        if "asr_over_time" in chosen and chosen["asr_over_time"].notna().any():
            yield times(chosen[chosen["asr_over_time"].notna()])


def framed(
    rows: pandas.DataFrame, parts: Callable[[pandas.DataFrame], Iterable[str]], what: str = "grid", more: str = NOT_MADE
) -> str:
    """What the page of any kind of run has around its own: first how many cells are missing, last those that failed.

    Args:
        rows: The content of ``results.parquet``.
        parts: What stands between, of the rows that were measured; not asked where there are no rows.
        what: What the cells are of.
        more: What is said of missing cells.

    Returns:
        Markdown.
    """
    if not len(rows):
        return "No cell was made."
    missing = rows[MISSING].iloc[0] if MISSING in rows else 0
    done, failed = split(rows)
    first = [f"**Missing cells of the {what}: {missing}**{more}"] if missing else []
    last = ["## Failed cells", failures(failed)] if len(failed) else []
    return "\n\n".join([*first, *parts(done), *last])


def split(rows: pandas.DataFrame) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """The rows of cells that were measured, and of those that failed."""
    if "error" not in rows:
        return rows, rows.iloc[:0]
    return rows[rows["error"].isna()], rows[rows["error"].notna()]


def blocks(rows: pandas.DataFrame) -> Iterator[tuple[str, str, pandas.DataFrame]]:
    """(group, retain set, its rows and those of the untouched models); victims are called ``GROUP/NAME``, or have no group."""
    if not len(rows):
        return
    names = pandas.DataFrame([name.rpartition("/") for name in rows["victim"]], rows.index, ["group", "", "name"])
    for group in names["group"].unique():
        of_group = rows[names["group"] == group].assign(victim=names["name"])
        for retain in of_group["retain"].dropna().unique():
            yield group, retain, of_group[(of_group["retain"] == retain) | of_group["defence"].isin(UNTOUCHED)]


def titled(rows: pandas.DataFrame) -> Iterator[tuple[str, pandas.DataFrame]]:
    """`blocks`, each with its heading."""
    for group, retain, chosen in blocks(rows):
        yield f"## {', '.join(filter(None, [group, f'retain set {retain}']))}", chosen


def under_legend(rows: pandas.DataFrame, legend: str, table: Callable[[pandas.DataFrame], str]) -> str:
    """`framed`: a legend where anything was measured, and a table for each of `blocks` under its heading."""

    def parts(done: pandas.DataFrame) -> Iterator[str]:
        if len(done):
            yield legend
        for title, chosen in titled(done):
            yield from (title, table(chosen))

    return framed(rows, parts)


def overview(rows: pandas.DataFrame) -> str:
    """One line per defence: the four `RATES` per victim and their average, means over seeds; the worst of all its cells."""
    worst = {key: methodcaller(WORST[name], skipna=False) for name, key in RATES.items()}
    worst = 100 * rows.groupby("defence", sort=False).agg(worst)
    mean = methodcaller("mean", skipna=False)
    means = 100 * rows.groupby(["defence", "victim"], sort=False)[list(RATES.values())].agg(mean)
    victims = [name for name in rows["victim"].unique() if name in means.index.get_level_values("victim")]
    lines = []
    for defence in ordered(rows):
        found = means.loc[defence].reindex(victims)
        known = found.dropna(how="all")
        shown = [joined(known.loc[victim]) if victim in known.index else "" for victim in victims]
        partial = f" ({len(known)} of {len(victims)})" if len(known) < len(victims) else ""
        lines.append([defence, *shown, joined(mean(known)) + partial, joined(worst.loc[defence]) + partial])
    return markdown_table([" / ".join(RATES), *victims, "average", "worst"], lines)


def remarks(rows: pandas.DataFrame) -> list[str]:
    """A line for each cell in which the method says, in brackets, that it did something else, as Neural Cleanse may."""
    return [
        f"{row['defence']} on {row['victim']}, seed {row['seed']:.0f}: {row['method']}"
        for _, row in rows[rows["method"].str.contains("(", regex=False, na=False)].iterrows()
    ]


def details(rows: pandas.DataFrame) -> str:
    """One line per victim and defence: mean and half width of the 95 % interval over seeds, trigger drift, DER and cost."""
    lines = []
    for victim, defence, chosen in by_defence(rows):
        rates = [interval(100 * chosen[key]) for key in (*RATES.values(), DRIFT)]
        lines.append([victim, defence, *rates, *costs(chosen)])
    head = ["victim", "defence", *RATES, "trigger drift", "DER", "seeds", "seconds", "passes forward + backward", "peak MiB"]
    return markdown_table(head, lines)


def by_defence(rows: pandas.DataFrame) -> Iterator[tuple[str, str, pandas.DataFrame]]:
    """(victim, defence, its rows) for each pair that has some, defences as `ordered` has them."""
    for victim in rows["victim"].unique():
        for defence in ordered(rows):
            chosen = rows[(rows["victim"] == victim) & (rows["defence"] == defence)]
            if len(chosen):
                yield victim, defence, chosen


def costs(rows: pandas.DataFrame) -> list[str]:
    """DER, seeds, seconds of training, passes over the retain set and peak memory of one victim's and defence's cells."""
    if rows["defence"].iloc[0] in UNTOUCHED:
        return [""] * 5
    passes = [f"{(rows[key] / rows['retain_n']).mean():.0f}" for key in ("forward_images", "backward_images")]
    peak = rows["peak_memory_mib"].mean()
    return [
        f"{rows['der'].mean():.3f}",
        str(len(rows)),
        f"{rows['seconds_training'].mean():.0f}",
        " + ".join(passes),
        "" if pandas.isna(peak) else f"{peak:.0f}",
    ]


def times(rows: pandas.DataFrame) -> str:
    """One line per victim, defence and seed: seconds of training until ASR fell, first and for good, and in all."""
    limits = (0.01, 0.02)
    lines = []
    for _, row in rows.iterrows():
        series = json.loads(row["asr_over_time"])
        until = [" / ".join("never" if s is None else f"{s:.0f}" for s in seconds_until(series, limit)) for limit in limits]
        lowest = 100 * min(asr for _, asr in series)
        lines.append([row["victim"], row["defence"], f"{row['seed']:.0f}", *until, f"{series[-1][0]:.0f}", f"{lowest:.1f}"])
    head = [f"s to ASR < {100 * limit:.0f} %, first / for good" for limit in limits]
    return markdown_table(["victim", "defence", "seed", *head, "s in all", "lowest ASR"], lines)


def seconds_until(series: Sequence[tuple[float, float]], asr: float) -> tuple[float | None, float | None]:
    """Seconds until ASR was below ``asr``, in [0, 1], for the first time, and from when on it stayed so; None: never."""
    below = [seconds for seconds, found in series if found < asr]
    lasting = [seconds for seconds, _ in itertools.takewhile(lambda point: point[1] < asr, reversed(series))]
    return min(below, default=None), min(lasting, default=None)


def failures(rows: pandas.DataFrame) -> str:
    """One line per cell that failed, with its error."""
    columns = ["victim", "retain", "defence", "seed", "error"]
    texts = rows[columns].astype({"seed": int}).astype(str)  # beside rows without a seed pandas makes it a float
    return markdown_table(columns, texts.values.tolist())


def ordered(rows: pandas.DataFrame) -> list[str]:
    """The defences in the grid's order, the untouched models before them."""
    names = list(rows["defence"].unique())
    return [name for name in UNTOUCHED if name in names] + [name for name in names if name not in UNTOUCHED]


def joined(rates: pandas.Series) -> str:
    """``90.1 / 2.3 / 88.0 / 88.4``."""
    return " / ".join(UNKNOWN if pandas.isna(rates[key]) else f"{rates[key]:.1f}" for key in RATES.values())


def interval(values: pandas.Series) -> str:
    """The mean and, of several seeds, the half width of Student's 95 % interval of it; `UNKNOWN` if a value is missing."""
    from scipy.stats import t

    if values.isna().any():
        return UNKNOWN
    if len(values) < 2:
        return f"{values.mean():.1f}"
    half = t.ppf(0.975, len(values) - 1) * values.sem()
    return f"{values.mean():.1f} ± {half:.1f}"
