"""``config.json``: what changes the meaning of logits or leads elsewhere is refused, what a network returns is settled."""

import json
import shutil

import pytest
import timm
import torch
from networks import IMAGES, NAMES, TIMM_VIT, logits
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf
from tiny import tiny_samples, tiny_vit
from transformers import AutoModelForImageClassification, PvtConfig, PvtForImageClassification, ViTImageProcessor

from d3_hf import D3Config, D3Trainer
from d3_hf.models import load_classifier


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def changed(source, folder, **changes):
    shutil.copytree(source, folder, dirs_exist_ok=True)
    edit(folder, **changes)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "is trained for another task .problem_type 'multi_label_class"),
        ({"problem_type": "regression"}, "is trained for another task .problem_type 'regression'.: .* to null if"),
        ({"problem_type": "ranking"}, "another task"),
        ({"id2label": {"0": "cat"}, "label2id": {"cat": 0}}, "has 1 class: a classifier tells at least 2 apart"),
        ({"id2label": {}, "label2id": {}}, "has 0 class"),
        ({"transformers_weights": "other.safetensors"}, "config.json leads to other files .transformers_weights., which"),
        ({"configuration_files": ["config.4.0.0.json"]}, "config.json leads to other files .configuration_files., which"),
        ({"compression_config": {"format": "int4"}}, "is quantised"),
        ({"vision_config": {"quantization_config": {"quant_method": "bnb"}}}, "is quantised"),
    ],
)
def test_what_changes_the_meaning_of_the_logits_is_refused(vit_folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_classifier(changed(vit_folder, tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_transformers_would_follow_the_detour(vit_folder, tmp_path):
    changed(vit_folder, tmp_path, transformers_weights="other.safetensors")
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"classifier.bias": torch.ones(10)}, tmp_path / "other.safetensors", metadata={"format": "pt"})
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(model.classifier.bias.data, torch.ones(10))


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("return_dict", False),
        ("output_hidden_states", True),
        ("output_attentions", True),
        ("torchscript", True),
        ("quantization_config", None),
    ],
)
@pytest.mark.parametrize("kind", ["vit_folder", "timm_folder"])
def test_what_a_network_returns_is_settled(request, tmp_path, kind, entry, value):
    folder = request.getfixturevalue(kind)
    model = load_classifier(changed(folder, tmp_path, **{entry: value}))
    with torch.no_grad():
        output = model(pixel_values=IMAGES)
    assert list(output.keys()) == ["logits"] and torch.equal(output.logits, logits(load_classifier(folder)))


def test_code_that_is_not_run_is_told(vit_folder, tmp_path, caplog):
    load_classifier(changed(vit_folder, tmp_path, auto_map={"AutoModelForImageClassification": "evil.EvilModel"}))
    assert "the Python code that its auto_map names is not run, but transformers' vit" in caplog.text


def test_models_in_memory_are_judged_as_well(vit_folder):
    model = AutoModelForImageClassification.from_pretrained(vit_folder, return_dict=False)
    assert logits(load_classifier(model)).shape == (4, 10)
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="another task"):
        load_classifier(model)
    model = AutoModelForImageClassification.from_pretrained(vit_folder)
    model._hf_peft_config_loaded = True  # as add_adapter leaves it
    with pytest.raises(ValueError, match="carries a PEFT adapter: merge it"):
        load_classifier(model)


def test_a_trainer_refuses_another_task(tmp_path):
    model = tiny_vit()
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="ViTForImageClassification is trained for another task"):
        D3Trainer(model, D3Config(str(tmp_path), use_cpu=True), tiny_samples())


def test_an_adapters_folder_is_named_for_what_it_is(vit_folder, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "google/vit"}))
    with pytest.raises(ValueError, match="holds a PEFT adapter of google/vit: merge it first"):
        load_classifier(tmp_path)
    shutil.copytree(vit_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(ValueError, match="holds a PEFT adapter: merge it first"):
        load_classifier(tmp_path)


def test_a_folder_above_the_model_says_where_it_is(vit_folder, tmp_path):
    shutil.copytree(vit_folder, tmp_path / "checkpoint-500")
    with pytest.raises(FileNotFoundError, match="holds no config.json; there is one in checkpoint-500$"):
        load_classifier(tmp_path)
    with pytest.raises(ValueError, match="in Python its module; or load its folder, .*checkpoint-500$"):
        load_classifier(tmp_path / "checkpoint-500" / "model.safetensors")


# timm ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["checkpoint_path", "pretrained_cfg_overlay", "features_only", "pretrained"])
def test_arguments_of_timm_that_load_something_else(timm_folder, tmp_path, entry):
    with pytest.raises(ValueError, match=f"{entry} in model_args of config.json is no part of a classifier: remove it"):
        load_classifier(changed(timm_folder, tmp_path, model_args=TIMM_VIT | {entry: "weights.pth"}))


@pytest.fixture
def timm_export(tmp_path):
    """A folder that timm wrote, and its network."""
    arguments, size = TIMM_VIT | {"num_classes": 10}, {"input_size": (3, TIMM_VIT["img_size"], TIMM_VIT["img_size"])}
    network = timm.create_model("vit_tiny_patch16_224", pretrained_cfg_overlay=size, **arguments).eval()
    save_for_hf(network, tmp_path, model_args=arguments, safe_serialization="both")
    return tmp_path, network


def test_timms_two_copies_are_compared(timm_export):
    folder, network = timm_export
    assert (folder / "pytorch_model.bin").is_file()
    assert torch.equal(logits(load_classifier(folder)), network(IMAGES))
    torch.save(network.state_dict() | {"head.bias": torch.ones(10)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="two copies of its weights that differ, .*in head.bias"):
        load_classifier(folder)


def test_a_background_class_is_left_out_as_timm_does(timm_export):
    folder, network = timm_export
    (folder / "pytorch_model.bin").unlink()
    config = json.loads((folder / "config.json").read_text())
    edit(folder, pretrained_cfg=config["pretrained_cfg"] | {"label_offset": 1})
    weights = network.state_dict()
    offset = {name: torch.cat([torch.ones_like(weights[name][:1]), weights[name]]) for name in ("head.weight", "head.bias")}
    save_file(weights | offset, folder / "model.safetensors")
    model = load_classifier(folder)
    assert torch.equal(logits(model), network(IMAGES))
    model.save_pretrained(folder / "again")
    assert "label_offset" not in json.loads((folder / "again" / "config.json").read_text())["pretrained_cfg"]
    assert torch.equal(logits(load_classifier(folder / "again")), network(IMAGES))


def test_a_config_of_timm_without_its_number_of_classes(timm_export):
    folder, _ = timm_export
    config = json.loads((folder / "config.json").read_text())
    del config["num_classes"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json gives no num_classes: add how many"):
        load_classifier(folder)


def test_a_timm_network_of_one_class(timm_folder, tmp_path):
    with pytest.raises(ValueError, match="has 1 class: a classifier tells at least 2 apart"):
        load_classifier(changed(timm_folder, tmp_path, num_classes=1, label_names=NAMES[:1]))


def test_pvt_has_as_many_classes_as_names(tmp_path):
    """Its configuration counts them apart, 1,000 unless it is told, and has no names then."""
    small = dict(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1], image_size=32)
    model = PvtForImageClassification(PvtConfig(num_labels=3, **small))
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for source, given in ((model, {"image_processor": processor}), (tmp_path, {})):
        assert load_classifier(source, **given).config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    named = load_classifier(tmp_path, new_head=["a", "b"])
    named.save_pretrained(tmp_path)
    contents = json.loads((tmp_path / "config.json").read_text())
    del contents["num_labels"]  # as transformers wrote it once
    (tmp_path / "config.json").write_text(json.dumps(contents))
    assert load_classifier(tmp_path).config.num_labels == named.config.num_labels == 2
