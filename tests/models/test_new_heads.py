"""Encoders under an untrained head: what loads and what is told in one line, whose weights count, and at what size."""

import json
import re

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from networks import MEAN, NORM, STD, TIMM_VIT, Net, saved
from reloading import assert_reloads
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf
from transformers import (
    CONFIG_MAPPING,
    BitImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from d3_hf.models import load_classifier
from d3_hf.models.head import find_head
from d3_hf.models.source import preprocessing_of

NAMES = ["a", "b", "c", "d", "e"]
SIZE = 32
LAYERS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VIT = LAYERS | {"image_size": SIZE, "patch_size": 8}
PAIR = {"vision_config": VIT, "text_config": LAYERS | {"vocab_size": 99}}
SWIN = {"image_size": SIZE, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
STAGES = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
SMALL = {"depth": 1, "embed_dim": 16, "num_heads": 2}
DINO = SMALL | {"img_size": 56}
MASKED = "decoder.0.bias, decoder.0.weight, {}.embeddings.mask_token left out"
TEXT = "logit_scale, .* of text_model.* left out"
# The encoders of the Hub that are fetched most, and what is said to be left out of each.
LOADED = {
    "Dinov2Model": ("dinov2", VIT, None),
    "Dinov2WithRegistersModel": ("dinov2_with_registers", VIT, None),
    "ViTModel": ("vit", VIT, "pooler.dense.bias, pooler.dense.weight left out"),
    "ViTForMaskedImageModeling": ("vit", VIT, MASKED.format("vit")),
    "DeiTModel": ("deit", VIT, "pooler.dense.bias, pooler.dense.weight left out"),
    "BeitModel": ("beit", VIT, None),
    "SwinModel": ("swin", SWIN, None),
    "SwinForMaskedImageModeling": ("swin", SWIN, MASKED.format("swin")),
    "Swinv2Model": ("swinv2", SWIN, None),
    "ConvNextModel": ("convnext", STAGES, None),
    "ConvNextV2Model": ("convnextv2", STAGES, None),
    "ResNetModel": ("resnet", RESNET, None),
    "CLIPModel": ("clip", PAIR, TEXT),
    "SiglipModel": ("siglip", PAIR, TEXT.replace("scale", "bias, logit_scale")),
}
OF_TIMM = "is no image classifier that transformers knows; timm has most encoders of images too"
REFUSED = {
    "DINOv3ViTModel": ("dinov3_vit", VIT, OF_TIMM),
    "CLIPVisionModel": ("clip_vision_model", VIT, OF_TIMM),
    "SiglipVisionModel": ("siglip_vision_model", VIT, OF_TIMM),
    "ViTMAEModel": ("vit_mae", VIT, OF_TIMM),
    "BeitForMaskedImageModeling": (
        "beit",
        VIT,
        "4 missing: .*beit.pooler.layernorm.bias.*; 2 unexpected: layernorm",
    ),
    "LevitModel": ("levit", {"image_size": 64}, r"6 missing: .*classifier.batch_norm.*: check the architecture"),
}
HEADLESS = r"is an encoder without a head \(only .*{}.* missing\): give it a new one and train it, --new_head of d3-hf victim"


def encoder(name, model_type, settings):
    torch.manual_seed(0)
    return getattr(transformers, name)(CONFIG_MAPPING[model_type](**settings))


def write(folder, model, processor=None):
    model.save_pretrained(folder)
    (processor or ViTImageProcessor(size={"height": SIZE, "width": SIZE}, **NORM)).save_pretrained(folder)
    return folder


def assert_same_body(model, body, head="classifier"):
    """Everything but the head has the weight of the same name, but for what stands before it, of an encoder."""
    start = f"{model.base_model_prefix}."
    held = {name.removeprefix(start): tensor for name, tensor in body.state_dict().items()}
    needed = {name.removeprefix(start): t for name, t in model.state_dict().items() if not name.startswith(head)}
    assert needed and all(torch.equal(held[name], tensor) for name, tensor in needed.items())


@pytest.mark.parametrize("name", LOADED)
def test_an_encoder_loads_under_a_new_head_and_only_there(name, tmp_path, caplog):
    body, left_out = encoder(name, *LOADED[name][:2]), LOADED[name][2]
    folder = write(tmp_path / "encoder", body)
    with pytest.raises(ValueError, match=HEADLESS.format("classifier")) as caught:
        load_classifier(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    caplog.set_level("INFO", "d3_hf")
    model = load_classifier(folder, new_head=NAMES)
    assert model.config.id2label == dict(enumerate(NAMES)) and not model.training and model.dtype == torch.float32
    assert model.source.kind == "folder" and "model.safetensors" in model.source.sha256
    assert_same_body(model, body)
    told = [record.getMessage() for record in caplog.records if record.name == "d3_hf.models.new_heads"]
    assert told[-1].endswith("drawn anew, to be trained") and len(told) == (2 if left_out else 1)
    assert not left_out or re.search(left_out, told[0])
    assert_reloads(model, tmp_path / "saved")


@pytest.mark.parametrize("name", REFUSED)
def test_an_encoder_that_does_not_load_says_why(name, tmp_path):
    model_type, settings, message = REFUSED[name]
    size = settings.get("image_size")
    folder = write(tmp_path, encoder(name, model_type, settings), ViTImageProcessor(size={"height": size, "width": size}))
    with pytest.raises(ValueError, match=message) as caught:
        load_classifier(folder, new_head=NAMES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "arguments", "size"),
    [
        ("vit_tiny_patch16_224", TIMM_VIT, SIZE),
        ("vit_small_patch14_dinov2", DINO, 56),
        ("vit_base_patch16_siglip_224", SMALL | {"img_size": SIZE}, SIZE),
        ("test_resnet", {}, SIZE),
        ("test_convnext", {}, SIZE),
    ],
)
def test_a_timm_network_without_classes(architecture, arguments, size, tmp_path):
    torch.manual_seed(0)
    body = timm.create_model(architecture, num_classes=0, **arguments)
    save_for_hf(body, tmp_path, model_args=arguments | {"num_classes": 0}, safe_serialization=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["pretrained_cfg"] |= {"input_size": [3, size, size]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"is an encoder without a head \(num_classes is 0 in its config.json\): give it a"):
        load_classifier(tmp_path)
    model = load_classifier(tmp_path, new_head=NAMES)
    assert model.config.id2label == dict(enumerate(NAMES))
    assert_same_body(model, body, find_head(model, (size, size)))
    assert_reloads(model, tmp_path / "saved")


@pytest.fixture(scope="module")
def resnet_folder(tmp_path_factory):
    torch.manual_seed(0)
    return write(tmp_path_factory.mktemp("resnet"), ResNetForImageClassification(ResNetConfig(**RESNET, num_labels=10)))


# Whose weights count --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit_folder", "timm_folder", "resnet_folder"])
@pytest.mark.parametrize("names", [NAMES, [str(number) for number in range(10)]])
def test_the_head_of_other_classes_counts_for_nothing(kind, names, request, tmp_path):
    """Ten classes before: a head of another shape, and one of the same."""
    folder = request.getfixturevalue(kind)
    torch.manual_seed(0)
    model = load_classifier(folder, new_head=names)
    torch.manual_seed(0)
    again, other = load_classifier(folder, new_head=names), load_classifier(folder, new_head=names)
    old, name = load_classifier(folder), find_head(model, (SIZE, SIZE))
    assert_same_body(model, old, name)
    weight = model.get_parameter(f"{name}.weight")
    assert torch.equal(weight, again.get_parameter(f"{name}.weight"))
    assert not torch.equal(weight, other.get_parameter(f"{name}.weight"))
    assert len(weight) == len(names) and not torch.equal(weight, old.get_parameter(f"{name}.weight")[: len(names)])
    assert model.config.id2label == dict(enumerate(names)) and model.num_labels == len(names)
    model.save_pretrained(tmp_path)
    model.image_processor.save_pretrained(tmp_path)
    assert load_classifier(tmp_path).config.id2label == dict(enumerate(names))


def test_names_that_a_configuration_lists_twice_do_not_come_back(tmp_path, timm_folder):
    """That of a timm folder does; a head of transformers' own making leaves the old ones there."""
    old, model = load_classifier(timm_folder).config.label_names, load_classifier(timm_folder, new_head=NAMES)
    model.config.label_names = old
    load_classifier(model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["label_names"] == NAMES
    assert load_classifier(tmp_path).config.id2label == dict(enumerate(NAMES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layernorm.bias"), "3 missing: classifier.bias, classifier.weight, vit.layernorm.bias"),
        (lambda w: w.update({"layernorm.bias": torch.zeros(7)}), r"2 missing: .*wrong shape: vit.layernorm.bias \(7,\)"),
        (lambda w: w.update({"encoder.layer.1.x": torch.zeros(1)}), "unexpected: layers.1.x"),
        (lambda w: w.update({"embeddings.more": torch.zeros(1)}), "unexpected: embeddings.more"),
        (lambda w: w.update({"layernorm.bias": torch.full((16,), torch.nan)}), "NaN or infinite values in layernorm.bias"),
    ],
)
@pytest.mark.parametrize("new_head", [None, NAMES])
def test_a_body_that_is_not_the_networks_is_refused(change, message, new_head, tmp_path):
    folder = write(tmp_path, encoder("ViTModel", "vit", VIT))
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_classifier(folder, new_head=new_head)


def test_a_body_layer_with_as_many_outputs_as_classes_is_no_head(tmp_path):
    model = ViTForImageClassification(ViTConfig(**VIT, num_labels=16))
    folder = write(tmp_path, model)
    weights = load_file(folder / "model.safetensors")
    lost = next(name.removesuffix(".weight") for name, t in weights.items() if t.shape == (16, 16) and "vit." in name)
    save_file({name: t for name, t in weights.items() if not name.startswith(lost)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="2 missing: vit.*: check the architecture"):
        load_classifier(folder, new_head=[str(number) for number in range(16)])


def test_a_network_with_two_heads_is_refused(tmp_path):
    arguments = SMALL | {"img_size": SIZE, "num_classes": 0}
    network = timm.create_model("deit_tiny_distilled_patch16_224", **arguments)
    save_for_hf(network, tmp_path, model_args=arguments, safe_serialization=True)
    with pytest.raises(ValueError, match="4 missing: .*timm_model.head_dist.weight"):
        load_classifier(tmp_path, new_head=NAMES)


def test_another_task_and_a_single_class_are_forgotten(tmp_path):
    folder = write(tmp_path, ViTForImageClassification(ViTConfig(**VIT, num_labels=1, problem_type="regression")))
    with pytest.raises(ValueError, match="is trained for another task"):
        load_classifier(folder)
    model = load_classifier(folder, new_head=NAMES)
    assert model.config.problem_type is None and model.config.num_labels == len(NAMES)
    assert_reloads(model, tmp_path / "saved")


# What may be asked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"label_names": NAMES},
            r"a new head has its own classes: leave class_names \(in Python label_names, num_",
        ),
        ({"num_labels": 5}, "a new head has its own classes"),
        ({"new_head": ["a"]}, "a classifier has at least 2 classes; got num_labels=1"),
        ({"new_head": ["a", "b", "a"]}, "label_names must differ from each other; got a, b, a"),
        (
            {"image_size": 16, "image_processor": ViTImageProcessor()},
            "an image_processor says the size itself: leave",
        ),
        ({"image_size": 16, "new_head": None}, "image_size cannot be set for a folder source"),
    ],
)
def test_arguments_that_do_not_go_together(vit_folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_classifier(vit_folder, **{"new_head": NAMES} | options)


def test_modules_and_models_in_memory_bring_their_heads(tmp_path):
    with pytest.raises(ValueError, match="new_head cannot be set for a module source"):
        load_classifier(Net(), new_head=NAMES, **NORM)
    with pytest.raises(ValueError, match="new_head goes with architecture, not with module, which has a head of its own"):
        load_classifier(saved(tmp_path, Net().state_dict()), module=Net(), new_head=NAMES, **NORM)
    load_classifier(Net(), **NORM).save_pretrained(tmp_path / "wrapped")
    with pytest.raises(ValueError, match="is a wrapped module: give the module its new head, and load that"):
        load_classifier(tmp_path / "wrapped", module=Net(), new_head=NAMES)
    for name, model_type in (("Dinov2Model", "dinov2"), ("CLIPVisionModel", "clip_vision_model")):
        for options in ({}, {"new_head": NAMES}):
            with pytest.raises(ValueError, match=rf"{name} is an encoder without a head \(a {name}\): give it a new one"):
                load_classifier(encoder(name, model_type, VIT), **options)


# The size of the images -----------------------------------------------------------------------------------------------


def test_without_image_size_the_processors_counts(tmp_path):
    """Not the configuration's, which says at what size the position embeddings were trained."""
    folder = write(tmp_path, encoder("Dinov2Model", "dinov2", VIT | {"image_size": 64}))
    assert preprocessing_of(load_classifier(folder, new_head=NAMES)).size == (SIZE, SIZE)


@pytest.mark.parametrize(
    "processor",
    [
        BitImageProcessor(size={"shortest_edge": 256}, crop_size=224, image_mean=MEAN, image_std=STD),
        BitImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False, image_mean=MEAN, image_std=STD),
        ConvNextImageProcessor(size={"shortest_edge": 224}, image_mean=MEAN, image_std=STD),
        DeiTImageProcessor(image_mean=MEAN, image_std=STD),
        ViTImageProcessor(do_resize=False, **NORM),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_another_size_is_kept_and_nothing_cut_off(processor, tmp_path):
    folder = write(tmp_path, encoder("Dinov2Model", "dinov2", VIT), processor)
    model = load_classifier(folder, new_head=NAMES, image_size=24)
    assert type(model.image_processor) is type(processor) and model.config.image_size == SIZE
    assert_reloads(model, tmp_path / "saved")
    for preprocessing in (preprocessing_of(model), preprocessing_of(load_classifier(tmp_path / "saved"))):
        assert preprocessing.size == (24, 24) and preprocessing.keeps_size
        assert preprocessing.mean == pytest.approx(MEAN) and preprocessing.std == pytest.approx(STD)
    corner = torch.zeros(1, 3, 48, 48, dtype=torch.uint8)
    corner[..., -4:, -4:] = 255
    assert preprocessing_of(model).resize(corner)[..., -1, -1].min() > 200


@pytest.mark.parametrize(
    ("name", "image_size", "message"),
    [
        ("Dinov2Model", 28, "does not see the edge of images of 28 x 28 pixels: choose an image_size that is a multiple of"),
        ("ViTModel", 24, r"fails on RGB images of shape \(1, 3, 24, 24\)"),
        ("CLIPModel", 24, r"fails on RGB images of shape \(1, 3, 24, 24\)"),
        ("Dinov2Model", 0, "image_size must be positive"),
    ],
)
def test_a_size_that_the_network_does_not_take(name, image_size, message, tmp_path):
    folder = write(tmp_path, encoder(name, *LOADED[name][:2]))
    with pytest.raises(ValueError, match=message) as caught:
        load_classifier(folder, new_head=NAMES, image_size=image_size)
    assert "\n" not in str(caught.value)


def test_a_processor_that_cannot_make_the_size_is_refused(tmp_path):
    folder = write(tmp_path, encoder("ConvNextModel", "convnext", STAGES), ConvNextImageProcessor(size={"shortest_edge": 224}))
    with pytest.raises(ValueError, match="its ConvNextImageProcessor cannot make images of 64 x 32 pixels: leave"):
        load_classifier(folder, new_head=NAMES, image_size=(64, 32))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_the_position_embeddings_of_timm_are_resampled(kind, tmp_path):
    torch.manual_seed(0)
    body = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **DINO)
    if kind == "folder":
        save_for_hf(body, tmp_path, model_args=DINO | {"num_classes": 0}, safe_serialization=True)
        model = load_classifier(tmp_path, new_head=NAMES, image_size=28)
    else:
        path, options = saved(tmp_path, body.state_dict()), {"architecture": "vit_small_patch14_dinov2", "model_args": SMALL}
        with pytest.raises(ValueError, match="an encoder, which has none, takes a new head, --new_head of d3-hf victim"):
            load_classifier(path, **options)
        with pytest.raises(ValueError, match=HEADLESS.format("head")):
            load_classifier(path, num_labels=5, image_size=56, **options)
        model = load_classifier(path, new_head=NAMES, image_size=28, **options)
    assert preprocessing_of(model).size == (28, 28)
    found, old = dict(model.timm_model.named_parameters()), dict(body.named_parameters())
    of_class, grid = old["pos_embed"].detach().split([1, 16], dim=1)
    smaller = F.interpolate(grid.mT.reshape(1, -1, 4, 4), (2, 2), mode="bicubic", antialias=True)
    torch.testing.assert_close(found["pos_embed"].detach(), torch.cat([of_class, smaller.flatten(2).mT], dim=1))
    assert all(torch.equal(found[name], old[name]) for name in old.keys() - {"pos_embed"})
    assert_reloads(model, tmp_path / "saved")


def test_weights_that_timm_cannot_resample_are_refused(tmp_path):
    body = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **DINO)
    path = saved(tmp_path, body.state_dict() | {"pos_embed": torch.zeros(3)})
    with pytest.raises(ValueError, match="its weights cannot be brought to another size of images .*: leave image_size out"):
        load_classifier(path, architecture="vit_small_patch14_dinov2", model_args=SMALL, new_head=NAMES, image_size=28)


def test_the_real_encoder(shared):
    """Weights of a DINOv2 ViT-S/14 in transformers' format, at the 98 pixels of its processor and at another size."""
    folder = shared / "checkpoints" / "vit_small_patch14"
    with pytest.raises(ValueError, match="encoder without a head .only classifier.bias, classifier.weight are missing"):
        load_classifier(folder)
    model = load_classifier(folder, new_head=NAMES, image_size=70)
    assert preprocessing_of(model).size == (70, 70)
    assert model.source.sha256.keys() == {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert find_head(model, (70, 70)) == "classifier" and model.classifier.in_features == 768
