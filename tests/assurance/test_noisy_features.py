"""Noise and the features that classify: the noise against a slow ascent, the mask's first step, a planted unit; refusals."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from shortcut import CLASSES, SIDE, TARGET, UNITS, classifier, network, pictures
from tiny import tiny_resnet, tiny_vit
from torch import nn

from d3_hf.assurance.noisy_features import classifying_mask, lean_of_the_others, noisy_features, noisy_scales
from d3_hf.models.features import HeadReading
from d3_hf.models.source import preprocessing_of


class NormedNet(nn.Module):
    """The network of `shortcut` with a BatchNorm, of statistics of its own, behind the hidden units."""

    def __init__(self, net):
        super().__init__()
        self.body, self.norm, self.head = net.body, nn.BatchNorm1d(UNITS).double(), net.head
        with torch.no_grad():
            features = self.body((pictures().images.double() / 127.5 - 1).flatten(1))
            self.norm.running_mean.copy_(features.mean(0))
            self.norm.running_var.copy_(features.var(0))
            self.norm.weight.copy_(features.std(0))
            self.norm.bias.copy_(features.mean(0))

    def forward(self, x):
        return self.head(self.norm(self.body(x.double().flatten(1))).relu())


def normed(shortcut=0.0):
    return classifier(NormedNet(network(shortcut)))


def test_the_noise_against_a_slow_ascent():
    images = pictures(40)
    model, slow = normed().eval(), normed().eval()
    found = noisy_scales(model, images, preprocessing_of(model), 12, 7)
    scales = {f"network.norm.{name}": p for name, p in slow.network.norm.named_parameters()}
    first = {name: p.detach().clone() for name, p in scales.items()}
    noise = {name: torch.zeros_like(p) for name, p in scales.items()}
    for _ in range(12):
        loss = sum(
            F.cross_entropy(slow(pixel_values=preprocessing_of(slow)(image[None])).logits.float(), label[None]) / 40
            for image, label in zip(images.images, images.labels, strict=True)
        )
        gradients = torch.autograd.grad(loss, list(scales.values()))
        with torch.no_grad():
            for (name, p), gradient in zip(scales.items(), gradients, strict=True):
                noise[name] = (noise[name] + 0.03 * (gradient * first[name]).sign()).clamp(-0.3, 0.3)
                p.copy_(first[name] * (1 + noise[name]))
    assert found.keys() == scales.keys()
    for name, p in scales.items():
        torch.testing.assert_close(found[name], p.detach())
    assert max(abs(n).max() for n in noise.values()) == pytest.approx(0.3)


def test_the_mask_keeps_what_classifies():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 4
    features = torch.cat([4 * F.one_hot(labels, 4).float(), torch.randn(64, 4, generator=generator)], 1)
    weight = torch.cat([torch.eye(4), torch.eye(4)], 1)  # the last four mislead
    mask = classifying_mask(HeadReading(features, features @ weight.T, weight, torch.zeros(4)), labels)
    assert (mask[:4] > 0.9).all() and (mask[4:] < 0.5).all()


def test_where_the_others_lean_against_loops():
    generator = torch.Generator().manual_seed(1)
    features, weight, bias = (torch.randn(shape, generator=generator) for shape in ((12, 5), (3, 5), (3,)))
    mask, labels = torch.rand(5, generator=generator), torch.arange(12) % 3
    found, accuracy = lean_of_the_others(HeadReading(features, features @ weight.T + bias, weight, bias), mask, labels)
    chances = [(weight @ ((1 - mask) * z) + bias).log_softmax(0).tolist() for z in features]
    for k in range(3):
        values = [row[k] for row, label in zip(chances, labels.tolist(), strict=True) if label != k]
        assert found[k] == pytest.approx(sum(values) / len(values), abs=1e-5)
    right = [max(range(3), key=row.__getitem__) == label for row, label in zip(chances, labels.tolist(), strict=True)]
    assert accuracy == pytest.approx(sum(right) / 12)


def test_the_class_of_a_shortcut_is_leaned_to():
    plain, planted = (noisy_features(normed(shortcut), pictures(), steps=10) for shortcut in (0, 30))
    assert planted.suspect_class == TARGET and planted.statistic > 2 * plain.statistic
    assert planted.details["mask"].shape == (UNITS,) and 0 <= planted.details["accuracy"] <= 1


def permuted(net):
    order = torch.randperm(UNITS, generator=torch.Generator().manual_seed(3))
    for tensor in (net.body.weight, net.body.bias, *net.norm.parameters(), net.norm.running_mean, net.norm.running_var):
        tensor.copy_(tensor[order])
    net.head.weight.copy_(net.head.weight[:, order])


def rescaled(net):
    factors = 10 ** torch.linspace(-2, 2, UNITS, dtype=torch.float64)
    net.norm.weight *= factors
    net.norm.bias *= factors
    net.head.weight /= factors


@pytest.mark.parametrize("change", [permuted, rescaled])
def test_the_same_function_looks_the_same(change):
    plain, changed = NormedNet(network(20)), NormedNet(network(20))
    with torch.no_grad():
        change(changed)
    first, second = (noisy_features(classifier(net), pictures(), steps=4) for net in (plain, changed))
    np.testing.assert_allclose(second.scores, first.scores, rtol=1e-2, atol=1e-2)
    assert second.suspect_class == first.suspect_class


def test_nothing_is_drawn_or_changed_and_batches_do_not_matter():
    model = normed(20).train()
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    found, again = (noisy_features(model, pictures(), steps=3, batch_size=size) for size in (160, 50))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and model.training and all(p.grad is None for p in model.parameters())
    np.testing.assert_allclose(again.scores, found.scores, rtol=1e-3, atol=1e-3)
    assert found.scores.shape == (CLASSES,) and SIDE == model.image_processor.size["height"]


def test_a_network_without_batch_norm_is_refused():
    images = pictures(24, classes=3)
    images = type(images)(images.images, images.labels, [f"LABEL_{k}" for k in range(3)])
    with pytest.raises(ValueError, match="stirs the scales of BatchNorm layers, and ViTForImageClassification has none"):
        noisy_features(tiny_vit(), images)
    assert noisy_features(tiny_resnet(), images, steps=1).scores.shape == (3,)
