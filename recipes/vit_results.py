"""Make README's picture and table and the table of model_cards/vit.md from committed rows: run it when they have changed.

    python recipes/vit_results.py

Reads model_cards/results/vit.parquet, draws docs/pictures/acc_asr.png, and rewrites what stands between the two marks in
README.md and in model_cards/vit.md.
"""

import hashlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import pandas
from matplotlib.figure import Figure

from d3_hf.benchmark.tables import ordered, split
from d3_hf.cli import run
from d3_hf.options.parser import Parser
from d3_hf.publishing.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
TABLE, PICTURE = ROOT / "model_cards/results/vit.parquet", ROOT / "docs/pictures/acc_asr.png"
README, CARD = ROOT / "README.md", ROOT / "model_cards/vit.md"
BLOCK = re.compile(r"(?<=<!-- results: begin -->\n).*?(?=<!-- results: end -->)", re.S)

RETAIN = "1,000 images"  # the grid's retain set that all of this is about
# Attacks: what they are called, and their marker in the picture.
ATTACKS = {
    "badnets": ("BadNets", "o"),
    "blended": ("Blended", "s"),
    "lf": ("LF", "^"),
    "wanet": ("WaNet", "D"),
    "ssba_lite": ("SSBA-lite", "v"),
}
VICTIM, TWIN = "victim", "twin without backdoor"
# In the picture, by the names in the grid: what they are called there, and their colour (Okabe and Ito's).
SHOWN = {
    VICTIM: ("victim (before)", "#000000"),
    "FT": ("FT", "#E69F00"),
    "D3": ("D3", "#0072B2"),
    "A2": ("base tuning", "#009E73"),
    "D3 from the base": ("D3 near the base", "#CC79A7"),
    TWIN: ("floor (never backdoored)", "#FFFFFF"),
}
# The rows of README's table: what they are called there, what to take them for, and how they are asked for.
BASE = "`--defence base_tuning --base_model auto{}`"
ROWS = {
    "D3 from the base": ("D3 near the base", "the default where the public base is found or named", "`d3-hf purify`"),
    "D3": ("D3", "the default where it is not", "`--base_model none`"),
    "FT": ("FT", "the control: what D3 must beat", "`--defence fine_tuning`"),
    "A2": ("base tuning", "the same start, without the distance", BASE.format("")),
    "A0": ("A0", "the control of that start: nothing of the victim's body", BASE.format(" --keep 0")),
}
RATES = ["accuracy_after", "asr_after", "ra_after", "pacc_after"]
FONT, DPI, SIZE = 13, 150, (7.2, 5.4)


def read(table: Path = TABLE) -> pandas.DataFrame:
    """What is shown of a table: measured rows of `ATTACKS` and `RETAIN`, ``attack`` filled in for the untouched models too."""
    rows, _ = split(pandas.read_parquet(table))
    rows = rows.assign(attack=rows["victim"].str.rpartition("/")[2])
    return rows[rows["attack"].isin(ATTACKS) & (rows["retain"].isna() | (rows["retain"] == RETAIN))]


def means(rows: pandas.DataFrame) -> dict[tuple[str, str], tuple[float, ...]]:
    """ACC, ASR, RA and PACC in percent, mean over seeds, by (defence, attack)."""
    found = 100 * rows.groupby(["defence", "attack"])[RATES].mean()
    return {key: tuple(row) for key, row in found.iterrows()}


def attacks_of(rows: pandas.DataFrame) -> dict[str, str]:
    """Those of `ATTACKS` that were measured, and what they are called."""
    return {key: name for key, (name, _) in ATTACKS.items() if key in set(rows["attack"])}


def listed(parts: Iterable[str]) -> str:
    """``a, b and c``."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def span(values: pandas.Series) -> str:
    """A count, or the least and the greatest of several; nothing of none."""
    return " to ".join(f"{value:,.0f}" for value in sorted({*values.agg(["min", "max"])})) if len(values) else ""


def shown(rates: dict, name: str, attack: str, count: int) -> str:
    """The first ``count`` of `RATES`, or that there are none."""
    return " / ".join(f"{rate:.1f}" for rate in rates[name, attack][:count]) if (name, attack) in rates else "not run"


def said(rows: pandas.DataFrame) -> str:
    """On how many images and with which seeds the rows were measured."""
    done = rows.dropna(subset="seed")
    seeds = sorted({int(seed) for seed in done["seed"]})
    several = [
        f"{name} on {attacks_of(rows)[attack]}"
        for (name, attack), count in done.groupby(["defence", "attack"])["seed"].nunique().items()
        if count > 1
    ]
    said = f"{span(done['accuracy_after_n'])} test images of CIFAR-10, seed {seeds[0]}"
    if not several:
        return said
    return f"{said}, and the mean of as many as there are of seeds {listed(map(str, seeds))} for {listed(several)}"


def readme_block(rows: pandas.DataFrame) -> str:
    """What stands between README's marks: a sentence about the measurement and the table."""
    rates, attacks = means(rows), attacks_of(rows)
    rows = rows[rows["defence"].isin([*ROWS, VICTIM, TWIN])]
    lines = [
        f"ACC / ASR / RA in percent, on {said(rows)}. Passes: how often the trusted images go through the network, forward and",
        "backward.",
        "",
        f"| take | ask for it by | passes | {' | '.join(attacks.values())} |",
        f"| --- | --- | ---: |{' ---: |' * len(attacks)}",
    ]
    for name, label in ((VICTIM, "victim, before"), (TWIN, "the floor")):
        lines.append(f"| {label} | | | {' | '.join(shown(rates, name, attack, 3) for attack in attacks)} |")
    for name, (label, purpose, asked) in ROWS.items():
        own = rows[rows["defence"] == name]
        passes = [span((own[f"{way}_images"] / own["retain_n"]).round()) for way in ("forward", "backward")]
        cells = [f"**{label}**: {purpose}", asked, " + ".join(filter(None, passes))]
        lines.append(f"| {' | '.join([*cells, *(shown(rates, name, attack, 3) for attack in attacks)])} |")
    return "\n".join(lines) + "\n"


def card_block(rows: pandas.DataFrame) -> str:
    """What stands between the card's marks: all rows, in the grid's order."""
    rates, attacks = means(rows), attacks_of(rows)
    table = []
    for name in ordered(rows):
        own = rows[rows["defence"] == name]
        seconds = "" if name in (VICTIM, TWIN) else span(own["seconds_training"].round())
        table.append((name, *(shown(rates, name, attack, 4) for attack in attacks), seconds))
    header = ("ACC / ASR / RA / PACC", *attacks.values(), "seconds")
    return f"On {said(rows)}.\n\n{markdown_table(header, table)}\n"


def points(rows: pandas.DataFrame) -> list[tuple[str, str, float, float]]:
    """Method, attack, ACC and ASR of each point of the picture."""
    rates = means(rows)
    return [(name, attack, *rates[name, attack][:2]) for name in SHOWN for attack in ATTACKS if (name, attack) in rates]


def draw(rows: pandas.DataFrame) -> Figure:
    """ACC to the right, ASR downwards: up and right is better."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    style = dict(s=110, edgecolor="black", zorder=3)
    for name, attack, accuracy, asr in points(rows):
        axes.scatter(accuracy, asr, color=SHOWN[name][1], marker=ATTACKS[attack][1], **style)
    methods = [axes.scatter([], [], color=colour, marker="o", label=label, **style) for label, colour in SHOWN.values()]
    attacks = [
        axes.scatter([], [], color="0.8", marker=ATTACKS[attack][1], label=name, **style)
        for attack, name in attacks_of(rows).items()
    ]
    axes.set(ylim=(106, -8), yticks=range(0, 101, 20))
    axes.margins(x=0.08)
    axes.set_xlabel("accuracy, ACC (%): right is better", fontsize=FONT)
    axes.set_ylabel("attack success, ASR (%): up is better", fontsize=FONT)
    axes.tick_params(labelsize=FONT)
    axes.grid(alpha=0.3)
    figure.legend(handles=methods, loc="outside upper center", ncols=3, fontsize=FONT - 1, frameon=False)
    figure.legend(handles=attacks, loc="outside lower center", ncols=len(attacks), fontsize=FONT - 1, frameon=False)
    return figure


def digest(rows: pandas.DataFrame) -> str:
    """Of what the picture shows; the file carries it, so that a picture of other rows is found out."""
    return hashlib.sha256(repr([(*names, f"{x:.3f}", f"{y:.3f}") for *names, x, y in points(rows)]).encode()).hexdigest()


def main(argv: list[str]) -> None:
    """Write picture and blocks; there are no options."""
    Parser([]).read(argv)
    rows = read()
    PICTURE.parent.mkdir(exist_ok=True)
    draw(rows).savefig(PICTURE, dpi=DPI, metadata={"Description": digest(rows), "Software": None})
    for file, block in ((README, readme_block(rows)), (CARD, card_block(rows))):
        file.write_text(BLOCK.sub(lambda _, block=block: block, file.read_text()))


if __name__ == "__main__":
    run(main, sys.argv[1:])
