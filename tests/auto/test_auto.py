"""`--defence auto`: trials on a tiny model, what stops one, how a walk goes on, and the whole command.

The recipes do what they do on every processor: FT at a rate that changes no prediction keeps the floor, D3 from the negated
head answers every image otherwise, a rate of 1e30 diverges, ANP refuses a network without BatchNorm.
"""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from pictures import encoded
from raising import same_weights
from safetensors.torch import load_file
from tiny import CLASSES, PROCESSOR, SGD, SIZE, tiny_resnet, tiny_vit
from tiny_trained import base_of

from d3_hf import FineTuningConfig, FineTuningTrainer, load_classifier, load_images, retain_split
from d3_hf.auto import early
from d3_hf.auto import run as auto
from d3_hf.auto.config import AutoConfig
from d3_hf.auto.dry_run import dry_run, refusal
from d3_hf.auto.ladder import read_ladder
from d3_hf.auto.plan import make_plan
from d3_hf.auto.record import RECORD
from d3_hf.auto.run import choose_recipe
from d3_hf.auto.trial import predictions_before, try_recipe
from d3_hf.commands.purify import OPTIONS, run
from d3_hf.data.images import RawImages
from d3_hf.data.preprocessing import Preprocessing
from d3_hf.errors import Terminated
from d3_hf.evaluation.measure import measure
from d3_hf.evaluation.paired import PairedTable, paired_table
from d3_hf.options.parser import parse_arguments
from d3_hf.publishing.tables import audit_line
from d3_hf.training.reference import fingerprint
from d3_hf.training.schedule import rule_of

COMMON = SGD | {"max_steps": 4, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True}
RECIPES = {
    "gentle": {"defence": "fine_tuning", "options": {"learning_rate": 1e-4}},
    "firm": {"defence": "fine_tuning", "options": {"learning_rate": 2e-4}},
    "unfit": {"defence": "anp", "options": {"learning_rate": 0.1}},
    "harsh": {"defence": "d3", "options": {"warm_start": "far", "learning_rate": 1e-4}},
    "harsher": {"defence": "d3", "options": {"warm_start": "far", "learning_rate": 2e-4}},
    "diverging": {"defence": "fine_tuning", "options": {"learning_rate": 1e30}},
    "half": {"defence": "fine_tuning", "rate": 0.5},
    "whole": {"defence": "fine_tuning"},
    "rooted": {"defence": "base_tuning", "options": {"learning_rate": 0.1}, "needs": "base"},
}
WHOLE = ("gentle", "firm*", "unfit", "harsh", "harsher", "rooted")


def coloured(count, seed):
    """Images whose colour tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    pixels = torch.randint(0, 80, (count, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(count), :, :, labels] += 120
    rows = [{"bytes": encoded(image), "path": None} for image in pixels.numpy()]
    features = Features({"image": Image(), "label": ClassLabel(names=[f"LABEL_{k}" for k in range(CLASSES)])})
    return Dataset.from_dict({"image": rows, "label": labels.tolist()}, features=features)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders of a classifier that knows its images, and of these."""
    folder = tmp_path_factory.mktemp("auto")
    (folder / "data").mkdir()
    for name, count, seed in (("train", 120, 0), ("test", 60, 1)):
        coloured(count, seed).to_parquet(folder / "data" / f"{name}.parquet")
    args = FineTuningConfig(str(folder / "out"), **COMMON | {"max_steps": 40, "learning_rate": 0.05, "crop_padding": 0})
    trainer = FineTuningTrainer(tiny_vit(), args, coloured(120, 0))
    trainer.train()
    trainer.plain.save_pretrained(folder / "suspect")
    trainer.plain.image_processor.save_pretrained(folder / "suspect")
    return folder


@pytest.fixture
def planned(place, tmp_path):
    def make(names=WHOLE, folder="out", count=100, max_accuracy_drop=0.05, model=None, **options):
        file = names and str(ladder(tmp_path / "ladder.yaml", names))
        args = AutoConfig(str(tmp_path / folder), ladder=file, **COMMON | options)
        retain, _ = retain_split(load_images(str(place / "data"))["train"], count=count)
        return make_plan(model or load_classifier(str(place / "suspect")), retain, args, max_accuracy_drop)

    return make


def ladder(file, names):
    """A file of recipes; the one with a star is tried first."""
    recipes = [{"name": n.rstrip("*"), "start": n.endswith("*")} | RECIPES[n.rstrip("*")] for n in names]
    file.write_text(yaml.safe_dump({"recipes": recipes}))
    return file


def untimed(facts):
    return facts | {"tried": [{name: v for name, v in row.items() if name != "seconds"} for row in facts["tried"]]}


def outcomes(facts):
    return {row["name"]: row["floor"] for row in facts["tried"]}


def test_one_more_severe_while_the_floor_holds(planned, tmp_path, capsys):
    plan = planned()
    before = fingerprint(plan.model.state_dict().values())
    choice = choose_recipe(plan)
    assert outcomes(choice.facts) == {"firm": "kept", "harsh": "broken"}
    assert choice.rung.recipe.name == choice.facts["recipe"] == "firm" and choice.facts["above_floor"]
    assert "BatchNorm" in choice.facts["left_out"]["unfit"] and choice.facts["left_out"]["rooted"] == "needs --base_model"
    firm, harsh = choice.facts["tried"]
    assert firm["lost"] == firm["gained"] == 0 and firm["accuracy"] == choice.facts["accuracy_before"]
    assert harsh["lost"] > 10 and firm["updates"] == harsh["updates"] == 4
    assert firm["scores"]["place"] == 2 and "stopped_at" not in firm
    assert harsh["stopped_at"] == 0.5 and harsh["scores"] is None  # every image is answered otherwise
    assert 0 <= firm["scores"]["feature_distance"] < 1e-3
    assert choice.facts["split"] == {"tune": 60, "validate": 20, "audit": 20}
    assert fingerprint(plan.model.state_dict().values()) == before  # copies were trained
    assert [file.name for file in (tmp_path / "out").iterdir()] == [RECORD]
    shown = capsys.readouterr().out
    assert "1/8 looking at the suspicious model on 80 images" in shown and "\n2/8 trying firm\n" in shown
    assert "\n3/8 trying harsh (less than a minute left)\n" in shown and "broken: stopped at 50 % of its updates" in shown
    assert "\nchosen: firm, the most thorough above the floor; it purifies on 80 images (less than a minute left)\n" in shown


def test_where_there_is_a_base_a_start_near_it_is_tried_first(planned):
    names = ("gentle", "firm*", "harsh", "rooted*")
    assert planned(names).next_rung({}).recipe.name == "firm"
    plan = planned(names, base_model=base_of(tiny_vit))
    assert plan.next_rung({}).recipe.name == "rooted" and [rung.recipe.name for rung in plan.longest_walks()[0]] == ["rooted"]
    plan.left_out["rooted"] = "it is not the ancestor"  # as its trainer may find
    assert plan.next_rung({}).recipe.name == "firm"


def test_a_rate_is_times_that_of_the_rule_or_the_users(planned, tmp_path):
    by_rule = planned(("half", "whole"), **dict.fromkeys(SGD))
    given = planned(("half", "whole"), learning_rate=0.04)
    of_rule = rule_of(by_rule.model).options(by_rule.args, by_rule.model)["learning_rate"]
    for plan, rate in ((by_rule, of_rule), (given, 0.04)):
        rates = [plan.trial_trainer(rung, plan.model, str(tmp_path / "trial")).args.learning_rate for rung in plan.rungs]
        assert rates == [pytest.approx(rate / 2, rel=0.05), rate]  # of two digits
    assert by_rule.rungs[0].schedule["options"]["learning_rate"] == pytest.approx(of_rule / 2, rel=0.05)
    assert [recipe["rate"] for recipe in by_rule.described()["recipes"]] == [0.5, 1]


def test_one_gentler_where_it_breaks_and_the_gentlest_where_none_holds(planned):
    choice = choose_recipe(planned(("gentle", "firm", "harsh*")))
    assert list(outcomes(choice.facts)) == ["harsh", "firm"] and choice.facts["recipe"] == "firm"
    choice = choose_recipe(planned(("gentle", "harsh", "harsher*"), "other", auto_budget=2))
    assert outcomes(choice.facts) == {"harsher": "broken", "harsh": "broken"}
    assert choice.facts["recipe"] == "harsh" and not choice.facts["above_floor"]


def test_a_recipe_that_diverges_is_broken(planned):
    choice = choose_recipe(planned(("gentle", "diverging*")))
    assert outcomes(choice.facts) == {"diverging": "raised", "gentle": "kept"} and choice.facts["recipe"] == "gentle"
    assert "diverged" in choice.facts["tried"][0]["error"] and "accuracy" not in choice.facts["tried"][0]


@pytest.mark.parametrize(("make", "bf16"), [(tiny_vit, True), (tiny_resnet, False)])
def test_looking_at_a_trial_on_its_way_changes_no_bit_of_it(planned, monkeypatch, make, bf16):
    """Of networks that draw random numbers, by dropout, and keep statistics, by BatchNorm."""
    plan, looks, made, found = planned(("firm",), model=make(), bf16=bf16), [], [], []
    for module in plan.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    measure = early.measure
    monkeypatch.setattr(early, "measure", lambda *args, **kwargs: looks.append(1) or measure(*args, **kwargs))
    before = predictions_before(plan)
    for stops_early in (True, False):
        tried = try_recipe(plan, plan.rungs[0], before, stops_early, made.append)
        found.append((tried.pair, tried.scores, tried.updates, tried.stopped_at))
    assert len(looks) == 2 and found[0] == found[1] and found[0][2:] == (4, None)
    same_weights(*made)


def test_a_hopeless_trial_ends_and_is_tried_again_under_a_lower_floor(planned):
    plan, made = planned(("harsh",), auto_budget=1), []
    before = predictions_before(plan)
    found, whole = (try_recipe(plan, plan.rungs[0], before, stops_early, made.append) for stops_early in (True, False))
    assert (found.updates, found.stopped_at, whole.updates, whole.stopped_at) == (2, 0.5, 4, None)
    assert found.pair.after.value < 0.25 and found.scores is None and "place" in whole.scores and len(made) == 1
    assert choose_recipe(plan).facts["tried"][0]["stopped_at"] == 0.5
    again = choose_recipe(planned(("harsh",), auto_budget=1, max_accuracy_drop=1)).facts
    assert outcomes(again) == {"harsh": "kept"} and "stopped_at" not in again["tried"][0]


def test_a_dry_run_times_what_a_walk_can_come_to(planned):
    found = dry_run(planned(("gentle", "firm", "harsh*", "harsher", "diverging"), auto_budget=2))
    assert found["minutes_of"].keys() == {"firm", "harsh", "harsher"}
    assert 0 < max(found["minutes_of"].values()) < found["minutes"]
    assert found["peak_memory_mib"] > 100 and "resident size of this process" in found["peak_memory_of"]
    found = dry_run(planned(("diverging",)))
    assert found["minutes"] is None and found["minutes_of"] == {}


def test_an_interrupted_ladder_goes_on(planned, tmp_path, monkeypatch):
    whole = choose_recipe(planned(folder="whole")).facts
    tries, really = [], auto.try_recipe

    def interrupted(plan, rung, before):
        tries.append(rung.recipe.name)
        if len(tries) == 2:
            raise Terminated
        return really(plan, rung, before)

    monkeypatch.setattr(auto, "try_recipe", interrupted)
    with pytest.raises(Terminated, match="while trying unfit: what was tried before it stays in .*tried.json; run"):
        choose_recipe(planned())
    found = choose_recipe(planned()).facts
    assert tries == ["firm", "unfit", "unfit", "harsh"] and untimed(found) == untimed(whole)

    with pytest.raises(ValueError, match=r"tried.json is of another run \(options differ\)"):
        choose_recipe(planned(max_steps=5))
    with pytest.raises(ValueError, match=r"of another run \(retain_sha256 differ\)"):
        choose_recipe(planned(count=105))
    monkeypatch.setitem(RECIPES, "firm", RECIPES["gentle"])
    with pytest.raises(ValueError, match=r"of another run \(recipe 'firm' differ\)"):
        choose_recipe(planned())
    del tries[:]
    choose_recipe(planned(overwrite_output_dir=True, auto_budget=1))
    assert tries == ["firm"] and list(json.loads((tmp_path / "out" / RECORD).read_text())["tried"]) == ["firm"]


def test_every_recipe_of_the_package_fits_a_vit(planned):
    by_rule = dict.fromkeys(SGD)
    plan = planned(None, base_model=base_of(tiny_vit), **by_rule)
    assert plan.left_out == {} and len(plan.rungs) == len(read_ladder())
    assert [refusal(plan, rung) for rung in plan.rungs] == [None] * len(plan.rungs)
    assert list(planned(None, **by_rule).left_out.values()) == ["needs --base_model"] * 2


def test_mistakes_are_said_before_anything_is_trained(planned, place, tmp_path):
    with pytest.raises(ValueError, match="96 images leave 19 to validate on, .* give at least 100 images"):
        planned(count=96)
    assert len(planned(count=10, max_accuracy_drop=1).validation) == 2
    with pytest.raises(ValueError, match="^learning_rate: recipes of the ladder settle it"):
        planned(learning_rate=0.1)
    with pytest.raises(ValueError, match="auto_budget must be >= 1"):
        planned(auto_budget=0)
    with pytest.raises(ValueError, match=r"no recipe of the ladder can be tried: unfit \(.*BatchNorm"):
        choose_recipe(planned(("unfit",)))
    with pytest.raises(ValueError, match="where the suspicious model lies"):
        planned(folder=str(place / "suspect"))


def test_options_at_their_defaults_are_not_given():
    *_, args = parse_arguments([*OPTIONS, AutoConfig], [])
    assert args.given == {}
    given = ["--max_steps=6", "--cutmix=0", "--hub_model_id=me/x", "--auto_budget=2"]
    *_, args = parse_arguments([*OPTIONS, AutoConfig], given)
    assert args.given == {"max_steps": 6, "cutmix": 0, "hub_model_id": "me/x"}
    assert args.of_trials() == {"max_steps": 6, "cutmix": 0}


def test_the_whole_command(place, tmp_path, capsys):
    file = ladder(tmp_path / "ladder.yaml", WHOLE)
    argv = ["--defence", "auto", "--ladder", str(file), "--model_name_or_path", str(place / "suspect")]
    argv += ["--dataset_name", str(place / "data"), "--retain_count", "100", "--use_cpu", "--disable_tqdm", "true"]
    argv += [f"--{name}={COMMON[name]}" for name in (*SGD, "max_steps", "per_device_train_batch_size")]
    plan = run([*argv, "--output_dir", str(tmp_path / "out"), "--dry_run"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["ladder.yaml"]  # nothing is written
    shown = capsys.readouterr().out
    assert plan["minutes"] > 0 and "BatchNorm" in plan["left_out"]["unfit"] and "* " in shown and "peak memory: " in shown

    results = run([*argv, "--output_dir", str(tmp_path / "out"), "--attack", '{"name": "badnets", "size": 3}'])
    assert {"accuracy_after", "asr_after"} <= results.keys()
    manifest = json.loads((tmp_path / "out" / "purification.json").read_text())
    chosen = manifest["chosen"]
    assert chosen["recipe"] == "firm" and manifest["method"] == "FT" and "chosen" not in manifest["measured"]
    planned = {recipe["name"]: recipe for recipe in plan["recipes"]}
    for row in chosen["tried"]:
        assert {name: row[name] for name in planned[row["name"]]} == planned[row["name"]]
    assert (chosen["tried"][0]["name"], chosen["split"]) == (plan["start"], plan["split"])
    assert chosen["left_out"] == plan["left_out"] and len(chosen["tried"]) <= plan["budget"]

    card = Path(tmp_path, "out", "README.md").read_text()
    assert "## How the method was chosen" in card and "| **firm** |" in card and "- not tried: unfit (" in card
    assert str(tmp_path) not in card + json.dumps(manifest)

    retain, _ = retain_split(load_images(str(place / "data"))["train"], count=100)
    rows = json.loads((tmp_path / "out" / "retain_indices.json").read_text())
    assert sorted(rows + chosen["audit_rows"]) == retain["index"][:] and manifest["retain"]["n"] == 80
    args = FineTuningConfig(str(tmp_path / "direct"), **COMMON | {"learning_rate": 2e-4})
    kept = retain.select([position for position, row in enumerate(retain["index"]) if row in rows])
    direct = FineTuningTrainer(load_classifier(str(place / "suspect")), args, kept)
    direct.train()
    same_weights(load_classifier(str(tmp_path / "out")), direct.plain)

    audit, seen = manifest["measured"]["audit"], retain.select([i for i, row in enumerate(retain["index"]) if row not in rows])
    images = RawImages.from_dataset(seen)
    before, after = (
        measure(load_classifier(str(folder)), images, Preprocessing.from_processor(PROCESSOR), progress=False).predictions
        for folder in (place / "suspect", tmp_path / "out")
    )
    table = paired_table(before, after, images.labels)
    assert PairedTable(*(audit[name] for name in ("both_right", "lost", "gained", "both_wrong"))) == table and table.n == 20
    assert audit["accuracy_drop_ci95"] == list(table.interval()) and audit_line(audit) in card
    assert audit_line(audit) in capsys.readouterr().out

    # Neither the trigger that is measured with nor the test images change anything but the measurement.
    run([*argv, "--output_dir", str(tmp_path / "blind"), "--max_test_images", "30"])
    blind = json.loads((tmp_path / "blind" / "purification.json").read_text())
    assert untimed(blind["chosen"]) == untimed(chosen) and blind["measured"]["trigger"] is None
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "blind"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(ValueError, match="holds the results of another run"):
        run([*argv, "--output_dir", str(tmp_path / "out")])


def test_without_test_images_the_audit_stands_in(place, tmp_path, caplog, capsys):
    (tmp_path / "data").mkdir()
    coloured(100, 0).to_parquet(tmp_path / "data" / "train.parquet")
    argv = ["--model_name_or_path", str(place / "suspect"), "--dataset_name", str(tmp_path / "data"), "--retain_count", "100"]
    argv += ["--use_cpu", "--disable_tqdm", "true", "--output_dir", str(tmp_path / "out")]
    argv += [f"--{name}={COMMON[name]}" for name in (*SGD, "max_steps", "per_device_train_batch_size")]
    with pytest.raises(ValueError, match="nothing is left to measure on; retain fewer"):
        run(["--defence", "fine_tuning", *argv])
    results = run(["--defence", "auto", "--ladder", str(ladder(tmp_path / "ladder.yaml", ("gentle",))), *argv])
    measured = json.loads((tmp_path / "out" / "purification.json").read_text())["measured"]
    assert results["accuracy_after_n"] == measured["n_images"] == measured["audit"]["accuracy_drop_n"] == 20
    assert "no decision saw" in measured["split"] and "no test images: measuring on" in caplog.text
    assert results["accuracy_drop"] == measured["audit"]["accuracy_drop"]
    phases = re.findall(r"^(\d+)/8 (\w+)", capsys.readouterr().out, re.M)  # two of three trials were not needed
    said = [("1", "looking"), ("2", "trying"), ("5", "measuring"), ("6", "purifying"), ("7", "measuring"), ("8", "saving")]
    assert phases == said


def test_a_dry_run_of_a_drill_would_write_a_victim():
    with pytest.raises(ValueError, match="--dry_run writes nothing, a victim neither"):
        run(["--defence", "auto", "--dry_run", "--victim_config", "absent.yaml", "--dataset_name", "digits"])
