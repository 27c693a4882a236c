"""`load_classifier`: every source, reloading bit for bit, and one row for every error."""

import io
import json
import shutil

import huggingface_hub.constants
import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from networks import IMAGES, MEAN, NAMES, NORM, STD, TIMM_VIT, WRN, Net, logits, saved
from PIL import Image
from safetensors.torch import load_file
from timm.models._hub import save_for_hf
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from d3_hf.files import sha256
from d3_hf.models import Source, WrappedClassifier, load_classifier, new_classifier

# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".th", ".bin", ".pth.tar"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "timm_model."])
def test_file(tmp_path, network, suffix, prefix):
    weights = {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}
    path = saved(tmp_path, weights, suffix)
    model = load_classifier(str(path), **WRN, **NORM)
    assert torch.equal(logits(model), network(IMAGES))
    assert model.source == Source("file", str(path), sha256={path.name: sha256(path)})
    assert model.config.num_labels == 10 and not model.training and model.dtype == torch.float32


@pytest.mark.parametrize("container", ["state_dict", "model", "net", "state_dict_ema", "model_state_dict", "params"])
def test_container(tmp_path, network, container):
    path = saved(tmp_path, {"epoch": 3, "optimizer": {"lr": 0.1}, container: network.state_dict()})
    assert torch.equal(logits(load_classifier(path, **WRN, **NORM)), network(IMAGES))


def test_old_checkpoint_without_batch_counters(tmp_path, network):
    weights = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert torch.equal(logits(load_classifier(saved(tmp_path, weights), **WRN, **NORM)), network(IMAGES))


def test_half_precision_becomes_float32(tmp_path, network):
    weights = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    model = load_classifier(saved(tmp_path, weights, ".safetensors"), **WRN, **NORM)
    assert model.dtype == torch.float32 and model.config.dtype == torch.float32
    assert torch.equal(model.timm_model.fc.weight, network.fc.weight.half().float())


def test_file_reloads_with_its_labels_and_processor(tmp_path, network):
    model = load_classifier(saved(tmp_path, network.state_dict()), label_names=NAMES, image_size=40, **WRN, **NORM)
    model.save_pretrained(tmp_path / "out")
    model.image_processor.save_pretrained(tmp_path / "out")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert again.config.id2label == dict(enumerate(NAMES)) == model.config.id2label
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.data_config == model.image_processor.data_config
    assert processor.data_config["input_size"] == (3, 40, 40) and processor.data_config["crop_pct"] == 1.0
    # A trap of TimmWrapperConfig: names set on a config that was loaded are lost unless label_names is set as well.
    renamed = load_classifier(tmp_path / "out", label_names=[f"{name}!" for name in NAMES])
    renamed.save_pretrained(tmp_path / "renamed")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "renamed").config.id2label[9] == "class 9!"


def test_architecture_with_its_own_normalisation(tmp_path):
    network = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1, embed_dim=32, num_heads=2)
    args = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    path = saved(tmp_path, network.state_dict())
    model = load_classifier(path, architecture="vit_tiny_patch16_224.augreg_in21k_ft_in1k", model_args=args)
    assert model.image_processor.data_config["mean"] == (0.5, 0.5, 0.5)
    assert model.image_processor.data_config["crop_pct"] == 0.9 and model.config.num_labels == 3


def test_image_size_reaches_a_network_of_fixed_size():
    model = new_classifier("vit_tiny_patch16_224", num_labels=3, image_size=64, model_args={"depth": 1}, **NORM)
    assert model(torch.zeros(1, 3, 64, 64)).logits.shape == (1, 3)


def test_file_into_a_module(tmp_path):
    torch.manual_seed(0)
    trained = Net().eval()
    model = load_classifier(saved(tmp_path, {"state_dict": trained.state_dict()}), module=Net(), **NORM)
    assert isinstance(model, WrappedClassifier) and model.source.kind == "file"
    assert torch.equal(logits(model), trained(IMAGES))


# Folders and the Hub -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("vit_folder", ("config.json", "preprocessor_config.json", "model.safetensors")),
        ("timm_folder", ("config.json", "model.safetensors")),
    ],
)
def test_folder(kind, files, request, tmp_path):
    folder = request.getfixturevalue(kind)
    expected = logits(AutoModelForImageClassification.from_pretrained(folder))
    model = load_classifier(folder)
    assert torch.equal(logits(model), expected)
    hashes = {name: sha256(folder / name) for name in files}
    assert model.source == Source("folder", str(folder), sha256=hashes)
    model.save_pretrained(tmp_path)
    model.image_processor.save_pretrained(tmp_path)
    assert torch.equal(logits(load_classifier(str(tmp_path), num_labels=10)), expected)
    assert load_classifier(tmp_path).config.id2label == dict(enumerate(NAMES))


def test_sharded_folder(vit_folder, tmp_path):
    model = load_classifier(vit_folder)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    model.image_processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = load_classifier(tmp_path)
    assert torch.equal(logits(again), logits(model)) and len(again.source.sha256) > 2


def test_folder_with_only_a_pickle(vit_folder, tmp_path):
    shutil.copytree(vit_folder, tmp_path, dirs_exist_ok=True)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(logits(load_classifier(tmp_path)), logits(load_classifier(vit_folder)))


def test_folder_that_timm_wrote(tmp_path):
    # A new timm writes the network's size and arguments unasked, an old one does not.
    network = timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, pretrained_cfg_overlay={"input_size": (3, 32, 32)}, **TIMM_VIT
    ).eval()
    save_for_hf(network, tmp_path, model_args=TIMM_VIT | {"num_classes": 10}, safe_serialization=True)
    assert "num_classes" in json.loads((tmp_path / "config.json").read_text())["model_args"]  # what trips TimmWrapper
    model = load_classifier(tmp_path)
    assert torch.equal(logits(model), network(IMAGES))
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForImageClassification.from_pretrained(tmp_path / "out")), logits(model))


def test_hub_id_from_the_cache(vit_folder, tmp_path, monkeypatch):
    commit = "0123456789" * 4
    repo = tmp_path / "models--someone--vit"
    shutil.copytree(vit_folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = load_classifier("someone/vit")
    assert model.source == Source("hub", "someone/vit", revision=commit)
    assert model.name_or_path == "someone/vit"
    assert torch.equal(logits(model), logits(load_classifier(vit_folder)))
    assert load_classifier("someone/vit", revision=commit).source.revision == commit
    with pytest.raises(OSError, match="not in the Hub cache"):
        load_classifier("someone/vit", revision="other")


# Modules and models in memory ----------------------------------------------------------------------------------------


def test_module_round_trip(tmp_path):
    torch.manual_seed(0)
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model = load_classifier(net, num_labels=10, label_names=NAMES, **NORM)
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in before), "the weights were initialised again"
    model.save_pretrained(tmp_path)
    model.image_processor.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == {f"network.{name}" for name in before}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["module_class"].endswith("networks.Net") and config["image_size"] == [32, 32]
    assert config["image_mean"] == MEAN and config["image_std"] == STD and config["id2label"]["9"] == "class 9"
    again = load_classifier(tmp_path, module=Net())
    assert torch.equal(logits(again), logits(model))
    assert again.config.id2label == dict(enumerate(NAMES)) and again.source.kind == "folder"
    assert AutoImageProcessor.from_pretrained(tmp_path).to_dict() == again.image_processor.to_dict()
    assert not any(path.suffix in (".bin", ".pt", ".pth") for path in tmp_path.iterdir())


def test_two_classes_survive(tmp_path):
    load_classifier(Net(2), image_size=(32, 40), **NORM).save_pretrained(tmp_path)
    again = load_classifier(tmp_path, module=Net(2))
    assert again.config.num_labels == 2 and again.image_processor.size == {"height": 32, "width": 40}


def test_module_loss():
    model = load_classifier(Net(), **NORM)
    labels = torch.tensor([1, 2, 3, 4])
    output = model(IMAGES, labels=labels)
    expected = -output.logits.log_softmax(1)[torch.arange(4), labels].mean()
    torch.testing.assert_close(output.loss, expected)
    assert model(IMAGES).loss is None and model.source == Source("module", "networks.Net")


def test_model_in_memory(vit_folder, timm_folder):
    model = AutoModelForImageClassification.from_pretrained(vit_folder)
    assert load_classifier(model) is model
    assert list(model.image_processor.image_mean) == MEAN and model.source == Source("module", str(vit_folder))
    assert load_classifier(model).source.kind == "module"
    wrapped = AutoModelForImageClassification.from_pretrained(timm_folder)
    wrapped.name_or_path = ""
    assert load_classifier(wrapped).image_processor.data_config["mean"] == tuple(MEAN)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    fresh = ViTForImageClassification(model.config)
    assert load_classifier(fresh, image_processor=processor).image_processor is processor


@pytest.mark.parametrize("source", ["vit_folder", "timm_folder", "module"])
def test_pipeline(source, request, caplog):
    net = Net()
    model = load_classifier(net, **NORM) if source == "module" else load_classifier(request.getfixturevalue(source))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    found = pipeline("image-classification", model=model, image_processor=model.image_processor)(image, top_k=10)
    assert "not supported" not in caplog.text
    pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 - torch.tensor(MEAN).view(3, 1, 1)) / (
        torch.tensor(STD).view(3, 1, 1)
    )
    expected = model(pixels).logits.softmax(1)[0].detach()
    assert [entry["score"] for entry in found] == pytest.approx(expected.sort(descending=True).values.tolist(), abs=1e-5)


# Other people's checkpoints ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar10(shared) -> tuple[torch.Tensor, torch.Tensor]:
    """The first 1,000 test images, uint8 (N, 3, 32, 32), and their labels."""
    table = pq.read_table(shared / "data" / "cifar10" / "test.parquet").slice(0, 1000)
    images = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["img"].to_pylist()]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(table["label"].to_pylist())


def predictions(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    config = model.image_processor.data_config
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        return torch.cat([model((batch / 255 - mean) / std).logits.argmax(1) for batch in images.split(250)])


# On all 10,000 test images these are 91.73 % and 93.39 %, the published figures; on the first 1,000 exactly what stands here.
@pytest.mark.parametrize(
    ("file", "architecture", "correct"),
    [
        ("clean_resnet20/resnet20-12fca82f.th", "resnet20_cifar", 923),
        ("clean_resnet56/resnet56-4bfd9763.th", "resnet56_cifar", 928),
    ],
)
def test_published_resnets(shared, cifar10, file, architecture, correct):
    images, labels = cifar10
    path = shared / "checkpoints" / file
    normalisation = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
    model = load_classifier(path, architecture=architecture, **normalisation)
    # The file is named after the start of its own SHA-256.
    assert model.source.sha256[path.name].startswith(path.stem.split("-")[1])
    assert abs(int((predictions(model, images) == labels).sum()) - correct) <= 2


def test_published_backdoor(shared, cifar10):
    images, labels = cifar10
    path = shared / "checkpoints" / "nad_wrn16_badnets" / "WRN-16-1-S-model_best.pth.tar"
    model = load_classifier(path, architecture="wrn16_1_cifar", num_labels=10, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    others = labels != 5
    # Published: 85.65 % of the 9,000 images outside the target class, and ASR 100 %. Here: of the first 1,000.
    correct = predictions(model, images) == labels
    assert abs(int(correct.sum()) - 851) <= 2 and 0.84 < correct[others].float().mean() < 0.88
    triggered = images.clone()
    triggered[:, :, -3:, -3:] = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)
    assert (predictions(model, triggered)[others] == 5).all()
