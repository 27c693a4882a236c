"""The Space: what its page shows is what the rows say, and no more; without gradio, which only its requirements have."""

import re
import runpy
import sys

import pandas
import pytest
import yaml
from huggingface_hub import SpaceCardData
from matplotlib.colors import to_hex
from places import RECIPES, ROOT

from d3_hf.benchmark import tables

FOLDER = RECIPES / "space"


@pytest.fixture(scope="module")
def space():
    return runpy.run_path(str(FOLDER / "app.py"))


def row(victim, defence, seed=None, rates=(0.9, 0.5, 0.4, 0.45), retain="5 %", method=None, error=None):
    is_untouched = defence in tables.UNTOUCHED
    found = {"victim": victim, "defence": defence, "seed": seed, "method": method or defence, "error": error}
    found |= {"retain": None if is_untouched else retain, "accuracy_after_n": 1000, "asr_after_n": 900, "missing_cells": 7}
    return found | ({} if error else dict(zip(tables.RATES.values(), rates, strict=True)))


@pytest.fixture
def rows():
    return pandas.DataFrame(
        [
            row("cnn/badnets", "D3", 0, (0.861, 0.02, 0.8, 0.81)),
            row("cnn/badnets", "D3", 1, (0.864, 0.031, 0.9, 0.82)),
            row("cnn/badnets", "D3", 2, error="ValueError: no"),
            row("cnn/badnets", "D3", 0, retain="1 %"),
            row("cnn/blended", "NC", 0, method="Neural Cleanse (fine-tuned, nothing was found)"),
            row("cnn/badnets", "victim", rates=(0.912, 0.9999, 0.0, 0.1)),
            row("cnn/blended", "twin without backdoor"),
        ]
    )


def shown(table, victim, method, retain=""):
    ((_, found),) = table[(table[["victim", "method", "retain set"]] == [victim, method, retain]).all(axis=1)].iterrows()
    return found


def test_columns_are_called_as_the_benchmark_calls_them(space):
    assert space["RATES"] == tables.RATES and tuple(space["UNTOUCHED"]) == tables.UNTOUCHED


def test_a_line_is_the_mean_over_the_seeds_that_were_measured(space, rows):
    table = space["lines"](rows)
    assert list(table) == ["victim", "method", "retain set", "seeds", *tables.RATES, "test images", "triggered"]
    found = shown(table, "cnn/badnets", "D3", "5 %")
    assert list(found)[3:] == [2, pytest.approx(86.2, abs=0.051), pytest.approx(2.6, abs=0.051), 85.0, 81.5, 1000, 900]
    assert shown(table, "cnn/badnets", "D3", "1 %")["ACC"] == 90
    victim = shown(table, "cnn/badnets", "victim")
    assert victim["ASR"] == 100.0 and pandas.isna(victim["seeds"])
    assert set(table["method"][:2]) == set(tables.UNTOUCHED) and len(table) == 5


def test_a_method_that_did_something_else_says_so(space, rows):
    assert shown(space["lines"](rows), "cnn/blended", "NC (fine-tuned, nothing was found)", "5 %")["seeds"] == 1


def test_what_a_seed_lacks_has_no_mean(space, rows):
    rows.loc[0, "pacc_after"] = None
    found = shown(space["lines"](rows), "cnn/badnets", "D3", "5 %")
    assert pandas.isna(found["PACC"]) and found["ACC"] > 86
    assert space["lines"](rows.drop(columns="pacc_after"))["PACC"].isna().all()  # a table of an earlier version


def test_untouched_models_stay_beside_what_is_chosen(space, rows):
    table, chosen = space["lines"](rows), space["chosen"]
    assert chosen(table, [], [], []).equals(table)
    assert list(chosen(table, ["cnn/badnets"], ["D3"], ["1 %"])["method"]) == ["victim", "D3"]
    assert list(chosen(table, ["cnn/blended"], ["D3"], [])["method"]) == ["twin without backdoor"]
    assert space["choices"](table) == [
        ["cnn/badnets", "cnn/blended"], ["D3", "NC (fine-tuned, nothing was found)"], ["5 %", "1 %"],
    ]  # fmt: skip


def test_the_page_says_how_much_is_behind_its_numbers(space, rows):
    said = space["evidence"](rows)
    assert "Seeds: 1 to 2 per line" in said and "Images: 1,000; 900 of them count" in said
    assert "by up to 3.3 points (95 %)" in said  # 1.96 * sqrt(0.25 / 900)
    assert "failed: 1;" in said and "not made: 7." in said
    assert "failed: 0;" in space["evidence"](rows[rows["error"].isna()].drop(columns=["error"]))


def test_victims_have_their_marker_and_methods_their_colour(space, rows):
    (axes,) = space["draw"](space["lines"](rows)).axes
    points = [part for part in axes.collections if len(part.get_offsets())]
    assert len(points) == 5 and "choose one to tell them apart" in axes.get_title()
    looks = {(to_hex(part.get_facecolor()[0]), part.get_paths()[0].vertices.tobytes()) for part in points}
    assert len(looks) == 4 and ("#000000" in {colour for colour, _ in looks})  # the two retain sets of D3 look alike
    assert [100.0, 91.2] in [part.get_offsets()[0].tolist() for part in points]
    labels = [text.get_text().strip() for text in axes.figure.legends[0].get_texts()]
    assert labels[:3] == ["victims", "cnn/badnets", "cnn/blended"] and labels[3:6] == ["methods", *tables.UNTOUCHED]


def test_more_than_can_be_told_apart_is_not_drawn(space):
    many = pandas.DataFrame([row(f"cnn/{number}", "D3", 0) for number in range(len(space["MARKERS"]) + 1)])
    (axes,) = space["draw"](space["lines"](many)).axes
    assert not axes.collections and "choose at most" in axes.get_title()
    (axes,) = space["draw"](space["lines"](many[1:])).axes
    assert axes.collections and not axes.get_title()


def test_the_committed_results_are_read(space):
    files = space["tables"]()
    there = {file.stem: file for file in (ROOT / "model_cards" / "results").glob("*.parquet")}
    assert files == {name: file for name, file in there.items() if name.startswith("vit")}
    assert {"zoo", "encoders_vit"} <= there.keys()  # tables of another kind
    for file in files.values():
        rows = pandas.read_parquet(file)
        table, (done, _) = space["lines"](rows), tables.split(rows)
        assert len(table) == len(done.fillna({"retain": ""}).groupby(["victim", "defence", "retain"]))
        one = done[done["defence"] == "D3"].iloc[0]
        found = shown(table, one["victim"], "D3", one["retain"])
        assert found["seeds"] > 1 or found["ASR"] == pytest.approx(100 * one["asr_after"], abs=0.0501)
        assert f"{int(done['accuracy_after_n'].max()):,}" in space["evidence"](rows)


def test_without_results_it_says_where_they_belong(space, tmp_path, monkeypatch):
    monkeypatch.setitem(space["tables"].__globals__, "FOLDERS", [tmp_path / "results", tmp_path])
    with pytest.raises(FileNotFoundError, match=r"put results.parquet of `d3-hf benchmark` into .*results"):
        space["tables"]()


def test_its_metadata_are_those_of_a_space_and_fit_its_requirements():
    _, head, text = (FOLDER / "README.md").read_text().split("---\n", 2)
    said = yaml.safe_load(head)
    known = SpaceCardData(**said)
    assert known.sdk == "gradio" and (FOLDER / known.app_file).is_file() and known.license == "apache-2.0"
    assert len(said["short_description"]) <= 60  # the Hub's limit
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {said["colorFrom"], said["colorTo"]} <= colours
    needed = (FOLDER / "requirements.txt").read_text().split()
    assert f"gradio=={known.sdk_version}" in needed
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", (FOLDER / "app.py").read_text(), re.M))
    imported -= set(sys.stdlib_module_names)
    assert imported == {re.split("[<>=]", line)[0] for line in needed}
    assert all(command in text for command in ("python recipes/space/app.py", "hf upload"))
