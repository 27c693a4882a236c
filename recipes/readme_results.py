"""Make the picture and the table of README.md from committed rows of the benchmark: run it when they have changed.

    python recipes/readme_results.py

Reads model_cards/results/vit.parquet, draws docs/pictures/acc_asr.png, rewrites what stands between the two marks in README.md.
"""

import hashlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import pandas
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from d3_hf.cli import run
from d3_hf.options.parser import Parser

ROOT = Path(__file__).resolve().parents[1]
TABLE, PICTURE, README = ROOT / "model_cards/results/vit.parquet", ROOT / "docs/pictures/acc_asr.png", ROOT / "README.md"
BLOCK = re.compile(r"(?<=<!-- results: begin -->\n).*?(?=<!-- results: end -->)", re.S)

RETAIN = "1,000 images"  # the grid's retain set that picture and table are about
# Attacks that are shown: what they are called, and colour and marker (Okabe and Ito's colours).
ATTACKS = {"badnets": ("BadNets", "#0072B2", "o"), "blended": ("Blended", "#D55E00", "s"), "lf": ("LF", "#009E73", "^")}
# Methods in the picture, by their names in the grid, with what they are called there.
SHOWN = {
    "D3": "D3",
    "FT": "FT",
    "FT-SAM": "FT-SAM",
    "D3 1.5e-4, 10 epochs": "D3, longer",
    "FT 1.5e-4, 10 epochs": "FT, longer",
    "A2, 400 updates": "near base",
}
# The rows of the table: what to take it for, and how it is asked for.
BASE = "--defence base_tuning --base_model BASE"
ROWS = {
    "D3": ("the default, to begin with", "`d3-hf purify`"),
    "FT": ("the control: what D3 must beat", "`--defence fine_tuning`"),
    "FT-SAM": ("twice the passes, a flatter minimum", "`--defence ft_sam`"),
    "A2, 400 updates": ("a start near the public base, where that is known", f"`{BASE} --keep 0.25 --max_steps 400`"),
    "A0": ("the control where it is: the base alone, with nothing of the victim", f"`{BASE}`"),
}
RATES = ["accuracy_after", "asr_after", "ra_after"]
# ACC, ASR and RA of the twin, the same training without a trigger, on 2,000 test images (model_cards/vit.md); a row wins.
TWIN, FLOOR = "twin without backdoor", {"badnets": (90.6, 1.1, 90.7), "blended": (90.6, 1.7, 82.0), "lf": (90.6, 3.4, 84.7)}
FONT, DPI, SIZE = 13, 150, (7.2, 5)
# Where a label may stand, in points from its own point, near places first.
SIDES = ((1, 0), (-1, 0), (0, 1.2), (0, -1.2), (1, 1), (1, -1), (-1, 1), (-1, -1))
OFFSETS = [(x * reach, y * reach) for reach in (10, 18, 28, 40, 55, 75, 100) for x, y in SIDES]
NEAR = 20  # further away a line leads there


def read(table: Path = TABLE) -> pandas.DataFrame:
    """What is shown of a table: measured rows of `ATTACKS` and `RETAIN`, ``attack`` filled in for the untouched models too."""
    rows = pandas.read_parquet(table)
    rows = rows[rows["error"].isna()] if "error" in rows else rows
    rows = rows.assign(attack=rows["victim"].str.rpartition("/")[2])
    return rows[rows["attack"].isin(ATTACKS) & (rows["retain"].isna() | (rows["retain"] == RETAIN))]


def means(rows: pandas.DataFrame) -> dict[tuple[str, str], tuple[float, ...]]:
    """ACC, ASR and RA in percent, mean over seeds, by (defence, attack); the floor's under `TWIN`."""
    found = 100 * rows.groupby(["defence", "attack"])[RATES].mean()
    return {(TWIN, attack): rates for attack, rates in FLOOR.items()} | {key: tuple(row) for key, row in found.iterrows()}


def _listed(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}"


def block(rows: pandas.DataFrame) -> str:
    """What stands between README's marks: a sentence about the measurement and the table."""
    rates, done = means(rows), rows[rows["defence"].isin(ROWS)]
    seeds = sorted({int(seed) for seed in done["seed"]})
    names = _listed(name for name, _, _ in ATTACKS.values())
    before, floor = (_listed(_shown(rates, name, attack) for attack in ATTACKS) for name in ("victim", TWIN))
    lines = [
        f"ACC / ASR / RA in percent, on {_span(done['accuracy_after_n'])} test images of CIFAR-10, "
        + (f"mean over seeds {', '.join(map(str, seeds))}." if seeds[1:] else f"seed {seeds[0]}.")
        + f" {names} before: {before}; the floor: {floor}.",
        "",
        f"| take | ask for it by | trusted images | passes | {' | '.join(name for name, _, _ in ATTACKS.values())} |",
        f"| --- | --- | ---: | ---: |{' ---: |' * len(ATTACKS)}",
    ]
    for name, (purpose, asked) in ROWS.items():
        own = done[done["defence"] == name]
        passes = [_span((own[f"{way}_images"] / own["retain_n"]).round()) for way in ("forward", "backward")]
        cells = [f"**{SHOWN.get(name, name)}**: {purpose}", asked, _span(own["retain_n"]), " + ".join(filter(None, passes))]
        cells += [_shown(rates, name, attack) for attack in ATTACKS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _shown(rates: dict, name: str, attack: str) -> str:
    return " / ".join(f"{rate:.1f}" for rate in rates[name, attack]) if (name, attack) in rates else "not run"


def _span(values: pandas.Series) -> str:
    """A count, or the least and the greatest of several; nothing of none."""
    return " to ".join(f"{value:,.0f}" for value in sorted({*values.agg(["min", "max"])})) if len(values) else ""


def points(rows: pandas.DataFrame) -> list[tuple[str, str, float, float]]:
    """Label, attack, ACC and ASR of each point of the picture."""
    named, rates = {"victim": "victim"} | SHOWN | {TWIN: "floor"}, means(rows)
    return [
        (label, attack, *rates[name, attack][:2])
        for name, label in named.items()
        for attack in ATTACKS
        if (name, attack) in rates
    ]


def draw(rows: pandas.DataFrame) -> Figure:
    """ACC to the right, ASR downwards: up and right is better."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    shown = points(rows)
    for label, attack, accuracy, asr in shown:
        name, colour, marker = ATTACKS[attack]
        marker = {"victim": "X", "floor": "*"}.get(label, marker)
        axes.scatter(accuracy, asr, s=260 if marker == "*" else 110, color=colour, marker=marker, edgecolor="black", zorder=3)
    for name, colour, marker in ATTACKS.values():
        axes.scatter([], [], s=110, color=colour, marker=marker, edgecolor="black", label=name)
    for label, marker, size in (("victim (before)", "X", 110), ("floor (never backdoored)", "*", 260)):
        axes.scatter([], [], s=size, color="white", marker=marker, edgecolor="black", label=label)
    low, high = min(point[2] for point in shown), max(point[2] for point in shown)
    axes.set(xlim=(low - 0.12 * (high - low), high + 0.12 * (high - low)), ylim=(106, -8), yticks=range(0, 101, 20))
    axes.set_xlabel("accuracy, ACC (%): right is better", fontsize=FONT)
    axes.set_ylabel("attack success, ASR (%): up is better", fontsize=FONT)
    axes.tick_params(labelsize=FONT)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, fontsize=FONT, frameon=False)
    figure.canvas.draw()  # the layout is settled now, and labels can be placed by pixels
    place_labels(axes, shown)
    return figure


def place_labels(axes, shown: list[tuple[str, str, float, float]]) -> None:
    """Put each label next to its point, where it covers neither another label nor a point; a line leads there from afar.

    Raises:
        ValueError: There is no room for one of them.
    """
    pixels = [axes.transData.transform((accuracy, asr)) for _, _, accuracy, asr in shown]
    taken = [Bbox.from_bounds(x - 16, y - 16, 32, 32) for x, y in pixels]
    renderer = axes.figure.canvas.get_renderer()
    for label, attack, *point in sorted(shown, key=lambda point: -point[2]):
        style = dict(fontsize=FONT, color=ATTACKS[attack][1], textcoords="offset points", va="center")
        for x, y in OFFSETS:
            style |= dict(ha="left" if x > 0 else "right" if x < 0 else "center")
            style |= dict(arrowprops=dict(arrowstyle="-", color="0.4", shrinkB=6)) if abs(x) + abs(y) > NEAR else {}
            text = axes.annotate(label, point, (x, y), **style)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer).padded(3)  # without the line
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            raise ValueError(f"no room for the label {label!r}: show fewer methods")
        taken.append(box)


def digest(rows: pandas.DataFrame) -> str:
    """Of what the picture shows; the file carries it, so that a picture of other rows is found out."""
    return hashlib.sha256(repr([(*names, f"{x:.3f}", f"{y:.3f}") for *names, x, y in points(rows)]).encode()).hexdigest()


def main(argv: list[str]) -> None:
    """Write picture and block; there are no options."""
    Parser([]).read(argv)
    rows = read()
    PICTURE.parent.mkdir(exist_ok=True)
    draw(rows).savefig(PICTURE, dpi=DPI, metadata={"Description": digest(rows), "Software": None})
    README.write_text(BLOCK.sub(lambda _: block(rows), README.read_text()))


if __name__ == "__main__":
    run(main, sys.argv[1:])
