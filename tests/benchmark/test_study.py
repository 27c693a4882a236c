"""The blind study: tables of made-up rows with a planted truth, and a small one of tiny victims from end to end."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pandas
import pytest
import yaml

from d3_hf.auto.choose import Tried
from d3_hf.auto.thoroughness import SCORES
from d3_hf.auto.trial import predictions_before, try_recipe
from d3_hf.benchmark.cells import CELL, cells_of
from d3_hf.benchmark.grid import read_grid
from d3_hf.benchmark.study import StudyGrid, StudyRunner
from d3_hf.benchmark.study_tables import RULES, choices, ladders, recipes_table, render_study
from d3_hf.commands.benchmark import run_study
from d3_hf.evaluation.measure import measure
from d3_hf.evaluation.paired import PairedTable

# Made-up rows ----------------------------------------------------------------------------------------------------------

# From gentle to severe: images of 100 that validation loses, what the features moved, ASR and ACC on test images, in percent.
# The order of the ladder is wrong in one place: "firm" erases more than "hard". From "severe" on the floor is broken.
PLANTED = {
    "gentle": (0, 0.1, 90, 91),
    "firm": (1, 0.4, 2, 89),
    "hard": (1, 0.3, 10, 88),
    "severe": (30, 0.9, 1, 60),
    "raised": None,
    "unfit": None,
}


def made_up(planted=PLANTED, victim="g/badnets", start="gentle", budget=3):
    rows = []
    for place, (name, found) in enumerate(planted.items(), 1):
        row = {"victim": victim, "retain": "300", "defence": name, "seed": 0, "place": place, "is_start": name == start}
        row |= {"recipes": len(planted), "max_accuracy_drop": 0.05, "auto_budget": budget}
        if found:
            lost, moved, asr, acc = found
            scores = {"place": 7.0, "feature_distance": moved}  # of another ladder: the place counts as it is now
            tried = Tried(name, 7, 10.0, PairedTable(95 - lost, lost, 0, 5), scores, 300)
            row |= {"accuracy_after": acc / 100, "asr_after": asr / 100, "ra_after": 0.5, "tried": json.dumps(asdict(tried))}
        elif name == "raised":
            row |= {"tried": json.dumps(asdict(Tried(name, 7, 3.0, error="diverged")))}
        else:
            row |= {"left_out": "needs BatchNorm"}
        rows.append(row)
    before = {"victim": victim, "defence": "victim", "accuracy_after": 0.92, "asr_after": 0.99, "ra_after": 0.01}
    return pandas.DataFrame([*rows, before])


def ranks(values):
    return [sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values]


def correlation(one, two):
    """Spearman's, of ranks without ties, by the formula of their differences."""
    n, squares = len(one), sum((a - b) ** 2 for a, b in zip(ranks(one), ranks(two), strict=True))
    return 1 - 6 * squares / (n * (n * n - 1))


def test_rules_oracle_and_regret_on_a_planted_ladder():
    found = choices(made_up()).set_index("rule")
    assert list(found.index) == list(RULES) and set(found["oracle"]) == {"firm"}
    assert found.loc["place", "recipe"] == "hard" and found.loc["place", "regret"] == pytest.approx(0.08)
    assert found.loc["feature_distance", "recipe"] == "firm" and found.loc["feature_distance", "regret"] == 0
    assert found["above_floor"].all() and found.loc["place", "accuracy_after"] == 0.88
    ran = [values for values in PLANTED.values() if values]
    for score, values in (("place", [1, 2, 3, 4]), ("feature_distance", [moved for _, moved, _, _ in ran])):
        assert found.loc[score, "correlation"] == pytest.approx(correlation(values, [asr for _, _, asr, _ in ran]))
    assert found.loc["place", "tried"] == 5 and found.loc["place", "seconds"] == 43  # the raised one took its time


def test_a_walk_sees_what_its_budget_and_the_floor_let_it():
    assert choices(made_up(budget=1)).set_index("rule").loc["place, walk", "recipe"] == "gentle"
    walk = choices(made_up(start="severe", budget=2)).set_index("rule").loc["place, walk"]
    assert (walk["recipe"], walk["tried"], walk["seconds"]) == ("hard", 2, 20)
    _, ladder = next(ladders(made_up(start="gentle", budget=9)))
    assert [one.name for one in ladder.walk] == ["gentle", "firm", "hard", "severe"]  # which breaks it
    two = made_up(start="gentle", budget=1)
    two.loc[two["defence"] == "severe", "is_start"] = True  # near the base, where it was tried
    assert next(ladders(two))[1].start == 4 and choices(two).set_index("rule").loc["place, walk", "recipe"] == "severe"
    raised = choices(made_up(start="raised", budget=1)).set_index("rule").loc["place, walk"]
    assert not isinstance(raised["recipe"], str) and math.isnan(raised["regret"]) and raised["oracle"] == "firm"


@pytest.mark.parametrize("seed", range(5))
def test_no_rule_knows_the_truth(seed):
    """The rates of the test images change places: so do oracle and regret, but no choice."""
    rows, rates = made_up(), ["accuracy_after", "asr_after", "ra_after"]
    ran = rows["tried"].notna() & rows["asr_after"].notna()
    other = rows.copy()
    other.loc[ran, rates] = rows.loc[ran, rates].sample(frac=1, random_state=seed).values
    assert choices(other)["recipe"].tolist() == choices(rows)["recipe"].tolist()


def test_where_no_recipe_keeps_the_floor_the_gentlest_is_taken_and_there_is_no_oracle():
    rows = made_up({name: (30, *PLANTED[name][1:]) for name in ("gentle", "firm")})
    found = choices(rows)
    assert set(found["recipe"]) == {"gentle"} and not found["above_floor"].any()
    assert found["oracle"].isna().all() and found["regret"].isna().all()
    table = render_study(rows)
    assert "| none above the floor |" in table and "gentle below the floor: 91.0 / 90.0 / 50.0 (+–)" in table
    assert choices(made_up({"raised": None})).empty and "## Rules" not in render_study(made_up({"raised": None}))


def test_a_ladder_is_shown_when_it_is_whole():
    rows = pandas.concat([made_up(), made_up(victim="g/blended")], ignore_index=True)
    part = rows[~((rows["victim"] == "g/blended") & (rows["defence"] == "firm"))].assign(missing_cells=1)
    assert set(choices(rows)["victim"]) == {"g/badnets", "g/blended"} and set(choices(part)["victim"]) == {"g/badnets"}
    assert render_study(part).startswith("**Missing cells of the study: 1**")
    failed = part.assign(error=[None] * (len(part) - 1) + ["OSError: no base"])
    failed.loc[failed.index[-1], ["defence", "retain", "seed"]] = ["firm", "300", 0]
    assert "OSError: no base" in render_study(failed) and set(choices(failed)["victim"]) == {"g/badnets"}


def test_the_tables_fit_a_page():
    table = render_study(made_up())
    lines = table.splitlines()
    assert [line for line in lines if line.startswith("## ")] == ["## Rules", "## Ladders", "## Recipes"]
    assert "| feature_distance | 1 of 1 | 89.0 / 2.0 / 50.0 | 0.0 | 0.0 | -1.00 | 5.0 |" in lines
    (ladder,) = [line for line in lines if line.startswith("| g/badnets | 300 | 0 |")]
    assert "| 92.0 / 99.0 / 1.0 | hard: 88.0 / 10.0 / 50.0 (+8.0) | firm: 89.0 / 2.0 / 50.0 (+0.0) |" in ladder
    assert ladder.endswith("| firm: 89.0 / 2.0 / 50.0 |")
    assert recipes_table(made_up()).splitlines()[2:] == [
        "| gentle | 1 of 1 | 0 | 91.0 / 90.0 / 50.0 | 90.0 |",
        "| firm | 1 of 1 | 0 | 89.0 / 2.0 / 50.0 | 2.0 |",
        "| hard | 1 of 1 | 0 | 88.0 / 10.0 / 50.0 | 10.0 |",
        "| severe | 0 of 1 | 0 | 60.0 / 1.0 / 50.0 | 1.0 |",
        "| raised | 0 of 1 | 0 | | |",
        "| unfit | 0 of 0 | 1 | | |",
    ]
    assert render_study(pandas.DataFrame([])) == "No cell was made."


# A study of tiny victims -----------------------------------------------------------------------------------------------

RECIPES = [
    {"name": "FT", "defence": "fine_tuning", "options": {"learning_rate": 0.001}},
    {"name": "FT fast", "defence": "fine_tuning", "options": {"learning_rate": 0.01}, "start": True},
    {"name": "RNP", "defence": "rnp"},
    {"name": "FT at once", "defence": "fine_tuning", "options": {"learning_rate": 1.0e30}},
    {"name": "base tuning", "defence": "base_tuning", "needs": "base"},
]
CHOSEN = {"victim", "retain", "seed", "rule", "recipe", "oracle", "regret", "correlation"}


@pytest.fixture(scope="module")
def study(grid, tmp_path_factory):
    """The file of a study on one of the benchmark's victims."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "ladder.yaml").write_text(yaml.safe_dump({"recipes": RECIPES}))
    names = ("dataset_name", "victims_dir", "held_out", "test_images")
    content = {name: getattr(grid, name) for name in names} | {"victims": grid.victims[:1], "seeds": [0]}
    content |= {"output_dir": str(folder / "out"), "ladder": str(folder / "ladder.yaml"), "retain": {"60": {"count": 60}}}
    content |= {"max_accuracy_drop": 0.2, "auto_budget": 2, "common": {"disable_tqdm": True, "use_cpu": True, "max_steps": 3}}
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    return folder / "study.yaml"


def cell_files(study):
    return {file: file.stat().st_mtime_ns for file in (study.parent / "out" / "cells").rglob(CELL)}


def test_a_study_from_end_to_end(study, capsys):
    """It is stopped after two of its cells, and goes on; each cell holds what the trial found and then the truth."""
    assert not len(run_study([str(study), "--only", "* | FT | 0", "* | RNP | 0"]))
    first, shown = cell_files(study), capsys.readouterr().out
    assert len(first) == 2 and "3 of the grid's 5 cells are not made yet" in shown and "left out: " in shown
    found = run_study([str(study)])
    files, shown = cell_files(study), capsys.readouterr().out
    assert len(files) == 5 and first.items() <= files.items() and "broken: the clean loss is" in shown
    assert CHOSEN <= set(found) and list(found["rule"]) == list(RULES)
    written = pandas.read_parquet(study.parent / "out" / "choices.parquet")
    assert written["recipe"].tolist() == found["recipe"].tolist()
    rows = pandas.read_parquet(study.parent / "out" / "results.parquet").set_index("defence")
    assert rows.loc["RNP", "left_out"].count("BatchNorm") and rows.loc["base tuning", "left_out"] == "needs --base_model"
    assert json.loads(rows.loc["FT at once", "tried"])["pair"] is None and math.isnan(rows.loc["FT at once", "asr_after"])
    assert {"victim", "twin without backdoor"} <= set(rows.index)

    run_study([str(study)])
    again = cell_files(study)
    assert again == files
    run_study([str(study.parent / "out" / "results.parquet")])
    assert (study.parent / "out" / "results.md").read_text().strip() in capsys.readouterr().out


def test_a_cell_is_what_auto_tries_and_what_it_made_under_the_trigger(study):
    runner = StudyRunner(read_grid(str(study), StudyGrid))
    cell = next(cell for cell in cells_of(runner.grid) if cell.defence == "FT fast")
    row = runner.read(cell) or runner.make(cell)
    plan, made = runner._plan(cell), []
    (rung,) = [rung for rung in plan.rungs if rung.recipe.name == cell.defence]
    found, kept = try_recipe(plan, rung, predictions_before(plan), keep=made.append), Tried.from_json(json.loads(row["tried"]))
    assert replace(found, seconds=0) == replace(kept, seconds=0) and found.scores.keys() == SCORES.keys()
    after = measure(made[0], runner.inputs.test, plan.preprocessing, runner.inputs.attack(cell.victim), progress=False)
    assert (row["accuracy_after"], row["asr_after"], row["ra_after"]) == (after.accuracy.value, after.asr.value, after.ra.value)


def test_a_ladder_in_another_order_makes_no_cell_anew(study):
    """Nor do another floor and another budget, which are for the tables; a base does, for the recipe that needs it."""
    grid = read_grid(str(study), StudyGrid)
    turned = study.parent / "turned.yaml"
    turned.write_text(yaml.safe_dump({"recipes": RECIPES[::-1]}))
    other = replace(grid, ladder=str(turned), defences={}, max_accuracy_drop=0.1, auto_budget=1)
    based = replace(grid, bases={"vit": str(Path(grid.victims_dir) / grid.victims[0])})
    runners, cells = [StudyRunner(one) for one in (grid, other, based)], cells_of(grid)
    here, there, elsewhere = ([runner.folder(cell) for cell in cells] for runner in runners)
    assert here == there
    assert [cell.defence for cell, one, two in zip(cells, here, elsewhere, strict=True) if one != two] == ["base tuning"]
    assert runners[0].read(cells[0]) or runners[0].make(cells[0])
    places = {row["defence"]: row["place"] for row in runners[1].rows() if "place" in row}
    names = [recipe["name"] for recipe in RECIPES]
    assert places["FT"] == 5 and all(place == 5 - names.index(name) for name, place in places.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defences": {"FT": {"defence": "fine_tuning"}}}, "the defences of a study are the recipes of its ladder"),
        ({"watch_images": 10}, "a study watches nothing and keeps no models"),
        ({"save_models": True}, "a study watches nothing and keeps no models"),
        ({"common": {"learning_rate": 0.1}}, "common: recipes of the ladder settle learning_rate"),
        ({"bases": {"vif": "here"}}, "neither a victim nor a group of them is called vif"),
        ({"auto_budget": 0}, "auto_budget at least 1"),
        ({"max_accuracy_drop": 5.0}, "max_accuracy_drop must be in"),
    ],
)
def test_a_wrong_study_is_refused(study, change, message):
    with pytest.raises(ValueError, match=message):
        replace(read_grid(str(study), StudyGrid), **change)


def test_the_table_of_a_benchmark_is_none_of_a_study(tmp_path):
    pandas.DataFrame([{"victim": "v", "retain": "30", "defence": "FT"}]).to_parquet(tmp_path / "results.parquet")
    with pytest.raises(ValueError, match="holds the table of another kind of run"):
        run_study([str(tmp_path / "results.parquet")])
