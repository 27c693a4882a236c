"""Deployed forms: int8 against loops and against torch's own, pruning against a sort; copies that signals can be read of."""

import copy
import warnings

import numpy as np
import pytest
import torch
from shortcut import CLASSES, classifier, network, pictures
from tiny import tiny_resnet, tiny_samples, tiny_vit
from torch import nn
from torch.nn.utils import parametrizations, prune

from d3_hf.assurance.deployed import pruned, quantised, quantised_input, quantised_weight
from d3_hf.assurance.head_rows import head_rows
from d3_hf.assurance.maximum_margin import maximum_margin
from d3_hf.models.source import preprocessing_of

FORMS = [quantised, pruned]


@torch.no_grad()
def logits(model):
    return model.eval()(pixel_values=torch.stack([sample["pixel_values"] for sample in tiny_samples(12)])).logits


def test_rounding_against_loops():
    values = 3 * torch.randn(40, generator=torch.Generator().manual_seed(0)) + 1
    scale = max(abs(v) for v in values.tolist()) / 127.5
    expected = [scale * min(max(round(v / scale), -128), 127) for v in values.tolist()]
    assert quantised_weight(values).tolist() == pytest.approx(expected, abs=1e-5)
    low, high = min(values.tolist()), max(values.tolist())
    scale = (high - low) / 127
    zero = round(-low / scale)
    expected = [scale * (min(max(round(v / scale) + zero, 0), 127) - zero) for v in values.tolist()]
    assert quantised_input(values).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("values", [[0.0, 0.0], [2.0, 1.0], [-3.0, -1.0]])
def test_zero_stays_zero(values):
    assert quantised_input(torch.tensor([*values, 0.0]))[-1] == 0 and quantised_weight(torch.zeros(3)).tolist() == [0] * 3
    assert (quantised_input(torch.tensor(values)) - torch.tensor(values)).abs().max() <= 0.03


def test_inputs_have_the_gradient_of_no_rounding():
    inputs = torch.linspace(-1, 2, 7, requires_grad=True)
    (quantised_input(inputs) ** 2).sum().backward()
    torch.testing.assert_close(inputs.grad, 2 * quantised_input(inputs).detach())


def test_it_computes_what_torch_s_own_layers_do():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 4))
    inputs = torch.randn(50, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces its removal
        theirs = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, torch.qint8)
    with torch.no_grad():
        plain, expected, found = net(inputs), theirs(inputs), quantised(net)(inputs)
    bits = 7 if torch.backends.quantized.engine in ("x86", "fbgemm", "onednn") else 8  # other processors' engine takes 8
    assert (found - expected).abs().max() < (1e-5 if bits == 7 else 0.05) < 5 * (found - plain).abs().max()


def test_the_smallest_weights_of_each_layer_are_gone():
    model = tiny_resnet()
    found = pruned(model)
    for name, layer in model.named_modules():
        weight, left = getattr(layer, "weight", None), getattr(found.get_submodule(name), "weight", None)
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            assert weight is None or torch.equal(weight, left)
            continue
        order = sorted(range(weight.numel()), key=lambda i, w=weight: abs(w.flatten()[i].item()))
        gone = order[: round(0.3 * weight.numel())]
        expected = weight.detach().flatten().clone()
        expected[gone] = 0
        assert gone and torch.equal(left.flatten(), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
def test_a_copy_that_nearly_agrees_and_nothing_else_is_touched(form, make):
    model = make()
    before, plain = copy.deepcopy(model.state_dict()), logits(model)
    found = form(model)
    changed = logits(found)
    assert list(found.state_dict()) == list(before) and found.image_processor is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=0)
    difference = (changed - plain).abs().max() / plain.std()
    assert 0 < difference < (0.3 if form is quantised else 3)


@pytest.mark.parametrize("form", FORMS)
def test_predictions_of_a_classifier_nearly_agree(form):
    images, model = pictures(), classifier(network())
    with torch.no_grad():
        pixels = preprocessing_of(model)(images.images)
        plain, changed = (m(pixel_values=pixels).logits.argmax(1) for m in (model, form(model)))
    assert (plain == images.labels).float().mean() > 0.95 and (changed == plain).float().mean() > 0.8


@pytest.mark.parametrize("form", FORMS)
def test_signals_can_be_read_of_it(form):
    model, images = classifier(network(shortcut=20, patch=5)), pictures()
    plain, found = (head_rows(m, images) for m in (model, form(model)))
    assert found.suspect_class == plain.suspect_class and not np.array_equal(found.scores, plain.scores)
    assert maximum_margin(form(model), images, starts=1, steps=3).scores.shape == (CLASSES,)


def test_a_shared_weight_is_rounded_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5)
            self.two.weight = self.one.weight

    net = Tied()
    found = quantised(net)
    assert found.one.weight is found.two.weight
    assert torch.equal(found.one.weight, quantised_weight(net.one.weight.detach()))
    assert (pruned(net).two.weight == 0).sum() == 8


@pytest.mark.parametrize("form", FORMS)
def test_computed_weights_are_refused(form):
    masked, normed = tiny_vit(), tiny_vit()
    prune.random_unstructured(masked.classifier, "weight", 1)
    parametrizations.weight_norm(normed.classifier)
    for model, message in ((masked, "classifier is pruned by a mask"), (normed, "classifier is parametrised")):
        with pytest.raises(ValueError, match=message):
            form(model)
