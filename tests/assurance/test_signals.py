"""What holds for every signal: functions that are the same look the same, nothing is drawn or changed, what cannot be read."""

import itertools

import numpy as np
import pytest
import torch
from shortcut import UNITS, classifier, network, pictures
from tiny import SIZE, tiny_resnet, tiny_timm_vit, tiny_vit

from d3_hf.assurance.anti_learning import anti_learning
from d3_hf.assurance.canary import canary
from d3_hf.assurance.feature_inversion import feature_inversion
from d3_hf.assurance.head_rows import head_rows
from d3_hf.assurance.inversion import Schedule
from d3_hf.assurance.latent_shift import latent_shift
from d3_hf.assurance.maximum_margin import maximum_margin
from d3_hf.assurance.trigger_inversion import trigger_inversion
from d3_hf.data.images import RawImages


def short_anti_learning(model, images, **options):
    return anti_learning(model, images, steps=6, **options)


def short_canary(model, images, **options):
    return canary(model, images, steps=6, **options)


def short_maximum_margin(model, images, **options):
    return maximum_margin(model, images, starts=3, steps=6, **options)


def short_trigger_inversion(model, images, **options):
    return trigger_inversion(model, images, Schedule(epochs=3, cost_patience=1), **options)


def short_feature_inversion(model, images, **options):
    return feature_inversion(model, images, Schedule(epochs=10, cost_patience=1), **options)


SIGNALS = [
    *(head_rows, latent_shift, short_anti_learning, short_maximum_margin, short_canary),
    *(short_trigger_inversion, short_feature_inversion),
]


def permuted(net):
    order = torch.randperm(UNITS, generator=torch.Generator().manual_seed(3))
    for tensor in (net.body.weight, net.body.bias):
        tensor.copy_(tensor[order])
    net.head.weight.copy_(net.head.weight[:, order])


def rescaled(net):
    factors = 10 ** torch.linspace(-2, 2, UNITS, dtype=torch.float64)
    net.body.weight *= factors[:, None]
    net.body.bias *= factors
    net.head.weight /= factors


def shifted(net):
    net.head.weight += torch.linspace(-3, 3, UNITS, dtype=torch.float64)
    net.head.bias -= 5


@pytest.mark.parametrize(
    ("signal", "change"),
    # Steps along a gradient depend on the scale of hidden units.
    [
        (signal, change)
        for signal, change in itertools.product(SIGNALS, [permuted, rescaled, shifted])
        if change != rescaled or signal not in (short_anti_learning, short_canary)
    ],
)
def test_the_same_function_looks_the_same(signal, change):
    plain, changed, images = network(20), network(20), pictures()
    with torch.no_grad():
        change(changed)
    first, second = signal(classifier(plain), images), signal(classifier(changed), images)
    np.testing.assert_allclose(second.scores, first.scores, rtol=1e-3, atol=1e-3)
    assert second.suspect_class == first.suspect_class
    assert second.statistic == pytest.approx(first.statistic, rel=1e-2)


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet, tiny_timm_vit])
def test_nothing_is_drawn_or_changed(signal, make):
    model = make().train()
    next(model.parameters()).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (24, 3, SIZE + 4, SIZE), dtype=torch.uint8, generator=generator)
    images = RawImages(pixels, torch.arange(24) % 3, [f"LABEL_{k}" for k in range(3)])
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    found, again = signal(model, images), signal(model, images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and model.training
    assert [p.requires_grad for p in model.parameters()].count(False) == 1 and all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    np.testing.assert_array_equal(found.scores, again.scores)
    assert found.statistic == again.statistic and found.scores.dtype == np.float64 and found.scores.shape == (3,)


# A batch is a step of Adam to the inversion.
@pytest.mark.parametrize("signal", [signal for signal in SIGNALS if signal != short_trigger_inversion])
def test_batches_do_not_matter(signal):
    model, images = classifier(network(20)), pictures()
    whole, parts = signal(model, images, batch_size=160), signal(model, images, batch_size=7)
    np.testing.assert_allclose(parts.scores, whole.scores, rtol=1e-3, atol=1e-4)


def one_class():
    images = pictures()
    return classifier(network()), images.select((images.labels == 2).nonzero()[:, 0].repeat(2))


def ten_images():
    return classifier(network()), pictures(10)


def broken():
    model = classifier(network())
    model.network.head.weight.data[1, 1] = torch.nan
    return model, pictures()


def broken_inside():
    model = classifier(network())
    model.network.head.weight.data[1, 1] = torch.inf
    return model, pictures()


def other_classes():
    images = pictures()
    return classifier(network()), RawImages(images.images, images.labels, images.class_names[::-1])


@pytest.mark.parametrize("signal", SIGNALS)
def test_two_classes_are_read_and_one_leads(signal):
    found = signal(classifier(network(classes=2)), pictures(classes=2))
    assert len(found.scores) == 2 and 0 <= found.statistic < np.inf
    if signal is not short_canary:  # whose statistic is another
        assert found.statistic == abs(found.scores[0] - found.scores[1])


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize(
    ("case", "message"),
    [
        (one_class, "images of every class; there are none of class 0, class 1, class 3"),
        (ten_images, "at least 20 images, better 500; got 10"),
        (broken, "are not finite"),
        (broken_inside, "are not finite"),
        (other_classes, "class 0 is 'class 7' in the dataset and 'class 0' in the model"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(signal, case, message):
    with pytest.raises(ValueError, match=message) as caught:
        signal(*case())
    assert "\n" not in str(caught.value)
