"""A grid whose purified models relearn: its curves are those of `relearn` on its own models, its table, what it refuses."""

import json

import pytest

from d3_hf.benchmark import Grid
from d3_hf.benchmark.cells import cells_of, run_grid
from d3_hf.benchmark.relearning import Curve, area, relearn
from d3_hf.benchmark.relearning_study import RelearningGrid, RelearningRunner
from d3_hf.benchmark.relearning_tables import render_relearning
from d3_hf.commands.benchmark import run_relearning
from d3_hf.models import load_classifier

SHORT = {"poisoned": [1, 4], "steps": [1, 2], "tuning_seeds": [0, 1], "tuning_images": 20, "tuning": {"use_cpu": True}}


def relearning(grid: Grid, folder, **options) -> RelearningGrid:
    plain = {
        name: getattr(grid, name) for name in ("dataset_name", "victims_dir", "held_out", "test_images", "common", "retain")
    }
    own = {"output_dir": str(folder), "victims": ["vit/badnets"], "defences": {"FT": {"defence": "fine_tuning"}}, "seeds": [0]}
    return RelearningGrid(**plain | own | SHORT | options)


@pytest.fixture(scope="module")
def made(grid, tmp_path_factory):
    runner = RelearningRunner(relearning(grid, tmp_path_factory.mktemp("relearning")))
    return runner, run_grid(runner.grid, runner_class=RelearningRunner)


def test_curves_are_those_of_relearn_on_the_purified_model_and_on_the_twin(made):
    runner, rows = made
    (cell,) = cells_of(runner.grid)
    row = rows[rows["defence"] == "FT"].iloc[0]
    arguments = runner.inputs.attack(cell.victim), runner._tuning_images(cell), runner.inputs.test
    purified = load_classifier(str(runner.folder(cell)))
    for column, model in (("curves", purified), ("twin_curves", runner.inputs.model("vit/twin"))):
        wanted = relearn(model, *arguments, poisoned=[1, 4], steps=[1, 2], seeds=[0, 1], use_cpu=True)
        assert json.loads(row[column]) == json.loads(json.dumps([vars(curve) for curve in wanted]))
    assert json.loads(row["curves"])[0]["asr"][0] == row["asr_after"]


def test_what_is_tuned_on_is_seen_by_nobody_else(made):
    runner, _ = made
    (cell,) = cells_of(runner.grid)
    tuned, retain = runner._tuning_images(cell), runner.inputs.retain(cell.retain, cell.seed)
    assert len(tuned) == 20 and not set(tuned.index.tolist()) & set(retain["index"])
    assert set(tuned.index.tolist()) <= set(runner.inputs.held_out["index"])


def test_the_table_is_the_means_of_the_curves(made, capsys):
    runner, rows = made
    table = render_relearning(rows)
    row = rows[rows["defence"] == "FT"].iloc[0]
    ours, theirs = ([Curve(**curve) for curve in json.loads(row[name])] for name in ("curves", "twin_curves"))
    four = [2, 3]  # of two numbers of images and two seeds
    gap = sum(area(ours[i].steps, ours[i].asr) - area(theirs[i].steps, theirs[i].asr) for i in four) / 2
    ends = [f"{50 * sum(curves[i].asr[-1] for i in four):.1f}" for curves in (ours, theirs)]
    line = next(line for line in table.splitlines() if line.startswith("| badnets | FT |") and " | 4 | " in line)
    assert f"| 4 | {', '.join(ends)} | {100 * gap:.1f} ±" in line
    run_relearning([str(runner.root / "results.parquet")])
    assert capsys.readouterr().out.strip() == table


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tuning_images": 40}, "leaves fewer than 40 of 60 images"),
        ({"retain": {"all": {}}}, "leaves fewer than 20 of 60 images"),
        ({"save_models": False}, "and are kept"),
        ({"victims": {"theirs": {"model_name_or_path": "x", "attack": "badnets"}}}, "give victims of a set"),
    ],
)
def test_a_grid_that_cannot_relearn_is_refused(grid, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        relearning(grid, tmp_path, **options)


def test_without_a_twin_it_says_which(grid, tmp_path, monkeypatch):
    runner = RelearningRunner(relearning(grid, tmp_path))
    monkeypatch.setattr(type(runner.inputs), "twin", lambda self, victim: None)
    with pytest.raises(FileNotFoundError, match="no vit/twin, beside which models relearn"):
        run_grid(runner.grid, runner_class=RelearningRunner)
