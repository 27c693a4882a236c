"""Victims of a zoo read before and after they are purified: as `check` reads them, beside the twins of the zoo's study."""

import pandas
import pytest
from tiny_zoo import QUICK, make_zoo

from d3_hf.benchmark.cells import CELL, Cell, cells_of
from d3_hf.benchmark.grid import read_grid
from d3_hf.commands.benchmark import run_after, run_zoo
from d3_hf.inspection.suspicion import suspicion_of
from d3_hf.models import load_classifier
from d3_hf.zoo.after import AfterGrid, AfterRunner
from d3_hf.zoo.after_tables import LEGEND, render_after, table
from d3_hf.zoo.study import ZooRunner

VICTIM = "zoo-judge/badnets-2"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ZooRunner, "signals", QUICK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("after")
    make_zoo(folder)
    return folder


def grid_of(folder, **options):
    own = {"output_dir": str(folder / "after"), "dataset_name": "digits", "victims_dir": str(folder / "victims")}
    own |= {"held_out": 60, "seeds": [0], "test_images": 40, "victims": [VICTIM], "retain": {"30": {"count": 30}}}
    own |= {"defences": {"FT": {"defence": "fine_tuning", "max_steps": 2, "use_cpu": True}}}
    return AfterGrid(**own | {"zoo": str(folder / "zoo.yaml"), "images": "80 images"} | options)


def test_a_study_without_its_zoo_or_with_a_part_of_it_says_what_to_run(folder):
    with pytest.raises(
        FileNotFoundError, match="2 of 2 models of zoo-calibrate, 80 images, seed 0, were not read in .*out: run"
    ):
        AfterRunner(grid_of(folder)).null(0)
    run_zoo([str(folder / "zoo.yaml"), "--only", "zoo-calibrate/twin-1 *", "zoo-judge/*"])
    with pytest.raises(
        FileNotFoundError, match="1 of 2 models of zoo-calibrate.*run recipes/assurance_study.py with .*zoo.yaml"
    ):
        AfterRunner(grid_of(folder)).null(0)


def test_both_models_are_read_as_check_reads_them(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("d3_hf.zoo.after.ALARM_AT", 1 / 3)  # which two twins can give
    run_zoo([str(folder / "zoo.yaml")])
    runner = AfterRunner(grid_of(folder))
    (cell,) = cells_of(runner.grid)
    row = runner.make(cell)
    assert "error" not in row, row
    zoo = ZooRunner(runner.grid.zoo_grid)
    images = zoo.images(Cell(VICTIM, "80 images", "check", 0))
    twins = [zoo.inputs.model(f"zoo-calibrate/twin-{k}") for k in (1, 2)]
    models = {"before": zoo.inputs.model(VICTIM), "after": load_classifier(str(runner.folder(cell)))}
    for when, model in models.items():
        found = suspicion_of(model, images, twins, alarm_at=1 / 3, signals=QUICK)
        assert (row[f"p_{when}"], row[f"beside_{when}"]) == (found.p, found.class_beside_twins)
        assert row[f"alarm_{when}"] is found.verdict.alarm is (found.p <= 1 / 3)
        assert row[f"farthest_{when}"] == found.class_z.sum(0).max()
    assert row["target"] == "4" and row["signals"] == '["head_rows", "latent_shift"]'
    before = (runner.folder(cell) / CELL).stat().st_mtime_ns
    zoo_rows = pandas.read_parquet(folder / "out" / "results.parquet")
    assert runner.read(cell) == row and len(zoo_rows) == 5

    rows = pandas.DataFrame([row])
    rows.to_parquet(tmp_path / "results.parquet")
    run_after([str(tmp_path / "results.parquet")])
    assert render_after(rows) in capsys.readouterr().out and (runner.folder(cell) / CELL).stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="name the results.parquet that a study of what check says afterwards wrote"):
        run_after([str(folder / "out" / "results.parquet")])


def test_both_are_judged_by_the_signals_that_can_be_read_on_both(folder, monkeypatch):
    run_zoo([str(folder / "zoo.yaml")])
    runner = AfterRunner(grid_of(folder, defences={"FT": {"defence": "fine_tuning", "max_steps": 3, "use_cpu": True}}))
    (cell,) = cells_of(runner.grid)
    said = AfterRunner._said

    def half_read(self, cell, images, model):
        found = said(self, cell, images, model)
        if model is not self.inputs.model(cell.victim):
            found.findings["latent_shift"] = "it diverged"
        return found

    monkeypatch.setattr(AfterRunner, "_said", half_read)
    row = runner.make(cell)
    zoo = runner.zoo
    images, twins = zoo.images(Cell(VICTIM, "80 images", "check", 0)), runner.null(0)
    alone = suspicion_of(zoo.inputs.model(VICTIM), images, null=twins, signals={"head_rows": QUICK["head_rows"]})
    assert row["signals"] == '["head_rows"]' and row["farthest_before"] == alone.class_z.sum(0).max()


def made_up(victim, asr, before, after, **more):
    row = {"victim": victim, "defence": "D3", "retain": "r", "accuracy_before": 0.9, "accuracy_after": 0.88}
    row |= {"asr_before": 0.95, "asr_after": asr, "target": "cat"}
    for when, (alarm, beside) in (("before", before), ("after", after)):
        row |= {
            f"alarm_{when}": alarm,
            f"beside_{when}": beside,
            f"farthest_{when}": 9.04,
            f"p_{when}": 0.03 if alarm else 0.5,
        }
    return row | more


def test_alarms_that_are_gone_are_counted_apart_from_those_that_were_none():
    rows = pandas.DataFrame(
        [
            made_up("a", 0.01, (True, "cat"), (False, "cat")),  # gone
            made_up("b", 0.02, (True, "cat"), (True, "dog")),  # gone, since another class raises it
            made_up("c", 0.03, (True, "cat"), (True, "cat")),  # still there
            made_up("d", 0.60, (True, "cat"), (False, "dog")),  # gone, though the backdoor is not
            made_up("e", 0.01, (False, "cat"), (False, "cat")),  # never raised
            made_up("f", 0.01, (True, "cat"), (True, "dog"), target=None),  # of many targets one stands out after another
            made_up("g", 0.01, (True, "cat"), (False, "cat"), asr_before=0.19),  # there was no backdoor
            made_up("h", 0.20, (True, "cat"), (False, "cat"), asr_before=0.20),  # still works as often as counts as planted
        ]
    )
    shown = table(rows)
    assert "| a | D3 | 90.0 -> 88.0 | 95.0 -> 1.0 | cat, 9.0 (0.03) | cat, 9.0 (0.50) | yes |" in shown
    lines = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[-1] for line in shown.splitlines()}
    expected = ["yes", "yes", "no", "yes", "no alarm before", "no", "planted in vain", "yes"]
    assert [lines[name] for name in "abcdefgh"] == expected
    assert "D3, alarms before, ASR below 20 afterwards: gone in 2 of 4 [" in shown
    assert "D3, alarms before, ASR at least 20 afterwards: gone in 2 of 2 [" in shown
    assert LEGEND in render_after(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "90 images"}, "images and seeds must be some of .*, which has 80 images; seeds 0"),
        ({"seeds": [0, 1]}, "images and seeds must be some of"),
        ({"save_models": False}, "purified models are read, and so kept"),
    ],
)
def test_a_wrong_grid_is_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        grid_of(folder, **options)


def test_a_grid_file_is_read(folder, tmp_path):
    (tmp_path / "after.yaml").write_text(
        f"{{output_dir: out, dataset_name: digits, victims: [{VICTIM}], zoo: {folder / 'zoo.yaml'}, images: 80 images, "
        "seeds: [0], retain: {a: {count: 9}}, defences: {FT: {defence: fine_tuning}}}"
    )
    assert read_grid(str(tmp_path / "after.yaml"), AfterGrid).zoo_grid.victims[0] == "zoo-calibrate/twin-1"
