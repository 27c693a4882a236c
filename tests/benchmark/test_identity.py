"""What a grid knows victims, images and cells by: no victim has seen a retain set, and no cell is taken for another."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from places import RECIPES

from d3_hf.benchmark import grid as grid_module
from d3_hf.benchmark import read_grid, render, run_grid
from d3_hf.benchmark.cells import CELL, Runner, _verified, _write, cells_of
from d3_hf.benchmark.grid import GridInputs
from d3_hf.data.images import RawImages
from d3_hf.data.labels import retain_indices
from d3_hf.data.load import load_images
from d3_hf.evaluation.measure import Measurement
from d3_hf.evaluation.metrics import accuracy
from d3_hf.options.arguments import DataArguments
from d3_hf.training import schedule

HELD_OUT = retain_indices(np.zeros(1437, int), ["any"], count=60)  # of the digits' training split, as `grid` has it


def write_digits(folder, change=None, rows=range(0), test="test"):
    """The digits as parquet files, with the pictures at ``rows`` of a split in place of each other."""
    folder.mkdir()
    for name, split in load_images("digits").items():
        order = np.arange(len(split))
        if name == change:
            order[rows] = np.roll(rows, 1)
        pictures = split.select_columns("image").select(order)
        file = {"train": "train", "test": test}[name]
        pictures.add_column("label", split["label"][:]).cast(split.features).to_parquet(folder / f"{file}.parquet")
    return str(folder)


def altered_victims(grid, folder, victim, change):
    """The grid over copies of its victims, the record of one of them changed."""
    copies = Path(shutil.copytree(grid.victims_dir, folder / "victims"))
    file = copies / victim / "victim.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))
    return replace(grid, victims_dir=str(copies), output_dir=str(folder / "grid"))


# No victim has seen a retain set ----------------------------------------------------------------------------------------


def test_no_victim_has_seen_a_retain_set(grid):
    record = json.loads((Path(grid.victims_dir) / "vit/badnets/victim.json").read_text())
    drawn = {row for seed in grid.seeds for row in GridInputs(grid).retain("30", seed)["index"]}
    assert len(drawn) > 30 and not drawn & set(record["planted"]["poisoned_rows"])
    with pytest.raises(ValueError, match="set held_out"):
        GridInputs(replace(grid, held_out=50)).folder("vit/badnets")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"retain_balanced": True}, "retain_balanced True, here False"),
        ({"retain_seed": 1}, "retain_seed 1, here 0"),
        ({"train_split": "test"}, "train_split test, here train"),
        ({"retain_count": None, "retain_fraction": 60 / 1437}, "retain_count None, here 60; retain_fraction 0.04"),
    ],
)
@pytest.mark.parametrize("digest", [True, False])
def test_a_victim_of_another_draw_is_refused(grid, tmp_path, recipe, message, digest):
    def change(record):
        record["recipe"] |= recipe
        if not digest:
            del record["images_sha256"]

    with pytest.raises(ValueError, match=f"vit/badnets holds other images out than the grid \\({message}") as found:
        run_grid(altered_victims(grid, tmp_path, "vit/badnets", change))
    assert "\n" not in str(found.value)


def test_a_victim_of_other_images_is_refused_wherever_they_lie(grid, tmp_path):
    seen = np.setdiff1d(np.arange(1437), HELD_OUT)[:2]
    other = replace(grid, dataset_name=write_digits(tmp_path / "digits", "train", seen))
    with pytest.raises(ValueError, match="vit/badnets was trained on other images than .* has besides .*images_sha256"):
        run_grid(other)
    same = replace(grid, dataset_name=write_digits(tmp_path / "elsewhere"))
    assert GridInputs(same).record("vit/badnets")


def test_without_a_digest_the_name_of_the_data_set_must_do(grid, tmp_path):
    for name, fits in (("digits", True), ("/data/digits", True), ("uoft-cs/cifar10", False)):
        (tmp_path / name.replace("/", "_")).mkdir()

        def change(record, name=name):
            record["recipe"]["dataset_name"] = name
            del record["images_sha256"]

        inputs = GridInputs(altered_victims(grid, tmp_path / name.replace("/", "_"), "vit/badnets", change))
        if fits:
            assert inputs.record("vit/badnets")
        else:
            with pytest.raises(ValueError, match="dataset_name uoft-cs/cifar10, here digits"):
                inputs.record("vit/badnets")


def test_the_rest_of_the_images_is_decoded_once_and_only_for_a_digest(grid, tmp_path, monkeypatch):
    sizes = []
    digest = grid_module.images_digest
    monkeypatch.setattr(grid_module, "images_digest", lambda images: sizes.append(len(images)) or digest(images))
    runner = Runner(grid)
    for cell in cells_of(grid):
        runner.spec(cell)
    assert sizes.count(1437 - 60) == 1
    sizes.clear()
    copies = altered_victims(grid, tmp_path, "vit/badnets", lambda record: record.pop("images_sha256"))
    Runner(copies).spec(cells_of(copies)[0])
    assert cells_of(copies)[0].victim == "vit/badnets" and 1437 - 60 not in sizes


def test_a_twin_of_another_draw_is_refused_before_the_work(grid, tmp_path):
    with pytest.raises(ValueError, match="vit/twin holds other images out"):
        run_grid(altered_victims(grid, tmp_path, "vit/twin", lambda record: record["recipe"].update(retain_seed=1)))
    assert not (tmp_path / "grid").exists()


def test_a_victim_that_was_changed_since_is_not_purified(grid, tmp_path):
    copies = altered_victims(grid, tmp_path, "vit/badnets", lambda record: None)
    shutil.copy(f"{grid.victims_dir}/vit/blended/model.safetensors", f"{copies.victims_dir}/vit/badnets")
    row = Runner(copies).make(cells_of(copies)[0])
    assert row["victim"] == "vit/badnets" and "model.safetensors is not what victim.json says" in row["error"]


# No cell is taken for another -------------------------------------------------------------------------------------------


def folders(grid):
    runner = Runner(grid)
    return [runner.folder(cell).name for cell in cells_of(grid)]


def test_a_data_set_that_moved_keeps_its_cells_and_another_makes_new_ones(grid, tmp_path):
    moved = replace(grid, dataset_name=write_digits(tmp_path / "moved"))
    assert folders(moved) == folders(grid)
    retained = replace(grid, dataset_name=write_digits(tmp_path / "retained", "train", HELD_OUT))
    tested = replace(grid, dataset_name=write_digits(tmp_path / "tested", "test", range(360)))
    assert not set(folders(retained)) & set(folders(grid)) and not set(folders(tested)) & set(folders(grid))


def test_a_victim_is_measured_anew_on_other_images(grid, tmp_path):
    moved = write_digits(tmp_path / "moved")
    other = write_digits(tmp_path / "other", "test", range(360))
    for place, measured in ((grid.dataset_name, 1), (moved, 1), (other, 2)):
        Runner(replace(grid, dataset_name=place, output_dir=str(tmp_path))).before("vit/badnets", "vit/badnets")
        assert len(list((tmp_path / "before").iterdir())) == measured


def test_other_data_of_a_retain_set_are_known_by_their_content(grid, tmp_path):
    def of(place):
        return replace(grid, retain={"other": {"dataset_name": place, "classes": {"3": "5", "1": "7"}, "count": 25}})

    places = [write_digits(tmp_path / name) for name in ("one", "two")]
    assert folders(of(places[0])) == folders(of(places[1]))
    changed = write_digits(tmp_path / "changed", "train", range(1437))
    assert not set(folders(of(changed))) & set(folders(of(places[0])))


def test_other_data_that_are_not_there_fail_their_own_cells_alone(grid, tmp_path):
    retain = {"30": {"count": 30}, "other": {"dataset_name": str(tmp_path / "none"), "classes": {"3": "5"}}}
    (tmp_path / "test-only").mkdir()
    load_images("digits")["test"].to_parquet(tmp_path / "test-only" / "test.parquet")
    retain["test"] = retain["other"] | {"dataset_name": str(tmp_path / "test-only")}
    part = replace(grid, retain=retain, output_dir=str(tmp_path / "grid"), seeds=[0], victims=grid.victims[:1])
    part = replace(part, defences={"FT": {"defence": "fine_tuning"}})
    rows = run_grid(part).set_index("retain")
    assert rows.loc["30", "accuracy_after"] >= 0 and "none" in rows.loc["other", "error"]
    assert "test-only has no split 'train' to draw a retain set from; it has test" in rows.loc["test", "error"]


def test_an_option_at_its_default_is_the_same_as_none(grid):
    said = grid.common | {"bf16": False, "adam_beta1": 0.9, "cutout": 0, "batch_norm": "train"}
    assert folders(replace(grid, common=said)) == folders(grid)
    assert not set(folders(replace(grid, common=said | {"bf16": True}))) & set(folders(grid))


def test_another_rule_of_the_schedule_makes_other_cells(grid, monkeypatch):
    before = folders(grid)
    row, *rest = schedule.RULES
    monkeypatch.setattr(schedule, "RULES", (replace(row, measured="elsewhere"), *rest))
    assert folders(grid) == before
    monkeypatch.setattr(schedule, "RULES", (replace(row, updates=row.updates + 1), *rest))
    assert not set(folders(grid)) & set(before)


def test_a_precision_of_the_launcher_is_that_of_the_option(grid, monkeypatch):
    plain, asked = folders(grid), folders(replace(grid, common=grid.common | {"bf16": True}))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert folders(grid) == asked and not set(asked) & set(plain)
    runner = Runner(grid)
    assert runner.options(cells_of(grid)[0])["bf16"] and "bf16" not in grid.common
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert folders(grid) == plain


def test_a_file_of_options_is_known_by_its_content(grid, tmp_path):
    found = []
    for name, content in (("one", "{}"), ("two", "{}"), ("two", '{"split_batches": true}')):
        (tmp_path / name).write_text(content)
        found.append(folders(replace(grid, common=grid.common | {"accelerator_config": str(tmp_path / name)})))
    assert found[0] == found[1] and not set(found[1]) & set(found[2])


def test_other_peoples_checkpoints_are_known_by_content_not_by_place(tmp_path):
    (tmp_path / "one.pth").write_bytes(b"weights")
    (tmp_path / "two.pth").write_bytes(b"weights")
    grid = read_grid(str(RECIPES / "grids" / "proof_nad.yaml"))
    found = []
    for name in ("one.pth", "two.pth"):
        grid.checkpoint_at(str(tmp_path / name))
        found.append(GridInputs(grid).identity("nad_grid"))
    assert found[0] == found[1] and GridInputs(grid).attack("nad_grid").target_label == 5
    with pytest.raises(ValueError, match="one checkpoint of other people"):
        read_grid(str(RECIPES / "grids" / "cpu.yaml")).checkpoint_at("x")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_a_folder_of_other_people_is_known_by_its_files(grid, tmp_path, file):
    folders = [shutil.copytree(f"{grid.victims_dir}/vit/badnets", tmp_path / name) for name in ("one", "two", "changed")]
    (folders[2] / file).write_bytes((folders[2] / file).read_bytes() + b" ")
    theirs = [replace(grid, victims={"v": {"model_name_or_path": str(f), "attack": {"name": "badnets"}}}) for f in folders]
    one, two, changed = (GridInputs(grid).identity("v") for grid in theirs)
    assert one == two != changed


# What an earlier version did not measure ------------------------------------------------------------------------------------


def without_pacc(row):
    return {key: value for key, value in row.items() if not key.startswith(("pacc", "trigger_drift"))}


def test_cells_without_pacc_stay_made_and_untouched_models_are_measured_again(grid, tmp_path):
    part = replace(grid, output_dir=str(tmp_path), victims=grid.victims[:1], defences={"FT": {"defence": "fine_tuning"}})
    rows = run_grid(part)
    runner, (cell, _) = Runner(part), cells_of(part)
    earlier = runner.folder(cell) / CELL
    for file in [earlier, *(tmp_path / "before").iterdir()]:
        _write(file, {}, without_pacc(_verified(file)))
    written = earlier.read_text()
    again = run_grid(part)
    assert earlier.read_text() == written
    lacking = (again["defence"] == "FT") & (again["seed"] == cell.seed)
    assert again["pacc_after"].isna().tolist() == lacking.tolist() and lacking.sum() == 1
    pandas.testing.assert_frame_equal(again[~lacking], rows[~lacking], check_like=True, check_dtype=False)  # a count or none
    means = 100 * again[again["defence"] == "FT"][["accuracy_after", "asr_after", "ra_after"]].mean()
    shown = " / ".join([*(f"{mean:.1f}" for mean in means), "–"])  # the other seed's PACC is not taken for both
    assert f"| FT | {shown} | {shown} |" in render(again)
    assert render(rows[list(without_pacc(rows))]).count(" / –") == 3 * 3  # three models: victim, average, worst


def test_a_victim_measured_without_its_predictions_is_not_measured_again(grid, tmp_path):
    part, victim = replace(grid, output_dir=str(tmp_path)), grid.victims[0]
    found, again = (Runner(part).before(victim, victim) for _ in range(2))
    assert again.predictions.tolist() == found.predictions.tolist() and len(again.predictions) == again.accuracy.n
    (file,) = (tmp_path / "before").iterdir()
    _write(file, {}, {key: value for key, value in _verified(file).items() if key != "predictions"})
    written = file.read_text()
    assert Runner(part).before(victim, victim).predictions is None and file.read_text() == written


# Which class is which -------------------------------------------------------------------------------------------------


def test_a_grid_about_other_peoples_checkpoints_takes_a_class_map(grid):
    theirs = {"v": {"model_name_or_path": f"{grid.victims_dir}/vit/badnets", "attack": {"name": "badnets"}}}
    plain, mapped = (
        GridInputs(replace(grid, victims=theirs, class_map=class_map))
        for class_map in (None, {str(digit): 9 - digit for digit in range(10)})
    )
    assert torch.equal(mapped.test.labels, 9 - plain.test.labels) and torch.equal(mapped.test.images, plain.test.images)
    assert mapped.held_out["label"][:] == [9 - label for label in plain.held_out["label"]]


def test_a_checkpoint_that_counts_otherwise_is_refused_and_not_written_down(grid, tmp_path, monkeypatch):
    folder = shutil.copytree(f"{grid.victims_dir}/vit/badnets", tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    unnamed = {f"LABEL_{number}": number for number in range(10)}
    ids = {"id2label": {number: name for name, number in unnamed.items()}, "label2id": unnamed}
    (folder / "config.json").write_text(json.dumps(config | ids))
    victims = {"v": {"model_name_or_path": str(folder), "attack": {"name": "badnets"}}}
    runner = Runner(replace(grid, victims=victims, output_dir=str(tmp_path / "grid")))
    labels = runner.inputs.test.labels.numpy()
    predictions = labels * 3 % 10
    found = Measurement(accuracy(predictions, labels), None, None, 0.0, len(labels), predictions=predictions)
    monkeypatch.setattr("d3_hf.benchmark.cells.measure", lambda *_, **__: found)
    with pytest.raises(ValueError, match="if the classes were in another order"):
        runner.before("v", "v")
    assert not list(tmp_path.glob("grid/before/*"))


# Which images are measured on -------------------------------------------------------------------------------------------


def test_test_images_are_drawn_as_purify_draws_them(grid, tmp_path):
    """Sorted by class, as a folder of images is, and with a split `validation` alone."""
    (tmp_path / "digits").mkdir()
    for name, file in (("train", "train"), ("test", "validation")):
        split = load_images("digits")[name]
        split.select(np.argsort(split["label"], kind="stable")).to_parquet(tmp_path / "digits" / f"{file}.parquet")
    inputs = GridInputs(replace(grid, dataset_name=str(tmp_path / "digits"), test_images=30, watch_images=15))
    assert len(inputs.test) == 30 and len(inputs.test.labels.unique()) > 5
    assert len(inputs.watched) == 15 and len(inputs.watched.labels.unique()) > 5
    expected = DataArguments(str(tmp_path / "digits"), retain_count=60, max_test_images=30).load().test
    assert torch.equal(inputs.test.images, expected.images)
    assert len(GridInputs(replace(grid, watch_images=1000)).watched) == 40


def test_nothing_is_measured_on_what_victims_were_trained_on(grid, tmp_path):
    load_images("digits")["train"].to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="has no test or validation split"):
        run_grid(replace(grid, dataset_name=str(tmp_path / "train.parquet")))


def test_retain_sets_of_test_images_are_not_measured_on(grid):
    usual = GridInputs(replace(grid, test_images=None))
    drawn = GridInputs(replace(grid, retain={"x": {"count": 20}}, retain_from_test=30, test_images=None))
    kept, measured, everything = (
        [image.numpy().tobytes() for image in images.images]
        for images in (RawImages.from_dataset(drawn.held_out), drawn.test, usual.test)
    )
    assert len(kept) == 30 and sorted(kept + measured) == sorted(everything) and not set(kept) & set(measured)
    assert drawn.rest_sha256 == usual.rest_sha256  # of what victims may have seen
    grid = replace(drawn.grid, victims=grid.victims[:1], seeds=[0], test_images=10)
    row = Runner(grid).make(cells_of(grid)[0])
    assert (row["retain_n"], row["accuracy_after_n"]) == (20, 10)
