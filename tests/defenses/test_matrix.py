"""What every defence must do alike: one row a promise, one column a defence."""

import json
import shutil

import jsonschema
import pytest
import torch
from every_defence import ALL_AT_ONCE, NETWORKS, OPTIONS, STREAMED, build, required
from places import ROOT
from streamed import NAMES, stream, write_files
from tiny_trained import assert_reloads, differing, trained

from d3_hf.defenses import DEFENCES, defence
from d3_hf.training.config import RANGES, declared

SCHEMA = ROOT / "d3_hf" / "publishing" / "schemas" / "purification.schema.json"
LOOPED = [name for name in DEFENCES if name not in ALL_AT_ONCE]
SAVING = {"save_strategy": "steps", "save_steps": 2}
WRONG = {  # a number outside of each range
    ">= 0 and finite": (-1, float("inf"), float("nan")),
    "> 0 and finite": (0, float("inf"), float("nan")),
    ">= 1": (0, float("nan")),
    "in (0, 1]": (0, 1.5, float("nan")),
    "in [0, 1]": (-0.5, 1.5, float("nan")),
    "in [0, 1)": (-0.5, 1, float("nan")),
    "in (0, 1)": (0, 1, float("nan")),
    "in (0, 4]": (0, 4.5, float("nan")),
}


@pytest.fixture(scope="module", params=LOOPED)
def whole(request, tmp_path_factory):
    """The name of a defence and its uninterrupted run, with checkpoints."""
    run = build(request.param, tmp_path_factory.mktemp(request.param) / "run", **SAVING)
    run.train()
    return request.param, run


def test_a_run_resumed_in_its_own_folder_ends_as_the_uninterrupted_one(whole, tmp_path):
    name, run = whole
    shutil.copytree(run.args.output_dir, tmp_path / "run")
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-2":
            shutil.rmtree(checkpoint)
    resumed = build(name, tmp_path / "run", **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert differing(resumed.model, run.model) == []
    assert json.dumps(said(resumed)) == json.dumps(said(run))


def said(run):
    """The manifest without what tells one run from another."""
    return {key: value for key, value in run.facts().items() if key not in ("measured", "versions")}


def test_a_checkpoint_of_another_suspicious_model_is_refused(whole, tmp_path):
    name, run = whole
    other = trained(NETWORKS[name])
    with torch.no_grad():
        next(other.parameters()).add_(0.01)
    checkpoint = next(path for path in sorted((tmp_path / run.args.output_dir).glob("checkpoint-2")))
    with pytest.raises(ValueError, match="checkpoint-2 belongs to a run from another model: resume with the suspicious model"):
        build(name, tmp_path / "run", other, **SAVING).train(resume_from_checkpoint=str(checkpoint))


def test_the_same_seed_gives_the_same_weights_and_saving_gives_the_model(whole, tmp_path):
    name, run = whole
    again = build(name, tmp_path)
    again.train()
    assert differing(again.model, run.model) == []
    assert_reloads(again, tmp_path)


def test_manifest_and_card_name_method_source_and_options(whole, tmp_path):
    name, run = whole
    run.save_model(str(tmp_path))
    facts, card = json.loads((tmp_path / "purification.json").read_text()), (tmp_path / "README.md").read_text()
    jsonschema.validate(facts, json.loads(SCHEMA.read_text()))
    assert facts["method"] == run.method and facts["paper"] in card and run.method in card
    assert facts["reference_sha256"] == run.reference_sha256 and facts["retain"]["n"] == 40
    assert set(OPTIONS[name]) <= set(facts["arguments"])
    told = [*facts["changed_options"], *facts.get("schedule", {}).get("options", ())]
    assert "per_device_train_batch_size" in told
    assert all(f"`{option}`" in card for option in told)
    assert not {path.name for path in tmp_path.iterdir()} & {"training_args.bin", "optimizer.pt"}


def test_nothing_of_the_run_stays_in_the_model(whole):
    _, run = whole
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in run.model.modules())
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in run.model.parameters())


@pytest.mark.parametrize("name", ALL_AT_ONCE)
def test_a_search_for_masks_repeats_itself_and_leaves_nothing_in_the_model(name, tmp_path):
    runs = [build(name, tmp_path / folder) for folder in "ab"]
    for run in runs:
        # As a command line says that nothing is resumed, and as a job that was put back into the queue says that it may.
        run.train(resume_from_checkpoint="false" if run is runs[0] else "true")
    assert differing(runs[0].model, runs[1].model) == []
    assert all(parameter.grad is None for parameter in runs[0].model.parameters())
    with pytest.raises(ValueError, match="writes no checkpoints to resume from"):
        build(name, tmp_path / "c").train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# TSC moves along its curves whatever the rate; `test_tsc.py` makes both ends the same.
@pytest.mark.parametrize("name", [name for name in LOOPED if name != "tsc"])
def test_a_run_in_which_nothing_moves_raises(name, tmp_path):
    run = build(name, tmp_path, learning_rate=0.0)
    with pytest.raises(RuntimeError, match="not purified"):
        run.train()
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("name", LOOPED)
def test_bf16_trains_weights_that_stay_float32(name, tmp_path):
    run = build(name, tmp_path, bf16=True)
    run.train()
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    assert differing(run.model, trained(NETWORKS[name])) and all(p.isfinite().all() for p in run.model.parameters())


@pytest.mark.parametrize("name", DEFENCES)
def test_a_streamed_retain_set_is_read_or_refused(name, tmp_path):
    model = trained(NETWORKS[name])
    model.config.id2label = dict(enumerate(NAMES))
    images = stream(write_files(tmp_path / "data", files=1))
    options = {} if name == "tsc" else {"max_steps": 2, "num_train_epochs": 1}  # TSC's stages are counted in epochs
    if name in STREAMED:
        build(name, tmp_path / "run", model, images, **options).train()
    else:
        with pytest.raises(ValueError, match="as a whole: load it without streaming=True"):
            build(name, tmp_path / "run", model, images, **options)


def options_with(key):
    """Each option of each defence whose field declares ``key``: defence, option, what is declared."""
    return [(name, option, found) for name in DEFENCES for option, found in declared(defence(name)[0], key).items()]


@pytest.mark.parametrize(("name", "option", "needed"), options_with("range"))
def test_a_number_out_of_its_range_is_refused_by_name(name, option, needed, tmp_path):
    assert WRONG.keys() == RANGES.keys()
    config_class, _ = defence(name)
    is_list = isinstance(getattr(config_class(str(tmp_path), **required(name)), option), list)
    for number in WRONG[needed]:
        with pytest.raises(ValueError, match=f"^{option} must be "):
            config_class(str(tmp_path), **{option: [0.5, number] if is_list else number})


@pytest.mark.parametrize(("name", "option", "choices"), options_with("choices"))
def test_what_is_no_choice_is_refused_by_name(name, option, choices, tmp_path):
    with pytest.raises(ValueError, match=f"^{option} must be one of {', '.join(choices)}; got 'nothing'"):
        defence(name)[0](str(tmp_path), **{option: "nothing"})


def test_every_defence_is_small_and_touches_no_checkpoint():
    for name, (module, _) in DEFENCES.items():
        place = ROOT / "d3_hf" / "defenses" / module
        files = list(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
        for file in files:
            text = file.read_text()
            assert "_load_from_checkpoint" not in text and "json.loads" not in text, f"{name}: {file.name}"
