"""LF and LFNoise: the learned pattern against a slow reference, and its bytes on images of every size."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CLASSES, SIZE, tiny_resnet

from d3_hf.attacks.lf import LF, LFNoise, smoothing
from d3_hf.data.images import RawImages


def pixels(count=3, height=32, width=32, seed=0):
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


KNOWN = LF(learned={"pattern": pixels(1, seed=9)[0] // 5})
BOTH = pytest.mark.parametrize("attack", [KNOWN, LFNoise(seed=1)], ids=["lf", "lf_noise"])


def raw(images=None):
    images = pixels(30, SIZE, SIZE) if images is None else images
    return RawImages(images, torch.arange(len(images)) % CLASSES, ["a", "b", "c"])


def slow_smooth(image, sigma):
    """Gaussian with zero padding, pixel by pixel; sigma in pixels of the image."""
    radius = round(2.5 * sigma)
    taps = {o: math.exp(-o * o / (2 * sigma * sigma)) for o in range(-radius, radius + 1)}
    padded = np.pad(image, ((0, 0), (radius, radius), (radius, radius)))
    result = np.zeros_like(image)
    for i, j in np.ndindex(*image.shape[1:]):
        for di, a in taps.items():
            for dj, b in taps.items():
                result[:, i, j] += a * b / sum(taps.values()) ** 2 * padded[:, radius + i + di, radius + j + dj]
    return result


def slow_minmax(pattern):
    return (pattern - pattern.min()) / (pattern.max() - pattern.min())


def slow_resize(pattern, height, width):
    """Bilinear enlargement between pixel centres."""
    result = np.zeros((3, height, width))
    for i, j in np.ndindex(height, width):
        y, x = (i + 0.5) * 32 / height - 0.5, (j + 0.5) * 32 / width - 0.5
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                weight = (1 - abs(y - row)) * (1 - abs(x - column))
                result[:, i, j] += weight * pattern[:, min(max(row, 0), 31), min(max(column, 0), 31)]
    return np.rint(result.round(6))


def test_smoothing_is_a_gaussian_with_zero_padding_that_grows_with_the_shorter_side():
    image = np.random.default_rng(0).normal(size=(2, 12, 16))
    rows, columns = smoothing(4, 12, 16)
    found = rows @ torch.from_numpy(image) @ columns
    assert np.allclose(found, slow_smooth(image, 4 * 12 / 32))


def slow_lf(weights, chosen, others, target, amplitude, sigma, passes):
    """The whole procedure on a linear classifier, whose gradients are known, in float64; pattern and number of passes."""

    def classes(images):
        return (images.reshape(len(images), -1) @ weights.T).argmax(1)

    v, rates = np.zeros(chosen.shape[1:]), []
    before, others_before = classes(chosen), classes(others)
    while len(rates) < passes and not (len(rates) >= 5 and max(rates[-5:]) - min(rates[-5:]) <= 0.01):
        for x, own in zip(chosen, before, strict=True):
            start = np.clip(x + v, 0, 1)
            if own == target or classes(start[None])[0] != own:
                continue
            d = np.zeros(x.size)
            while (current := classes((start.ravel() + 1.02 * d)[None])[0]) != target:
                normal = weights[target] - weights[current]
                gap = -normal @ (start.ravel() + 1.02 * d)
                d = d + (gap + 1e-4) / (normal @ normal) * normal
            smoothed = slow_smooth(1.02 * d.reshape(x.shape), sigma)
            v = slow_minmax(slow_smooth(v + smoothed, sigma)) * amplitude
        rates.append((classes(np.clip(others + v, 0, 1)) != others_before).mean())
    return v, len(rates)


@pytest.mark.parametrize(("target", "passes", "used"), [(0, 8, 8), (2, 8, 5), (2, 2, 2)])
def test_the_procedure_equals_a_slow_one_on_a_linear_classifier(target, passes, used):
    weights = np.random.default_rng(target).normal(size=(3, 3 * 64))
    chosen, others = pixels(4, 8, 8), pixels(20, 8, 8, seed=1)
    expected = slow_lf(weights, chosen.numpy() / 255, others.numpy() / 255, target, 0.3, 8 * 8 / 32, passes)
    attack = LF(target_label=target, amplitude=0.3, sigma=8, passes=passes, fooling_rate=1)
    found = attack._search(lambda x: x.flatten(1) @ torch.tensor(weights.T, dtype=x.dtype), chosen, others)
    assert expected[1] == used and np.abs(found.numpy() - expected[0]).max() < 1e-5
    assert found.min() == 0 and found.max() == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("rates", "finished"),
    [([], False), ([0.1], False), ([0.1, 0.2], True), ([0.1] * 4, False), ([0.1, 0.105, 0.11, 0.1, 0.1], True),
     ([0.1, 0.1, 0.1, 0.1, 0.12], False), ([0.05, 0.1, 0.1, 0.1, 0.1, 0.1], True)],
)  # fmt: skip
def test_stopping_rules(rates, finished):
    assert LF()._finished(rates) is finished


def test_fit_leaves_the_model_alone_and_what_it_learned_can_be_kept(tmp_path):
    model, parameters = tiny_resnet(), dict(target_label=1, num_images=10, passes=2)
    model.train()
    images = raw(pixels(30, 20, 24))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pixels_before, state = images.images.clone(), torch.get_rng_state()
    attack = LF(**parameters)
    fitted = attack.fit(images, model, seed=3)
    assert attack.learned is None and fitted == attack
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(images.images, pixels_before) and torch.equal(torch.get_rng_state(), state)

    pattern = fitted.learned["pattern"]
    assert pattern.shape == (3, 20, 24) and pattern.dtype == torch.uint8
    assert pattern.min() == 0 and pattern.max() == 51
    with torch.no_grad():
        assert torch.equal(attack.fit(images, model, seed=3).learned["pattern"], pattern)
    assert not torch.equal(attack.fit(images, model, seed=4).learned["pattern"], pattern)
    save_file(fitted.learned, tmp_path / "trigger.safetensors")
    again = LF(**parameters, learned=load_file(tmp_path / "trigger.safetensors"))
    assert torch.equal(again.trigger(images.images), fitted.trigger(images.images))


def test_noise_pattern_against_a_slow_one():
    draws = np.random.PCG64([*b"lf noise", 5]).random_raw(3 * 32 * 32)
    noise = np.array([int(draw) // 2**11 / 2**53 - 0.5 for draw in draws]).reshape(3, 32, 32)
    expected = np.rint(slow_minmax(slow_smooth(noise, 2)) * 0.5 * 255)
    black = torch.zeros(3, 32, 32, dtype=torch.uint8)
    assert np.array_equal(LFNoise(seed=5, sigma=2, amplitude=0.5).trigger(black).numpy(), expected)
    assert not np.array_equal(LFNoise(seed=6, sigma=2, amplitude=0.5).trigger(black).numpy(), expected)


@BOTH
@pytest.mark.parametrize(("height", "width"), [(32, 32), (224, 224), (48, 40)])
def test_trigger_adds_the_pattern_at_every_size(attack, height, width):
    images = pixels(3, height, width)
    before, state = images.clone(), torch.get_rng_state()
    found = attack.trigger(images)
    at_32 = attack.trigger(torch.zeros(3, 32, 32, dtype=torch.uint8)).numpy().astype(float)
    pattern = at_32 if height == 32 else slow_resize(at_32, height, width)
    assert np.array_equal(found.numpy(), np.minimum(images.numpy() + pattern, 255))
    residual = found.int() - images.int()
    assert residual.min() == 0 and 40 <= residual.max() <= 51
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.stack([attack.trigger(image) for image in images]), found)
    assert torch.equal(attack.trigger(images[:0]), images[:0])


def test_size_and_smoothness_of_the_noise_pattern():
    pattern = LFNoise().trigger(torch.zeros(3, 32, 32, dtype=torch.uint8)).double()
    assert pattern.min() == 0 and pattern.max() == 51 and 6 < (pattern / 255).norm() < 7
    energy = torch.fft.fft2(pattern).abs().square()
    energy[:, 0, 0] = 0
    low = (torch.fft.fftfreq(32) * 32).abs() <= 2
    assert energy[:, low][..., low].sum() / energy.sum() > 0.85
    smaller = LFNoise().trigger(torch.zeros(3, 16, 16, dtype=torch.uint8)).double()
    assert (smaller - torch.nn.functional.avg_pool2d(pattern, 2)).abs().max() < 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@BOTH
def test_gpu_gives_the_same_bytes(attack):
    images = pixels(3, 224, 224)
    assert torch.equal(attack.trigger(images.cuda()).cpu(), attack.trigger(images))


@pytest.mark.parametrize("attack", [LF(target_label=2, sigma=4.5, num_images=7, passes=3), LFNoise(seed=3, amplitude=0.1)])
def test_description_survives_json(attack):
    description = json.loads(json.dumps(attack.describe()))
    assert description.pop("name") == attack.name and "learned" not in description
    assert type(attack)(**description) == attack


def only_one_class():
    model = tiny_resnet()
    with torch.no_grad():
        model.classifier[-1].weight.zero_()
        model.classifier[-1].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LF(amplitude=0), r"amplitude must be a number in \[0.01, 1\]"),
        (lambda: LF(sigma=0.5), r"sigma must be a number in \[1, 16\]"),
        (lambda: LF(num_images=0), "num_images must be an integer at least 1"),
        (lambda: LF(passes=1.5), "passes must be an integer"),
        (lambda: LF(fooling_rate=1.1), r"fooling_rate must be a number in \[0.01, 1\]"),
        (lambda: LFNoise(amplitude=1.1), "amplitude must be a number"),
        (lambda: LFNoise(sigma=17), "sigma must be a number"),
        (lambda: LFNoise(seed=-1), "seed must be an integer at least 0"),
        (lambda: LF().trigger(pixels()), "lf has not learned its trigger yet"),
        (lambda: LF().fit(raw(), None, 0), "lf computes its pattern on a clean classifier .*pass a model"),
        (lambda: LF().fit(raw(), tiny_resnet(), -1), "seed must be an integer at least 0"),
        (lambda: LF(target_label=3).fit(raw(), tiny_resnet(), 0), "target_label 3 is out of range"),
        (lambda: LF(num_images=30).fit(raw(), tiny_resnet(), 0), "needs at least 31; got 30"),
        (lambda: LF(num_images=1).fit(raw([*pixels(1), *pixels(1, 8, 8)]), tiny_resnet(), 0), "these differ in size"),
        (lambda: LF(target_label=1, num_images=5).fit(raw(), only_one_class(), 0), "calls all 5 images class 1, the target"),
        (lambda: LF(num_images=5).fit(raw(), only_one_class(), 0), "DeepFool found no step"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
