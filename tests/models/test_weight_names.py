"""Names of weights: what wrappers add is removed where it is beyond doubt, and named where it is not."""

import pytest
import timm
import torch
from networks import IMAGES, NORM, WRN, Net, logits, saved
from torch import nn
from torch.optim.swa_utils import AveragedModel

from d3_hf.models import load_classifier
from d3_hf.models.weight_names import told, unwrapped


class Lightning(nn.Module):
    """What a LightningModule with a loss of its own saves."""

    def __init__(self, network, loss=None):
        super().__init__()
        self.model = network
        if loss is not None:
            self.criterion = loss


def fsdp(network):
    """Names as FSDP and activation checkpointing write them, inside as well as in front."""
    names = (
        name.replace("layer.", "_fsdp_wrapped_module.layer.").replace("conv1", "_checkpoint_wrapped_module.conv1")
        for name in network.state_dict()
    )
    return {f"_fsdp_wrapped_module.{name}": tensor for name, tensor in zip(names, network.state_dict().values(), strict=True)}


WRAPPED = {
    "Lightning": lambda network: Lightning(network).state_dict(),
    "Lightning, compiled": lambda network: Lightning(torch.compile(network)).state_dict(),
    "a compiled stage": lambda network: {k.replace("block1.", "block1._orig_mod."): v for k, v in network.state_dict().items()},
    "AveragedModel": lambda network: AveragedModel(network).state_dict(),
    "AveragedModel in Lightning": lambda network: Lightning(nn.DataParallel(network)).state_dict(),
    "FSDP": fsdp,
    "net": lambda network: {f"net.{name}": tensor for name, tensor in network.state_dict().items()},
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_are_taken_off(tmp_path, network, wrapper):
    path = saved(tmp_path, {"state_dict": WRAPPED[wrapper](network)})
    assert torch.equal(logits(load_classifier(path, **WRN, **NORM)), network(IMAGES))


def test_names_of_mmpretrain(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=3).eval()
    weights = {f"{'head.' if k.startswith('fc') else 'backbone.'}{k}": v for k, v in network.state_dict().items()}
    model = load_classifier(saved(tmp_path, {"meta": {}, "state_dict": weights}), architecture="resnet18")
    with torch.no_grad():
        assert torch.equal(logits(model), network(IMAGES)) and model.config.num_labels == 3


def test_a_wrapped_classifier_of_transformers_in_its_folder(vit_folder, tmp_path):
    model = load_classifier(vit_folder)
    Lightning(model).model.config.save_pretrained(tmp_path)
    model.image_processor.save_pretrained(tmp_path)
    torch.save(Lightning(model).state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(logits(load_classifier(tmp_path)), logits(model))


class Outer(nn.Module):
    """A network of one's own whose names begin as a wrapper's do."""

    def __init__(self):
        super().__init__()
        self.model = Net()

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize("start", ["", "module."])
def test_a_networks_own_names_stay(tmp_path, start):
    torch.manual_seed(0)
    network = Outer().eval()
    weights = {f"{start}{name}": tensor for name, tensor in network.state_dict().items()}
    model = load_classifier(saved(tmp_path, weights), module=Outer(), **NORM)
    assert torch.equal(logits(model), network(IMAGES))
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(load_classifier(tmp_path / "out", module=Outer())), network(IMAGES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: Lightning(network_of(weights), nn.CrossEntropyLoss(torch.ones(10))).state_dict(),
            r"whose classifier is fc, where the weights are criterion.weight, \d+ of model.\* \(as model.block1.layer",
        ),
        (
            lambda weights: {f"base_model.model.{k}": v for k, v in weights.items()},
            r"holds the weights of an adapter \(base_model.model.conv1.weight\): merge it into its base model",
        ),
        (lambda weights: weights | {"fc.lora_A.default.weight": torch.ones(1)}, r"an adapter \(fc.lora_A.default.weight\)"),
        (lambda weights: {"_flat_param": torch.ones(9)}, r"holds flattened shards of FSDP \(_flat_param\): gather them"),
    ],
)
def test_weights_that_are_no_networks_own(tmp_path, network, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_classifier(saved(tmp_path, {"state_dict": change(network.state_dict())}), **WRN, **NORM)
    assert "\n" not in str(caught.value)


def network_of(weights):
    network = timm.create_model("wrn_cifar", num_classes=10, depth=10, width=1)
    network.load_state_dict(weights)
    return network


def test_two_names_are_not_made_one():
    weights = {"a.weight": torch.zeros(1), "a._orig_mod.weight": torch.ones(1)}
    assert unwrapped(weights, "it") == weights


def test_no_beginning_of_a_name_is_left_out():
    names = [f"vit.layer.{number}.weight" for number in range(99)]
    assert told(names[:2]) == "vit.layer.0.weight, vit.layer.1.weight"
    assert told([*names, "classifier.bias"]) == "classifier.bias, 99 of vit.* (as vit.layer.0.weight)"
    assert told(names[:9]).startswith("vit.layer.0.weight, vit.layer.1.weight, ") and told(names).endswith(
        " and 94 other beginnings"
    )
