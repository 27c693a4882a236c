"""Plots of a benchmark, from the rows of ``results.parquet`` alone."""

import re
from pathlib import Path

import pandas

from ..files import atomic_file
from .tables import UNTOUCHED, blocks, split

SIZE, FONT, DPI = (7, 5), 12, 150
MARKERS = "osDv^<>ph*XPd8"
SIDES = [((7, -11), "left"), ((-7, -3), "right"), ((7, 5), "left")]  # of a point, where its label stands: one side a curve
TICKS = [0, 2, 4, 6, 8, 10, 20, 50, 100]


def draw(rows: pandas.DataFrame, folder: Path) -> list[Path]:
    """Draw ACC against ASR and time against ASR, each a mean over victims and seeds, a pair per group and retain set.

    A defence that lacks a victim which others have is left out: its mean would be over other victims.

    Args:
        rows: The content of ``results.parquet``.
        folder: Where the PNG files go.

    Returns:
        The files.
    """
    files, names = [], set()
    for group, retain, chosen in blocks(split(rows)[0]):
        means = averages(chosen)
        name = "_".join(re.findall(r"\w+", f"{group} {retain}"))
        while name in names:  # retain sets "5 %" and "5"
            name += "_2"
        names.add(name)
        victims = chosen["victim"].unique()
        shown = f"mean of {len(victims)} victims" if len(victims) > 1 else victims[0]
        title = f"{group} retain set {retain}, {shown}".strip()
        files.append(acc_against_asr(means, title, folder / f"acc_asr_{name}.png"))
        files.append(time_against_asr(means.drop(UNTOUCHED, errors="ignore"), title, folder / f"time_asr_{name}.png"))
    return files


def averages(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Mean over seeds, then over victims, per defence that has all victims; percent and seconds."""
    columns = ["accuracy_after", "asr_after", "seconds_training"]
    cells = rows.groupby(["defence", "victim"], sort=False)[columns].mean()
    whole = cells.groupby("defence", sort=False).size() == rows["victim"].nunique()
    means = cells.groupby("defence", sort=False).mean()[whole]
    means[["accuracy_after", "asr_after"]] *= 100
    return means.join(rows.groupby("defence", sort=False)["curve"].first())


def acc_against_asr(means: pandas.DataFrame, title: str, file: Path) -> Path:
    """One point per defence, those of one ``curve`` joined in the grid's order; up and left is better."""
    figure, axes = _axes(title, "ASR (%, logarithmic from 10 on), lower is better", "ACC (%), higher is better")
    # Defences crowd near 0, the victims stand near 100.
    axes.set_xscale("symlog", linthresh=10, linscale=2)
    axes.set_xticks(TICKS, TICKS)
    axes.set_xlim(-0.5, 130)
    for number, (curve, joined) in enumerate(means.groupby("curve", sort=False)):
        style = dict(color=f"C{number}", marker=MARKERS[number % len(MARKERS)], markeredgecolor="black")
        axes.plot(joined["asr_after"], joined["accuracy_after"], label=curve, **style)
        side, alignment = SIDES[number % len(SIDES)]
        for name, row in joined.iterrows():
            point, style = (row["asr_after"], row["accuracy_after"]), dict(ha=alignment, fontsize=FONT - 3, color=f"C{number}")
            axes.annotate(name.removeprefix(curve).strip(), point, side, textcoords="offset points", **style)
    _points(axes, means[means["curve"].isna()], "asr_after", "accuracy_after")
    return _save(figure, file)


def time_against_asr(means: pandas.DataFrame, title: str, file: Path) -> Path:
    """One point per defence; down and left is better."""
    figure, axes = _axes(title, "training time (s), on one machine", "ASR (%), lower is better")
    axes.set_xscale("log")
    _points(axes, means, "seconds_training", "asr_after")
    return _save(figure, file)


def _axes(title: str, x: str, y: str):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    axes.set_xlabel(x, fontsize=FONT)
    axes.set_ylabel(y, fontsize=FONT)
    axes.set_title(title, fontsize=FONT)
    axes.tick_params(labelsize=FONT - 1)
    axes.grid(alpha=0.3)
    return figure, axes


def _points(axes, means: pandas.DataFrame, x: str, y: str) -> None:
    from matplotlib import pyplot

    colours = pyplot.get_cmap("tab20").colors
    for number, (name, row) in enumerate(means.iterrows()):
        style = dict(marker=MARKERS[number % len(MARKERS)], color=colours[number % len(colours)], edgecolor="black")
        axes.scatter(row[x], row[y], s=80, label=name, zorder=2, **style)
    axes.legend(fontsize=FONT - 3, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _save(figure, file: Path) -> Path:
    from matplotlib import pyplot

    with atomic_file(file) as beside:
        figure.savefig(beside, dpi=DPI)
    pyplot.close(figure)
    return file
