"""The manifest's own facts, and what the cards say beside them."""

import importlib.metadata
import json
import re

import pytest
import torch
from places import ROOT
from tiny import FAST, tiny_samples, tiny_vit

import d3_hf
from d3_hf.defenses.d3.trainer import D3Config, D3Trainer
from d3_hf.publishing import manifest
from d3_hf.publishing.card import TEMPLATES


def test_a_run_from_a_checkout_that_is_not_installed_is_saved(tmp_path, monkeypatch):
    def version(name):
        if name == "d3_hf":  # accelerate before 1.13 asks for torch's
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(manifest, "PACKAGES", (*manifest.PACKAGES, "absent"))
    trainer = D3Trainer(tiny_vit(), D3Config(str(tmp_path), **FAST), tiny_samples())
    trainer.train()
    trainer.save_model()
    found = json.loads((tmp_path / "purification.json").read_text())["versions"]
    assert (found["d3_hf"], found["torch"], found["absent"]) == (d3_hf.__version__, torch.__version__, "unknown")


def test_the_version_is_written_down_once():
    project = (ROOT / "pyproject.toml").read_text()
    assert not re.search(r"^version = \"", project, re.M) and 'version = { attr = "d3_hf.__version__" }' in project


@pytest.mark.parametrize("card", ["purified_card.md", "victim_card.md", "encoder_victim_card.md"])
def test_what_a_card_tells_to_call_is_public(card):
    called = re.findall(r"`d3_hf\.(\w+)", (TEMPLATES / card).read_text())
    assert set(called) <= set(d3_hf.__all__)
