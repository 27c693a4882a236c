"""`load_classifier`: one row for every error; no file runs code."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import timm
import torch
from fake_hub import logged_in
from networks import MEAN, NORM, STD, TIMM_VIT, WRN, Net, PairNet, logits, saved
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from d3_hf.models import load_classifier


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_pickle_is_not_run(tmp_path, vit_folder, legacy):
    marker = tmp_path / "ran"
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": Hostile(marker)}, path, _use_new_zipfile_serialization=not legacy)
    folder = tmp_path / "folder"
    shutil.copytree(vit_folder, folder)
    (folder / "model.safetensors").unlink()
    shutil.copy(path, folder / "pytorch_model.bin")
    for source, options in ((path, {**WRN, **NORM}), (folder, {})):
        with pytest.raises(
            ValueError, match=r"(evil.pth|pytorch_model.bin) was not opened: it wants to run \w+.mkdir"
        ) as caught:
            load_classifier(source, **options)
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert not marker.exists()
    with path.open("rb") as file:
        if legacy:
            for _ in range(4):  # proof that the file does what it is refused for: its fourth pickle holds the object
                pickle.load(file)
            assert marker.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_hostile_pickle_that_torch_did_not_write_is_not_run(tmp_path, protocol, recwarn):
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Hostile(marker), protocol))
    with pytest.raises(ValueError, match="evil.pth .*(wants to|can) run .*; ask its author for safetensors") as caught:
        load_classifier(path, **WRN, **NORM)
    assert not marker.exists() and not list(recwarn) and "issue" not in str(caught.value)
    pickle.loads(path.read_bytes())  # proof that the file does what it is refused for
    assert marker.exists()


def broken_weights(network: nn.Module) -> dict:
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    missing, extra, nan, inf = (dict(weights) for _ in range(4))
    del missing["fc.bias"], missing["bn1.weight"]
    extra["fc2.weight"] = torch.zeros(2)
    nan["fc.weight"] = torch.full_like(weights["fc.weight"], float("nan"))
    inf["bn1.running_var"] = torch.full((64,), float("inf"))
    return {"missing": missing, "extra": extra, "nan": nan, "inf": inf, "good": weights}


@pytest.mark.parametrize(
    ("which", "options", "message"),
    [
        ("missing", {}, r"2 missing: .*bn1.weight, .*fc.bias"),
        ("extra", {}, r"1 unexpected: .*fc2.weight"),
        ("nan", {}, r"NaN or infinite values in fc.weight"),
        ("inf", {}, r"NaN or infinite values in bn1.running_var"),
        ("good", {"num_labels": 7}, r"fc.weight \(10, 64\) instead of \(7, 64\).*number of classes"),
        ("good", {"label_names": ["a", "b"]}, r"fc.weight \(10, 64\) instead of \(2, 64\)"),
        (
            "good",
            {"model_args": {"depth": 16, "width": 1}},
            r"30 missing: 10 of timm_model.block1\.\* \(as timm_model.block1.layer.1.bn1.bias\), 10 of",
        ),
        ("good", {"model_args": {"depth": 10, "width": 1, "nonsense": 1}}, "nonsense"),
        ("good", {"num_labels": 1}, "at least 2 classes"),
        ("good", {"num_labels": 10, "label_names": ["a", "b"]}, "num_labels=10 but label_names has 2"),
        ("good", {"label_names": ["a", "a"]}, "differ from each other"),
        ("good", {"architecture": "wrn_cifra"}, "did you mean wrn_cifar"),
        ("good", {"architecture": "resnet20"}, "unknown architecture 'resnet20': did you mean resnet20_cifar or"),
        ("good", {"architecture": None}, "give its architecture, a timm name, or in Python its module"),
        ("good", {"module": Net()}, "give its architecture"),
        ("good", {"architecture": None, "module": Net()}, "model_args goes with architecture"),
        ("good", {"architecture": None, "model_args": None, "module": Net()}, "missing: .*head.*unexpected"),
        ("good", {"image_mean": None}, "come together"),
        ("good", {"image_mean": None, "image_std": None}, "fixes no normalisation: give"),
        ("good", {"image_mean": (125, 122, 113)}, "three numbers in"),
        ("good", {"image_std": (0, 1, 1)}, "three numbers in"),
        ("good", {"image_size": 0}, "must be positive"),
        ("good", {"revision": "main"}, "revision cannot be set for a file"),
        ("good", {"image_processor": ViTImageProcessor()}, "image_processor cannot be set for a file"),
    ],
)
def test_file_errors(tmp_path, network, which, options, message):
    path = saved(tmp_path, broken_weights(network)[which])
    with pytest.raises(ValueError, match=message) as caught:
        load_classifier(path, **{**WRN, **NORM, **options})
    assert "\n" not in str(caught.value)


def test_module_in_file_without_normalisation(tmp_path):
    with pytest.raises(ValueError, match="give the training's image_mean and image_std"):
        load_classifier(saved(tmp_path, Net().state_dict()), module=Net())


def test_number_of_classes_is_not_guessed(tmp_path):
    network = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, depth=1)
    with pytest.raises(ValueError, match="cannot tell the number of classes"):
        load_classifier(
            saved(tmp_path, network.state_dict()), architecture="deit_tiny_distilled_patch16_224", model_args={"depth": 1}
        )


@pytest.mark.parametrize(
    ("name", "contents", "error", "message"),
    [
        ("a.safetensors", b"", ValueError, "no complete safetensors file"),
        ("a.safetensors", b"\x10\0\0\0\0\0\0\0{}", ValueError, "no complete safetensors file"),
        ("a.safetensors", "truncated", ValueError, "no complete safetensors file"),
        ("a.safetensors", {}, ValueError, "holds no weights"),
        ("a.pth", b"", ValueError, "no complete state dict"),
        ("a.pth", b"hello world", ValueError, "no complete state dict"),
        ("a.pth", b"PK\5\6" + bytes([1] * 16) + bytes(2), ValueError, "no complete state dict"),  # a zip of nothing
        ("a.pth", "truncated", ValueError, "no complete state dict"),
        ("a.pth", {}, ValueError, "holds no weights"),
        ("a.pth", [torch.zeros(2)], ValueError, "holds a list"),
        ("a.pth", {"epoch": 3, "weights": {}}, ValueError, r"found 'weights' \(dict\), 'epoch' \(int\)"),
        ("a.pth", {0: torch.zeros(2)}, ValueError, r"found 0 \(Tensor\)"),
        ("a.npz", b"", ValueError, "unknown suffix '.npz'"),
        ("a.safetensors", None, FileNotFoundError, "no such file or folder"),
        ("folder/a.pth.tar", None, FileNotFoundError, "no such file or folder"),
        ("./nowhere/at/all", None, FileNotFoundError, "no such file or folder"),
    ],
)
def test_damaged_files(tmp_path, network, name, contents, error, message):
    path = tmp_path / name
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    elif contents == "truncated":
        whole = saved(tmp_path, network.state_dict(), path.suffix).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif contents is not None:
        saved(tmp_path, contents, path.suffix).rename(path)
    with pytest.raises(error, match=message) as caught:
        load_classifier(path, **WRN, **NORM)
    assert "\n" not in str(caught.value) and name.split("/")[-1] in str(caught.value)


@pytest.mark.parametrize("make", [torch.jit.script, lambda module: torch.jit.trace(module, torch.zeros(1, 2))])
def test_torchscript_is_named_and_not_opened(tmp_path, make):
    make(nn.Linear(2, 2)).save(str(tmp_path / "weights.pt"))
    with pytest.raises(
        ValueError, match="weights.pt is TorchScript, .* was not opened: ask its author for safetensors"
    ) as caught:
        load_classifier(tmp_path / "weights.pt", **WRN, **NORM)
    assert "weights_only" not in str(caught.value) and "torch.jit" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Cannot use ``weights_only=True`` with files saved in the legacy .tar format"),
        RuntimeError("Please use torch.jit.load"),
    ],
)
def test_advice_to_load_without_restriction_is_not_passed_on(tmp_path, monkeypatch, network, error):
    path = saved(tmp_path, network.state_dict())

    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(ValueError, match=r"is no complete state dict that torch.save wrote \(RuntimeError\): ask its author"):
        load_classifier(path, **WRN, **NORM)


@pytest.mark.parametrize("name", ["nobody/nothing-here", "nothing-here"])
def test_unreachable_hub_id(name):
    with pytest.raises(OSError, match="no local path and not in the Hub cache") as caught:
        load_classifier(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("me/unheard", None, "me/unheard is no local path, and no model on the Hub that you may read: check the name"),
        ("me/vit", "v9", "me/vit has no branch, tag or commit v9: check the revision"),
    ],
)
def test_hub_id_that_does_not_exist(vit_folder, name, revision, message, monkeypatch):
    with logged_in(monkeypatch) as hub, pytest.raises(FileNotFoundError, match=message):
        hub.publish("me/vit", vit_folder)
        load_classifier(name, revision=revision)


@pytest.mark.parametrize("source", [None, 3, {"a": 1}])
def test_no_source(source):
    with pytest.raises(TypeError, match="pass a Hub id, a path or a module"):
        load_classifier(source)


def edit(folder: Path, file: str, **changes) -> None:
    contents = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in contents.items() if value is not None}))


AUTO_MAP = {"AutoConfig": "evil.EvilConfig", "AutoModelForImageClassification": "evil.EvilModel"}


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "holds no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "holds no model.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "no JSON"),
        (lambda f: (f / "config.json").write_text("[]"), ValueError, "holds a list"),
        (lambda f: edit(f, "config.json", model_type=None), ValueError, "model_type None"),
        (lambda f: edit(f, "config.json", model_type="bert_like"), ValueError, "model_type 'bert_like'"),
        (lambda f: edit(f, "config.json", model_type="gpt2"), ValueError, "no image classifier"),
        (lambda f: edit(f, "config.json", model_type="evil", auto_map=AUTO_MAP), ValueError, "never run"),
        (lambda f: edit(f, "config.json", hidden_size="big"), ValueError, "config.json cannot be used"),
        (lambda f: edit(f, "config.json", hidden_act="step"), ValueError, "can be built from its config"),
        (lambda f: edit(f, "config.json", num_hidden_layers=2), ValueError, "missing: "),
        (lambda f: edit(f, "config.json", quantization_config={"quant_method": "bnb"}), ValueError, "quantised"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), ValueError, "PEFT adapter"),
        (lambda f: (f / "preprocessor_config.json").unlink(), ValueError, "no image processor"),
        (lambda f: edit(f, "preprocessor_config.json", image_processor_type="Evil"), ValueError, "no image processor"),
    ],
)
def test_folder_errors(vit_folder, tmp_path, damage, error, message):
    shutil.copytree(vit_folder, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    with pytest.raises(error, match=message) as caught:
        load_classifier(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_code_beside_a_native_model_is_not_run(vit_folder, tmp_path):
    shutil.copytree(vit_folder, tmp_path, dirs_exist_ok=True)
    edit(tmp_path, "config.json", auto_map=AUTO_MAP, attn_implementation="evil/kernel")
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    model = load_classifier(tmp_path)
    assert type(model) is ViTForImageClassification and not (tmp_path / "ran").exists()
    assert torch.equal(logits(model), logits(load_classifier(vit_folder)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "vit_tiny_patch16"}, "unknown architecture 'vit_tiny_patch16': did you mean"),
        ({"architecture": "hf-hub:evil/model"}, "unknown architecture"),
        ({"num_classes": 7, "label_names": None}, "of the wrong shape: .*head"),
        ({"model_args": TIMM_VIT | {"num_classes": 7}}, "says 10 classes, and 7 in model_args"),
        ({"model_args": TIMM_VIT | {"nonsense": 1}}, "can be built from its config"),
    ],
)
def test_timm_folder_errors(timm_folder, tmp_path, changes, message):
    shutil.copytree(timm_folder, tmp_path, dirs_exist_ok=True)
    edit(tmp_path, "config.json", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_classifier(tmp_path)
    assert "\n" not in str(caught.value)


def test_classes_are_numbered_from_zero(vit_folder, tmp_path):
    """Flowers-102 and other lists from MATLAB count from 1."""
    shutil.copytree(vit_folder, tmp_path, dirs_exist_ok=True)
    names = [f"flower {number}" for number in range(1, 11)]
    ids = {"id2label": dict(enumerate(names, 1)), "label2id": {name: number for number, name in enumerate(names, 1)}}
    edit(tmp_path, "config.json", **ids)
    with pytest.raises(ValueError, match="numbers 10 classes from 1 to 10, and the logits count from 0 to 9: .*--class_names"):
        load_classifier(tmp_path)
    assert load_classifier(tmp_path, label_names=names).config.label2id["flower 1"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 7}, "has 10 classes, not num_labels=7"),
        ({"label_names": ["a", "b"]}, "num_labels=10 but label_names has 2"),
        ({"module": Net()}, "leave module out"),
        ({"architecture": "resnet18"}, "architecture cannot be set for a folder"),
        ({"image_mean": MEAN, "image_std": STD}, "image_mean, image_std cannot be set for a folder"),
    ],
)
def test_folder_option_errors(vit_folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_classifier(vit_folder, **options)


def not_finite() -> nn.Module:
    net = Net()
    net.head.bias.data[0] = float("nan")
    return net


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Net(), {}, "give the training's image_mean and image_std"),
        (Net(), {**NORM, "num_labels": 7}, "has 10 classes, not num_labels=7"),
        (Net(), {**NORM, "label_names": ["a", "b"]}, "num_labels=10 but label_names has 2"),
        (Net(), {**NORM, "image_size": 1}, "failed on an image of shape"),
        (Net(), {**NORM, "architecture": "resnet18"}, "architecture cannot be set for a module"),
        (PairNet(), NORM, "for one image it returned tuple"),
        (nn.Conv2d(3, 2, 3), NORM, r"for one image it returned \(1, 2, 30, 30\)"),
        (nn.Flatten(), NORM, "has no parameters"),
        (nn.DataParallel(Net()), NORM, "pass the network itself, module.module"),
        (not_finite(), NORM, "NaN or infinite values in head.bias"),
    ],
)
def test_module_errors(module, options, message):
    with pytest.raises(ValueError, match=message):
        load_classifier(module, **options)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, r"holds the weights of a .*networks.Net, .* with one passed as module"),
        (Net(7), r"head.weight \(10, 4\) instead of \(7, 4\)"),
        (nn.Linear(2, 2), "missing: bias, weight"),
    ],
)
def test_wrapped_folder_errors(tmp_path, module, message):
    load_classifier(Net(), **NORM).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_classifier(tmp_path, module=module)


def test_wrapped_folder_without_size(tmp_path):
    load_classifier(Net(), **NORM).save_pretrained(tmp_path)
    edit(tmp_path, "config.json", image_size=None)
    with pytest.raises(ValueError, match="lacks image_size"):
        load_classifier(tmp_path, module=Net())


def test_wrapped_folder_with_an_auto_class(tmp_path):
    load_classifier(Net(), **NORM).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"load_classifier\(folder, module=it\)"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_model_errors(vit_folder):
    config = ViTConfig.from_pretrained(vit_folder)
    with pytest.raises(ValueError, match="pass one as image_processor"):
        load_classifier(ViTForImageClassification(config))
    with pytest.raises(ValueError, match="has 10 classes, not num_labels=7"):
        load_classifier(AutoModelForImageClassification.from_pretrained(vit_folder), num_labels=7)
