"""A zoo of tiny networks from end to end: stopped and gone on with, damaged and mended, and the same test as `check`'s."""

import json
import math
from pathlib import Path

import pandas
import pytest
import yaml
from places import RECIPES
from tiny_zoo import JUDGE, QUICK, make_zoo

from d3_hf.assurance.calibration import ALARM_AT, twins_needed
from d3_hf.assurance.head_rows import head_rows
from d3_hf.assurance.signals import SIGNALS
from d3_hf.attacks import ATTACKS
from d3_hf.benchmark.cells import CELL, Cell, cells_of
from d3_hf.benchmark.grid import read_grid
from d3_hf.commands.benchmark import run_zoo
from d3_hf.evaluation.measure import measure
from d3_hf.inspection.measured import read_measured
from d3_hf.inspection.suspicion import suspicion_of, weights_digest
from d3_hf.models.source import preprocessing_of
from d3_hf.options.arguments import DataArguments
from d3_hf.options.parser import parse_arguments
from d3_hf.victims.sets import KINDS, read_set
from d3_hf.victims.train import images_digest
from d3_hf.zoo import verdicts
from d3_hf.zoo.study import ZooGrid, ZooRunner, settings_of


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """The file of a zoo's grid, its models made."""
    return make_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Two signals that train nothing."""
    monkeypatch.setattr(ZooRunner, "signals", QUICK)


def runner_of(zoo):
    return ZooRunner(read_grid(str(zoo), ZooGrid))


def cell_files(zoo):
    return {file: file.stat().st_mtime_ns for file in (zoo.parent / "out" / "cells").rglob(CELL)}


def rows_of(zoo):
    return pandas.read_parquet(zoo.parent / "out" / "results.parquet").set_index("victim")


def test_a_zoo_that_is_stopped_goes_on_and_its_tables_follow_from_the_rows_alone(zoo, capsys):
    run_zoo([str(zoo), "--only", "zoo-judge/*", "--shard", "0/2"])
    first, shown = cell_files(zoo), capsys.readouterr().out
    assert len(first) == 2 and "3 of the grid's 5 cells are not made yet" in shown and "No p: there are no twins" in shown
    found = run_zoo([str(zoo)])
    files, shown = cell_files(zoo), capsys.readouterr().out
    assert len(files) == 5 and first.items() <= files.items()
    assert found.loc[found["half"] == "judge", "victim"].tolist() == [f"zoo-judge/{name}" for name in JUDGE]
    written = pandas.read_parquet(zoo.parent / "out" / "verdicts.parquet")
    assert written["p: all together"].tolist() == found["p: all together"].tolist()

    run_zoo([str(zoo)])
    assert cell_files(zoo) == files
    capsys.readouterr()
    run_zoo([str(zoo.parent / "out" / "results.parquet")])
    again = capsys.readouterr().out
    assert (zoo.parent / "out" / "results.md").read_text().strip() in again and "2 twins; suspects: " in again


def test_a_cell_is_what_check_reads_and_what_is_true(zoo):
    """The p of a verdict is that of `check`'s own function with the models of the other half as twins."""
    found = run_zoo([str(zoo)]).set_index("victim")
    runner = runner_of(zoo)
    images = DataArguments("digits", retain_count=60, max_test_images=80).load().test  # what check takes
    drawn, other = (runner.images(Cell("zoo-judge/twin-3", "80 images", "check", seed)) for seed in (0, 1))
    assert images_digest(drawn) == images_digest(images) != images_digest(other) and len(other) == 80
    for name in JUDGE:
        victim = f"zoo-judge/{name}"
        twins = (runner.inputs.model(f"zoo-calibrate/twin-{k}") for k in (1, 2))
        said, row = suspicion_of(runner.inputs.model(victim), images, twins, signals=QUICK), found.loc[victim]
        assert row["p: all together"] == said.p and row["alarm"] == said.verdict.alarm
        for signal, finding in said.findings.items():
            assert row[f"statistic: {signal}"] == finding.statistic and row[f"p: {signal}"] == said.p_values[signal]
            assert row[f"suspect: {signal}"] == finding.class_names[finding.suspect_class]
        assert row["beside: all together"] == said.class_beside_twins
    rows, model = rows_of(zoo), runner.inputs.model("zoo-judge/badnets-2")
    row = rows.loc["zoo-judge/badnets-2"]
    truth = measure(model, runner.inputs.test, preprocessing_of(model), runner.inputs.attack("zoo-judge/badnets-2"))
    assert (row["accuracy"], row["asr"]) == (truth.accuracy.value, truth.asr.value)
    assert (row["attack"], row["target"], row["poison_ratio"], row["half"]) == ("badnets", "4", 0.1, "judge")
    assert row["weights_sha256"] == weights_digest(model) and row["seconds_reading"] > 0
    assert all(facts["seconds"] > 0 for facts in json.loads(row["findings"]).values())
    assert rows.loc["zoo-judge/all_to_all-1", "target"] is None or pandas.isna(rows.loc["zoo-judge/all_to_all-1", "target"])
    twin = rows.loc["zoo-judge/twin-3"]
    assert pandas.isna(twin["attack"]) and math.isnan(twin["asr"])
    assert rows["half"].value_counts().to_dict() == {"calibrate": 2, "judge": 3}


def test_a_model_that_cannot_be_read_is_a_row_with_its_error_and_the_others_go_on(zoo, capsys):
    """Damaged weights, a damaged record, and a model that was not made; when it is whole again, it is read."""
    whole = run_zoo([str(zoo)])
    places = [Path(zoo.parent / "victims" / name) for name in ("zoo-judge/twin-3/model.safetensors", "zoo-judge/badnets-2")]
    weights, record = places[0].read_bytes(), (places[1] / "victim.json").read_text()
    away = zoo.parent / "victims" / "zoo-calibrate" / "twin-2"
    out = ["--output_dir", str(zoo.parent / "damaged")]
    try:
        places[0].write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
        (places[1] / "victim.json").write_text("[]")
        away.rename(away.with_name("gone"))
        run_zoo([str(zoo), *out])
        rows = pandas.read_parquet(zoo.parent / "damaged" / "results.parquet").set_index("victim")
        errors = rows["error"].dropna()
        assert set(errors.index) == {"zoo-judge/twin-3", "zoo-judge/badnets-2", "zoo-calibrate/twin-2"}
        assert "is not what victim.json says" in errors["zoo-judge/twin-3"]
        assert "no victim" in errors["zoo-calibrate/twin-2"] and "victim.json" in errors["zoo-judge/badnets-2"]
        assert "## Failed cells" in (zoo.parent / "damaged" / "results.md").read_text()
    finally:
        places[0].write_bytes(weights)
        (places[1] / "victim.json").write_text(record)
        away.with_name("gone").rename(away)
    mended = run_zoo([str(zoo), *out])
    assert mended["p: all together"].tolist() == whole["p: all together"].tolist()
    assert "error" not in pandas.read_parquet(zoo.parent / "damaged" / "results.parquet")


def test_images_that_are_not_there_are_no_models_fault(zoo):
    with pytest.raises(FileNotFoundError, match="absent"):
        run_zoo([str(zoo), "--dataset_name", "./absent", "--output_dir", str(zoo.parent / "absent")])


def test_a_signal_with_another_setting_or_another_set_of_signals_makes_cells_anew(zoo, monkeypatch):
    runner = runner_of(zoo)
    cell = cells_of(runner.grid)[0]
    before = runner.folder(cell)
    monkeypatch.setattr(ZooRunner, "signals", {"head_rows": head_rows})
    assert runner.folder(cell) != before
    monkeypatch.setattr(ZooRunner, "signals", {"head_rows": lambda model, images, steps=3: None})
    one = runner.folder(cell)
    monkeypatch.setattr(ZooRunner, "signals", {"head_rows": lambda model, images, steps=4, batch_size=7: None})
    assert len({before, one, runner.folder(cell)}) == 3
    assert settings_of(ZooRunner.signals) == {"head_rows": {"steps": 4}}
    assert settings_of(SIGNALS)["canary"].keys() == {"steps"} and settings_of(SIGNALS).keys() == SIGNALS.keys()


def test_the_rates_that_check_looks_up_are_written_beside_the_tables(zoo, monkeypatch):
    run_zoo([str(zoo)])
    assert read_measured(zoo.parent / "out" / "measured.json") == ()  # of two twins there are none
    monkeypatch.setattr(verdicts, "LEAST_ASR", 0.0)  # two steps plant nothing
    monkeypatch.setattr(verdicts, "twins_needed", lambda alarm_at: 2)
    run_zoo([str(zoo)])
    (rates,) = read_measured(zoo.parent / "out" / "measured.json")
    assert (rates.architecture, rates.classes, rates.twins, rates.images) == ("vit", 10, 2, 80)
    assert rates.signals == ("head_rows", "latent_shift") and (rates.backdoored, rates.trusted) == (2, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"victims": ["zoo-judge/twin-3"]}, "the models of a zoo are those of its set"),
        ({"defences": {"FT": {"defence": "fine_tuning"}}}, "none is purified"),
        ({"judge": "zoo-calibrate"}, "calibrate and judge must be two groups of .*; it has zoo-calibrate, zoo-judge, spare"),
        ({"judge": "absent"}, "calibrate and judge must be two groups"),
        ({"common": {"learning_rate": 0.1}}, "nothing is trained in a zoo"),
        ({"save_models": True}, "nothing is trained in a zoo"),
        ({"test_images": 79}, "a count of test images, at most test_images"),
        ({"retain": {"r": {"count": 30, "transform": {"Grayscale": {}}}}}, "a count of test images"),
        ({"set": "absent"}, "no set of victims absent"),
    ],
)
def test_a_wrong_zoo_is_refused(zoo, tmp_path, change, message):
    (tmp_path / "zoo.yaml").write_text(yaml.safe_dump(yaml.safe_load(zoo.read_text()) | change))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_grid(str(tmp_path / "zoo.yaml"), ZooGrid)


def test_the_table_of_a_benchmark_is_none_of_a_zoo(tmp_path):
    pandas.DataFrame([{"victim": "v", "retain": "30", "defence": "FT"}]).to_parquet(tmp_path / "results.parquet")
    with pytest.raises(ValueError, match="holds the table of another kind of run"):
        run_zoo([str(tmp_path / "results.parquet")])


def test_the_shipped_zoo_is_what_its_grid_needs():
    """Two halves of the same schedules, enough twins for an alarm, no seed twice, all kinds of backdoors in the judging one."""
    grid = read_grid(str(RECIPES / "grids" / "zoo.yaml"), ZooGrid)
    victims = read_set(str(RECIPES / "zoo.yaml"))
    assert list(victims) == grid.victims == list(dict.fromkeys(grid.victims)) and len(cells_of(grid)) == len(victims)
    kinds, schedules, planted = {}, {}, {}
    for name, options in victims.items():
        _, data, attack, victim, args = parse_arguments(KINDS, [], options | {"output_dir": name})
        half, kind = grid.half_of(name), name.rpartition("/")[2].rpartition("-")[0]
        assert data.retain_count == grid.held_out and (attack.load() is None) == (kind == "twin")
        kinds.setdefault(half, []).append(kind)
        planted.setdefault(half, []).append(attack.load())
        schedule = (args.learning_rate, args.crop_padding, args.per_device_train_batch_size)
        schedules.setdefault((half, kind == "twin"), set()).add(schedule)
        assert attack.load() is None or attack.load().target_label < len(options["class_names"])
        if attack.load() and attack.load().clean_label:  # a class has not exactly its share of the images
            assert victim.poison_ratio <= 0.9 / len(options["class_names"])
    seeds = [options["seed"] for options in victims.values()]
    assert len(set(seeds)) == len(seeds)
    assert kinds["calibrate"].count("twin") == 32 >= twins_needed(ALARM_AT) and kinds["judge"].count("twin") == 8
    assert set(kinds["judge"]) == set(kinds["calibrate"]) | {"sam"}  # hardened ones came later
    assert len(kinds["judge"]) == 29 and len(kinds["calibrate"]) == 48
    assert len(set(map(frozenset, schedules.values()))) == 1
    wanted = {"badnets", "blended", "wanet", "lf", "sig", "input_aware", "ssba_lite", "lc_lite"}
    assert {attack.name for attack in planted["judge"] if attack} == wanted <= ATTACKS.keys()
    assert len({attack.target_label for attack in planted["judge"] if attack}) == 10
