"""Other libraries: picklescan on a pickled source; the extras model-signing on the output folder, trackio as the tracker."""

import json
import pickle
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from tiny import tiny_samples, tiny_vit

from d3_hf.defenses.d3.trainer import D3Config, D3Trainer
from d3_hf.models.load import Source, load_classifier
from d3_hf.publishing import hub
from d3_hf.publishing.card import render_card
from d3_hf.publishing.signature import signed_files

FAST = {"max_steps": 2, "disable_tqdm": True, "use_cpu": True}


class Runs:
    def __reduce__(self):
        return print, ("executed",)


def source(file):
    return {"kind": "file", "name": str(file), "revision": None, "sha256": None}


def test_picklescan_says_what_a_file_imports(tmp_path, caplog):
    torch.save(tiny_vit().state_dict(), tmp_path / "weights.pth")
    found = hub.source_checks(source(tmp_path / "weights.pth"))["pickle_scan"]
    assert found["issues"] == 0 and "collections.OrderedDict" in found["globals"] and not caplog.text
    (tmp_path / "hostile.pt").write_bytes(pickle.dumps(Runs()))
    found = hub.source_checks(source(tmp_path / "hostile.pt"))["pickle_scan"]
    assert found["globals"] == ["builtins.print"] and found["issues"] + found["suspicious"] == 1


def test_a_folder_with_pickled_weights_is_scanned_too(tmp_path):
    model = tiny_vit()
    model.save_pretrained(tmp_path), model.image_processor.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    checks = hub.source_checks(asdict(load_classifier(tmp_path).source))
    assert checks["pickle_scan"]["issues"] == 0 and "collections.OrderedDict" in checks["pickle_scan"]["globals"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_every_shard_is_scanned(kind, tmp_path):
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    torch.save(tiny_vit().state_dict(), tmp_path / shards[0])
    (tmp_path / shards[1]).write_bytes(pickle.dumps(Runs()))
    digests = dict.fromkeys(["pytorch_model.bin.index.json", *shards], "0" * 64)
    place = tmp_path if kind == "folder" else tmp_path / "pytorch_model.bin.index.json"
    found = hub.source_checks({"kind": kind, "name": str(place), "revision": None, "sha256": digests})["pickle_scan"]
    assert {"builtins.print", "collections.OrderedDict"} <= set(found["globals"]) and found["issues"] + found["suspicious"] == 1


def test_the_card_shows_the_scan(tmp_path):
    trainer = D3Trainer(tiny_vit(), D3Config(str(tmp_path), **FAST), tiny_samples())
    trainer.train()
    facts = trainer.facts() | {"source_checks": {"pickle_scan": {"issues": 0, "suspicious": 0, "globals": []}}}
    card = str(render_card(facts, None, "x"))
    assert '| picklescan on the source | `{"globals": [], "issues": 0, "suspicious": 0}` |' in card


def test_a_source_that_cannot_be_scanned_any_more_costs_no_run(tmp_path, caplog):
    model = tiny_vit()
    model.source = Source("file", str(tmp_path / "gone.pth"), sha256={"gone.pth": "0" * 64})
    trainer = D3Trainer(model, D3Config(str(tmp_path / "run"), **FAST), tiny_samples())
    trainer.train()
    trainer.save_model()
    facts = json.loads((tmp_path / "run" / "purification.json").read_text())
    assert facts["source_checks"] == {"pickle_scan": "not available"} and "gone.pth: not scanned" in caplog.text


def test_only_pickles_are_scanned(tmp_path):
    assert hub.source_checks(source(tmp_path / "a.safetensors")) is None


@pytest.fixture
def purified(tmp_path):
    trainer = D3Trainer(tiny_vit(), D3Config(str(tmp_path / "purified"), **FAST), tiny_samples())
    trainer.train()
    trainer.save_model()
    return tmp_path / "purified"


def signing(verb, folder, *options):
    """The README's command; the card is left out, since a push writes the repository's name into it."""
    paths = ["--signature", str(folder / "model.sig"), "--ignore-paths", str(folder / "README.md")]
    command = [sys.executable, "-m", "model_signing", verb, "key", str(folder), *paths, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_signed_folder_verifies_until_it_is_changed(purified, tmp_path):
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    plain = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "key.pem").write_bytes(plain)
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pub").write_bytes(public)
    done = signing("sign", purified, "--private_key", str(tmp_path / "key.pem"))
    assert done.returncode == 0, done.stderr
    assert "model.sig" in [file.name for file in hub.published_files(purified)]
    assert signed_files(purified / "model.sig") == {file.name for file in purified.iterdir()} - {"model.sig", "README.md"}
    assert signing("verify", purified, "--public_key", str(tmp_path / "key.pub")).returncode == 0
    with (purified / "config.json").open("a") as file:
        file.write(" ")
    assert signing("verify", purified, "--public_key", str(tmp_path / "key.pub")).returncode != 0


@pytest.mark.slow
def test_trackio_gets_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip("trackio")
    args = D3Config(str(tmp_path / "run"), report_to="trackio", logging_steps=1, project="d3", run_name="one", **FAST)
    trainer = D3Trainer(tiny_vit(), args, tiny_samples())
    trainer.train()
    written = b"".join(file.read_bytes() for file in (tmp_path / "trackio").rglob("*") if file.is_file())
    assert b"clean_loss" in written and b"distance" in written
