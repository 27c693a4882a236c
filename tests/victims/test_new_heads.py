"""Victims of networks for other classes, and of encoders: with a head for the data set's classes, victims like others."""

import pytest
import torch
from tiny import tiny_resnet
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from d3_hf.data.preprocessing import Preprocessing
from d3_hf.files import sha256
from d3_hf.models import load_classifier
from d3_hf.victims.record import read_record
from d3_hf.victims.sets import is_made, make_victim

DIGITS = {"dataset_name": "digits", "max_test_images": 30, "use_cpu": True, "disable_tqdm": True, "max_steps": 1}
DIGITS |= {"attack": "badnets", "new_head": True}


@pytest.fixture
def other_classes(tmp_path):
    """A classifier of three classes."""
    model = tiny_resnet()
    model.save_pretrained(tmp_path / "start")
    model.image_processor.save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def encoder(tmp_path):
    """A DINOv2 without a head, trained on 64 pixels, whose processor makes 32."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "start")
    BitImageProcessor(size={"shortest_edge": 36}, crop_size=32).save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.mark.parametrize(("start", "image_size"), [("other_classes", None), ("encoder", None), ("encoder", 16)])
def test_a_victim_of_a_network_for_other_classes(start, image_size, request, tmp_path):
    """No floor is measured: the checkpoint cannot tell these classes apart."""
    folder = request.getfixturevalue(start)
    options = DIGITS | {"model_name_or_path": str(folder), "output_dir": str(tmp_path / "victim")}
    options |= {"image_size": image_size} if image_size else {}
    victim = make_victim([], options)
    assert "clean_model" not in victim.measured and victim.measured["victim"]["accuracy_n"] == 30
    record, model = read_record(tmp_path / "victim"), load_classifier(victim.folder)
    files = ("config.json", "preprocessor_config.json", "model.safetensors")
    assert record["source"]["sha256"] == {name: sha256(folder / name) for name in files}
    assert record["recipe"]["new_head"] is True and record["recipe"].get("image_size") == image_size
    assert model.config.id2label == {number: str(number) for number in range(10)}
    size = Preprocessing.from_processor(model.image_processor).size
    assert size == (image_size or (32 if start == "encoder" else 16),) * 2
    assert is_made(tmp_path / "victim", options)
    with pytest.raises(ValueError, match="holds a victim made with other image_size"):
        is_made(tmp_path / "victim", options | {"image_size": 24})


def test_an_encoder_is_no_start_without_a_new_head(encoder, tmp_path):
    options = DIGITS | {"model_name_or_path": str(encoder), "output_dir": str(tmp_path / "victim"), "new_head": False}
    with pytest.raises(ValueError, match="is an encoder without a head .*: give it a new one and train it, --new_head"):
        make_victim([], options)


def test_a_new_head_has_the_classes_of_the_images(encoder, tmp_path):
    options = DIGITS | {"model_name_or_path": str(encoder), "output_dir": str(tmp_path / "victim"), "class_names": ["a", "b"]}
    with pytest.raises(ValueError, match="a new head has its own classes: leave class_names"):
        make_victim([], options)
