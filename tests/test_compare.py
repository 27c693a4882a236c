"""The comparison grid: cells are made once, the twin gives the floor, the table follows from the files alone."""

import importlib.util
import json
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "recipes" / "compare.py"
FAST = {"max_steps": 2, "disable_tqdm": True, "use_cpu": True}


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def comparison(compare, tmp_path_factory):
    grid = compare.Grid(
        output_dir=str(tmp_path_factory.mktemp("grid")),
        dataset_name="digits",
        attacks={"badnets": {"attack": {"name": "badnets"}, "poison_ratio": 0.1}},
        defences={"D3": {"defence": "d3"}, "FT-init": {"defence": "fine_tuning", "reinitialize_head": True}},
        model={
            "architecture": "vit",
            "model_args": {"patch_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
            "image_size": 32,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        seeds=[0, 1],
        retain_count=30,
        test_images=40,
        victim=FAST,
        common=FAST,
    )
    found = compare.Comparison(grid)
    found.floor()
    for defence in grid.defences:
        found.cell("badnets", 0, defence)
    return found


def test_a_cell_holds_what_was_measured(comparison):
    row = json.loads((comparison.folder / "cells" / "badnets-0-D3.json").read_text())
    assert (row["attack"], row["seed"], row["defence"], row["accuracy_after_n"]) == ("badnets", 0, "D3", 40)
    assert row["arguments"]["lambda_clean"] > 0 and row["distance"] is None  # two steps are no logging step


def test_what_exists_is_not_made_again(comparison):
    times = {file: file.stat().st_mtime_ns for file in comparison.folder.rglob("*") if file.is_file()}
    comparison.floor()
    for defence in comparison.grid.defences:
        comparison.cell("badnets", 0, defence)
    assert {file: file.stat().st_mtime_ns for file in comparison.folder.rglob("*") if file.is_file()} == times


def test_no_victim_has_seen_a_retain_set(comparison):
    planted = json.loads((comparison.folder / "victims" / "badnets" / "victim.json").read_text())["planted"]
    drawn = {row for seed in (0, 1) for row in comparison.retain(seed)["index"]}
    assert not drawn & set(planted["poisoned_rows"]) and not drawn & set(comparison.seen["index"])


def test_table_has_victim_floor_and_defences(comparison):
    lines = comparison.table().splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["victim", "twin without backdoor", "D3", "FT-init"]


def test_a_grid_over_victims_that_exist(compare, comparison, tmp_path):
    grid = compare.Grid(
        output_dir=str(tmp_path),
        dataset_name="digits",
        victims=str(comparison.folder / "victims"),
        attacks=["badnets"],
        defences={"FT": {"defence": "fine_tuning"}},
        seeds=[0, 1],
        retain_count=30,
        test_images=40,
        common=FAST,
    )
    found = compare.Comparison(grid)
    assert found.attacks == comparison.attacks
    found.cell("badnets", 0, "FT")
    row = json.loads((tmp_path / "cells" / "badnets-0-FT.json").read_text())
    first = json.loads((comparison.folder / "cells" / "badnets-0-D3.json").read_text())
    assert row["asr_before"] == first["asr_before"] and row["accuracy_after_n"] == 40
