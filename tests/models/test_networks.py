"""The networks that the hubs lack: their structure, their names, and their registration with timm in any order of imports."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageClassification

import d3_hf  # noqa: F401  registers the networks
from d3_hf.models import new_classifier
from d3_hf.models.networks.cifar_resnet import BasicBlock as ResNetBlock
from d3_hf.models.networks.preact_resnet import PreActBlock
from d3_hf.models.networks.wide_resnet import BasicBlock as WideBlock

MEAN_STD = {"image_mean": (0.4, 0.5, 0.6), "image_std": (0.2, 0.25, 0.3)}
# Counted by hand from the papers' tables: convolutions without bias, two numbers per BatchNorm channel, classifier with bias.
PARAMETERS = {
    "resnet8_cifar": 75_290,
    "resnet20_cifar": 269_722,
    "resnet32_cifar": 464_154,
    "resnet44_cifar": 658_586,
    "resnet56_cifar": 853_018,
    "preact_resnet18_cifar": 11_171_146,
    "wrn16_1_cifar": 175_066,
    "wrn40_2_cifar": 2_243_546,
    "wrn28_10_cifar": 36_479_194,
}


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Give BatchNorm statistics and weights that a test can tell apart."""
    generator = torch.Generator().manual_seed(0)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module.eval()


def normalise(x: torch.Tensor, bn: torch.nn.BatchNorm2d) -> torch.Tensor:
    scale, shift, mean, variance = (v.view(-1, 1, 1) for v in (bn.weight, bn.bias, bn.running_mean, bn.running_var))
    return (x - mean) / (variance + bn.eps).sqrt() * scale + shift


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_parameters(name, expected):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize("name", ["resnet20_cifar", "preact_resnet18_cifar", "wrn16_1_cifar"])
def test_shapes_and_head(name):
    model = timm.create_model(name, num_classes=7, in_chans=1).eval()
    images = torch.randn(2, 1, 32, 32)
    features = model.forward_features(images)
    side = 4 if name.startswith("preact") else 8
    assert features.shape == (2, model.num_features, side, side)
    torch.testing.assert_close(model.forward_head(features), model(images))
    torch.testing.assert_close(model.get_classifier()(features.mean((2, 3))), model(images))
    model.reset_classifier(3)
    assert model(images).shape == (2, 3) and model.num_classes == 3
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), features.mean((2, 3)))
    assert model(torch.randn(1, 1, 64, 48)).shape == (1, model.num_features)


def test_option_a_block():
    block = randomise(ResNetBlock(4, 8, stride=2))
    x = torch.randn(2, 4, 6, 6)
    shortcut = torch.zeros(2, 8, 3, 3)
    for row in range(3):
        for column in range(3):
            shortcut[:, 2:6, row, column] = x[:, :, 2 * row, 2 * column]
    out = normalise(F.conv2d(x, block.conv1.weight, stride=2, padding=1), block.bn1).clamp_min(0)
    out = normalise(F.conv2d(out, block.conv2.weight, padding=1), block.bn2)
    torch.testing.assert_close(block(x), (out + shortcut).clamp_min(0))


@pytest.mark.parametrize("block_class", [PreActBlock, WideBlock])
@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (8, 2)])
def test_preactivation_block(block_class, channels, stride):
    block = randomise(block_class(4, channels, stride))
    x = torch.randn(2, 4, 6, 6)
    first = normalise(x, block.bn1).clamp_min(0)
    out = normalise(F.conv2d(first, block.conv1.weight, stride=stride, padding=1), block.bn2).clamp_min(0)
    out = F.conv2d(out, block.conv2.weight, padding=1)
    if channels == 4:
        expected = out + x
    else:
        weight = next(w for name, w in block.state_dict().items() if "hortcut" in name)
        expected = out + F.conv2d(first, weight, stride=stride)
    torch.testing.assert_close(block(x), expected)


def test_names_are_those_of_published_checkpoints():
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "linear.weight", "linear.bias", *(f"bn1.{n}" for n in norm)}
    for block in (f"layer{stage}.{index}" for stage in (1, 2, 3) for index in range(3)):
        expected |= {f"{block}.conv{i}.weight" for i in (1, 2)} | {f"{block}.bn{i}.{n}" for i in (1, 2) for n in norm}
    assert timm.create_model("resnet20_cifar").state_dict().keys() == expected

    names = timm.create_model("wrn16_1_cifar").state_dict().keys()
    assert {"conv1.weight", "block1.layer.0.bn1.weight", "block3.layer.1.conv2.weight", "bn1.bias", "fc.weight"} <= names
    shortcuts = {name for name in names if "hortcut" in name}
    assert shortcuts == {f"block{i}.layer.0.convShortcut.weight" for i in (2, 3)}

    names = timm.create_model("preact_resnet18_cifar").state_dict().keys()
    assert {"conv1.weight", "layer1.0.bn1.weight", "layer4.1.conv2.weight", "linear.bias"} <= names
    assert {n for n in names if "hortcut" in n} == {f"layer{i}.0.shortcut.0.weight" for i in (2, 3, 4)}
    assert not any(name.startswith("bn") for name in names)


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """Fill it from one stream of numbers that is the same everywhere, scaled so that signals neither die nor explode."""
    source = np.random.PCG64(0)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        draws = torch.from_numpy((source.random_raw(tensor.numel()) >> 11) * 2.0**-53).view(tensor.shape)
        if name.endswith("running_var") or tensor.ndim == 1 and name.endswith("weight"):
            tensor.copy_(draws + 0.5)
        else:
            tensor.copy_((draws - 0.5) * (12 / tensor[0].numel()) ** 0.5)
    return module.eval()


# With other names or logits, checkpoints in circulation would no longer load or would answer otherwise.
@pytest.mark.parametrize(
    ("name", "digest", "expected"),
    [
        ("resnet20_cifar", "43f1349e4cb851fa", [5.6314, 5.6042, -8.0231, -16.9810]),
        ("preact_resnet18_cifar", "0398a9d7e8c61c4b", [2.0915, -2.3247, -4.0290, 3.2376]),
        ("wrn16_1_cifar", "3ec72f9ac1b71272", [-1.5103, 2.3079, 1.7375, 0.9770]),
    ],
)
def test_names_shapes_and_logits_stay(name, digest, expected):
    model = filled(timm.create_model(name))
    names = [f"{key} {tuple(tensor.shape)}" for key, tensor in model.state_dict().items()]
    assert hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] == digest
    rows, columns = torch.arange(32.0)[:, None], torch.arange(32.0)
    image = torch.stack([(rows * columns) % 7, (rows + columns) % 5, (rows - columns) % 3])[None] / 3 - 1
    with torch.no_grad():
        found = model(image)[0]
    assert found.shape == (10,) and found[:4].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "model_args", "expected"),
    [
        ("resnet20_cifar", {}, 269_722 - 650 + 65 * 43),
        ("preact_resnet18_cifar", {}, 11_171_146 - 5130 + 513 * 43),
        ("wrn_cifar", {"depth": 10, "width": 2}, 303_706 - 1290 + 129 * 43),
    ],
)
def test_save_and_reload_bit_for_bit(tmp_path, name, model_args, expected):
    torch.manual_seed(0)
    names = [f"sign {index}" for index in range(43)]
    model = new_classifier(name, label_names=names, model_args=model_args, **MEAN_STD)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(reloaded(images).logits, model(images).logits)
    assert reloaded.config.id2label == dict(enumerate(names))
    assert reloaded.config.label2id == {label: index for index, label in enumerate(names)}


@pytest.mark.parametrize("name", ["resnet20_cifar", "preact_resnet18_cifar", "wrn16_1_cifar"])
def test_new_classifier_has_the_networks_own_initial_weights(name):
    torch.manual_seed(3)
    expected = timm.create_model(name, num_classes=10).state_dict()
    torch.manual_seed(3)
    found = new_classifier(name, num_labels=10, **MEAN_STD).timm_model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("name", "model_args", "message"),
    [
        ("wrn_cifar", {"depth": 17, "width": 1}, "depth must be 6n"),
        ("wrn_cifar", {"depth": 10, "width": 0}, "width >= 1"),
        ("wrn_cifar", {}, "depth"),
        ("resnet20_cifar", {"patch_size": 4}, "patch_size"),
        ("resnet20_cifr", {}, "did you mean resnet20_cifar"),
        ("zzz", {}, "unknown architecture 'zzz'"),
        ("resnet18.nobody", {}, "unknown architecture 'resnet18.nobody'"),
    ],
)
def test_architecture_errors(name, model_args, message):
    with pytest.raises(ValueError, match=message):
        new_classifier(name, num_labels=10, model_args=model_args, **MEAN_STD)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_light():
    heavy = "{'torch', 'timm', 'transformers', 'numpy', 'datasets'}"
    assert run(f"import sys, d3_hf, d3_hf.models; print(sorted({heavy} & sys.modules.keys()))") == "[]"


@pytest.mark.slow
def test_registered_when_imported_before_timm(tmp_path):
    new_classifier("wrn_cifar", num_labels=4, model_args={"depth": 10, "width": 1}, **MEAN_STD).save_pretrained(tmp_path)
    code = (
        "import sys, d3_hf; from transformers import AutoModelForImageClassification; "
        f"model = AutoModelForImageClassification.from_pretrained({str(tmp_path)!r}); import timm; "
        "left = [finder for finder in sys.meta_path if type(finder).__module__.startswith('d3_hf')]; "
        "print(type(model.timm_model).__name__, timm.is_model('resnet20_cifar'), left, "
        "type(timm.models.__loader__).__name__, 'exec_module' in vars(timm.models.__loader__))"
    )
    assert run(code).splitlines()[-1] == "WideResNet True [] SourceFileLoader False"


@pytest.mark.slow
def test_registered_when_imported_after_timm():
    code = "import timm; a = timm.is_model('resnet20_cifar'); import d3_hf; print(a, timm.is_model('resnet20_cifar'))"
    assert run(code) == "False True"
