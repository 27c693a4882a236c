"""The relearning test of an audit: what the canary is to planting and measuring, what is found of models, where it is shown."""

import copy
import json

import jsonschema
import pytest
import torch
from places import ROOT
from tiny import SIZE, tiny_resnet, tiny_vit

from d3_hf.assurance.canary import stamped
from d3_hf.benchmark.relearning import area
from d3_hf.data.images import RawImages
from d3_hf.inspection.audit import audit
from d3_hf.inspection.relearning import STEPS, Canary, relearning_of
from d3_hf.publishing.inspection.pages import audit_page
from d3_hf.publishing.inspection.text import audit_text


def coloured(count=40):
    """Three classes by their brightest channel."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 120, (count, 3, SIZE, SIZE), generator=generator)
    images[torch.arange(count), labels] += 100
    return RawImages(images.to(torch.uint8), labels, [f"LABEL_{k}" for k in range(3)])


def test_a_canary_is_an_attack_to_whom_it_concerns():
    canary, images = Canary(2, 3), coloured(4)
    expected = stamped(images.images, torch.tensor([2, 2, 2, 2]), 3)
    assert torch.equal(canary.trigger(images.images), expected) and torch.equal(canary.trigger(images.images[1]), expected[1])
    assert canary.counted(torch.tensor([0, 2, 1])).tolist() == [True, False, True]
    assert canary.eligible(torch.tensor([0, 2])).all() and canary.poisoned_labels(torch.tensor([0, 1]), 3).tolist() == [2, 2]
    with pytest.raises(ValueError, match="the canary's class 2 is none of 2"):
        canary.check_classes(2)


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
def test_every_model_is_tuned_alike_and_stays(make):
    models = {"suspicious": make(), "purified": make(seed=1), "twin": make()}
    before = copy.deepcopy(models["purified"].state_dict())
    found = relearning_of(models, coloured())
    assert found["models"].keys() == models.keys() and found["steps"] == [0, *STEPS]
    assert (found["images"], found["poisoned"], found["canary"]) == (20, 1, "LABEL_0")
    assert found["models"]["suspicious"] == found["models"]["twin"] != found["models"]["purified"]
    for one in found["models"].values():
        assert one["area"] == pytest.approx(area(found["steps"], one["asr"])) and len(one["asr"]) == 1 + len(STEPS)
    assert all(torch.equal(value, before[name]) for name, value in models["purified"].state_dict().items())


def test_an_audit_shows_it_where_it_is_asked_for():
    images = coloured()
    found = audit(tiny_resnet(seed=1), tiny_resnet(), images, signals={}, relearn=True, twin=tiny_resnet(seed=2))
    facts = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    jsonschema.validate(facts, json.loads((ROOT / "d3_hf" / "publishing" / "schemas" / "audit.schema.json").read_text()))
    assert list(facts["relearning"]["models"]) == ["suspicious", "purified", "twin"]
    for shown in (audit_text(facts), audit_page(facts, {}, {})):
        assert "ASR after 0, 5, 10, 20 steps" in shown and "twin: " in shown
    with pytest.raises(ValueError, match="a twin is for the relearning test"):
        audit(tiny_resnet(seed=1), tiny_resnet(), images, signals={}, twin=tiny_resnet(seed=2))
