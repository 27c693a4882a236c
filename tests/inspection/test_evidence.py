"""Evidence at the end of a purification: what stands in manifest and card, and that nothing of the model changes."""

import json

import pytest
import torch
import yaml
from command_line import command
from shortcut import TARGET, classifier, network, pictures
from tiny import FAST, NEW_VIT

from d3_hf.files import sha256
from d3_hf.inspection.evidence import MOST_IMAGES, evidence_of
from d3_hf.publishing.inspection.evidence import evidence_section


def purified():
    """Without the shortcut."""
    return classifier(network())


def test_what_is_evident_and_what_the_card_says():
    model, suspicious, images = purified(), classifier(network(20)), pictures(400)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found = json.loads(json.dumps(evidence_of(model, lambda: suspicious, images), allow_nan=False))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert found["images"] == found["accuracy"]["accuracy_before_n"] == MOST_IMAGES
    assert found["signals"].keys() == {"head_rows", "latent_shift"}
    assert found["signals"]["head_rows"]["before"]["suspect_class"] == f"class {TARGET}"
    text = evidence_section(found)
    assert text.startswith("## Evidence without the trigger\n") and f'head_rows: "class {TARGET}" stood out most' in text
    assert "**The class that stood out most no longer does by 2 of 2 signals.**" in text and "What this cannot see" in text
    assert evidence_section(None) == evidence_section({}) == "" and "clean" not in text and "safe" not in text


def test_class_names_cannot_bring_tags_into_a_card():
    found = evidence_of(purified(), lambda: classifier(network(20)), pictures())
    found["recall"][0]["class"] = "<img src=x>"
    assert "<img" not in evidence_section(found)


@pytest.mark.parametrize("error", [OSError, ValueError, RuntimeError])
def test_evidence_is_no_condition_of_a_purification(error):
    def gone():
        raise error("it is\ngone")

    found = evidence_of(purified(), gone, pictures())
    assert found == {"not_applicable": "it is"} and "Not available: it is." in evidence_section(found)


def test_the_purification_has_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"retain_count": 60, "max_test_images": 60, "dataset_name": "digits"} | FAST
    victim = NEW_VIT | options | {"attack": "badnets", "output_dir": "victim"}
    (tmp_path / "victim.yaml").write_text(yaml.safe_dump(victim))
    (tmp_path / "purify.yaml").write_text(yaml.safe_dump(options | {"model_name_or_path": "victim", "max_accuracy_drop": 1}))
    assert command("victim", "victim.yaml") == 0
    for evidence in ("true", "false"):
        assert command("purify", "purify.yaml", "--output_dir", evidence, "--evidence", evidence) == 0
    one, other = (sha256(tmp_path / folder / "model.safetensors") for folder in ("true", "false"))
    assert one == other
    cards = {folder: (tmp_path / folder / "README.md").read_text() for folder in ("true", "false")}
    assert "## Evidence without the trigger" in cards["true"] and "## Evidence" not in cards["false"]
    measured = json.loads((tmp_path / "true" / "purification.json").read_text())["measured"]
    assert measured["evidence"]["outcome"] and evidence_section(measured["evidence"]).strip() in cards["true"]
