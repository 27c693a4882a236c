"""Checkpoints that were made or damaged to do harm: one line, and nothing is written; see test_load_errors.py for mistakes."""

import struct

import pytest
import torch
from hostile import config, content, contents, good_model, huge_tensor, link_out, one_class, pickled, weights, zip_bomb

from d3_hf.models import load_classifier

DAMAGED = "model/model.safetensors is no complete safetensors file .*: fetch it again"


def as_dtype(dtype):
    return weights(lambda tensors: tensors.update({"classifier.weight": tensors["classifier.weight"].to(dtype)}))


@pytest.fixture
def here(tmp_path, monkeypatch):
    good_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(here, message, source, **options):
    before = contents(here)
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        load_classifier(source, **options)
    assert "\n" not in str(caught.value) and contents(here) == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (weights(lambda t: t.update({"classifier.bias": torch.zeros(7)})),
         r"model: .* of the wrong shape: classifier.bias \(7,\) instead of \(3,\)\): check"),
        (weights(lambda t: t.update(evil=torch.zeros(7))), r"model: .*1 unexpected: evil\): check the architecture"),
        (as_dtype(torch.float8_e4m3fn),
         r"model/model.safetensors: quantised or complex weights, classifier.weight \(torch.float8_e4m3fn\), cannot be"),
        (as_dtype(torch.complex64), "model/model.safetensors: quantised or complex"),
        (as_dtype(torch.int8), r"model/model.safetensors: quantised .*, classifier.weight \(torch.int8\), cannot"),
        (content(struct.pack("<Q", 10 << 30) + b"{}"), DAMAGED),  # a header of 10 GB
        (huge_tensor, DAMAGED),
        (link_out("model.safetensors"), "model: model.safetensors is a link out of the folder .*: put the file itself there"),
        (link_out("config.json"), "model: config.json is a link out"),
        (content(b"[" * 100_000, "model/config.json"), r"model: config.json is no JSON \(.*\)"),
        (content(b"\xff\xfe", "model/config.json"), r"model: config.json is no JSON \(.*\)"),
        (config(num_attention_heads=3), "model: "),
        (one_class, "model has 1 class: a classifier tells at least 2 apart"),
    ],
)  # fmt: skip
def test_folders(here, spoil, message):
    spoil(here)
    refused(here, message, "model")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (zip_bomb, r"bomb.pth was not opened: it unpacks to 67,\d+,\d+ bytes from \d\d,\d+"),
        (
            pickled({"a": torch.zeros(1).expand(1 << 40)}, "bomb.pth"),
            r"bomb.pth: a would fill more memory than the file's \d+",
        ),
        (pickled({"a": torch.zeros(1 << 40, layout=torch.sparse_coo)}, "bomb.pth"), r"bomb.pth is no .* found 'a' \(Tensor\)"),
        (content(b"no", "bomb.pth"), "bomb.pth is no state dict that torch.save wrote"),
    ],
)
def test_files(here, spoil, message):
    spoil(here)
    norm = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    refused(here, message, "bomb.pth", architecture="resnet20_cifar", **norm)
