"""The two attributes that a classifier carries: who sets them, who reads them, what keeps and what loses them."""

import copy
import re

import pytest
import torch
from networks import NAMES, NORM, Net, saved
from places import ROOT
from tiny import PROCESSOR, SIZE, tiny_resnet, tiny_vit
from transformers import AutoModelForImageClassification

from d3_hf.attacks import LF, TrojanNN
from d3_hf.data.images import RawImages
from d3_hf.data.preprocessing import Preprocessing
from d3_hf.models import Source, load_classifier, new_model
from d3_hf.models.source import attach, image_processor_of, preprocessing_of, source_of


def test_attached_and_read():
    model, source = tiny_vit(), Source("hub", "someone/vit", revision="0" * 40)
    assert attach(model, PROCESSOR, source) is model
    assert model.image_processor is image_processor_of(model) is PROCESSOR and model.source is source_of(model) is source
    assert preprocessing_of(model) == Preprocessing.from_processor(PROCESSOR)
    twin = copy.deepcopy(model)
    assert source_of(twin) == source and preprocessing_of(twin).size == (SIZE, SIZE)


@pytest.mark.parametrize("source", ["vit_folder", "timm_folder", "file", "module"])
def test_every_kind_of_source_leaves_both(source, request, tmp_path):
    if source == "file":
        model = load_classifier(saved(tmp_path, Net().state_dict()), module=Net(), **NORM)
    else:
        model = load_classifier(Net(), **NORM) if source == "module" else load_classifier(request.getfixturevalue(source))
    assert source_of(model).kind == source.removeprefix("vit_").removeprefix("timm_")
    assert preprocessing_of(model).mean == tuple(NORM["image_mean"])


@pytest.mark.parametrize("architecture", ["vit", "resnet20_cifar"])
def test_a_new_network_has_a_processor_and_comes_from_nowhere(architecture):
    sizes = {"patch_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = new_model(NAMES, architecture, **NORM, image_size=32, model_args=sizes if architecture == "vit" else None)
    assert preprocessing_of(model).size == (32, 32) and source_of(model) is None
    assert load_classifier(model).source.kind == "module"


def test_a_refused_model_gets_neither(vit_folder):
    model = AutoModelForImageClassification.from_pretrained(vit_folder)
    with pytest.raises(ValueError, match="has 10 classes, not num_labels=3"):
        load_classifier(model, num_labels=3)
    assert image_processor_of(model) is None and source_of(model) is None


@pytest.mark.parametrize("attack", [LF(num_images=1), TrojanNN()])
def test_an_attack_says_what_a_bare_model_lacks(attack):
    model, images = tiny_resnet(), torch.zeros(3, 3, SIZE, SIZE, dtype=torch.uint8)
    del model.image_processor
    with pytest.raises(ValueError, match="ResNetForImageClassification has no image processor: load it with d3_hf.load_"):
        attack.fit(RawImages(images, torch.arange(3), ["a", "b", "c"]), model, seed=0)


def test_the_two_are_set_in_one_place():
    setting = re.compile(r"\bmodel\.(image_processor|source)\s*=[^=]")
    files = (ROOT / "d3_hf").rglob("*.py")
    assert [file.name for file in files if setting.search(file.read_text())] == ["source.py"]
