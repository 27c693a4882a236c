"""README's picture and table, and the ViT card's table, are what the committed rows say."""

import runpy

import pytest
from PIL import Image
from places import RECIPES

RUN = "run python recipes/vit_results.py"


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(RECIPES / "vit_results.py"))


@pytest.fixture(scope="module")
def rows(recipe):
    return recipe["read"]()


@pytest.mark.parametrize(("place", "block"), [("README", "readme_block"), ("CARD", "card_block")])
def test_the_blocks_are_those_of_the_rows(recipe, rows, place, block):
    (found,) = recipe["BLOCK"].findall(recipe[place].read_text())
    assert found == recipe[block](rows), RUN


def test_the_picture_is_that_of_the_rows(recipe, rows):
    with Image.open(recipe["PICTURE"]) as picture:
        assert picture.text["Description"] == recipe["digest"](rows), RUN
        assert picture.width >= 1000


def test_another_measurement_is_another_picture_and_block(recipe, rows):
    changed = rows.copy()
    changed.loc[changed["defence"] == "D3", "asr_after"] += 0.01
    for made in ("digest", "readme_block", "card_block"):
        assert recipe[made](changed) != recipe[made](rows)


def test_seeds_are_averaged_and_named(recipe, rows):
    one = rows[(rows["defence"] == "D3") & (rows["attack"] == "badnets") & (rows["seed"] == 0)]
    both = recipe["pandas"].concat([one, one.assign(seed=1.0, accuracy_after=one["accuracy_after"] + 0.02)])
    first, mean = (recipe["means"](table)["D3", "badnets"][0] for table in (one, both))
    assert mean == pytest.approx(first + 1)
    assert recipe["said"](one).endswith(", seed 0")
    assert recipe["said"](both).endswith("of seeds 0 and 1 for D3 on BadNets")


def test_other_retain_sets_and_failures_are_left_out(recipe, rows, tmp_path):
    table = recipe["pandas"].read_parquet(recipe["TABLE"])
    few, failed = table.assign(retain="300 images", asr_after=0.5), table.assign(error="ValueError: x", accuracy_after=None)
    few = few[~few["defence"].isin([recipe["VICTIM"], recipe["TWIN"]])]
    recipe["pandas"].concat([table, few, failed]).to_parquet(tmp_path / "more.parquet")
    assert recipe["card_block"](recipe["read"](tmp_path / "more.parquet")) == recipe["card_block"](rows)


def test_what_was_not_run_says_so(recipe, rows):
    left = rows[~((rows["defence"] == "FT") & (rows["attack"] == "blended"))]
    for block in ("readme_block", "card_block"):
        lines = [recipe[block](table).count("not run") for table in (rows, left)]
        assert lines[1] == lines[0] + 1


def test_every_point_of_the_rows_is_drawn(recipe, rows):
    (axes,) = recipe["draw"](rows).axes
    drawn = [tuple(offset) for dots in axes.collections for offset in dots.get_offsets()]
    for *_, accuracy, asr in recipe["points"](rows):
        assert any(offset == pytest.approx((accuracy, asr)) for offset in drawn)
