"""Draw what a purification did to a victim: one figure a command, and its numbers beside it as JSON.

    python recipes/figures.py path --victim VICTIM --purified FT=outputs/ft D3=outputs/d3 --output path.png
    python recipes/figures.py weights ...     histograms of weight changes
    python recipes/figures.py features ...    t-SNE of the head's input, clean and triggered, with silhouettes
    python recipes/figures.py classes ...     ASR and RA per true class

The victim is a folder that make_victim wrote, a purified model one that a purification wrote. Images are those that the
victim's record names; --dataset_name says where they lie if no longer there. Needs matplotlib.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from d3_hf.attacks import Attack, load_attack
from d3_hf.cli import run
from d3_hf.data.images import RawImages
from d3_hf.data.preprocessing import Preprocessing
from d3_hf.evaluation.landscape import (
    path,
    penultimate_features,
    per_class,
    silhouette,
    t50,
    triggered_images,
    weight_changes,
)
from d3_hf.labels import check_labels
from d3_hf.models import load_classifier
from d3_hf.models.head import find_head
from d3_hf.options.arguments import DataArguments
from d3_hf.options.parser import Parser
from d3_hf.victims.record import read_record, recorded_images

VICTIM = "victim"
RETAINED = 2000  # images that BatchNorm statistics are re-estimated from; more do not move the curves
POINTS = 500  # pictures in a t-SNE, each clean and triggered: more points hide each other
BINS = [10 ** (exponent / 6) for exponent in range(-30, 7)]  # of relative weight changes, 1e-5 to 10
LOSSES = (1e-3, 1e3)  # nats; further out a line leaves the panel, which would be all powers of ten otherwise

# Okabe and Ito's colours without yellow, which is too light for lines; Tol's "muted" for classes. Both can be told apart by
# colour-blind readers.
COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
CLASS_COLOURS = "#332288 #88CCEE #44AA99 #117733 #999933 #DDCC77 #CC6677 #882255 #AA4499 #BBBBBB".split()


@dataclass
class FigureArguments:
    """What to draw.

    Args:
        victim: Folder that `make_victim` wrote.
        purified: ``NAME=FOLDER`` of each purified model; the names are those in the figure.
        output: PNG file; the numbers go beside it as JSON.
        dataset_name: Where the images lie, if no longer where the victim's own record says.
        max_test_images: Use so many test images only, drawn with seed 0.
    """

    victim: str = field(metadata={"help": "Folder of a victim."})
    purified: list[str] = field(metadata={"help": "NAME=FOLDER of each purified model."})
    output: str = field(metadata={"help": "PNG file; the numbers go beside it as JSON."})
    dataset_name: str | None = field(default=None, metadata={"help": "Images in place of the recorded ones."})
    max_test_images: int | None = field(default=None, metadata={"help": "Use so many test images only."})

    def __post_init__(self):
        if Path(self.output).suffix != ".png":
            raise ValueError(f"output must be a .png file; got {self.output}")
        names = [item.partition("=")[0] for item in self.purified]
        if not all(name and folder for name, _, folder in (item.partition("=") for item in self.purified)):
            raise ValueError(f"purified must be NAME=FOLDER of each model; got {' '.join(self.purified)}")
        if len({VICTIM, *names}) <= len(names):
            raise ValueError(f"purified models need different names, none of them {VICTIM!r}; got {', '.join(names)}")
        if len(names) >= len(COLOURS):
            raise ValueError(f"a figure can show {len(COLOURS) - 1} purified models; got {len(names)}")


@dataclass
class PathArguments(FigureArguments):
    """What to draw of a path.

    Args:
        batch_norm: ``interpolated`` or ``re-estimated``; see `d3_hf.landscape.path`.
    """

    batch_norm: str = field(default="interpolated", metadata={"help": "BatchNorm statistics: interpolated or re-estimated."})


@dataclass
class Case:
    """The victim and the purified models, and what they are measured with.

    Attributes:
        models: Name -> classifier; the victim first.
        preprocessing: Of them all.
        attack: The victim's.
        data: The images, as the victim's record names them.
    """

    models: dict[str, PreTrainedModel]
    preprocessing: Preprocessing
    attack: Attack
    data: DataArguments

    @classmethod
    def load(cls, options: FigureArguments) -> "Case":
        """Load models and attack.

        Raises:
            FileNotFoundError: A folder does not exist, or the victim's is none that `make_victim` wrote.
            ValueError: A purified model prepares its images in another way than the victim.
        """
        folder = Path(options.victim)
        record = read_record(folder)
        images = recorded_images(record, dataset_name=options.dataset_name, max_test_images=options.max_test_images)
        attack = load_attack(folder)
        folders = {VICTIM: options.victim} | dict(item.split("=", 1) for item in options.purified)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        models = {name: load_classifier(place).to(device) for name, place in folders.items()}
        seen = {name: Preprocessing.from_processor(model.image_processor) for name, model in models.items()}
        if odd := [name for name in seen if seen[name] != seen[VICTIM]]:
            raise ValueError(f"{odd[0]} resizes or normalises images differently from the victim: it is no purified form of it")
        return cls(models, seen[VICTIM], attack, images)

    def images(self) -> tuple[RawImages, Dataset]:
        """(test, retain): the test images, and up to 2,000 of the recorded retain set, which the victim has not seen."""
        images = self.data.load(self.models[VICTIM].config)
        for model in self.models.values():
            check_labels(images.test.class_names, model.config)
        return images.test, images.retain.select(range(min(RETAINED, len(images.retain))))


def path_numbers(case: Case, options: PathArguments) -> dict[str, Any]:
    """Losses, ACC and ASR along the line to each purified model, and how soon ASR is half on the way back, see `t50`."""
    test, rows = case.images()
    retain = RawImages.from_dataset(rows) if options.batch_norm == "re-estimated" else None
    victim, *purified = case.models
    shown = (test, case.preprocessing, case.attack)
    points = {
        name: path(case.models[victim], case.models[name], *shown, batch_norm=options.batch_norm, retain=retain)
        for name in purified
    }
    found = {
        name: [
            # JSON has no infinity
            {key: finite(getattr(point, key)) for key in ("t", "clean_loss", "backdoor_loss")}
            | point.accuracy.as_dict("accuracy")
            | point.asr.as_dict("asr")
            for point in line
        ]
        for name, line in points.items()
    }
    back = {name: t50(line) for name, line in points.items()}
    # A network without running statistics has nothing to state in its figure.
    has_statistics = any(key.endswith("running_var") for key in case.models[victim].state_dict())
    batch_norm = options.batch_norm if has_statistics else None
    return {"batch_norm": batch_norm, "n_retain": len(retain or []), "n_images": len(test), "paths": found, "t50": back}


def finite(value: float) -> float | None:
    """The value, or None where it is infinite."""
    return value if math.isfinite(value) else None


def draw_path(numbers: dict[str, Any], plt) -> Any:
    """Two panels over t: losses (log) and rates; a colour per purified model, clean solid, triggered dashed."""
    figure, (losses, rates) = plt.subplots(2, 1, figsize=(6, 6.4), sharex=True)
    for colour, (name, rows) in zip(COLOURS[1:], numbers["paths"].items(), strict=False):
        t = [row["t"] for row in rows]
        for key, style, axes, factor in (
            ("clean_loss", "-", losses, 1),
            ("backdoor_loss", "--", losses, 1),
            ("accuracy", "-", rates, 100),
            ("asr", "--", rates, 100),
        ):
            values = [1e30 if row[key] is None else factor * row[key] for row in rows]  # None: infinite
            axes.plot(t, values, style, color=colour, marker="o" if style == "-" else "s", markersize=3.5, linewidth=1.6)
        losses.plot([], [], "-", color=colour, label=name)
    for label, style, marker in (("clean: loss, ACC", "-", "o"), ("triggered: loss, ASR", "--", "s")):
        losses.plot([], [], style, color="grey", marker=marker, markersize=3.5, label=label)
    losses.set(yscale="log", ylabel="cross-entropy (nats)")
    low, high = losses.get_ylim()
    losses.set_ylim(max(low, LOSSES[0]), min(high, LOSSES[1]))
    statistics = f"\nBatchNorm statistics {numbers['batch_norm']}" if numbers["batch_norm"] else ""
    rates.set(ylabel="ACC, ASR (%)", ylim=(-3, 103), xlabel="position t on the line (0: victim, 1: purified)" + statistics)
    for axes in (losses, rates):
        for mark in (0, 1):
            axes.axvline(mark, color="0.7", linewidth=1, zorder=0)
        axes.grid(alpha=0.3)
    figure.legend(*losses.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def weight_numbers(case: Case, options: FigureArguments) -> dict[str, Any]:
    """Histogram of |change| / RMS of the weight's tensor, head and other layers apart, per purified model.

    Changes outside the bins are counted in the first and last one, weights that did not change in none.
    """
    victim, *purified = case.models
    head = find_head(case.models[victim], case.preprocessing.size) + ".weight"
    edges = torch.tensor(BINS)
    found = {}
    for name in purified:
        changes = weight_changes(case.models[victim], case.models[name])
        groups = {
            "head": changes[head],
            "other layers": torch.cat([change for key, change in changes.items() if key != head]),
        }
        found[name] = {}
        for group, values in groups.items():
            sizes = values.abs()
            counts = torch.histogram(sizes[sizes > 0].clamp(BINS[0], BINS[-1]), edges).hist
            found[name][group] = {
                "n": len(sizes),
                "share": (counts / len(sizes)).tolist(),
                "unchanged": (sizes == 0).float().mean().item(),
                "median": sizes.median().item(),
            }
    return {"head": head, "edges": BINS, "changes": found}


def draw_weights(numbers: dict[str, Any], plt) -> Any:
    """Two panels, head and other layers; a colour per purified model."""
    figure, panels = plt.subplots(2, 1, figsize=(6, 5.6), sharex=True)
    for axes, group in zip(panels, ("head", "other layers"), strict=True):
        for colour, (name, groups) in zip(COLOURS[1:], numbers["changes"].items(), strict=False):
            found = groups[group]
            label = f"{name}: median {found['median']:.2g}"
            if found["unchanged"] > 0:
                label += f", {100 * found['unchanged']:.0f} % unchanged"
            shares = [100 * share for share in found["share"]]
            axes.stairs(shares, numbers["edges"], color=colour, linewidth=1.8, label=label)
        axes.set(xscale="log", ylabel="weights (% per bin)", xlim=(numbers["edges"][0], numbers["edges"][-1]))
        axes.set_ylim(0, axes.get_ylim()[1] * (1.1 + 0.16 * len(numbers["changes"])))  # room for the legend
        axes.set_title(group, fontsize=12)
        axes.legend(loc="upper left", frameon=False, fontsize=11)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("|change| / RMS of the weight's tensor in the victim")
    return figure


def feature_numbers(case: Case, options: FigureArguments) -> dict[str, Any]:
    """Silhouette over all images, and t-SNE coordinates of the first 500 of them, per model."""
    from sklearn.manifold import TSNE

    test, _ = case.images()
    triggered = triggered_images(test, case.attack, len(test.class_names))
    shown = min(POINTS, len(test))
    # The same pictures with and without the trigger.
    shown_triggered = int(case.attack.counted(test.labels[:shown]).sum())
    found = {}
    for name, model in case.models.items():
        clean = penultimate_features(model, test, case.preprocessing)
        stamped = penultimate_features(model, triggered, case.preprocessing)
        both = torch.cat([clean[:shown], stamped[:shown_triggered]]).numpy()
        points = TSNE(perplexity=min(30, (len(both) - 1) / 3), init="pca", random_state=0).fit_transform(both)
        found[name] = {"silhouette": silhouette(clean, test.labels, stamped), "points": points.tolist()}
    return {
        "n_images": len(test),
        "n_triggered": len(triggered),
        "class_names": test.class_names,
        "classes": test.labels[:shown].tolist() + triggered.labels[:shown_triggered].tolist(),
        "triggered": [False] * shown + [True] * shown_triggered,
        "models": found,
    }


def draw_features(numbers: dict[str, Any], plt) -> Any:
    """A panel per model; the colour is the true class, dots are clean and crosses triggered images."""
    import numpy as np

    names, classes, triggered = numbers["class_names"], np.array(numbers["classes"]), np.array(numbers["triggered"])
    many = len(names) > len(CLASS_COLOURS)  # then colours say "different classes", not which
    palette = plt.get_cmap("viridis")(np.linspace(0, 1, len(names))) if many else CLASS_COLOURS
    rows = math.ceil(len(numbers["models"]) / 2)
    figure, panels = plt.subplots(rows, 2, figsize=(6, 3.1 * rows + 1), squeeze=False)
    for axes, (name, found) in zip(panels.flat, numbers["models"].items(), strict=False):
        points = np.array(found["points"])
        for number in range(len(names)):
            for stamped, marker, size in ((False, ".", 22), (True, "x", 16)):
                chosen = points[(classes == number) & (triggered == stamped)]
                axes.scatter(*chosen.T, s=size, marker=marker, color=palette[number], linewidths=0.9 if stamped else 0)
        axes.set_title(f"{name}\nsilhouette {found['silhouette']:.2f}", fontsize=12)
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel("t-SNE 1 (no unit)", fontsize=11)
        axes.set_ylabel("t-SNE 2 (no unit)", fontsize=11)
    for axes in panels.flat[len(numbers["models"]) :]:
        axes.axis("off")
    labels = [] if many else list(zip(palette, names, strict=False))
    handles = [plt.Line2D([], [], color=colour, marker="s", linestyle="", label=label) for colour, label in labels]
    for label, marker in (("clean", "."), ("triggered", "x")):
        handles.append(plt.Line2D([], [], color="black", marker=marker, linestyle="", label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, columnspacing=1, handletextpad=0.2)
    return figure


def class_numbers(case: Case, options: FigureArguments) -> dict[str, Any]:
    """ASR and RA per true class, per model."""
    test, _ = case.images()
    found = {name: per_class(model, test, case.preprocessing, case.attack) for name, model in case.models.items()}
    return {
        "n_images": len(test),
        "models": {
            name: {label: one.asr.as_dict("asr") | one.ra.as_dict("ra") for label, one in classes.items()}
            for name, classes in found.items()
        },
    }


def draw_classes(numbers: dict[str, Any], plt) -> Any:
    """A panel per model: ASR and RA per true class with their 95 % intervals."""
    models = numbers["models"]
    labels = list(next(iter(models.values())))
    size = (max(6, 0.35 * len(labels)), 1.9 * len(models) + 1.6)
    figure, panels = plt.subplots(len(models), 1, figsize=size, sharex=True, squeeze=False)
    for axes, (name, classes) in zip(panels[:, 0], models.items(), strict=True):
        for key, colour, offset in (("asr", "#D55E00", -0.2), ("ra", "#0072B2", 0.2)):
            places = [place + offset for place in range(len(labels))]
            values = [100 * classes[label][key] for label in labels]
            intervals = [[100 * end for end in classes[label][f"{key}_ci95"]] for label in labels]
            # Rounding may put an end of the interval past the value.
            below = [max(0, value - low) for value, (low, _) in zip(values, intervals, strict=True)]
            above = [max(0, high - value) for value, (_, high) in zip(values, intervals, strict=True)]
            axes.bar(places, values, 0.4, color=colour, label=key.upper())
            axes.errorbar(places, values, [below, above], fmt="none", ecolor="black", elinewidth=1)
        axes.set(ylim=(0, 105), ylabel="images (%)", yticks=[0, 50, 100])
        axes.set_title(name, fontsize=12)
        axes.grid(axis="y", alpha=0.3)
    bottom = panels[-1, 0]
    bottom.set_xticks(range(len(labels)), labels, rotation=45, ha="right", rotation_mode="anchor")
    bottom.set_xlabel("true class of the triggered images")
    handles, names = bottom.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=2, frameon=False)
    return figure


FIGURES: dict[str, tuple[type[FigureArguments], Callable, Callable]] = {
    "path": (PathArguments, path_numbers, draw_path),
    "weights": (FigureArguments, weight_numbers, draw_weights),
    "features": (FigureArguments, feature_numbers, draw_features),
    "classes": (FigureArguments, class_numbers, draw_classes),
}


def draw(name: str, numbers: dict[str, Any], output: Path) -> None:
    """Draw a figure again from the numbers in its JSON file.

    Args:
        name: ``path``, ``weights``, ``features`` or ``classes``.
        numbers: What the JSON file holds.
        output: PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 12, "legend.fontsize": 11, "figure.constrained_layout.use": True}):
        figure = FIGURES[name][2](numbers, plt)
        figure.savefig(output, dpi=150)
        plt.close(figure)


def main(argv: list[str]) -> None:
    """Run ``path | weights | features | classes --option value ...``.

    Raises:
        ValueError: There is no such figure, or see `FigureArguments`, `Case` and `d3_hf.landscape`.
    """
    name, *argv = argv or [""]
    if name not in FIGURES:
        raise ValueError(f"name a figure first: {', '.join(FIGURES)}; got {name!r}")
    arguments, compute, _ = FIGURES[name]
    (options,) = Parser([arguments]).read(argv)
    case = Case.load(options)
    facts = {"figure": name, "arguments": asdict(options), "attack": case.attack.describe()}
    numbers = facts | compute(case, options)
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n")
    draw(name, numbers, output)
    print(output, output.with_suffix(".json"))


if __name__ == "__main__":
    run(main, sys.argv[1:])
