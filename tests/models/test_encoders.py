"""`load_encoder`: every kind of source, the features, saving and reloading by Auto classes, and what is no encoder."""

import re

import pytest
import timm
import torch
import transformers
from networks import NORM, STD, Net, saved
from safetensors.torch import load_file
from tiny import PROCESSOR, SIZE
from tiny_encoders import LAYERS, VIT, colours, tiny_clip, tiny_dinov2, tiny_module, tiny_resnet, tiny_timm, tiny_vit
from tiny_encoders import Net as Encoder
from transformers import CONFIG_MAPPING, AutoImageProcessor, AutoModel, ViTConfig, ViTForImageClassification

from d3_hf import load_classifier, load_encoder
from d3_hf.models.encoders import encode_images
from d3_hf.models.kinds import encode, is_encoder
from d3_hf.models.source import preprocessing_of

PIXELS = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
MAKERS = {
    "Dinov2Model": (tiny_dinov2, 16),
    "ViTModel": (tiny_vit, 16),
    "ResNetModel": (tiny_resnet, 16),
    "CLIPVisionModel": (tiny_clip, 16),
    "TimmWrapperModel": (tiny_timm, 16),
    "WrappedEncoder": (tiny_module, 16),
}


def write(folder, model):
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


@torch.no_grad()
def features(model):
    return encode(model.eval(), PIXELS)


@pytest.mark.parametrize("name", MAKERS)
def test_an_encoder_loads_from_its_folder_and_auto_classes_reload_what_is_saved(name, tmp_path):
    make, width = MAKERS[name]
    model, options = make(), {"module": Encoder()} if name == "WrappedEncoder" else {}
    loaded = load_encoder(write(tmp_path / "first", model), **options)
    assert type(loaded).__name__ == name and is_encoder(loaded) and not loaded.training
    assert loaded.source.kind == "folder" and "model.safetensors" in loaded.source.sha256
    assert preprocessing_of(loaded).size == (SIZE, SIZE)
    expected = features(model)
    assert expected.shape == (3, width) and torch.equal(features(loaded), expected)
    write(tmp_path / "second", loaded)
    assert sorted(file.suffix for file in (tmp_path / "second").iterdir()) == [".json", ".json", ".safetensors"]
    if name == "WrappedEncoder":
        with pytest.raises(ValueError, match="whose code is not stored here: .* d3_hf.load_encoder"):
            AutoModel.from_pretrained(tmp_path / "second")
        return
    again = AutoModel.from_pretrained(tmp_path / "second")
    assert type(again) is type(model) and torch.equal(features(again), expected)
    assert AutoImageProcessor.from_pretrained(tmp_path / "second").to_dict()


def test_features_are_those_that_a_head_would_read():
    """The class token of ViT, whose pooler is left untrained by most; elsewhere what the network pools."""
    vit, dinov2, resnet = tiny_vit().eval(), tiny_dinov2().eval(), tiny_resnet().eval()
    with torch.no_grad():
        assert torch.equal(features(vit), vit(pixel_values=PIXELS).last_hidden_state[:, 0])
        assert torch.equal(features(dinov2), dinov2(pixel_values=PIXELS).last_hidden_state[:, 0])
        torch.testing.assert_close(features(resnet), resnet(pixel_values=PIXELS).last_hidden_state.mean((2, 3)))


def test_the_image_tower_of_a_pair_is_taken_and_the_rest_is_told(tmp_path, caplog):
    pair = {"vision_config": VIT, "text_config": LAYERS | {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}}
    torch.manual_seed(0)
    clip = transformers.CLIPModel(CONFIG_MAPPING["clip"](**pair))
    caplog.set_level("INFO", "d3_hf")
    model = load_encoder(write(tmp_path, clip))
    assert type(model).__name__ == "CLIPVisionModel" and "text_model" in caplog.text and "visual_projection" in caplog.text
    with torch.no_grad():
        expected = clip.eval().vision_model(pixel_values=PIXELS).pooler_output
    assert torch.equal(features(model), expected)


def test_a_missing_dense_pooler_is_the_same_whenever_it_is_loaded(tmp_path):
    bare = transformers.ViTModel(ViTConfig(**VIT), add_pooling_layer=False)
    folder = write(tmp_path, bare)
    first, state = load_encoder(folder), torch.get_rng_state()
    second = load_encoder(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_loads_with_its_architecture_or_module(suffix, tmp_path):
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments).eval()
    file = saved(tmp_path, network.state_dict(), suffix)
    model = load_encoder(file, architecture="vit_tiny_patch16_224", model_args=arguments, **NORM)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(encode(model, pixels), network(pixels)) and model.config.num_labels == 0
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(encode(AutoModel.from_pretrained(tmp_path / "saved").eval(), pixels), network(pixels))
    assert torch.equal(encode(load_encoder(tmp_path / "saved"), pixels), network(pixels))
    own = Encoder().eval()
    wrapped = load_encoder(saved(tmp_path, own.state_dict(), suffix), module=Encoder(), **NORM)
    with torch.no_grad():
        assert torch.equal(encode(wrapped, pixels), own(pixels))


def test_another_size_of_images(tmp_path):
    folder = write(tmp_path, tiny_dinov2())
    model = load_encoder(folder, image_size=24)
    assert preprocessing_of(model).size == (24, 24)
    with pytest.raises(ValueError, match="does not see the edge of images of 20 x 20 pixels"):
        load_encoder(folder, image_size=20)


def test_the_pretrained_vit_loads_at_the_size_of_its_recipe(shared):
    model = load_encoder(shared / "checkpoints" / "vit_small_patch14", image_size=70)
    with torch.no_grad():
        assert encode(model, torch.zeros(1, 3, 70, 70)).shape == (1, 384)


def test_all_images_are_encoded_in_their_order():
    model, images = tiny_resnet().train(), colours(7)
    preprocessing = preprocessing_of(model)
    found = encode_images(model, images, preprocessing, batch_size=3)
    model.eval()
    with torch.no_grad():
        expected = torch.stack([encode(model, preprocessing(image[None]))[0] for image in images.images])
    torch.testing.assert_close(found, expected)
    inverted = encode_images(model, images, preprocessing, change=lambda raw: 255 - raw)
    assert inverted.shape == (7, 16) and not torch.allclose(inverted, found)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="features of ResNetModel are not finite"):
        encode_images(model, images, preprocessing)


# What is no encoder ----------------------------------------------------------------------------------------------------


def of(name, model_type, **settings):
    return lambda: getattr(transformers, name)(CONFIG_MAPPING[model_type](**settings))


REFUSED = {
    "classifier": (
        lambda: ViTForImageClassification(ViTConfig(**VIT)),
        r"is a classifier with a head \(a ViTForImageClassification\) and no encoder: .*--defence d3",
    ),
    "timm classifier": (
        lambda: transformers.TimmWrapperForImageClassification(
            transformers.TimmWrapperConfig(architecture="resnet20_cifar", num_labels=3)
        ),
        r"is a classifier with a head \(num_classes is 3 in its config.json\)",
    ),
    "text": (
        of("BertModel", "bert", vocab_size=20, **LAYERS),
        "model_type 'bert' in config.json is no encoder of images that transformers knows",
    ),
    "masked autoencoder": (of("ViTMAEModel", "vit_mae", **VIT), "ViTMAEModel returns no features of whole images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_encoder_is_told_in_one_line(name, tmp_path):
    make, message = REFUSED[name]
    folder = write(tmp_path, make())
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(folder)
    assert "\n" not in str(caught.value)


def test_what_is_in_memory_is_taken_or_refused():
    model = tiny_dinov2()
    assert load_encoder(model) is model and model.source.kind == "module"
    with pytest.raises(ValueError, match=r"is a classifier with a head \(a ViTForImageClassification\)"):
        load_encoder(ViTForImageClassification(ViTConfig(**VIT)))
    with pytest.raises(ValueError, match=re.escape("must map images (B, 3, h, w) to features (B, width)")):
        load_encoder(torch.nn.Conv2d(3, 4, 1), **NORM)
    with pytest.raises(ValueError, match="image_std cannot be set for a model source"):
        load_encoder(model, image_std=STD)
    assert load_encoder(Net(4), **NORM).config.module_class.endswith("Net")


def test_an_encoder_is_still_no_classifier(tmp_path):
    folder = write(tmp_path, tiny_dinov2())
    with pytest.raises(ValueError, match="is an encoder without a head"):
        load_classifier(folder)
    assert "classifier.weight" not in load_file(folder / "model.safetensors")
