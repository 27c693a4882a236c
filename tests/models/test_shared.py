"""Tensors under several names: saved under each, read from one or all, refused where these differ."""

import pytest
import timm
import torch
from networks import NORM, Net, TiedNet, saved
from safetensors.torch import load_file, save_file
from tiny import FAST
from tiny_trained import differing
from torch import nn
from transformers import AutoModelForImageClassification

from d3_hf.data.images import RawImages
from d3_hf.defenses.d3.trainer import D3Config, D3Trainer
from d3_hf.defenses.fine_tuning import FineTuningConfig, FineTuningTrainer
from d3_hf.models import load_classifier, new_classifier
from d3_hf.models.neurons import neuron_layers
from d3_hf.models.shared import shared_names
from d3_hf.training.placement import choose

COAT = {"img_size": 32, "embed_dims": [8, 8, 8, 8], "serial_depths": [2, 1, 1, 1], "parallel_depth": 0}
NAMES = ["a", "b", "c"]
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class TiedInside(Net):
    """Two layers with one weight, which is not the head's."""

    def __init__(self):
        super().__init__(classes=3)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.head(self.two(self.one(self.norm(self.stem(x)).mean((2, 3))).relu()))


def coat():
    torch.manual_seed(0)
    return new_classifier("coat_tiny", label_names=NAMES, model_args=COAT, **NORM)


def tied_inside():
    torch.manual_seed(0)
    return load_classifier(TiedInside(), label_names=NAMES, **NORM)


def pictures(count=8):
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return RawImages(pixels, torch.arange(count) % 3, NAMES)


def logits(model):
    with torch.no_grad():
        return model.eval()(pixel_values=PIXELS).logits


def same(one, other):
    assert differing(one, other) == []
    torch.testing.assert_close(logits(one), logits(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("make", "module"), [(coat, None), (tied_inside, TiedInside)])
@pytest.mark.parametrize(
    ("config", "trainer", "options"),
    [
        (D3Config, D3Trainer, {"distillation": 0.1}),
        (FineTuningConfig, FineTuningTrainer, {"average_last": 0.9, "max_steps": -1, "num_train_epochs": 4}),
    ],
)
def test_it_trains_and_the_folder_gives_equal_logits(make, module, config, trainer, options, tmp_path):
    model = make()
    tied = shared_names(model)
    options = FAST | {"learning_rate": 0.01, "per_device_train_batch_size": 4} | options
    run = trainer(model, config(str(tmp_path), **options), pictures())
    run.train()
    run.save_model()
    assert tied and shared_names(run.model) == tied
    given = {"module": module()} if module else {}
    same(load_classifier(tmp_path, **given), run.model)
    if not module:  # transformers alone, which would fill a name that is missing with new numbers, reads the same
        same(AutoModelForImageClassification.from_pretrained(tmp_path), run.model)


@pytest.mark.parametrize("make", [coat, tied_inside])
def test_a_checkpoint_resumes(make, tmp_path):
    runs = []
    for resume in (None, True):
        args = FineTuningConfig(
            str(tmp_path), save_strategy="steps", save_steps=1, per_device_train_batch_size=4, **FAST | {"max_steps": 2}
        )
        runs.append(FineTuningTrainer(make(), args, pictures()))
        runs[-1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-1") if resume else None)
    assert differing(runs[0].model, runs[1].model) == []


def stored(model, folder):
    model.save_pretrained(folder, state_dict={name: tensor.clone() for name, tensor in model.state_dict().items()})
    return load_file(folder / "model.safetensors")


def test_a_file_that_holds_it_once_is_whole(tmp_path):
    model = coat()
    weights, groups = stored(model, tmp_path), shared_names(model)
    for names in groups:
        for name in names[1:]:
            del weights[name.removeprefix("timm_model.")]  # as `TimmWrapper` saves them
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    same(load_classifier(tmp_path), model)
    once = {name: tensor for name, tensor in TiedInside().state_dict().items() if name != "two.weight"}
    assert load_classifier(saved(tmp_path, once), module=TiedInside(), **NORM).config.num_labels == 3


def test_two_values_of_one_tensor_are_refused(tmp_path):
    """The loader's order would decide which of them is judged."""
    weights = {name: tensor.clone() for name, tensor in TiedNet().state_dict().items()}
    weights["again.weight"] += 1
    with pytest.raises(ValueError, match="head.weight and again.weight are one tensor of the network and differ in the file"):
        load_classifier(saved(tmp_path, weights), module=TiedNet(), **NORM)
    weights = stored(coat(), tmp_path)
    last = shared_names(coat())[0][-1]
    weights[last.removeprefix("timm_model.")] += 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="are one tensor of the network and differ in the file"):
        load_classifier(tmp_path)


def test_a_wrapped_module_with_a_tied_head_loads(tmp_path):
    model = load_classifier(TiedNet(), **NORM)
    model.save_pretrained(tmp_path)
    same(load_classifier(tmp_path, module=TiedNet()), model)
    with pytest.raises(ValueError, match="network.head.weight and network.again.weight share a weight"):
        D3Trainer(model, D3Config(str(tmp_path / "run"), **FAST), None)


def test_a_shared_weight_is_the_neurons_of_one_layer():
    class Linears(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
            self.two.weight = self.one.weight

        def forward(self, pixel_values):
            return type("Output", (), {"logits": self.head(self.two(self.one(pixel_values.mean((2, 3))).relu()))})()

    assert list(neuron_layers(Linears(), (8, 8))[1]) == ["one"]


def test_shards_are_refused():
    """Of FSDP each group of modules would hold, and step, a copy of its own."""
    run = type("Run", (), {"is_deepspeed_enabled": False, "is_fsdp_enabled": True, "args": D3Config("unused", use_cpu=True)})()
    with pytest.raises(ValueError, match=r"one tensor under two names .*: launch with DDP"):
        choose.placement_of(run, timm.create_model("coat_tiny", **COAT), runs_sharded=True)
