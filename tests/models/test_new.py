"""Untrained networks of either library: what is refused, and encoders that reload."""

import pytest
import torch
from networks import NAMES, NORM
from transformers import AutoModel

from d3_hf.models import load_encoder, new_encoder, new_model
from d3_hf.models.kinds import encode, is_encoder


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


@pytest.mark.parametrize(
    ("architecture", "width", "model_args"),
    [
        ("resnet8_cifar", 64, None),
        ("vit", 16, dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, patch_size=16)),
    ],
)
def test_a_new_encoder_of_either_library_is_saved_and_reloads(architecture, width, model_args, tmp_path):
    torch.manual_seed(0)
    model = new_encoder(architecture, **NORM, image_size=32, model_args=model_args)
    assert is_encoder(model) and not model.training
    model.save_pretrained(tmp_path)
    model.image_processor.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = encode(model, images)
        assert found.shape == (2, width) and torch.equal(encode(load_encoder(tmp_path), images), found)
        assert torch.equal(encode(AutoModel.from_pretrained(tmp_path).eval(), images), found)


@pytest.mark.parametrize(("architecture", "size"), [("vit", None), ("resnet8_cifar", 32)])
def test_a_new_encoder_needs_a_normalisation(architecture, size):
    with pytest.raises(ValueError, match="needs image_size, image_mean and image_std|fixes no normalisation"):
        new_encoder(architecture, image_size=size)


def test_a_new_encoder_has_the_initial_weights_of_its_architecture():
    """Not the N(0, 0.02) that the wrapper alone would draw: Kaiming's deviation of 3x3x16 inputs is 0.118."""
    torch.manual_seed(0)
    weight = new_encoder("resnet8_cifar", **NORM).timm_model.layer1[0].conv1.weight
    assert 0.1 < weight.std() < 0.14
