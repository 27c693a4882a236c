"""The base of a fine-tuned classifier: found under its names however it was saved, and refused where it is none."""

import copy
import logging
import shutil

import huggingface_hub.constants
import pytest
import timm
import torch
from hostile import Code
from networks import MEAN, STD, Net
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from tiny import CLASSES, SIZE, tiny_dinov2, tiny_resnet, tiny_timm_vit, tiny_vit, with_processor
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ViTModel,
    set_seed,
)

from d3_hf.files import sha256
from d3_hf.models import Source, load_classifier
from d3_hf.models.base import load_base, relative_distance


def tiny_convnext(seed=0):
    set_seed(seed)
    sizes = {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2, "patch_size": 2, "initializer_range": 0.3}
    return with_processor(ConvNextForImageClassification(ConvNextConfig(**sizes, num_labels=CLASSES)))


def wrapped(seed=0):
    set_seed(seed)
    return load_classifier(Net(CLASSES), image_mean=MEAN, image_std=STD, image_size=SIZE)


def tuned(base):
    """A copy of the base in which every parameter and statistic has moved a little."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.02 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1))
    return model


def of_other_classes(base, folder):
    """The base's weights with a head for seven classes."""
    weights = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    for key in head_keys(base):
        weights[key] = torch.ones(7, *weights[key].shape[1:])
    save_file(weights, folder / "model.safetensors")


def encoder(base, folder):
    getattr(base, base.base_model_prefix).save_pretrained(folder)


def with_pooler(base, folder):
    model = ViTModel(base.config)
    model.load_state_dict(base.vit.state_dict(), strict=False)
    model.save_pretrained(folder)


def by_timm(base, folder):
    """Without a head, under timm's own names."""
    network = timm.create_model(base.config.architecture, num_classes=0, **base.config.model_args)
    network.load_state_dict(base.timm_model.state_dict(), strict=False)
    save_file(network.state_dict(), folder / "model.safetensors")


def by_data_parallel(base, folder):
    torch.save({"state_dict": {f"module.{k}": t for k, t in base.network.state_dict().items()}}, folder / "pytorch_model.bin")


def pickle_alone(base, folder):
    torch.save(base.state_dict(), folder / "pytorch_model.bin")


def in_half_precision(base, folder):
    save_file({k: t.half() if t.is_floating_point() else t for k, t in base.state_dict().items()}, folder / "model.safetensors")


HEADS = {
    "ViTForImageClassification": "classifier.",
    "Dinov2ForImageClassification": "classifier.",
    "ConvNextForImageClassification": "classifier.",
    "ResNetForImageClassification": "classifier.1.",
    "TimmWrapperForImageClassification": "timm_model.head.",
    "WrappedClassifier": "network.head.",
}


def head_keys(model):
    return [key for key in model.state_dict() if key.startswith(HEADS[type(model).__name__])]


@pytest.mark.parametrize(
    ("make", "save"),
    [
        (tiny_vit, encoder),
        (tiny_vit, with_pooler),
        (tiny_vit, of_other_classes),
        (tiny_vit, pickle_alone),
        (tiny_dinov2, encoder),
        (tiny_dinov2, of_other_classes),
        (tiny_convnext, encoder),
        (tiny_resnet, encoder),
        (tiny_timm_vit, by_timm),
        (tiny_timm_vit, of_other_classes),
        (wrapped, of_other_classes),
        (wrapped, by_data_parallel),
    ],
    ids=lambda function: function.__name__,
)
def test_a_base_is_found_under_the_names_of_the_suspicious_model(make, save, tmp_path):
    original = make()
    suspicious = tuned(original)
    before, body = copy.deepcopy(suspicious.state_dict()), original.state_dict()
    save(original, tmp_path)
    state = torch.get_rng_state()
    base = load_base(suspicious, tmp_path, (SIZE, SIZE))
    assert torch.equal(torch.get_rng_state(), state)
    expected = [k for k, t in body.items() if k not in head_keys(original) and not k.endswith("num_batches_tracked")]
    assert list(base.weights) == expected
    assert any(key.endswith("running_var") for key in expected) == (make in (tiny_resnet, wrapped))
    for key, tensor in base.weights.items():
        torch.testing.assert_close(tensor, body[key], rtol=0, atol=0)
    moved = norm = 0.0
    for key in expected:
        if body[key].ndim > 1:
            moved += sum(
                (a - b) ** 2 for a, b in zip(before[key].flatten().tolist(), body[key].flatten().tolist(), strict=True)
            )
            norm += sum(b**2 for b in body[key].flatten().tolist())
    assert 0 < base.relative_distance == pytest.approx((moved / norm) ** 0.5, rel=1e-6)
    assert all(torch.equal(tensor, before[key]) for key, tensor in suspicious.state_dict().items())


def test_half_precision_becomes_float32(tmp_path):
    original = tiny_vit()
    in_half_precision(original, tmp_path)
    base = load_base(tuned(original), tmp_path, (SIZE, SIZE))
    assert {tensor.dtype for tensor in base.weights.values()} == {torch.float32}
    key = "vit.embeddings.cls_token"
    assert torch.equal(base.weights[key], original.state_dict()[key].half().float())


def test_what_is_no_part_of_the_model_is_logged(tmp_path, caplog):
    with_pooler(tiny_vit(), tmp_path)
    with caplog.at_level(logging.INFO, "d3_hf"):
        load_base(tuned(tiny_vit()), tmp_path, (SIZE, SIZE))
    assert "not a part of ViTForImageClassification, and left out: pooler.dense.bias, pooler.dense.weight" in caplog.text


def test_where_a_base_came_from(tmp_path, monkeypatch):
    encoder(tiny_vit(), tmp_path / "base")
    file, commit = tmp_path / "base" / "model.safetensors", "0123456789" * 4
    digests = {"model.safetensors": sha256(file)}
    assert load_base(tuned(tiny_vit()), file, (SIZE, SIZE)).source == Source("file", str(file), sha256=digests)
    source = load_base(tuned(tiny_vit()), tmp_path / "base", (SIZE, SIZE)).source
    assert source == Source("folder", str(tmp_path / "base"), sha256=digests)
    snapshot = tmp_path / "models--them--base" / "snapshots" / commit
    shutil.copytree(tmp_path / "base", snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    base = load_base(tuned(tiny_vit()), "them/base", (SIZE, SIZE), commit)
    assert base.source == Source("hub", "them/base", revision=commit)
    torch.save(load_file(file), snapshot / "pytorch_model.bin")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"them/base holds no model.safetensors"):
        load_base(tuned(tiny_vit()), "them/base", (SIZE, SIZE), commit)


def changed(change):
    def save(base, folder):
        weights = dict(base.state_dict())
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return save


def of_another_size(base, folder):
    base.config.image_size = 2 * SIZE
    type(base)(base.config).save_pretrained(folder)


PATCHES, TOKEN = "vit.embeddings.patch_embeddings.projection.weight", "vit.embeddings.cls_token"


def another_network(base, folder):
    tiny_resnet().save_pretrained(folder)


def test_a_base_of_timm_may_be_for_images_of_another_size(tmp_path):
    small = tiny_timm_vit()
    large = timm.create_model(small.config.architecture, num_classes=0, **small.config.model_args | {"img_size": 2 * SIZE})
    save_file(large.state_dict(), tmp_path / "model.safetensors")
    patches = (small.timm_model.pos_embed.shape[1] - 1) ** 0.5
    places = resample_abs_pos_embed(large.pos_embed.detach(), new_size=[int(patches)] * 2, num_prefix_tokens=1)
    expected = large.state_dict() | {"pos_embed": places}
    small.timm_model.load_state_dict(expected, strict=False)
    base = load_base(tuned(small), tmp_path, (SIZE, SIZE))
    assert {key.removeprefix("timm_model.") for key in base.weights} == expected.keys()
    for key, tensor in base.weights.items():
        torch.testing.assert_close(tensor, expected[key.removeprefix("timm_model.")], rtol=0, atol=1e-6)


def unrelated(base, folder):
    type(base)(base.config).save_pretrained(folder)


def itself(base, folder):
    tuned(base).save_pretrained(folder)


def pickle_with_code(base, folder):
    torch.save({"a": Code()}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (
            changed(lambda weights: weights.update({TOKEN: torch.zeros(1, 1, 9)})),
            r"is no base of this ViTForImageClassification "
            rf"\(1 of another shape: {TOKEN} \(1, 1, 9\) instead of \(1, 1, 8\)\): name the model that it was fine-tuned from",
        ),
        (changed(lambda weights: weights.pop(TOKEN)), rf"is no base of .* \(1 missing: {TOKEN}\): name the model that"),
        (another_network, r"is no base of .* \(\d+ missing: "),
        (of_another_size, r"instead of \(1, 5, 8\)\): position embeddings depend on the image size: name a base for images of"),
        (unrelated, r"is not what this .* was fine-tuned from: \|\|tau\|\| / \|\|theta_b\|\| is 1\.\d\d, which is above 1 for"),
        (itself, "is the suspicious model itself, but for the head: there is nothing to move away from"),
        (changed(lambda weights: weights.update({PATCHES: weights[PATCHES] / 0})), rf"NaN or infinite values in {PATCHES}"),
        (pickle_with_code, r"was not opened: it wants to run \w+.mkdir"),
    ],
)
def test_what_is_no_base_is_refused_in_one_line(save, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tiny_vit(), tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_base(tuned(tiny_vit()), tmp_path, (SIZE, SIZE))
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_a_name_that_leads_nowhere_is_refused(tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    model = tuned(tiny_vit())
    with pytest.raises(FileNotFoundError, match="no such file or folder: ./nothing"):
        load_base(model, "./nothing", (SIZE, SIZE))
    with pytest.raises(OSError, match="them/nothing is no local path"):
        load_base(model, "them/nothing", (SIZE, SIZE))
    with pytest.raises(ValueError, match="is a folder and has no revision"):
        load_base(model, tmp_path, (SIZE, SIZE), "main")


@pytest.mark.parametrize(("length", "angle", "expected"), [(1, 90, 2**0.5), (1, 60, 1), (0.1, 90, 1.01**0.5), (1.2, 0, 0.2)])
def test_relative_distance_of_vectors(length, angle, expected):
    """Orthogonal weights are above 1 however long they are."""
    radians = torch.tensor(angle).deg2rad()
    weights = 3 * length * torch.stack([radians.cos(), radians.sin()])
    base = torch.tensor([3.0, 0.0])
    assert relative_distance(weights.split(1), base.split(1)) == pytest.approx(expected, rel=1e-5)
    assert relative_distance(weights, torch.zeros(2)) == float("inf")
