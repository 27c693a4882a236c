"""A trained network under an untrained head: what is kept, what is drawn, and that the folder loads again."""

import json

import pytest
import torch
from tiny import SIZE, tiny_resnet, tiny_timm_vit, tiny_vit
from torch import nn

from d3_hf.models import load_classifier, new_model, with_new_head
from d3_hf.models.head import find_head
from d3_hf.victims.sets import make_victim

NAMES = ["a", "b", "c", "d", "e"]
NORM = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet, tiny_timm_vit])
def test_only_the_head_is_new_and_the_folder_loads(make, tmp_path):
    old, model = make().eval(), with_new_head(make().eval(), NAMES)
    head = find_head(old, (SIZE, SIZE))
    kept = {key: value for key, value in old.state_dict().items() if not key.startswith(head)}
    assert kept and all(torch.equal(model.state_dict()[key], value) for key, value in kept.items())
    model.save_pretrained(tmp_path)
    model.image_processor.save_pretrained(tmp_path)
    loaded, pixels = load_classifier(str(tmp_path)), torch.rand(2, 3, SIZE, SIZE)
    assert loaded.config.id2label == dict(enumerate(NAMES))
    assert torch.allclose(loaded(pixels).logits, model(pixels).logits, atol=1e-6)
    assert model(pixels).logits.shape == (2, len(NAMES))


def test_a_loaded_timm_classifier_keeps_its_new_names(tmp_path, timm_folder):
    """Its configuration lists the names a second time."""
    model = with_new_head(load_classifier(timm_folder), NAMES)
    assert model.num_labels == model.config.num_labels == len(NAMES)
    model.save_pretrained(tmp_path)
    assert load_classifier(tmp_path).config.id2label == dict(enumerate(NAMES))


def test_a_new_head_of_transformers_own_keeps_no_old_names(tmp_path, timm_folder):
    """It leaves the names that the configuration of a timm folder lists a second time."""
    model = load_classifier(timm_folder)
    old = list(model.config.label_names)
    with_new_head(model, NAMES)
    model.config.label_names = old
    load_classifier(model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["label_names"] == NAMES
    assert load_classifier(tmp_path).config.id2label == dict(enumerate(NAMES))


def test_a_head_that_is_not_linear_is_refused():
    class Convolutional(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(3, 4, 1)

        def forward(self, pixels):
            return self.head(pixels).mean((2, 3))

    model = load_classifier(Convolutional(), num_labels=4, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_size=SIZE)
    with pytest.raises(ValueError):
        with_new_head(model, NAMES)


@pytest.mark.parametrize("architecture", ["vit", "resnet20_cifar"])
@pytest.mark.parametrize(
    ("names", "norm", "message"),
    [
        (["a", "b", "a"], NORM, "label_names must differ from each other; got a, b, a"),
        (["a"], NORM, "a classifier has at least 2 classes; got num_labels=1"),
        (NAMES, NORM | {"image_mean": [125.0] * 3}, r"image_mean must be three numbers in \[0, 1\]"),
    ],
)
def test_a_new_network_of_either_library_refuses_alike(architecture, names, norm, message):
    with pytest.raises(ValueError, match=message):
        new_model(names, architecture, **norm, image_size=32)


@pytest.mark.parametrize("names", [["a", "b", "a"], ["a"]])
def test_a_new_head_refuses_names_that_are_no_classes(names):
    model = tiny_vit()
    with pytest.raises(ValueError, match="label_names must differ|at least 2 classes"):
        with_new_head(model, names)
    assert model.config.num_labels == model.classifier.out_features == 3


def test_a_victim_of_a_network_for_other_classes(tmp_path):
    """Three classes before, the ten digits after; no floor, since the checkpoint cannot be measured on them."""
    model = tiny_resnet()
    model.save_pretrained(tmp_path / "start")
    model.image_processor.save_pretrained(tmp_path / "start")
    options = {"model_name_or_path": str(tmp_path / "start"), "new_head": True, "attack": "badnets", "max_steps": 1}
    options |= {"dataset_name": "digits", "max_test_images": 30, "use_cpu": True, "output_dir": str(tmp_path / "victim")}
    victim = make_victim([], options)
    assert "clean_model" not in victim.measured and victim.measured["victim"]["accuracy_n"] == 30
    assert load_classifier(victim.folder).config.num_labels == 10
