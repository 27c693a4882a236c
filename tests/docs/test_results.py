"""README's picture and table are what the committed rows say."""

import itertools
import runpy

import pytest
from matplotlib.text import Annotation, Text
from PIL import Image
from places import RECIPES


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(RECIPES / "readme_results.py"))


@pytest.fixture(scope="module")
def rows(recipe):
    return recipe["read"]()


def test_the_block_is_that_of_the_rows(recipe, rows):
    text = recipe["README"].read_text()
    (shown,) = recipe["BLOCK"].findall(text)
    assert shown == recipe["block"](rows), "run python recipes/readme_results.py"
    assert shown.count("\n| **") == len(recipe["ROWS"]) == 5


def test_the_picture_is_that_of_the_rows(recipe, rows):
    with Image.open(recipe["PICTURE"]) as picture:
        assert picture.text["Description"] == recipe["digest"](rows), "run python recipes/readme_results.py"
        assert picture.width >= 1000


def test_another_measurement_is_another_picture_and_block(recipe, rows):
    changed = rows.copy()
    changed.loc[changed["defence"] == "D3", "asr_after"] += 0.01
    assert recipe["digest"](changed) != recipe["digest"](rows) and recipe["block"](changed) != recipe["block"](rows)


def test_seeds_are_averaged(recipe, rows):
    one = rows[(rows["defence"] == "D3") & (rows["attack"] == "badnets")]
    other = one.assign(seed=1.0, accuracy_after=one["accuracy_after"] + 0.02)
    both = recipe["pandas"].concat([rows, other])
    first, mean = (recipe["means"](table)["D3", "badnets"][0] for table in (rows, both))
    assert mean == pytest.approx(first + 1)
    assert "mean over seeds 0, 1" in recipe["block"](both) and ", seed 0." in recipe["block"](rows)


def test_other_retain_sets_and_failures_are_left_out(recipe, rows, tmp_path):
    table = recipe["pandas"].read_parquet(recipe["TABLE"])
    few, failed = table.assign(retain="300 images", asr_after=0.5), table.assign(error="ValueError: x", accuracy_after=None)
    few = few[few["defence"] != "victim"]
    recipe["pandas"].concat([table, few, failed]).to_parquet(tmp_path / "more.parquet")
    assert recipe["block"](recipe["read"](tmp_path / "more.parquet")) == recipe["block"](rows)


def test_a_method_that_was_not_run_says_so(recipe, rows):
    (line,) = [line for line in recipe["block"](rows[rows["defence"] != "FT-SAM"]).splitlines() if "**FT-SAM**" in line]
    assert line.endswith("|  | " + " | ".join(["not run"] * len(recipe["ATTACKS"])) + " |")


def test_the_rows_of_a_twin_go_over_the_recorded_floor(recipe, rows):
    twin = rows[(rows["defence"] == "victim") & (rows["attack"] == "badnets")].assign(defence=recipe["TWIN"], asr_after=0.02)
    assert recipe["means"](rows)[recipe["TWIN"], "badnets"] == recipe["FLOOR"]["badnets"]
    assert recipe["means"](recipe["pandas"].concat([rows, twin]))[recipe["TWIN"], "badnets"][1] == pytest.approx(2)


def test_labels_cover_nothing(recipe, rows):
    figure = recipe["draw"](rows)
    renderer, (axes,) = figure.canvas.get_renderer(), figure.axes
    labels = [child for child in axes.get_children() if isinstance(child, Annotation)]
    assert len(labels) == len(recipe["points"](rows)) > 8
    boxes = [Text.get_window_extent(label, renderer) for label in labels]
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    for label in labels:
        x, y = axes.transData.transform(label.xy)
        assert not [box for box in boxes if box.contains(x, y)]


def test_a_picture_that_would_be_too_full_is_refused(recipe, rows):
    figure = recipe["draw"](rows)
    with pytest.raises(ValueError, match="no room for the label 'method': show fewer methods"):
        recipe["place_labels"](figure.axes[0], [("method", "badnets", 85.0, 50.0)] * 40)
