"""Make README's picture and table and the tables of model_cards/vit.md from committed rows: run it when they have changed.

    python recipes/vit_results.py

Reads model_cards/results/vit.parquet, draws docs/pictures/acc_asr.png, and rewrites what stands between pairs of marks in
README.md and in model_cards/vit.md. The card also has the tables of the victims before these, from vit_seed42.parquet.
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
OLDER = TABLE.with_name("vit_seed42.parquet")
README, CARD = ROOT / "README.md", ROOT / "model_cards/vit.md"

BETWEEN = "(?<=<!-- {0}: begin -->\n).*?(?=<!-- {0}: end -->)"

RETAIN = "1,000 images"  # the retain set that all is about but the table of sizes
# Victims: what their attacks are called, those of README and its picture and the others; and the markers in the picture.
ATTACKS = {
    "cifar10-vit-small/badnets": "BadNets",
    "cifar10-vit-small/blended": "Blended",
    "cifar10-vit-small/lf": "LF",
    "cifar10-vit-small/ssba_lite": "SSBA-lite",
}
OTHERS = {
    "cifar10-vit-small/wanet": "WaNet",
    "cifar10-vit-small/sig": "SIG",
    "cifar10-vit-small/badnets-1percent": "BadNets, 1 %",
    "cifar10-vit-small/blended-1percent": "Blended, 1 %",
    "cifar10-vit-small/badnets-sam1": "BadNets, SAM",
    "cifar10-vit-small-timm/badnets": "BadNets, timm",
}
MARKERS = dict(zip(ATTACKS, "os^v", strict=True))
FIRST = 0  # the seed that a row is of where nothing else is said
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
    """The measured rows; those that failed are left out."""
    return split(pandas.read_parquet(table))[0]


def about(rows: pandas.DataFrame, victims: Iterable[str] = ATTACKS) -> pandas.DataFrame:
    """The rows about some victims."""
    return rows[rows["victim"].isin(list(victims))]


def at(rows: pandas.DataFrame, retain: str = RETAIN) -> pandas.DataFrame:
    """Rows of models that were purified with a retain set, and of the untouched ones."""
    return rows[rows["retain"].isna() | (rows["retain"] == retain)]


def means(rows: pandas.DataFrame) -> dict[tuple[str, str], tuple[float, ...]]:
    """ACC, ASR, RA and PACC in percent, mean over seeds, by (defence, victim)."""
    found = 100 * rows.groupby(["defence", "victim"])[RATES].mean()
    return {key: tuple(row) for key, row in found.iterrows()}


def attacks_of(rows: pandas.DataFrame) -> dict[str, str]:
    """What the attacks are called that have rows, by victim."""
    return {victim: name for victim, name in (ATTACKS | OTHERS).items() if victim in set(rows["victim"])}


def listed(parts: Iterable[str]) -> str:
    """``a, b and c``."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def span(values: pandas.Series, digits: int = 0) -> str:
    """A count, or the least and the greatest of several; nothing of none."""
    return " to ".join(f"{value:,.{digits}f}" for value in sorted({*values.agg(["min", "max"])})) if len(values) else ""


def shown(rates: dict, name: str, victim: str, count: int) -> str:
    """The first ``count`` of `RATES`, or that there are none."""
    return " / ".join(f"{rate:.1f}" for rate in rates[name, victim][:count]) if (name, victim) in rates else "not run"


def said(rows: pandas.DataFrame) -> str:
    """On how many images and with which seeds the rows were measured."""
    images, done = f"{span(rows['accuracy_after_n'])} test images", rows.dropna(subset="seed")
    runs = done.groupby(["defence", "victim"])["seed"].nunique()
    several = sorted({name for (name, _), count in runs.items() if count > 1})
    said = f"{images}, seed {FIRST}"
    return f"{said}; {listed(several)}: means over up to {runs.max()} seeds" if several else said


def readme_block(rows: pandas.DataFrame) -> str:
    """README's table, after a sentence about the measurement."""
    rows = at(about(rows))
    rates, names = means(rows), attacks_of(rows)
    rows = rows[rows["defence"].isin([*ROWS, VICTIM, TWIN])]
    lines = [
        f"ACC / ASR / RA in percent, CIFAR-10, {said(rows)}. Passes: how often the trusted",
        "images go through the network, forward and backward.",
        "",
        f"| take | ask for it by | passes | {' | '.join(names.values())} |",
        f"| --- | --- | ---: |{' ---: |' * len(names)}",
    ]
    for name, label in ((VICTIM, "victim, before"), (TWIN, "the floor")):
        lines.append(f"| {label} | | | {' | '.join(shown(rates, name, victim, 3) for victim in names)} |")
    for name, (label, purpose, asked) in ROWS.items():
        own = rows[rows["defence"] == name]
        passes = [span((own[f"{way}_images"] / own["retain_n"]).round()) for way in ("forward", "backward")]
        cells = [f"**{label}**: {purpose}", asked, " + ".join(filter(None, passes))]
        lines.append(f"| {' | '.join([*cells, *(shown(rates, name, victim, 3) for victim in names)])} |")
    return "\n".join(lines) + "\n"


def methods_block(rows: pandas.DataFrame) -> str:
    """All methods in the grid's order, with their seconds."""
    rows = at(rows)
    rates, names, table = means(rows), attacks_of(rows), []
    for name in ordered(rows):
        own = rows[rows["defence"] == name]
        seconds = "" if name in (VICTIM, TWIN) else span(own["seconds_training"].round())
        seeds = set(own["seed"].dropna())
        label = name if not seeds or min(seeds) == FIRST else f"{name}, seed {min(seeds):.0f}"
        table.append((label, *(shown(rates, name, victim, 4) for victim in names), seconds))
    header = ("ACC / ASR / RA / PACC", *names.values(), "seconds")
    return f"{said(rows)}.\n\n{markdown_table(header, table)}\n"


def sizes_block(rows: pandas.DataFrame) -> str:
    """Methods that were run with other sizes of the retain set too, first seed."""
    rows = rows.dropna(subset="retain")
    rows = rows[rows["defence"].isin(rows.loc[rows["retain"] != RETAIN, "defence"])]
    rows = rows[rows["seed"] == rows["seed"].min()]
    names = attacks_of(rows)
    tables = [
        (f"{name}, {retain}", *(shown(means(own), name, victim, 3) for victim in names))
        for (name, _), own in rows.groupby(["defence", "retain_n"])
        for retain in own["retain"].unique()
    ]
    return f"{said(rows)}.\n\n{markdown_table(('ACC / ASR / RA', *names.values()), tables)}\n"


def seeds_block(rows: pandas.DataFrame) -> str:
    """What was run with several seeds: each rate's least and greatest."""
    rows = at(rows).dropna(subset="seed")
    table = []
    for (name, victim), own in rows.groupby(["defence", "victim"], sort=False):
        if len(own) > 1:
            rates = [span((100 * own[rate]).round(1), 1) for rate in RATES[:3]]
            table.append((name, attacks_of(own)[victim], str(len(own)), *rates))
    return f"{markdown_table(('method', 'attack', 'seeds', 'ACC', 'ASR', 'RA'), table)}\n"


def card_blocks(rows: pandas.DataFrame) -> dict[str, str]:
    """What stands between the card's marks, by their names."""
    main = about(rows)
    blocks = {"results": methods_block(main), "sizes": sizes_block(main), "seeds": seeds_block(main)}
    return blocks | {"others": methods_block(about(rows, OTHERS))}


def older_blocks(rows: pandas.DataFrame) -> dict[str, str]:
    """The same of the victims before these."""
    return {f"older {name}": block for name, block in card_blocks(rows).items() if name != "others"}


def replaced(text: str, name: str, block: str) -> str:
    """A text with another block between the marks of a name.

    Raises:
        ValueError: The text has no such marks, or several.
    """
    text, count = re.subn(BETWEEN.format(name), lambda _: block, text, flags=re.S)
    if count != 1:
        raise ValueError(f"the marks <!-- {name}: begin --> and <!-- {name}: end --> must be there once, not {count} times")
    return text


def points(rows: pandas.DataFrame) -> list[tuple[str, str, float, float]]:
    """Method, victim, ACC and ASR of each point of the picture."""
    rates = means(at(rows))
    return [(name, victim, *rates[name, victim][:2]) for name in SHOWN for victim in ATTACKS if (name, victim) in rates]


def draw(rows: pandas.DataFrame) -> Figure:
    """ACC to the right, ASR downwards: up and right is better."""
    rows = about(rows)
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    style = dict(s=110, edgecolor="black", zorder=3)
    for name, victim, accuracy, asr in points(rows):
        axes.scatter(accuracy, asr, color=SHOWN[name][1], marker=MARKERS[victim], **style)
    methods = [axes.scatter([], [], color=colour, marker="o", label=label, **style) for label, colour in SHOWN.values()]
    attacks = [
        axes.scatter([], [], color="0.8", marker=MARKERS[victim], label=name, **style)
        for victim, name in attacks_of(rows).items()
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
    card = card_blocks(rows) | older_blocks(read(OLDER))
    for file, blocks in ((README, {"results": readme_block(rows)}), (CARD, card)):
        text = file.read_text()
        for name, block in blocks.items():
            text = replaced(text, name, block)
        file.write_text(text)


if __name__ == "__main__":
    run(main, sys.argv[1:])
