"""What is fetched from a Hub repository, and what is said where that fails: against a Hub on the loopback interface."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from fake_hub import _Handler, _Refused, logged_in
from networks import logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from d3_hf import load_images
from d3_hf.models import load_classifier

SAFE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with logged_in(monkeypatch) as server:
        url = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def folder(vit_folder, tmp_path):
    return shutil.copytree(vit_folder, tmp_path / "model")


def cached(tmp_path):
    (snapshot,) = (tmp_path / "cache").glob("models--*/snapshots/*")
    return snapshot


def test_an_adapter_of_a_repository_is_seen(hub, folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "google/vit"}))
    hub.publish("me/vit", folder)
    with pytest.raises(ValueError, match="me/vit holds a PEFT adapter of google/vit"):
        load_classifier("me/vit")


def test_an_encoder_of_the_hub_gets_a_new_head(hub, folder):
    weights = load_file(folder / SAFE)
    save_file({name: weights[name] for name in weights if "classifier" not in name}, folder / SAFE, {"format": "pt"})
    hub.publish("me/encoder", folder)
    with pytest.raises(ValueError, match="^me/encoder is an encoder without a head"):
        load_classifier("me/encoder")
    model = load_classifier("me/encoder", new_head=["a", "b"])
    assert model.config.num_labels == 2 and torch.equal(model.vit.layernorm.weight, weights["vit.layernorm.weight"])
    assert model.source.kind == "hub" and model.source.revision


def test_a_processor_of_transformers_5_is_fetched(hub, folder):
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    hub.publish("me/vit", folder)
    assert load_classifier("me/vit").image_processor.to_dict() == load_classifier(folder).image_processor.to_dict()


def test_shards_of_a_repository_are_those_of_its_index(hub, vit_folder, folder, tmp_path):
    (folder / SAFE).unlink()
    AutoModelForImageClassification.from_pretrained(vit_folder).save_pretrained(folder, max_shard_size="12KB")
    index = json.loads((folder / INDEX).read_text())
    for file in set(index["weight_map"].values()):  # names that only the index tells
        (folder / file).rename(folder / file.replace("model-", "part."))
    index["weight_map"] = {name: file.replace("model-", "part.") for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    hub.publish("me/vit", folder)
    assert torch.equal(logits(load_classifier("me/vit")), logits(load_classifier(vit_folder)))
    save_file({"a": torch.zeros(1)}, folder / "model-00001-of-00009.safetensors")
    hub.publish("me/older", folder)
    with pytest.raises(ValueError, match="me/older holds shards that .* does not name"):
        load_classifier("me/older")
    index["weight_map"]["a"] = "../evil.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    hub.publish("me/evil", folder)
    with pytest.raises(ValueError, match=r"names ../evil.safetensors, which is no"):
        load_classifier("me/evil")


def test_pickles_are_neither_fetched_nor_opened_but_told(hub, folder, tmp_path, caplog):
    torch.save(load_file(folder / SAFE) | {"classifier.bias": torch.ones(10)}, folder / "pytorch_model.bin")
    hub.publish("me/vit", folder)
    load_classifier("me/vit")
    assert "me/vit also holds pytorch_model.bin: not compared with the weights that are loaded" in caplog.text
    assert not (cached(tmp_path) / "pytorch_model.bin").exists()
    shutil.copy(folder / "pytorch_model.bin", cached(tmp_path))  # as another program leaves it there
    load_classifier("me/vit")
    (folder / SAFE).unlink()
    hub.publish("me/pickled", folder)
    with pytest.raises(FileNotFoundError, match="me/pickled holds no model.safetensors"):
        load_classifier("me/pickled")


def test_a_gated_repository(hub, folder, monkeypatch):
    hub.publish("me/vit", folder)

    def gated(self, name, write=False):
        raise _Refused(403, "GatedRepo", {})

    monkeypatch.setattr(_Handler, "repository", gated)
    with pytest.raises(FileNotFoundError, match=rf"me/vit is gated: ask for access at {hub.endpoint}/me/vit, then log in"):
        load_classifier("me/vit")


def test_a_private_repository(hub, folder, monkeypatch):
    hub.publish("me/vit", folder)
    hub.repos["me/vit"].private = True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match="me/vit is no local path, .*if it is private log in .hf auth login, or HF_T"):
        load_classifier("me/vit")


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_what_keeps_it_offline_is_named(monkeypatch, name):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=f"cannot be reached: {name} keeps it offline: unset it$"):
        load_classifier("me/nothing")
    with pytest.raises(OSError, match=f"{name} keeps it offline: unset it. Check the name"):
        load_images("me/nothing")
