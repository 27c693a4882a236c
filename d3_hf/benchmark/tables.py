"""Tables of a benchmark in the form of the papers, from the rows of ``results.parquet`` alone."""

import json
from collections.abc import Iterator, Sequence

import pandas
from scipy.stats import t

RATES = {"ACC": "accuracy_after", "ASR": "asr_after", "RA": "ra_after"}
UNTOUCHED = ("victim", "twin without backdoor")
# Of several victims the worst is the one with the lowest ACC and RA, and the highest ASR.
WORST = {"ACC": "min", "ASR": "max", "RA": "min"}


def render(rows: pandas.DataFrame) -> str:
    """All tables of a benchmark.

    Args:
        rows: The content of ``results.parquet``.

    Returns:
        Markdown. Per group of victims and retain set a table of ACC / ASR / RA per victim with average and worst case; then
        every victim with mean and 95 % interval over seeds, DER and cost; where ASR was watched, the seconds that it took to
        fall; then the cells that failed. Rates in percent.
    """
    parts = []
    done, failed = split(rows)
    for group, retain, chosen in blocks(done):
        parts += [f"## {', '.join(filter(None, [group, f'retain set {retain}']))}", overview(chosen), details(chosen)]
        if "asr_over_time" in chosen and chosen["asr_over_time"].notna().any():
            parts.append(times(chosen[chosen["asr_over_time"].notna()]))
    if len(failed):
        parts += ["## Failed cells", failures(failed)]
    return "\n\n".join(parts)


def split(rows: pandas.DataFrame) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """The rows of cells that were measured, and of those that failed."""
    if "error" not in rows:
        return rows, rows.iloc[:0]
    return rows[rows["error"].isna()], rows[rows["error"].notna()]


def blocks(rows: pandas.DataFrame) -> Iterator[tuple[str, str, pandas.DataFrame]]:
    """(group, retain set, its rows and those of the untouched models); victims are called ``GROUP/NAME``, or have no group."""
    names = pandas.DataFrame([name.rpartition("/") for name in rows["victim"]], rows.index, ["group", "", "name"])
    for group in names["group"].unique():
        of_group = rows[names["group"] == group].assign(victim=names["name"])
        for retain in of_group["retain"].dropna().unique():
            yield group, retain, of_group[(of_group["retain"] == retain) | of_group["defence"].isin(UNTOUCHED)]


def overview(rows: pandas.DataFrame) -> str:
    """One line per defence, ``ACC / ASR / RA`` per victim, their average over victims and the worst case; means over seeds."""
    means = rows.groupby(["defence", "victim"], sort=False)[list(RATES.values())].mean() * 100
    victims = [name for name in rows["victim"].unique() if name in means.index.get_level_values("victim")]
    lines = []
    for defence in ordered(rows):
        found = means.loc[defence].reindex(victims)
        cells = ["" if found.loc[v].isna().any() else triple(found.loc[v]) for v in victims]
        known = found.dropna()
        partial = f" ({len(known)} of {len(victims)})" if len(known) < len(victims) else ""
        worst = pandas.Series({key: getattr(known[key], WORST[name])() for name, key in RATES.items()})
        lines.append([defence, *cells, triple(known.mean()) + partial, triple(worst) + partial])
    return markdown(["ACC / ASR / RA", *victims, "average", "worst"], lines)


def details(rows: pandas.DataFrame) -> str:
    """One line per victim and defence: mean and half width of the 95 % interval over seeds, DER and cost."""
    lines = []
    for victim in rows["victim"].unique():
        for defence in ordered(rows):
            chosen = rows[(rows["victim"] == victim) & (rows["defence"] == defence)]
            if not len(chosen):
                continue
            rates = [interval(100 * chosen[key]) for key in RATES.values()]
            lines.append([victim, defence, *rates, *costs(chosen)])
    head = ["victim", "defence", *RATES, "DER", "seeds", "seconds", "passes forward + backward", "peak MiB"]
    return markdown(head, lines)


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
    """One line per victim, defence and seed: seconds of training until ASR fell below 1 % and below 2 %, and in all."""
    lines = []
    for _, row in rows.iterrows():
        series = json.loads(row["asr_over_time"])
        until = [seconds_until(series, asr) for asr in (0.01, 0.02)]
        seconds = ["never" if found is None else f"{found:.0f}" for found in until]
        lowest = 100 * min(asr for _, asr in series)
        lines.append([row["victim"], row["defence"], str(row["seed"]), *seconds, f"{series[-1][0]:.0f}", f"{lowest:.1f}"])
    return markdown(["victim", "defence", "seed", "s to ASR < 1 %", "s to ASR < 2 %", "s in all", "lowest ASR"], lines)


def seconds_until(series: Sequence[tuple[float, float]], asr: float) -> float | None:
    """Seconds until ASR first fell below ``asr``, in [0, 1]; None if it never did."""
    return next((seconds for seconds, found in series if found < asr), None)


def failures(rows: pandas.DataFrame) -> str:
    """One line per cell that failed, with its error."""
    columns = ["victim", "retain", "defence", "seed", "error"]
    return markdown(columns, [[str(row[c]).replace("|", "\\|") for c in columns] for _, row in rows.iterrows()])


def ordered(rows: pandas.DataFrame) -> list[str]:
    """The defences in the grid's order, the untouched models before them."""
    names = list(rows["defence"].unique())
    return [name for name in UNTOUCHED if name in names] + [name for name in names if name not in UNTOUCHED]


def triple(rates: pandas.Series) -> str:
    """``90.1 / 2.3 / 88.0``."""
    return " / ".join(f"{rates[key]:.1f}" for key in RATES.values())


def interval(values: pandas.Series) -> str:
    """The mean and, of several seeds, the half width of Student's 95 % interval of it."""
    if len(values) < 2:
        return f"{values.mean():.1f}"
    half = t.ppf(0.975, len(values) - 1) * values.sem()
    return f"{values.mean():.1f} ± {half:.1f}"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table; all but the first column on the right."""
    rows = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
