"""A DINOv2 of transformers as timm's network: the same features, loaded under a new head at another size, refusals."""

import runpy

import pytest
import torch
from places import RECIPES
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

from d3_hf.models import load_classifier, load_encoder
from d3_hf.models.source import preprocessing_of

recipe = runpy.run_path(str(RECIPES / "dinov2_to_timm.py"))
SIZE, MEAN = 28, [0.4, 0.5, 0.6]


def encoder(**options):
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=14)
    torch.manual_seed(0)
    return Dinov2Model(Dinov2Config(**shape | options)).eval()


@pytest.fixture
def folder(tmp_path):
    model = encoder()
    for weight in model.parameters():
        if weight.ndim == 1:  # 1 and 0 as they are made, which would hide a swap
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "dinov2")
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=MEAN).save_pretrained(tmp_path / "dinov2")
    return tmp_path


def convert(folder, source="dinov2"):
    recipe["main"](["--source", str(folder / source), "--output_dir", str(folder / "timm")])


def test_features_and_preprocessing_are_the_same(folder):
    convert(folder)
    first, second = load_encoder(folder / "dinov2"), load_encoder(folder / "timm")
    pixels = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = first(pixel_values=pixels).last_hidden_state[:, 0], second(pixel_values=pixels).pooler_output
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert preprocessing_of(second).mean == pytest.approx(MEAN)


def test_it_takes_a_new_head_and_images_of_another_size(folder):
    convert(folder)
    model = load_classifier(folder / "timm", new_head=["cat", "dog", "cow"], image_size=42)
    assert preprocessing_of(model).size == (42, 42)
    assert model(pixel_values=torch.zeros(2, 3, 42, 42)).logits.shape == (2, 3)


def test_what_it_cannot_convert_is_refused_and_nothing_is_written(folder, tmp_path):
    with pytest.raises(ValueError, match="without SwiGLU"):
        recipe["timm_network"](encoder(use_swiglu_ffn=True))
    network, _ = recipe["timm_network"](encoder())
    with torch.no_grad():
        network.norm.bias += 1
    with pytest.raises(ValueError, match="timm's network gives other features, by .* nothing was written"):
        recipe["check_features"](encoder(), network)
    (folder / "timm").mkdir()
    (folder / "timm" / "mine").touch()
    with pytest.raises(FileExistsError, match="timm is not empty: name another folder"):
        convert(folder)
