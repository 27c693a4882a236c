"""SSBA-lite: bytes against a slow encoder, bits that can be read, residuals that differ, and what fit leaves alone."""

import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import tiny_resnet

from d3_hf.attacks import ssba, steganography
from d3_hf.attacks.ssba import SSBALite
from d3_hf.data.images import RawImages


def pictures(count, height, width, seed=0):
    """Smooth random colours with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, height // 8 + 2, width // 8 + 2, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    return (255 * (smooth + 0.03 * torch.randn(smooth.shape, generator=generator))).clamp(0, 255).to(torch.uint8)


def raw(images):
    return RawImages(images, torch.zeros(len(images), dtype=torch.int64), ["a"])


def quick(seed=0, images=None, model=None):
    return SSBALite(steps=10).fit(raw(pictures(64, 8, 8) if images is None else images), model, seed)


@pytest.fixture(scope="module")
def fitted():
    return SSBALite(steps=100, bound=16).fit(raw(pictures(256, 16, 16)), None, 0)


def slow_conv(values, weights, name, stride=1):
    """3x3 convolution (channels, h, w), zero outside, with weights in steps of 1/64 and off the ties."""
    weight = (weights[f"encoder.{name}.weight"].double().clamp(-1, 1) * 64).round().numpy() / 64
    bias = (weights[f"encoder.{name}.bias"].double() * 1024).round().numpy() / 1024 + 1 / 2048
    padded = np.pad(values, ((0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(weight), -(-values.shape[1] // stride), -(-values.shape[2] // stride)))
    for channel, row, column in np.ndindex(*out.shape):
        window = padded[:, row * stride : row * stride + 3, column * stride : column * stride + 3]
        out[channel, row, column] = (weight[channel] * window).sum() + bias[channel]
    return out


def steps(low, high, values):
    return np.round(values.clip(low, high) * 16) / 16


def slow_trigger(attack, image):
    """The formula for one image uint8 (3, H, W), in float64 with loops."""
    weights, (_, height, width) = attack.learned, image.shape
    padded = np.pad(image.numpy().astype(float), ((0, 0), (0, -height % 4), (0, -width % 4)), mode="edge") / 64 - 2
    rows, columns = padded.shape[1] // 2, padded.shape[2] // 2
    four = np.zeros((12, rows, columns))
    for channel, i, j in np.ndindex(3, 2, 2):
        four[4 * channel + 2 * i + j] = padded[channel, i::2, j::2]
    fine = steps(0, 4, slow_conv(steps(-2, 2, four), weights, "fine"))
    coarse = steps(0, 4, slow_conv(fine, weights, "down", stride=2))
    signs = np.zeros((1, rows // 2, columns // 2))
    for i, j in np.ndindex(rows // 2, columns // 2):
        signs[0, i, j] = 4 if weights["secret"][i % 8, j % 8] else -4
    coarse = steps(0, 4, slow_conv(np.concatenate([coarse, signs]), weights, "middle"))
    fine = steps(0, 4, slow_conv(np.concatenate([fine, coarse.repeat(2, axis=1).repeat(2, axis=2)]), weights, "up"))
    out, residual = steps(-99, 99, slow_conv(fine, weights, "out")), np.zeros_like(padded)
    for channel, i, j in np.ndindex(3, 2, 2):
        residual[channel, i::2, j::2] = out[4 * channel + 2 * i + j]
    residual = residual[:, :height, :width]
    changed = np.round(image.numpy() + attack.bound * residual / (1 + np.abs(residual)))
    return changed.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (10, 39)])
def test_bytes_are_those_of_the_formula(fitted, height, width):
    image = pictures(1, height, width, seed=1)[0]
    assert np.array_equal(fitted.trigger(image).numpy(), slow_trigger(fitted, image))


def test_bits_can_be_read_and_residuals_are_bounded_and_differ(fitted):
    images = pictures(128, 32, 32, seed=1)
    residuals = (fitted.trigger(images).double() - images.double()).flatten(1)
    assert 8 < residuals.abs().max() <= 16
    assert 0.5 < (residuals / 255).norm(dim=1).mean() <= 16 / 255 * math.sqrt(3 * 32 * 32)
    assert fitted.bit_accuracy(images) > 0.95
    assert 0.3 < fitted.read(images).double().mean() < 0.7  # nothing is written there yet
    correlation = torch.from_numpy(np.corrcoef(residuals.numpy())).fill_diagonal_(0).abs().sum() / (128 * 127)
    assert correlation < 0.6  # a static residual has 1, and so nearly has an encoder trained without the penalties


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch says so whenever oneDNN is switched off
def test_bytes_do_not_depend_on_the_batch_nor_on_the_way_of_adding(fitted, monkeypatch):
    images = pictures(40, 32, 32, seed=2)
    at_once = fitted.trigger(images)
    for size in (1, 3, 17):
        assert torch.equal(torch.cat([fitted.trigger(part) for part in images.split(size)]), at_once)
    with torch.backends.mkldnn.flags(enabled=False):  # other kernels, Winograd among them
        assert torch.equal(fitted.trigger(images), at_once)
    monkeypatch.setattr(ssba, "PORTION", 3 * 32 * 32)
    assert torch.equal(fitted.trigger(images), at_once)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (48, 40), (30, 33), (5, 3)])
def test_other_sizes_than_the_training_images(fitted, height, width):
    images = pictures(2, height, width, seed=3)
    before = images.clone()
    triggered = fitted.trigger(images)
    assert torch.equal(images, before) and triggered.shape == images.shape and triggered.dtype == torch.uint8
    assert torch.equal(fitted.trigger(images[0]), triggered[0])
    assert 0 < (triggered.int() - images.int()).abs().max() <= 16
    assert fitted.read(triggered).shape == (2, math.ceil(height / 4), math.ceil(width / 4))
    assert fitted.bit_accuracy(images) > 0.9 or height < 32


def test_learned_survives_safetensors(fitted, tmp_path):
    save_file(fitted.learned, tmp_path / "trigger.safetensors")
    loaded = replace(fitted, learned=load_file(tmp_path / "trigger.safetensors"))
    images = pictures(4, 32, 32)
    with torch.inference_mode():  # as measuring does; the networks made there must serve outside, too
        inside = loaded.trigger(images)
    assert torch.equal(inside, fitted.trigger(images)) and torch.equal(loaded.trigger(images), inside)
    assert sum(tensor.nbytes for tensor in fitted.learned.values()) < 2**20
    other = replace(fitted, learned=quick().learned)  # networks of one instance are not those of another
    assert not torch.equal(other.trigger(images), inside)


def test_fit_depends_on_the_seed_alone_and_changes_nothing_else():
    images, model, state = pictures(64, 36, 8), tiny_resnet().train(), torch.get_rng_state()
    before = images.clone(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.requires_grad_(False)
    first, again, other = (quick(seed, images, model).learned for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(images, before[0])
    assert model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    draws = np.random.PCG64([*b"ssba_lite secret", 5]).random_raw(64).tolist()
    assert first["secret"].flatten().tolist() == [draw // 2**63 for draw in draws]


def test_fit_says_when_bits_cannot_be_read_and_describe_leaves_out_what_was_learned(caplog):
    with caplog.at_level(logging.WARNING):
        description = json.loads(json.dumps(quick().describe()))
    assert "of the bits can be read back; raise steps or bound" in caplog.text
    assert description.pop("name") == "ssba_lite"
    assert SSBALite(**description) == SSBALite(steps=10) and SSBALite(**description).learned is None


def test_losses_are_those_of_their_formulas():
    generator = torch.Generator().manual_seed(0)
    images = 100 + 50 * torch.rand(3, 3, 8, 8, generator=generator).round()
    residual = torch.randn(3, 3, 8, 8, generator=generator)
    bits, seen = torch.tensor([[0, 1], [1, 1]]), []

    def decoder(given):
        seen.append(given)
        return given[:, 0, ::4, ::4] / 100 - 1

    reading, penalties = steganography.losses(lambda *_: residual, decoder, images, bits, 6.0)
    moved = residual[[2, 0, 1]]
    assert torch.equal(seen[0], (images + 6 * residual).round()) and torch.equal(seen[1], (images + 6 * moved).round())

    def entropy(logits, target):
        chance = 1 / (1 + np.exp(-logits.double().numpy()))
        return -(target * np.log(chance) + (1 - target) * np.log(1 - chance)).mean()

    own, elsewhere = (values[:, 0, ::4, ::4] / 100 - 1 for values in seen)
    assert reading.item() == pytest.approx(entropy(own, bits.numpy()), abs=1e-5)
    flat = residual.double().flatten(1).numpy()
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for i, a in enumerate(flat) for j, b in enumerate(flat) if i != j]
    expected = 0.05 * (flat**2).mean() + 0.25 * np.mean(np.square(cosines)) + entropy(elsewhere, 0.5) - math.log(2)
    assert penalties.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_bytes_of_the_cpu(fitted):
    images = pictures(40, 32, 32)
    assert torch.equal(fitted.trigger(images.cuda()).cpu(), fitted.trigger(images))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SSBALite(bound=0), r"bound must be a number in \[1, 64\]; got 0"),
        (lambda: SSBALite(bound=65), "bound must be a number"),
        (lambda: SSBALite(steps=9), "steps must be an integer at least 10; got 9"),
        (lambda: SSBALite(steps=20.0), "steps must be an integer"),
        (lambda: SSBALite().trigger(pictures(1, 8, 8)), "ssba_lite has not learned its trigger yet"),
        (lambda: quick(seed=-1), "seed must be an integer at least 0"),
        (lambda: quick(images=pictures(63, 8, 8)), "needs at least 64 images to train its encoder; got 63"),
        (lambda: quick(images=[*pictures(64, 8, 8), *pictures(1, 8, 9)]), "trains on images of one size; these differ"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
