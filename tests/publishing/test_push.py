"""Pushing to a Hub on the loopback interface, and loading from it, as a user does; looked at from the server's side."""

import json
import os
import re
import subprocess
import sys

import hub_session
import pytest
import torch
from fake_hub import FakeHub
from hub_session import FAST, MODEL_FILES, TOKEN, suspicious_model
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import PROCESSOR, tiny_samples, tiny_vit

from d3_hf import D3Config, D3Trainer, RawImages, load_images, retain_split
from d3_hf.data.preprocessing import Preprocessing
from d3_hf.data.training_images import TrainingImages
from d3_hf.files import sha256
from d3_hf.publishing.pictures.of_card import CLASSES, TRIGGERED


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The Hub after `hub_session`, with the session's folder, what it printed and what it saw."""
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
            HF_HUB_DISABLE_TELEMETRY="1", HF_DATASETS_OFFLINE="1",
        )  # fmt: skip
        command = [sys.executable, hub_session.__file__]
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
        ("me/model-purified", True, {"retain_indices.json", "all_results.json", CLASSES, TRIGGERED}),
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
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "accuracy": results["accuracy_after"],
        "attack_success_rate": results["asr_after"],
        "robust_accuracy": results["ra_after"],
        "poisoned_accuracy": results["pacc_after"],
    }
    assert card.data.datasets == ["them/digits"]
    assert {(result.dataset_type, result.dataset_split) for result in card.data.eval_results} == {("them/digits", "test")}
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
    weights = hub.folder / "suspicious" / "model.safetensors"
    assert source["sha256"]["model.safetensors"] == sha256(weights) and "| source | folder `suspicious` |" in card.text


def test_a_local_data_set_is_known_by_its_last_name_and_its_content(hub):
    _, files, card = pushed(hub, "me/out")
    retain = json.loads(files["purification.json"])["retain"]
    images, _ = retain_split(load_images("digits")["train"], fraction=0.05, seed=0)
    used = TrainingImages.from_raw(RawImages.from_dataset(images), Preprocessing.from_processor(PROCESSOR))
    assert retain["source"] == "trusted" and retain["sha256"] == used.fingerprint()
    assert "of `trusted`, rows" in card.text
    assert "sha256" not in json.loads(pushed(hub, "me/model-purified")[1]["purification.json"])["retain"]


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
