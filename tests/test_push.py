"""Pushing to a Hub on the loopback interface, and loading from it; looked at from the server's side."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import huggingface_hub
import pytest
import torch
from fake_hub import FakeHub, Repository
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny import tiny_samples, tiny_vit, with_processor
from transformers import AutoModelForImageClassification, ViTForImageClassification

from d3_hf import D3Config, D3Trainer, RawImages, load_classifier, load_images, purify, retain_split
from d3_hf import hub as pushing
from d3_hf.attacks import BadNets
from d3_hf.models.weights import sha256

TOKEN = "hf_testTESTtestTESTtestTESTtestTEST01"
MODEL_FILES = {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", "purification.json"}
FAST = dict(max_steps=2, per_device_train_batch_size=32, use_cpu=True, disable_tqdm=True)


def suspicious_model():
    config = tiny_vit().config
    config.num_labels = 10
    return with_processor(ViTForImageClassification(config))


def user_session():
    """What a user runs, in a process whose Hub is the fake one; the suspicious model is a folder here and a Hub repository."""
    model = load_classifier("suspicious")
    images = load_images("digits")
    retain, _ = retain_split(images["train"], fraction=0.05, seed=0)
    trainer = D3Trainer(model=model, args=D3Config(output_dir="out", **FAST), train_dataset=retain, eval_dataset=images["test"])
    trainer.train()
    trainer.save_model()
    out = trainer.push_to_hub()

    args = D3Config(output_dir="purified", push_to_hub=True, hub_model_id="me/model-purified", **FAST)
    trainer = D3Trainer(load_classifier("them/suspicious"), args, retain)
    results = purify(trainer, RawImages.from_dataset(images["test"]), BadNets(target_label=0))
    save_file(logits_of(trainer.model, load_classifier("me/model-purified")), "logits.safetensors")

    options = dict(save_strategy="steps", save_steps=1, hub_strategy="end", hub_model_id="samples", hub_private_repo=False)
    samples = D3Trainer(tiny_vit(), D3Config(output_dir="samples", push_to_hub=True, **options, **FAST), tiny_samples())
    samples.train()
    samples.save_model()

    args = D3Config(output_dir="proposed", push_to_hub=True, hub_create_pr=True, **FAST)
    proposed = D3Trainer(load_classifier("them/suspicious"), args, retain)
    proposed.train()
    pull_request = proposed.push_to_hub().pr_url

    card = ModelCard.load("me/model-purified")
    card.validate()
    card.data.base_model = "no model"
    with pytest.raises(ValueError, match="no model id"):
        card.validate()
    source = load_classifier("me/model-purified").source
    seen = {"out": out.oid, "results": results, "source": asdict(source), "pull_request": pull_request}
    Path("seen.json").write_text(json.dumps(seen))


def logits_of(pushed, loaded):
    """Logits of the model that was pushed and of its copies from the Hub, by `load_classifier` and by the Auto class."""
    models = {"pushed": pushed, "loaded": loaded, "auto": AutoModelForImageClassification.from_pretrained("me/model-purified")}
    pixels = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return {name: model.eval()(pixel_values=pixels).logits for name, model in models.items()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The Hub after `user_session`, with the session's folder, what it printed and what it saw."""
    folder = tmp_path_factory.mktemp("session")
    model = suspicious_model()
    model.save_pretrained(folder / "suspicious")
    model.image_processor.save_pretrained(folder / "suspicious")
    environment = {name: value for name, value in os.environ.items() if not re.match(r"HF_|TRANSFORMERS_|(?i:.*_proxy)$", name)}
    with FakeHub(TOKEN) as hub:
        hub.publish("them/suspicious", folder / "suspicious")
        # In a process of its own: huggingface_hub reads these when it is imported.
        environment |= dict(
            HF_ENDPOINT=hub.endpoint, HF_TOKEN=TOKEN, HF_HOME=str(folder / "home"), HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1", HF_DATASETS_OFFLINE="1", PYTHONPATH=str(Path(__file__).parent),
        )  # fmt: skip
        command = [sys.executable, "-c", "import test_push; test_push.user_session()"]
        session = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        hub.folder, hub.printed = folder, session.stdout + session.stderr
        assert session.returncode == 0, f"{hub.printed}\nnot answered: {hub.unanswered}"
        hub.seen_by_user = json.loads((folder / "seen.json").read_text())
        yield hub


def pushed(hub, repo):
    """A repository's newest commit, its files and its card."""
    sha, files = hub.repos[repo].commits[-1]
    return sha, files, ModelCard(files["README.md"].decode()) if "README.md" in files else None


@pytest.mark.parametrize(
    ("repo", "private", "further"),
    [
        ("me/out", True, {"retain_indices.json"}),
        ("me/model-purified", True, {"retain_indices.json", "all_results.json"}),
        ("me/samples", False, set()),
    ],
)
def test_what_is_pushed(hub, repo, private, further):
    _, files, card = pushed(hub, repo)
    assert set(files) == MODEL_FILES | further
    assert hub.repos[repo].private == private
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-classification"
    assert "purified" in card.data.tags and "**purified**" in card.text
    assert not re.search(r"\bclean\b|\bsafe\b", card.content.lower())
    assert f'model="{repo}"' in card.text and f"# {repo[3:]}\n" in card.text
    assert str(card) in hub.validated


def test_neither_token_nor_path_leaves_the_machine(hub):
    uploads = [data for repo in hub.repos.values() for _, files in repo.commits for data in files.values()]
    written = [file.read_bytes() for name in ("out", "purified", "samples") for file in (hub.folder / name).rglob("*.*")]
    assert len(uploads) > 15 and len(written) > 15
    assert not any(TOKEN.encode() in data for data in [*uploads, *written, hub.printed.encode()])
    assert not any(str(hub.folder).encode() in data for data in uploads)


def test_checkpoints_stay_at_home(hub):
    assert (hub.folder / "samples" / "checkpoint-1" / "optimizer.pt").is_file()
    assert not any("checkpoint" in file for _, files in hub.repos["me/samples"].commits for file in files)


def test_pushing_on_the_way_is_refused(tmp_path):
    args = D3Config(str(tmp_path), push_to_hub=True, save_strategy="steps", hub_strategy="every_save", **FAST)
    with pytest.raises(ValueError, match="set hub_strategy='end'"):
        D3Trainer(tiny_vit(), args, tiny_samples())


def test_card_has_what_was_measured(hub):
    _, files, card = pushed(hub, "me/model-purified")
    results = json.loads(files["all_results.json"])
    assert results == hub.seen_by_user["results"]
    assert {(r.metric_type, r.dataset_config): r.metric_value for r in card.data.eval_results} == {
        ("accuracy", "as they are"): results["accuracy_after"],
        ("attack_success_rate", "triggered by badnets"): results["asr_after"],
        ("robust_accuracy", "triggered by badnets"): results["ra_after"],
    }
    _, _, unmeasured = pushed(hub, "me/out")
    assert unmeasured.data.eval_results is None and "Nothing was measured" in unmeasured.text


def test_lineage(hub):
    origin, _, _ = pushed(hub, "them/suspicious")
    _, files, card = pushed(hub, "me/model-purified")
    assert (card.data.base_model, card.data.base_model_relation) == ("them/suspicious", "finetune")
    assert f"| revision | `{origin}` |" in card.text
    source = {"kind": "hub", "name": "them/suspicious", "revision": origin, "sha256": None}
    assert json.loads(files["purification.json"])["source"] == source


def test_a_folder_is_no_base_model(hub):
    _, files, card = pushed(hub, "me/out")
    assert card.data.base_model is None
    source = json.loads(files["purification.json"])["source"]
    assert (source["kind"], source["name"], source["revision"]) == ("folder", "suspicious", None)


@pytest.mark.parametrize("repo", ["me/out", "me/model-purified"])
def test_retain_set_can_be_drawn_again(hub, repo):
    _, files, _ = pushed(hub, repo)
    retain, _ = retain_split(load_images("digits")["train"], fraction=0.05, seed=0)
    assert json.loads(files["retain_indices.json"]) == list(retain["index"])
    assert json.loads(files["purification.json"])["retain"]["n"] == len(retain)


def test_loaded_from_the_hub_is_what_was_pushed(hub):
    logits = load_file(hub.folder / "logits.safetensors")
    assert torch.equal(logits["loaded"], logits["pushed"]) and torch.equal(logits["auto"], logits["pushed"])
    sha, files, _ = pushed(hub, "me/model-purified")
    assert hub.seen_by_user["source"] == {"kind": "hub", "name": "me/model-purified", "revision": sha, "sha256": None}
    _, suspicious, _ = pushed(hub, "them/suspicious")
    assert files["model.safetensors"] != suspicious["model.safetensors"]


def test_push_returns_the_commit(hub):
    assert hub.seen_by_user["out"] == pushed(hub, "me/out")[0]


def test_pull_request_on_the_source(hub):
    origin, _, _ = pushed(hub, "them/suspicious")
    ((parent, files),) = hub.repos["them/suspicious"].pulls
    assert parent == origin and set(files) == MODEL_FILES | {"retain_indices.json"}
    assert hub.seen_by_user["pull_request"] == f"{hub.endpoint}/them/suspicious/discussions/1"
    assert 'model="them/suspicious"' in files["README.md"].decode() and "me/proposed" not in hub.repos


def test_what_the_hub_says_of_the_source_is_recorded(hub):
    _, files, card = pushed(hub, "me/model-purified")
    checks = json.loads(files["purification.json"])["source_checks"]
    assert checks["security_scan"] == {"scansDone": True, "filesWithIssues": []}
    assert checks["checksums"] == {"compared": 3, "differ": []}
    assert '"scansDone": true' in card.text
    assert "source_checks" not in json.loads(pushed(hub, "me/out")[1]["purification.json"])


# In this process, against a Hub of their own ---------------------------------------------------------------------------------


@pytest.fixture
def own_hub(tmp_path, monkeypatch):
    """A Hub that this process talks to, without waiting between retries."""
    with FakeHub(TOKEN) as hub:
        url = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": hub.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": url, "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
        }.items():  # fmt: skip
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setattr(pushing, "TIMEOUT", 0.3)
        yield hub
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def purified(tmp_path_factory):
    """A purified model's folder, with things beside it that nobody should get."""
    folder = tmp_path_factory.mktemp("purified") / "run"
    options = dict(save_strategy="steps", save_steps=1, **FAST)
    trainer = D3Trainer(tiny_vit(), D3Config(str(folder), **options), tiny_samples())
    trainer.train()
    trainer.save_model()
    for name in ("training_args.bin", "weights.pth", "notes.txt", ".env", "other.safetensors", "path.png"):
        (folder / name).write_text(TOKEN)
    return folder


def contents(folder):
    return {file.name: sha256(file) for file in folder.rglob("*") if file.is_file()}


def test_only_what_is_listed_goes_up(own_hub, purified):
    pushing.push_folder(purified, "model")
    files = own_hub.repos["me/model"].commits[-1][1]
    assert set(files) == MODEL_FILES | {"path.png"} and own_hub.repos["me/model"].private
    assert b'model="me/model"' in files["README.md"]


REQUESTS = ("create", "validate", "preupload", "commit")


def test_these_are_all_the_requests_of_a_push(own_hub, purified):
    pushing.push_folder(purified, "me/model")
    assert set(own_hub.seen) == set(REQUESTS)


@pytest.mark.parametrize("how", ["500", "429", "reset", "slow"])
@pytest.mark.parametrize("request_name", REQUESTS)
def test_a_failed_push_costs_nothing_and_is_finished_by_another(own_hub, purified, request_name, how):
    before = contents(purified)
    own_hub.broken = (request_name, how)
    with pytest.raises(OSError) as failed:
        pushing.push_folder(purified, "me/model", private=False)
    assert re.fullmatch(
        rf"the push to me/model failed \(.+\); {purified} is whole. Finish it with: "
        rf"d3-hf push {purified} --hub_model_id me/model --hub_private_repo false",
        str(failed.value),
    )
    assert TOKEN not in str(failed.value) and contents(purified) == before
    own_hub.broken = None
    pushing.push_folder(purified, "me/model", private=False)
    assert set(own_hub.repos["me/model"].commits[-1][1]) == MODEL_FILES | {"path.png"}


def test_the_trainer_saves_before_it_pushes(own_hub, tmp_path):
    own_hub.broken = ("create", "500")
    args = D3Config(str(tmp_path / "run"), push_to_hub=True, hub_model_id="me/model", **FAST)
    trainer = D3Trainer(tiny_vit(), args, tiny_samples())
    trainer.train()
    with pytest.raises(OSError, match="is whole. Finish it with: d3-hf push"):
        trainer.push_to_hub()
    assert {file.name for file in (tmp_path / "run").iterdir()} == MODEL_FILES
    load_classifier(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda folder: (folder / "purification.json").unlink(), {}, FileNotFoundError, "no folder of a purified model"),
        (lambda folder: (folder / "model.safetensors").unlink(), {}, FileNotFoundError, "the weights are not whole"),
        (lambda folder: (folder / "plot.png").symlink_to("/etc/hostname"), {}, ValueError, "plot.png is a link out of the"),
        (lambda folder: (folder / "purification.json").write_text("{"), {}, ValueError, "is no manifest of a purification"),
        (lambda folder: None, {"repo": None}, ValueError, "name one place to push to"),
        (lambda folder: None, {"create_pr": True}, ValueError, "name one place to push to"),
        (lambda folder: None, {"repo": None, "create_pr": True}, ValueError, "but ViTForImageClassification is none"),
    ],
)
def test_what_is_not_pushed(purified, tmp_path, change, options, error, message):
    folder = Path(shutil.copytree(purified, tmp_path / "run"))
    change(folder)
    with pytest.raises(error, match=message):
        pushing.push_folder(folder, **({"repo": "me/model"} | options))


def test_a_rejected_model_is_not_pushed(purified, tmp_path):
    folder = Path(shutil.copytree(purified, tmp_path / "run"))
    facts = json.loads((folder / "purification.json").read_text())
    (folder / "purification.json").write_text(json.dumps(facts | {"measured": {"rejected": ["ACC fell"]}}))
    with pytest.raises(ValueError, match=r"was rejected and is not pushed \(ACC fell\)"):
        pushing.push_folder(folder, "me/model")


@pytest.mark.parametrize(
    ("options", "token", "message"),
    [
        ({"hub_model_id": "me/model"}, None, "log in with `hf auth login` or set HF_TOKEN"),
        ({"hub_create_pr": True}, TOKEN, "opens a pull request on the source's repository, but"),
    ],
)
def test_what_would_stop_the_push_is_said_at_the_start(tmp_path, monkeypatch, options, token, message):
    monkeypatch.setattr(pushing, "get_token", lambda: token)
    with pytest.raises(ValueError, match=message):
        D3Trainer(tiny_vit(), D3Config(str(tmp_path), push_to_hub=True, **options, **FAST), tiny_samples())


@pytest.mark.parametrize("options", [{}, {"push_to_hub": True, "hub_model_id": "me/model"}])
def test_a_pull_request_needs_a_push_and_no_repository(options):
    with pytest.raises(ValueError, match="give --push_to_hub and leave hub_model_id out"):
        D3Config("x", hub_create_pr=True, **options, **FAST)


def test_without_the_hub_its_checks_are_not_available():
    source = {"kind": "hub", "name": "them/suspicious", "revision": "a" * 40, "sha256": None}
    assert pushing.source_checks(source) == {"security_scan": "not available", "checksums": "not available"}
    assert pushing.source_checks(source | {"kind": "folder"}) is None


def test_files_that_changed_since_they_were_fetched_are_named(own_hub, tmp_path, caplog):
    publish(own_hub, repository(tmp_path))
    source = asdict(load_classifier("them/hostile").source)
    assert pushing.source_checks(source)["checksums"] == {"compared": 3, "differ": []}
    next((tmp_path / "cache").rglob("snapshots/*/config.json")).resolve().write_text("{}")
    assert pushing.source_checks(source)["checksums"] == {"compared": 3, "differ": ["config.json"]}
    assert "them/hostile: not as in the repository: config.json" in caplog.text


# Hostile repositories --------------------------------------------------------------------------------------------------------


def repository(tmp_path):
    """The files of a repository with a good model."""
    model = suspicious_model()
    model.save_pretrained(tmp_path / "model"), model.image_processor.save_pretrained(tmp_path / "model")
    return {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}


def publish(hub, files):
    hub.repos["them/hostile"] = repo = Repository(private=False, commits=[])
    return repo.commit(files)


def test_a_pickle_is_not_even_fetched(own_hub, tmp_path):
    files = repository(tmp_path)
    publish(own_hub, {name.replace("model.safetensors", "pytorch_model.bin"): data for name, data in files.items()})
    with pytest.raises(FileNotFoundError, match="them/hostile holds no model.safetensors"):
        load_classifier("them/hostile")
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_remote_code_is_refused_and_never_fetched(own_hub, tmp_path):
    files = repository(tmp_path)
    config = json.loads(files["config.json"]) | {"auto_map": {"AutoModelForImageClassification": "modeling.Net"}}
    for number, changed in enumerate((config, config | {"model_type": "my_net"})):
        publish(own_hub, files | {"config.json": json.dumps(changed).encode(), "modeling.py": b"raise SystemExit"})
        if number:
            with pytest.raises(ValueError, match="needs Python code of its repository"):
                load_classifier("them/hostile")
        else:  # a network that transformers has is built from its own code
            assert isinstance(load_classifier("them/hostile"), ViTForImageClassification)
    assert not list((tmp_path / "cache").rglob("*.py"))


@pytest.mark.parametrize("name", ["model-/../../../../../out-of-.safetensors", "../model-1-of-1.safetensors"])
def test_a_name_that_leaves_the_folder_is_refused_or_never_asked_for(own_hub, tmp_path, name):
    publish(own_hub, repository(tmp_path) | {name: b"evil"})
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    if name.startswith("model-"):
        with pytest.raises(OSError, match="them/hostile at revision main: Invalid filename .* cannot contain a '..'"):
            load_classifier("them/hostile")
    else:  # no name that is asked for
        load_classifier("them/hostile")
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"evil"]


def test_all_files_are_of_the_commit_that_was_read_first(own_hub, tmp_path):
    files = repository(tmp_path)
    first = publish(own_hub, files)
    other = suspicious_model()
    other.save_pretrained(tmp_path / "other")

    def change(request):
        if request == "info" and len(own_hub.repos["them/hostile"].commits) == 1:
            own_hub.repos["them/hostile"].commit({f.name: f.read_bytes() for f in (tmp_path / "other").iterdir()})

    own_hub.before_sending = change
    model = load_classifier("them/hostile")
    assert model.source.revision == first and len(own_hub.repos["them/hostile"].commits) == 2
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(model.classifier.weight, weights["classifier.weight"])
