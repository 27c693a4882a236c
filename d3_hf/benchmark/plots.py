"""Plots of a benchmark, from the rows of ``results.parquet`` alone."""

import itertools
import math
import re
from pathlib import Path

import pandas

from ..files import atomic_file
from .tables import UNTOUCHED, blocks, split

SIZE, FONT, DPI, LEGEND_ROWS = (7, 5), 12, 150, 20
TICKS = [0, 2, 4, 6, 8, 10, 20, 50, 100]
MARKERS = "osDv^<>phPd8"  # of the methods
# Marker and colour of the models that no method touched: no method has them.
LOOKS = {"victim": ("X", "black"), "twin without backdoor": ("*", "white")}
# Where a label may stand, in points from its marker: the nearest place first, farther ones with a line to the marker.
PLACES = [
    (distance * math.cos(angle), distance * math.sin(angle))
    for distance in (14, 26, 40, 56, 74)
    for angle in (math.radians(degrees) for degrees in (0, 180, 45, 135, 315, 225, 90, 270))
]
NEAR, CLEARANCE = 20, 6  # points: a label within needs no line; what a marker keeps free around it


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
        files.append(time_against_asr(means, title, folder / f"time_asr_{name}.png"))
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
    for name, (marker, colour) in LOOKS.items():
        if name in means.index:
            style = dict(marker=marker, color=colour, edgecolor="black", s=160, zorder=3, label=name)
            axes.scatter(*means.loc[name, ["asr_after", "accuracy_after"]], **style)
    _points(axes, means.drop(list(UNTOUCHED), errors="ignore"), "asr_after", "accuracy_after")
    return _save(figure, file)


def time_against_asr(means: pandas.DataFrame, title: str, file: Path) -> Path:
    """One point per defence, none of them joined, without the models that no method touched; down and left is better."""
    figure, axes = _axes(title, "training time (s), on one machine", "ASR (%), lower is better")
    axes.set_xscale("log")
    _points(axes, means.drop(list(UNTOUCHED), errors="ignore").assign(curve=None), "seconds_training", "asr_after")
    return _save(figure, file)


def _axes(title: str, x: str, y: str):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE, dpi=DPI, layout="constrained")
    axes.set_xlabel(x, fontsize=FONT)
    axes.set_ylabel(y, fontsize=FONT)
    axes.set_title(title, fontsize=FONT)
    axes.tick_params(labelsize=FONT - 1)
    axes.grid(alpha=0.3)
    return figure, axes


def _points(axes, means: pandas.DataFrame, x: str, y: str) -> None:
    """A marker and a colour for each curve, whose points are joined and named, and for each defence that is in none."""
    from matplotlib import pyplot

    colours = [*pyplot.get_cmap("tab20").colors[::2], *pyplot.get_cmap("tab20").colors[1::2]]  # strong ones first
    curves = list(means.groupby("curve", sort=False))
    others = [(name, means.loc[[name]]) for name in means.index[means["curve"].isna()]]
    labels = []
    for number, (name, points) in enumerate([*curves, *others]):
        is_curve = number < len(curves)
        look = dict(marker=MARKERS[number % len(MARKERS)], color=colours[number % len(colours)])
        look |= dict(linestyle="-" if is_curve else "none", markersize=9, markeredgecolor="black")
        axes.plot(points[x], points[y], label=name, **look)
        if is_curve:
            labels += [(each.removeprefix(name).strip(), row[x], row[y], look["color"]) for each, row in points.iterrows()]
    if names := axes.get_legend_handles_labels()[1]:
        columns = math.ceil(len(names) / LEGEND_ROWS)
        axes.figure.set_figwidth(SIZE[0] + 2.5 * (columns - 1))
        axes.legend(fontsize=FONT - 3, loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=columns)
    _label(axes, labels)


def _label(axes, labels: list[tuple[str, float, float, tuple]]) -> None:
    """Put each text beside its point, where it covers fewest markers, curves and other texts: at the first of such `PLACES`."""
    import numpy
    from matplotlib.text import Text

    figure = axes.figure
    figure.draw_without_rendering()  # settles where things are
    unit, taken = figure.dpi / 72, []  # pixels in a point; boxes as (left, bottom, right, top) in pixels
    for drawn in axes.lines:
        points = axes.transData.transform(drawn.get_xydata())
        taken += [[*(point - CLEARANCE * unit), *(point + CLEARANCE * unit)] for point in points]
        if drawn.get_linestyle() == "-":
            between = [numpy.linspace(*ends, 50) for ends in itertools.pairwise(points)]
            taken += [[*(point - unit), *(point + unit)] for line in between for point in line]
    for text, x, y, colour in labels:
        line = dict(arrowstyle="-", color=colour, linewidth=0.8, shrinkA=0, shrinkB=CLEARANCE)
        style = dict(textcoords="offset points", fontsize=FONT - 3, color=colour, va="center", arrowprops=line)
        note = axes.annotate(text, (x, y), PLACES[0], **style)

        def put(place: tuple[float, float], note=note) -> list[float]:
            note.set_position(place)
            note.set_horizontalalignment("left" if place[0] > 1 else "right" if place[0] < -1 else "center")
            note.arrow_patch.set_visible(math.hypot(*place) > NEAR)
            note.update_positions(figure.canvas.get_renderer())
            return list(Text.get_window_extent(note).extents)  # without the line

        def covered(place: tuple[float, float], put=put) -> float:
            left, bottom, right, top = put(place)
            if not (axes.bbox.contains(left, bottom) and axes.bbox.contains(right, top)):
                return math.inf
            lefts, bottoms, rights, tops = numpy.array(taken).T
            return numpy.sum((left < rights) & (lefts < right) & (bottom < tops) & (bottoms < top))

        taken.append(put(min(PLACES, key=covered)))


def _save(figure, file: Path) -> Path:
    from matplotlib import pyplot

    with atomic_file(file) as beside:
        figure.savefig(beside, dpi=DPI)
    pyplot.close(figure)
    return file
