"""What the plots show: labels beside their points that cover nothing, and looks by which victim and methods are told apart."""

import itertools

import pandas
import pytest
from matplotlib.text import Annotation, Text

from d3_hf.benchmark import plots
from d3_hf.benchmark.tables import UNTOUCHED

# ACC and ASR of model_cards/benchmark.md: two curves that cross, two points that nearly coincide.
CURVES = {
    "D3": {"lambda 0.5": (85.3, 4.3), "lambda 1": (85.6, 3.0), "lambda 2": (86.2, 3.2), "lambda 4": (86.7, 3.5),
           "lambda 10": (87.6, 3.1), "lambda 40": (87.8, 2.6)},
    "FST": {"alpha 0.01": (86.9, 2.7), "alpha 0.07": (85.6, 3.1), "alpha 0.2": (82.9, 1.7)},
    "FT-init": {"lr 0.03": (89.0, 20.3), "lr 0.1": (87.7, 3.3), "lr 0.2": (85.0, 2.0)},
}  # fmt: skip
ALONE = {"victim": (90.6, 98.5), "twin without backdoor": (91.2, 2.5), "FP": (88.8, 4.2), "NAD": (88.4, 3.6)}


@pytest.fixture
def rows():
    points = [(f"{curve} {name}", curve, *rates) for curve, named in CURVES.items() for name, rates in named.items()]
    points += [(name, None, *rates) for name, rates in ALONE.items()]
    return pandas.DataFrame(
        {
            "victim": "cnn/blended",
            "retain": None if name in UNTOUCHED else "5 %",
            "defence": name,
            "curve": curve,
            "accuracy_after": acc / 100,
            "asr_after": asr / 100,
            "seconds_training": None if name in UNTOUCHED else 60.0,
        }
        for name, curve, acc, asr in points
    )


@pytest.fixture
def figures(rows, tmp_path, monkeypatch):
    """The axes of both plots."""
    drawn = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, file: drawn.append(figure.axes[0]) or save(figure, file))
    assert all(file.is_file() for file in plots.draw(rows, tmp_path))
    return drawn


def test_no_label_of_a_curve_covers_another_a_marker_or_leaves_the_axes(figures):
    axes, _ = figures
    notes = [text for text in axes.texts if isinstance(text, Annotation)]
    assert [note.get_text() for note in notes] == [name for named in CURVES.values() for name in named]
    axes.figure.draw_without_rendering()
    boxes = [Text.get_window_extent(note) for note in notes]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    points = [point for line in axes.lines for point in axes.transData.transform(line.get_xydata())]
    assert len(points) == 14 and not any(box.contains(*point) for box in boxes for point in points)
    assert all(axes.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_each_label_is_nearer_to_its_own_point_than_places_reach(figures):
    axes, _ = figures
    shown = {note.get_text(): note.xy for note in axes.texts}
    assert shown == {name: pytest.approx((asr, acc)) for named in CURVES.values() for name, (acc, asr) in named.items()}


def test_no_method_looks_like_a_model_that_none_touched(figures):
    axes, times = figures
    untouched = {part.get_label(): part for part in axes.collections}
    assert tuple(untouched) == UNTOUCHED == tuple(plots.LOOKS)
    assert {marker for marker, _ in plots.LOOKS.values()}.isdisjoint(plots.MARKERS)
    looks = [(line.get_marker(), line.get_color()) for line in axes.lines]
    assert [line.get_label() for line in axes.lines] == [*CURVES, "FP", "NAD"] and len(set(looks)) == 5
    assert [line.get_linestyle() for line in axes.lines] == ["-"] * 3 + ["None"] * 2
    assert not {line.get_label() for line in times.lines} & set(UNTOUCHED) and len(times.lines) == 14


def test_more_methods_than_markers_differ_in_colour(rows, figures, tmp_path):
    one = rows[rows["defence"] == "FP"]
    drawn = plots._axes("", "", "")[1]
    many = pandas.concat([one.assign(defence=f"method {n}") for n in range(40)])
    plots._points(drawn, plots.averages(many), "asr_after", "accuracy_after")
    assert len({(line.get_marker(), line.get_color()) for line in drawn.lines}) == 40
