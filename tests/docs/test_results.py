"""README's picture and table, and the ViT card's tables, are what the committed rows say."""

import runpy

import pytest
from PIL import Image
from places import RECIPES

RUN = "run python recipes/vit_results.py"
BADNETS = "cifar10-vit-small/badnets"


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(RECIPES / "vit_results.py"))


@pytest.fixture(scope="module")
def rows(recipe):
    return recipe["read"]()


def blocks_of(recipe, rows):
    """Every block, by file and name."""
    card = {("CARD", name): block for name, block in recipe["card_blocks"](rows).items()}
    return {("README", "results"): recipe["readme_block"](rows)} | card


def test_the_blocks_are_those_of_the_rows(recipe, rows):
    older = {("CARD", name): block for name, block in recipe["older_blocks"](recipe["read"](recipe["OLDER"])).items()}
    for (place, name), block in (blocks_of(recipe, rows) | older).items():
        text = recipe[place].read_text()
        assert recipe["replaced"](text, name, block) == text, f"{name}: {RUN}"


def test_marks_that_are_missing_are_said(recipe):
    with pytest.raises(ValueError, match="sizes: begin .* not 0 times"):
        recipe["replaced"]("no marks", "sizes", "a block")


def test_the_picture_is_that_of_the_rows(recipe, rows):
    with Image.open(recipe["PICTURE"]) as picture:
        assert picture.text["Description"] == recipe["digest"](rows), RUN
        assert picture.width >= 1000


def test_another_measurement_is_another_picture_and_block(recipe, rows):
    changed = rows.copy()
    changed.loc[changed["defence"] == "D3 from the base", ["accuracy_after", "asr_after"]] += 0.01  # which is in every table
    assert recipe["digest"](changed) != recipe["digest"](rows)
    before, after = blocks_of(recipe, rows), blocks_of(recipe, changed)
    assert all(before[name] != after[name] for name in before)


def test_seeds_are_averaged_and_their_range_is_shown(recipe, rows):
    one = rows[(rows["victim"] == BADNETS) & (rows["defence"] == "D3") & (rows["seed"] == 0)]
    both = recipe["pandas"].concat([one, one.assign(seed=1.0, accuracy_after=one["accuracy_after"] + 0.02)])
    first, mean = (recipe["means"](table)["D3", BADNETS][0] for table in (one, both))
    assert mean == pytest.approx(first + 1)
    assert recipe["said"](one).endswith(", seed 0")
    assert recipe["said"](both).endswith(", seed 0; D3: means over up to 2 seeds")
    (line,) = [line for line in recipe["seeds_block"](both).splitlines() if line.startswith("| D3 ")]
    assert f"| 2 | {first:.1f} to {first + 2:.1f} |" in line


def test_other_retain_sets_are_in_their_own_table_and_failures_in_none(recipe, rows, tmp_path):
    table = recipe["pandas"].read_parquet(recipe["TABLE"])
    few, failed = table.assign(retain="50 images", retain_n=50), table.assign(error="ValueError: x", accuracy_after=None)
    few = few[few["seed"] == 0]
    recipe["pandas"].concat([table, few, failed]).to_parquet(tmp_path / "more.parquet")
    before, after = (blocks_of(recipe, rows) for rows in (rows, recipe["read"](tmp_path / "more.parquet")))
    assert {name for name in before if before[name] != after[name]} == {("CARD", "sizes")}
    assert "| D3, 50 images |" in after["CARD", "sizes"]


def test_what_was_not_run_says_so(recipe, rows):
    left = rows[~((rows["defence"] == "FT") & (rows["victim"] == BADNETS.replace("badnets", "blended")))]
    for name in (("README", "results"), ("CARD", "results")):
        lines = [blocks_of(recipe, table)[name].count("not run") for table in (rows, left)]
        assert lines[1] == lines[0] + 1


def test_every_point_of_the_rows_is_drawn(recipe, rows):
    (axes,) = recipe["draw"](rows).axes
    drawn = [tuple(offset) for dots in axes.collections for offset in dots.get_offsets()]
    for *_, accuracy, asr in recipe["points"](rows):
        assert any(offset == pytest.approx((accuracy, asr)) for offset in drawn)
