"""Pushing to a Hub on the loopback interface, and loading from it; looked at from the server's side."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny import tiny_samples, tiny_vit, with_processor
from transformers import AutoModelForImageClassification, ViTForImageClassification

from d3_hf import D3Config, D3Trainer, RawImages, load_classifier, load_images, purify, retain_split
from d3_hf.attacks import BadNets

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

    card = ModelCard.load("me/model-purified")
    card.validate()
    card.data.base_model = "no model"
    with pytest.raises(ValueError, match="no model id"):
        card.validate()
    source = load_classifier("me/model-purified").source
    Path("seen.json").write_text(json.dumps({"out": out.oid, "results": results, "source": asdict(source)}))


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
        hub.seen = json.loads((folder / "seen.json").read_text())
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
    assert results == hub.seen["results"]
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
    assert hub.seen["source"] == {"kind": "hub", "name": "me/model-purified", "revision": sha, "sha256": None}
    _, suspicious, _ = pushed(hub, "them/suspicious")
    assert files["model.safetensors"] != suspicious["model.safetensors"]


def test_push_returns_the_commit(hub):
    assert hub.seen["out"] == pushed(hub, "me/out")[0]
