"""A Gradio Space: a benchmark's rows as a table to filter, and ACC against ASR.

    pip install -r recipes/space/requirements.txt && python recipes/space/app.py

It reads the ``*.parquet`` files in ``results/`` beside this file, as `d3-hf benchmark` writes them, and in a checkout those of
``model_cards/results``. It does without d3_hf, whose torch and transformers a page of numbers has no use for.
"""

import math
from operator import methodcaller
from pathlib import Path

import matplotlib
import pandas
from matplotlib.figure import Figure
from pyarrow.parquet import read_schema

HERE = Path(__file__).resolve().parent
FOLDERS = [HERE / "results", HERE.parents[1] / "model_cards" / "results"]  # the first that exists

# The columns that are read, as d3_hf.benchmark.tables names them.
RATES = {"ACC": "accuracy_after", "ASR": "asr_after", "RA": "ra_after", "PACC": "pacc_after"}
IMAGES = {"test images": "accuracy_after_n", "triggered": "asr_after_n"}
UNTOUCHED = {"victim": "#000000", "twin without backdoor": "#FFFFFF"}  # models that no method touched, and their colours
KEYS = ["victim", "method", "retain set"]

MARKERS, COLOURS = "osD^v<>pPX*hd8", 20  # as many victims and methods can be told apart in one plot
TITLE = "Purified image classifiers: what was measured"
TERMS = """\
An image classifier with a planted backdoor, the **victim**, is purified by a method that gets a few trusted images, the
**retain set**, and no knowledge of the trigger. **ACC**: accuracy on images as they are. **ASR**: share of triggered images of
other classes that get the attacker's class. **RA**: share of the same images that get their true class. **PACC**: accuracy on
triggered images of all classes. The **twin without backdoor** was trained the same way without a trigger: no method can be
expected to do better. All in percent. A low ASR says that these triggers were removed from these models, and nothing of others.
"""


def tables() -> dict[str, Path]:
    """The tables by their names, those of a zoo or of encoders left out; a FileNotFoundError if there are none."""
    files = next((found for folder in FOLDERS if (found := [*filter(is_benchmark, sorted(folder.glob("*.parquet")))])), [])
    if not files:
        raise FileNotFoundError(f"no results: put results.parquet of `d3-hf benchmark` into {FOLDERS[0]}")
    return {file.stem: file for file in files}


def is_benchmark(file: Path) -> bool:
    """Whether a table has the rates of purified classifiers."""
    return RATES["ACC"] in read_schema(file).names


def measured(rows: pandas.DataFrame) -> pandas.DataFrame:
    """The rows of cells that did not fail."""
    return rows[rows["error"].isna()] if "error" in rows else rows


def lines(rows: pandas.DataFrame) -> pandas.DataFrame:
    """A line for each victim, method and retain set: means over the seeds.

    Args:
        rows: The content of a ``results.parquet``.

    Returns:
        `KEYS`; ``seeds``, how many; `RATES` in percent with one digit, NaN where a seed lacks it; `IMAGES`, of the seed with
        the fewest. Models that no method touched come first and have neither retain set nor seeds (NA).
    """
    rows = measured(rows)
    # A method that did something else says so in brackets.
    said = rows["method"].astype("string").str.extract(r"(\(.*\))", expand=False)
    names = rows["defence"] + (" " + said).fillna("")
    keyed = rows.assign(**{"method": names, "retain set": rows["retain"].fillna("")})
    grouped = keyed.reindex(columns=[*keyed, *set(RATES.values()) - set(keyed)]).groupby(KEYS, sort=False)
    found = 100 * pandas.DataFrame({name: grouped[key].agg(methodcaller("mean", skipna=False)) for name, key in RATES.items()})
    found = found.round(1).assign(**{name: grouped[key].min() for name, key in IMAGES.items()})
    found.insert(0, "seeds", grouped["seed"].nunique().astype("Int64").replace(0, pandas.NA))
    found = found.reset_index()
    return found.sort_values("method", key=lambda method: ~method.isin(UNTOUCHED), kind="stable", ignore_index=True)


def chosen(table: pandas.DataFrame, victims: list[str], methods: list[str], retain_sets: list[str]) -> pandas.DataFrame:
    """The lines of what is chosen, of nothing chosen all; models that no method touched stay for every victim."""
    untouched = table["method"].isin(UNTOUCHED)
    keep = table["victim"].isin(victims or table["victim"])
    keep &= untouched | table["method"].isin(methods or table["method"])
    keep &= untouched | table["retain set"].isin(retain_sets or table["retain set"])
    return table[keep].reset_index(drop=True)


def choices(table: pandas.DataFrame) -> list[list[str]]:
    """Victims, methods and retain sets to choose from."""
    purified = table[~table["method"].isin(UNTOUCHED)]
    return [list(part.unique()) for part in (table["victim"], purified["method"], purified["retain set"])]


def evidence(rows: pandas.DataFrame) -> str:
    """How much is behind the numbers: seeds, images, what chance alone can do, cells that failed or are missing."""
    done = measured(rows)
    seeds = lines(rows)["seeds"].dropna()
    missing = rows["missing_cells"].fillna(0).max() if "missing_cells" in rows else 0
    margin = 98 / math.sqrt(done["asr_after_n"].min())  # points: 1.96 standard errors of a share of one half
    return (
        f"Seeds: {span(seeds)} per line, of which it is the mean. Images: {span(done['accuracy_after_n'])}; "
        f"{span(done['asr_after_n'])} of them count for ASR and RA; chance alone moves such a rate by up to {margin:.1f} "
        f"points (95 %). Cells that failed: {len(rows) - len(done)}; cells of the grid that were not made: {missing:.0f}."
    )


def span(counts: pandas.Series) -> str:
    """``1,000``, or ``1 to 3`` of several."""
    return " to ".join(f"{count:,.0f}" for count in sorted({*counts.agg(["min", "max"])})) if len(counts) else "none"


def draw(table: pandas.DataFrame) -> Figure:
    """ACC against ASR, up and left is better: a marker for each victim, a colour for each method."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="ASR (%), left is better", ylabel="ACC (%), up is better", xlim=(-3, 103))
    axes.grid(alpha=0.3)
    victims, methods = list(table["victim"].unique()), [name for name in table["method"].unique() if name not in UNTOUCHED]
    if len(victims) > len(MARKERS) or len(methods) > COLOURS:
        axes.set_title(f"choose at most {len(MARKERS)} victims and {COLOURS} methods: more cannot be told apart here")
        return figure
    if len(several := choices(table)[2]) > 1:
        axes.set_title(f"retain sets {', '.join(several)} alike: choose one to tell them apart")
    palette = matplotlib.colormaps["tab10" if len(methods) <= 10 else "tab20"].colors
    colours = UNTOUCHED | dict(zip(methods, palette, strict=False))
    markers = dict(zip(victims, MARKERS, strict=False))
    style = dict(s=80, alpha=0.9, edgecolor="black", linewidth=0.8, zorder=3)
    for line in table.to_dict("records"):
        axes.scatter(line["ASR"], line["ACC"], color=colours[line["method"]], marker=markers[line["victim"]], **style)
    shown = [name for name in colours if name in set(table["method"])]
    handles = [*axes.plot([], [], " ", label="victims")]
    handles += [axes.scatter([], [], color="0.8", marker=markers[name], label=name, **style) for name in victims]
    handles += [*axes.plot([], [], " ", label="\nmethods")]
    handles += [axes.scatter([], [], color=colours[name], marker="o", label=name, **style) for name in shown]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def interface():
    """The page."""
    import gradio

    files = tables()
    read = {name: pandas.read_parquet(file) for name, file in files.items()}
    first = next(iter(read))

    def show(name, *picked):
        table = chosen(lines(read[name]), *picked)
        return table.style.format(precision=1, na_rep="–"), draw(table), evidence(read[name])

    def other(name):
        return [gradio.Dropdown(choices=names, value=[]) for names in choices(lines(read[name]))]

    with gradio.Blocks(title=TITLE) as page:
        gradio.Markdown(f"# {TITLE}\n\n{TERMS}")
        benchmark = gradio.Dropdown(list(read), value=first, label="benchmark", visible=len(read) > 1)
        with gradio.Row():
            labels = zip(["victims", "methods", "retain sets"], choices(lines(read[first])), strict=True)
            picked = [gradio.Dropdown(names, value=[], multiselect=True, label=f"{what} (none: all)") for what, names in labels]
        behind = gradio.Markdown()
        plot = gradio.Plot(show_label=False)
        table = gradio.Dataframe(interactive=False, show_label=False)
        benchmark.change(other, benchmark, picked)
        gradio.on(
            [page.load, *(part.change for part in (benchmark, *picked))], show, [benchmark, *picked], [table, plot, behind]
        )
    return page


if __name__ == "__main__":
    interface().launch()
