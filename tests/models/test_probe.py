"""What one probe image says of a network, and that it leaves the network as it was."""

from typing import NamedTuple

import pytest
import timm
import torch
from networks import NORM, Net, saved
from tiny import FAST, SIZE, tiny_resnet, tiny_vit, with_processor
from torch import Tensor, nn
from transformers import Siglip2Config, Siglip2ForImageClassification, ViTImageProcessor

from d3_hf.data.images import RawImages
from d3_hf.defenses.fine_pruning import last_units
from d3_hf.defenses.fine_tuning import FineTuningConfig, FineTuningTrainer
from d3_hf.defenses.shared.masks import batch_norm_scales
from d3_hf.defenses.tsbd import neuron_weights
from d3_hf.models import load_classifier, new_classifier
from d3_hf.models.probe import smallest_training_batch

NAMES = ["a", "b", "c"]


class Outputs(NamedTuple):
    logits: Tensor
    auxiliary: Tensor


class Auxiliary(Net):
    """A second classifier in training, as in GoogLeNet."""

    def __init__(self, make):
        super().__init__(classes=3)
        self.make, self.second = make, nn.Linear(4, 3)

    def forward(self, x):
        features = self.norm(self.stem(x)).relu().mean((2, 3))
        return self.make(self.head(features), self.second(features)) if self.training else self.head(features)


def pictures(size=32):
    pixels = torch.randint(0, 256, (8, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return RawImages(pixels, torch.arange(8) % 3, NAMES)


def train(model, folder):
    run = FineTuningTrainer(model, FineTuningConfig(str(folder), per_device_train_batch_size=4, **FAST), pictures())
    run.train()
    return run


def test_named_logits_are_trained_on_beside_auxiliary_classifiers(tmp_path):
    model = load_classifier(Auxiliary(Outputs), label_names=NAMES, **NORM)
    second = model.network.second.weight.clone()
    train(model, tmp_path).save_model()
    assert torch.equal(model.network.second.weight, second)
    load_classifier(tmp_path, module=Auxiliary(Outputs))


def test_a_tuple_in_training_mode_is_refused_before_the_training(tmp_path):
    model = load_classifier(Auxiliary(lambda *logits: logits), label_names=NAMES, **NORM)
    with pytest.raises(ValueError, match="a tuple of 2 instead of logits .* in training mode: switch its auxiliary or dist"):
        train(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_distilled_network_of_timm_in_its_own_training_is_refused(tmp_path):
    arguments = {"img_size": 32, "embed_dim": 12, "depth": 1, "num_heads": 2}
    model = new_classifier("deit_tiny_distilled_patch16_224", label_names=NAMES, model_args=arguments, **NORM)
    train(model, tmp_path / "averaged")
    model.timm_model.set_distilled_training(True)
    with pytest.raises(ValueError, match=r"a tuple of 2 instead of logits \(1, 3\) in training mode"):
        train(model, tmp_path / "run")


def test_one_channel_is_refused_at_load(tmp_path):
    weights = timm.create_model("test_resnet", num_classes=3, in_chans=1).state_dict()
    with pytest.raises(ValueError, match=r"on RGB images of shape \(1, 3, 32, 32\) .*only networks that take three channels"):
        load_classifier(saved(tmp_path, weights), architecture="test_resnet", image_size=32, model_args={"in_chans": 1}, **NORM)


def test_a_network_of_patches_is_refused_whatever_its_processor():
    small = dict(hidden_size=32, num_attention_heads=2, intermediate_size=48, num_hidden_layers=1)
    vision = dict(num_patches=16, patch_size=8, **small)
    model = Siglip2ForImageClassification(Siglip2Config(text_config=dict(vocab_size=9, **small), vision_config=vision))
    with pytest.raises(ValueError, match="only networks that take three channels at the size of their image processor"):
        load_classifier(model, image_processor=ViTImageProcessor(size={"height": 32, "width": 32}))


def test_another_size_than_the_processors_is_refused_at_load(tmp_path):
    model = tiny_vit()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 24}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"shape \(1, 3, 32, 24\)"):
        load_classifier(tmp_path)


def test_images_that_are_not_square_train_and_reload(tmp_path):
    for name, arguments in (("resnet10t", {}), ("vit_tiny_patch16_224", {"embed_dim": 12, "depth": 1, "num_heads": 2})):
        model = new_classifier(name, label_names=NAMES, image_size=(32, 16), model_args=arguments, **NORM)
        run = train(model, tmp_path / name)
        run.save_model()
        pixels = torch.randn(2, 3, 32, 16)
        assert run.preprocessing.size == (32, 16)
        with torch.no_grad():
            found = load_classifier(tmp_path / name)(pixels).logits
            torch.testing.assert_close(found, model.eval()(pixels).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
def test_a_probe_leaves_model_and_random_numbers_as_they_were(make):
    model = make().eval()
    before, random = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    assert smallest_training_batch(model, (SIZE, SIZE)) == 1
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(torch.get_rng_state(), random) and not any(module.training for module in model.modules())


@pytest.mark.parametrize("find", [last_units, neuron_weights])
def test_neurons_behind_a_parametrisation_are_refused(find):
    """Zeros written into such a weight would be gone with the next pass."""
    model = tiny_resnet()
    layer = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    nn.utils.parametrizations.weight_norm(model.get_submodule(layer))
    with pytest.raises(ValueError, match=f"{layer} is parametrised"):
        find(model, (SIZE, SIZE))


def test_scales_behind_a_parametrisation_are_refused():
    model = tiny_resnet()
    layer = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    with pytest.raises(ValueError, match="is parametrised"):
        batch_norm_scales(model, "ANP")


def test_a_parametrised_network_is_fine_tuned_and_reloads(tmp_path):
    def make():
        net = Net(classes=3)
        nn.utils.parametrizations.weight_norm(net.head)
        return net

    run = train(load_classifier(make(), label_names=NAMES, **NORM), tmp_path)
    run.save_model()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = load_classifier(tmp_path, module=make())(pixels).logits
        torch.testing.assert_close(found, run.model.eval()(pixels).logits, rtol=0, atol=0)


def test_a_masked_layer_is_refused_before_any_copy_of_it(tmp_path):
    model = with_processor(tiny_vit())
    nn.utils.prune.l1_unstructured(model.classifier, "weight", 0.3)
    with pytest.raises(ValueError, match=r"classifier is pruned by a mask: .*prune.remove\(layer, 'weight'\)"):
        FineTuningTrainer(model, FineTuningConfig(str(tmp_path), distillation=0.1, **FAST), pictures(SIZE))
