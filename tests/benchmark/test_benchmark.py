"""The benchmark: cells are independent, a damaged or failed one is made again, tables follow from results.parquet alone."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pandas
import pytest
import torch
import yaml
from tiny import tiny_resnet

from d3_hf.benchmark import draw, read_grid, render, run_grid
from d3_hf.benchmark.cells import CELL, Runner, cells_of
from d3_hf.benchmark.grid import GridInputs
from d3_hf.benchmark.meters import PassMeter, peak_memory, reset_peak_memory
from d3_hf.benchmark.retain import RetainSet
from d3_hf.benchmark.tables import interval, remarks, times
from d3_hf.commands.benchmark import run_benchmark as main
from d3_hf.data.images import RawImages
from d3_hf.data.preprocessing import Preprocessing
from d3_hf.defenses.d3.trainer import D3Config
from d3_hf.evaluation.measure import measure
from d3_hf.models import load_classifier


@pytest.fixture(scope="module")
def rows(grid):
    return run_grid(grid)


def files(grid):
    return {file: file.stat().st_mtime_ns for file in Path(grid.output_dir, "cells").rglob("*") if file.is_file()}


def test_a_row_holds_rates_costs_and_how_they_came_about(rows):
    row = rows[(rows["defence"] == "D3") & (rows["victim"] == "vit/badnets") & (rows["seed"] == 1)].iloc[0]
    assert (row["method"], row["attack"], row["network"], row["accuracy_after_n"]) == ("D3", "badnets", "vit", 40)
    assert row["asr_after_ci95"][0] <= row["asr_after"] <= row["asr_after_ci95"][1]
    assert row["accuracy_drop"] == pytest.approx(row["accuracy_before"] - row["accuracy_after"])
    assert (row["pacc_after_n"], row["trigger_drift_after_n"]) == (40, row["asr_after_n"]) and row["trigger_drift_after"] > 0
    assert (row["retain_n"], row["forward_images"], row["backward_images"]) == (30, 30, 30)  # one epoch of one pass each
    assert row["seconds_training"] > 0 and row["peak_memory_mib"] > 100 and row["hardware"] and row["version_torch"]
    assert json.loads(row["arguments"])["lambda_clean"] == 4


def test_passes_through_a_teacher_are_counted(grid):
    distilled = {"FT distilled": {"defence": "fine_tuning", "distillation": 1.0}}
    grid = replace(grid, defences=distilled, victims=grid.victims[:1], seeds=[0])
    row = Runner(grid).make(cells_of(grid)[0])
    assert (row["forward_images"], row["backward_images"]) == (60, 30)


def test_asr_is_watched_and_nothing_else_changes(grid, rows):
    watching = replace(grid, victims=grid.victims[:1], seeds=[0], watch_images=20, common=grid.common | {"num_train_epochs": 2})
    plain = replace(watching, watch_images=None)
    for cell in cells_of(watching):
        if cell.defence == "RNP":
            continue
        watched, unwatched = Runner(watching).make(cell), Runner(plain).make(cell)
        series = json.loads(watched.pop("asr_over_time"))
        assert len(series) == 3 and [seconds for seconds, _ in series] == sorted(seconds for seconds, _ in series)
        assert all(0 <= asr <= 1 for _, asr in series) and series[-1] == [watched["seconds_training"], watched["asr_after"]]
        assert _lasting(watched) == _lasting(unwatched)


def _lasting(row):
    return {key: value for key, value in row.items() if not key.startswith(("seconds", "peak", "arguments"))}


def test_the_time_table_says_when_asr_fell_first_and_for_good():
    series = json.dumps([(10.0, 0.009), (20.0, 0.2), (30.0, 0.015), (41.6, 0.012)])
    rows = pandas.DataFrame([{"victim": "v", "defence": "D3", "seed": 0, "asr_over_time": series}])
    assert times(rows).splitlines()[-1] == "| v | D3 | 0 | 10 / never | 10 / 30 | 42 | 0.9 |"


def test_a_method_says_where_it_did_something_else(rows):
    done = rows[rows["defence"] != "RNP"].assign(method="Neural Cleanse")
    assert remarks(done) == []
    done.loc[done.index[0], "method"] = "Neural Cleanse (no class flagged)"
    line = f"{done['defence'].iloc[0]} on {done['victim'].iloc[0]}, seed 0: Neural Cleanse (no class flagged)"
    assert remarks(done) == [line] and line.replace("vit/", "") in render(done)


@pytest.mark.slow
def test_curves_are_not_watched(grid, rows):
    """TSC: while a curve is trained the parameters are no classifier."""
    options = {"defence": "tsc", "rounds": 2, "curve_epochs": 1, "finetune_epochs": 1, "per_device_train_batch_size": 15}
    common = {name: value for name, value in grid.common.items() if name != "num_train_epochs"}
    watching = replace(grid, victims=grid.victims[:1], seeds=[0], watch_images=20, common=common, defences={"TSC": options})
    row = Runner(watching).make(cells_of(watching)[0])
    assert len(json.loads(row["asr_over_time"])) == 2  # the fine-tuning's epoch of five, and the end


def test_a_method_that_refuses_is_recorded_and_the_rest_goes_on(grid, rows):
    failed = rows[rows["error"].notna()]
    assert set(failed["defence"]) == {"RNP"} and len(failed) == 4
    assert failed["error"].str.contains("BatchNorm").all()
    assert len(rows[rows["defence"] == "FT"]) == 4
    runner = Runner(grid)
    cell = next(cell for cell in cells_of(grid) if cell.defence == "RNP")
    assert "Traceback" in json.loads((runner.folder(cell) / CELL).read_text())["traceback"]


def test_what_exists_is_not_made_again(grid, rows):
    before = {file: time for file, time in files(grid).items() if "RNP" not in str(file)}
    again = run_grid(grid)
    assert {file: time for file, time in files(grid).items() if "RNP" not in str(file)} == before
    pandas.testing.assert_frame_equal(again, rows)


@pytest.mark.parametrize("damage", ["truncated", "altered", "of another kind", "gone"])
def test_a_damaged_cell_is_made_again_with_the_same_result(grid, rows, damage):
    runner, cell = Runner(grid), cells_of(grid)[0]
    file, row = runner.folder(cell) / CELL, runner.read(cell)
    if damage == "truncated":
        file.write_text(file.read_text()[:200])
    elif damage == "altered":
        content = json.loads(file.read_text())
        content["row"]["asr_after"] += 0.01
        file.write_text(json.dumps(content))
    elif damage == "of another kind":
        file.write_text("[]")
    else:
        file.unlink()
    assert runner.read(cell) is None
    run_grid(grid, only=[str(cell).replace("[", "[[]")])
    again = runner.read(cell)
    assert {key: again[key] for key in row if not key.startswith(("seconds", "peak"))} == {
        key: row[key] for key in row if not key.startswith(("seconds", "peak"))
    }


def test_a_changed_grid_makes_new_cells_beside_the_old(grid, rows):
    changed = replace(grid, common=grid.common | {"learning_rate": 0.2})
    folders = set(map(Runner(grid).folder, cells_of(grid)))
    assert not folders & set(map(Runner(changed).folder, cells_of(changed)))
    assert set(map(Runner(replace(grid, output_dir=grid.output_dir)).folder, cells_of(grid))) == folders


def test_a_changed_default_makes_new_cells_beside_the_old(grid, monkeypatch):
    cell = cells_of(grid)[0]
    before = Runner(grid).folder(cell)
    monkeypatch.setattr(D3Config.__dataclass_fields__["lambda_clean"], "default", 5.0)
    assert Runner(grid).folder(cell) != before


def test_a_damaged_measurement_of_a_victim_is_made_again(grid, rows):
    whole = run_grid(grid, only=["* | FT | 0"])
    for file, text in zip(sorted(Path(grid.output_dir, "before").iterdir()), ("", "{}", "[1]"), strict=False):
        file.write_text(text)
    pandas.testing.assert_frame_equal(run_grid(grid, only=["* | FT | 0"]), whole)


def test_a_purified_model_may_be_kept_and_is_the_one_that_was_measured(grid, rows):
    keeping = replace(grid, save_models=True, output_dir=f"{grid.output_dir}-kept")
    cell = cells_of(grid)[0]
    run_grid(keeping, only=[str(cell)])
    model = load_classifier(str(Runner(keeping).folder(cell)))
    found = measure(model, GridInputs(grid).test, Preprocessing.from_processor(model.image_processor))
    assert found.accuracy.value == Runner(grid).read(cell)["accuracy_after"]
    (Runner(keeping).folder(cell) / "model.safetensors").write_bytes(b"damaged")
    assert Runner(keeping).read(cell) is None and Runner(replace(keeping, save_models=False)).read(cell)


@pytest.mark.parametrize("shares", [1, 2, 5, 20])
def test_shards_partition_the_grid(grid, shares):
    parts = [cells_of(grid, f"{share}/{shares}") for share in range(shares)]
    assert sorted(map(str, sum(parts, []))) == sorted(map(str, cells_of(grid)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.slow
def test_a_grid_goes_on_after_a_kill(grid, tmp_path):
    """Killed in the middle of the second cell; what is whole stays, the rest is made."""
    content = {"output_dir": str(tmp_path), "victims": grid.victims, "victims_dir": grid.victims_dir, "held_out": 60}
    content |= {"dataset_name": "digits", "test_images": 40, "retain": grid.retain, "common": grid.common, "seeds": [0]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content | {"defences": {"FT": {"defence": "fine_tuning"}}}))
    code = f"""
import os, signal, sys
from d3_hf.benchmark import cells
make = cells.Runner.purify
made = []
def killed(self, cell):
    if made: os.kill(os.getpid(), signal.SIGKILL)
    made.append(cell)
    return make(self, cell)
cells.Runner.purify = killed
cells.run_grid(cells.Grid(**__import__("yaml").safe_load(open({str(tmp_path / "grid.yaml")!r}))))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    whole = list(tmp_path.rglob(CELL))
    assert len(whole) == 1 and not (tmp_path / "results.parquet").exists()
    times = {file: file.stat().st_mtime_ns for file in whole}
    rows = main([str(tmp_path / "grid.yaml")])
    assert len(rows[rows["defence"] == "FT"]) == 2 and {f: f.stat().st_mtime_ns for f in whole} == times


def test_tables_and_plots_follow_from_the_parquet_file_alone(grid, rows, tmp_path):
    frame = run_grid(grid)
    shutil.copy(Path(grid.output_dir) / "results.parquet", tmp_path)
    main([str(tmp_path / "results.parquet")])
    assert (tmp_path / "results.md").read_text() == render(frame) + "\n"
    assert [file.name for file in draw(frame, tmp_path)] == ["acc_asr_vit_30.png", "time_asr_vit_30.png"]


def test_a_table_says_how_many_cells_it_lacks(grid, tmp_path, capsys):
    """Whichever share wrote it, and when it is drawn from the parquet file again."""
    part = replace(grid, output_dir=str(tmp_path), defences={"FT": {"defence": "fine_tuning"}})
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(asdict(part)))
    for share, missing in (("0/4", 3), ("2/4", 2)):
        rows = main([str(tmp_path / "grid.yaml"), "--shard", share])
        assert set(rows["missing_cells"]) == {missing} and sum(rows["defence"] == "FT") == 4 - missing
        assert f"{missing} of the grid's 4 cells are not made yet" in capsys.readouterr().out
        written = (tmp_path / "results.md").read_text()
        assert written.startswith(f"**Missing cells of the grid: {missing}**")
        main([str(tmp_path / "results.parquet")])
        assert (tmp_path / "results.md").read_text() == written and written.strip() in capsys.readouterr().out
    rows = main([str(tmp_path / "grid.yaml")])
    assert set(rows["missing_cells"]) == {0} and "issing" not in (tmp_path / "results.md").read_text()
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith(".")) == []


@pytest.mark.parametrize(
    ("writer", "name"),
    [
        ("pandas.DataFrame.to_parquet", "results.parquet"),
        ("pathlib.Path.write_text", "results.md"),
        ("matplotlib.figure.Figure.savefig", "acc_asr_vit_30.png"),
    ],
)
def test_what_cannot_be_written_leaves_the_old_file(grid, rows, tmp_path, monkeypatch, writer, name):
    def half(self, file, *args, **kwargs):
        Path(file if name != "results.md" else self).write_bytes(b"half")
        raise OSError("No space left on device")

    shutil.copytree(grid.output_dir, tmp_path, dirs_exist_ok=True)
    main([str(tmp_path / "results.parquet")])
    before, there = (tmp_path / name).read_bytes(), set(tmp_path.iterdir())
    monkeypatch.setattr(writer, half)
    with pytest.raises(OSError, match="No space left"):
        if name == "results.parquet":
            run_grid(replace(grid, output_dir=str(tmp_path)), only=["* | FT | 0"])
        else:
            main([str(tmp_path / "results.parquet")])
    assert (tmp_path / name).read_bytes() == before and set(tmp_path.iterdir()) == there


def test_many_curves_have_a_figure(rows, tmp_path):
    one = rows[rows["defence"] == "FT"]
    many = pandas.concat([one.assign(defence=f"D3 lambda {n}", curve=f"curve {n}") for n in range(16)])
    assert [file.is_file() for file in draw(many, tmp_path)] == [True, True]


def test_retain_sets_of_like_names_do_not_share_a_figure(rows, tmp_path):
    one = rows[rows["defence"] == "FT"]
    files = draw(pandas.concat([one.assign(retain="5 %"), one.assign(retain="5")]), tmp_path)
    assert len(set(files)) == 4 and all(file.is_file() for file in files)


def test_the_table_has_victim_and_floor_first_average_and_worst_last(rows):
    lines = [line.split(" | ") for line in render(rows).splitlines() if line.startswith("| ")]
    overview = lines[:5]
    assert [line[0] for line in overview] == ["| ACC / ASR / RA / PACC", "| ---", "| victim", "| twin without backdoor", "| D3"]
    done = rows[rows["error"].isna() & (rows["defence"] == "D3")]
    means = 100 * done.groupby("victim")[["accuracy_after", "asr_after", "ra_after", "pacc_after"]].mean()
    assert overview[4][-2] == " / ".join(f"{value:.1f}" for value in means.mean())
    worst = [done["accuracy_after"].min(), done["asr_after"].max(), done["ra_after"].min(), done["pacc_after"].min()]
    assert overview[4][-1].rstrip(" |") == " / ".join(f"{100 * value:.1f}" for value in worst)
    assert "## Failed cells" in render(rows)


def test_an_empty_share_has_nothing_to_show(tmp_path):
    assert render(pandas.DataFrame([])) == "No cell was made." and draw(pandas.DataFrame([]), tmp_path) == []


def test_a_grid_in_which_everything_failed_has_a_table_of_errors_alone(rows, tmp_path):
    failed = rows[rows["error"].notna()]
    assert render(failed).startswith("## Failed cells") and draw(failed, tmp_path) == []


def test_interval_is_students():
    values = pandas.Series([1.0, 2.0, 4.0])
    half = 4.302652729911275 * math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2 / 3)  # t of two degrees, 97.5 %
    assert interval(values) == f"2.3 ± {half:.1f}"
    assert interval(values[:1]) == "1.0"


def test_a_retain_set_may_be_changed_images(grid):
    held_out = GridInputs(grid).held_out
    plain = RawImages.from_dataset(RetainSet(count=20).draw(held_out, 0))
    blurred = RetainSet(count=20, transform={"GaussianBlur": {"kernel_size": 3, "sigma": 1.0}}).draw(held_out, 0)
    assert torch.equal(plain.labels, blurred.labels) and torch.equal(plain.index, blurred.index)
    assert blurred.images.float().std() < plain.images.float().std()
    noisy = RetainSet(transform={"ColorJitter": {"brightness": 0.5}})
    assert torch.equal(noisy.draw(held_out, 1).images, noisy.draw(held_out, 1).images)
    assert not torch.equal(noisy.draw(held_out, 1).images, noisy.draw(held_out, 2).images)


def test_a_retain_set_may_be_other_data(grid):
    held_out = GridInputs(grid).held_out
    other = RetainSet(dataset_name="digits", classes={"3": "5", "1": "7"}, count=25).draw(held_out, 0)
    assert len(other) == 25 and set(other.labels.tolist()) == {5, 7}
    with pytest.raises(ValueError, match="neither data set has: cat"):
        RetainSet(dataset_name="digits", classes={"3": "cat"}).draw(held_out, 0)


def test_passes_count_the_copies_too():
    import copy

    model, meter, images = tiny_resnet(), PassMeter(), torch.rand(4, 3, 16, 16)
    with meter.counting(model):
        model(images).logits.sum().backward()
        copy.deepcopy(model)(images[:2])
        with torch.no_grad():
            model(images)
    model(images)
    assert (meter.forward, meter.backward) == (10, 4) and not model._forward_hooks


def test_peak_memory_is_that_of_what_ran_since():
    torch.zeros(200 * 2**18)  # 200 MiB
    reset_peak_memory()
    low = peak_memory()
    block = torch.ones(200 * 2**18)
    assert peak_memory() - low > 150
    del block


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seeds": []}, "the grid has no seeds"),
        ({"victims": []}, "the grid has no victims"),
        ({"watch_images": 0}, "watch_images must be at least 1"),
        ({"test_images": 0}, "test_images must be at least 1"),
        ({"defences": {"victim": {"defence": "d3"}}}, "a defence cannot be called 'victim'"),
        ({"defences": {"x": {"defence": "magic"}}}, "unknown defence 'magic'"),
        ({"defences": {"x": {"defence": "d3", "lamda": 1}}}, "defence 'x': D3Config has no option lamda"),
        ({"retain": {"x": {"number": 1}}}, "retain set 'x' has no option number"),
        ({"retain": {500: {"count": 500}}}, "the name of retain set 500 must be text: put it in quotes"),
        ({"retain": {"x": 30}}, "retain set 'x' must be a mapping of options to values; got 30"),
        ({"defences": {"x": "d3"}}, "defence 'x' must be a mapping of options to values; got 'd3'"),
        ({"victims": {"x": "me/model"}}, "victim 'x' must be a mapping of options to values"),
        ({"victims": {"x": {"attack": {}}}}, "victim 'x' has no model_name_or_path"),
        ({"victims": {"x": {"model_name_or_path": "y", "attack": {}, "arch": 1}}}, "victim 'x' has no option arch"),
        ({"retain": {"x": {"classes": {"3": "5"}}}}, "needs both dataset_name and classes"),
        ({"retain": {"x": {"count": 61}}}, "count 61 is more than held_out, 60"),
        ({"retain": {"x": {"count": 21}}, "retain_from_test": 20}, "count 21 is more than retain_from_test, 20"),
    ],
)
def test_a_wrong_grid_is_refused(grid, change, message):
    with pytest.raises(ValueError, match=message):
        replace(grid, **change)


@pytest.mark.parametrize(
    "content, message",
    [({"victim": []}, "unknown key victim"), ({"output_dir": "x"}, "dataset_name, victims, defences missing")],
)
def test_a_wrong_grid_file_is_refused(tmp_path, content, message):
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        read_grid(str(tmp_path / "grid.yaml"))


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "-1/2", "0/0"])
def test_a_wrong_shard_is_refused(grid, shard):
    with pytest.raises(ValueError, match="shard must be i/n"):
        cells_of(grid, shard)


def test_a_pattern_that_matches_nothing_is_refused(grid):
    with pytest.raises(ValueError, match="matches no cell"):
        cells_of(grid, only=["nothing"])


def test_a_missing_victim_is_named(grid):
    with pytest.raises(FileNotFoundError, match="make it first with d3-hf victim --set"):
        run_grid(replace(grid, victims=["vit/wanet"]))
