"""The input-aware attack against a slow reference of its networks and losses, and what its poisoner does to a batch."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import tiny_resnet

from d3_hf.attacks.input_aware import NETWORKS, InputAware, likeness_penalty, meetings, thresholded
from d3_hf.attacks.networks import restored, weights_of
from d3_hf.data.images import RawImages
from d3_hf.models.batch_norm import batch_norms

CPU = torch.device("cpu")


def pixels(count=4, height=16, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = 255 * torch.rand(count, 3, 5, 5, generator=generator)  # smooth, so that masks have something to follow
    return F.interpolate(coarse, (height, width), mode="bilinear").round().to(torch.uint8)


def batch_of(count=40):
    return pixels(count), torch.arange(count) % 7


def raw(images):
    return RawImages(images=images, labels=torch.zeros(len(images), dtype=torch.int64), class_names=["a", "b"])


@pytest.fixture(scope="module")
def fitted():
    """With hardly trained networks, but the running statistics of trained ones: without these all masks would be alike."""
    images = pixels(24)
    start = InputAware(mask_steps=4, learning_rate=0.001).fit(raw(images), None, seed=0)
    learned = {}
    for name, make in NETWORKS.items():
        network = restored(name, make, start.learned).train()
        for module in batch_norms(network):
            module.momentum = 1.0  # one pass sets them
        network(images.float() / 255)
        learned |= weights_of(name, network)
    return InputAware(mask_steps=4, learned=learned)


def test_no_tf32_however_it_was_switched_on(fitted):
    convolution, images, found = torch.backends.cudnn.conv, pixels(2), []
    fitted._network("pattern", NETWORKS["pattern"], CPU).register_forward_hook(
        lambda *_: found.append(convolution.fp32_precision)
    )
    expected, before = fitted.trigger(images), torch.backends.fp32_precision
    torch.backends.fp32_precision = "tf32"  # as the Trainer does for torch_compile
    try:
        assert torch.equal(fitted.trigger(images), expected) and convolution.fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision = before
    assert found == ["ieee", "ieee"] and not torch.backends.cudnn.deterministic


def slow_network(learned, name, images):
    """The encoder-decoder from its description, in float64 and with the running statistics."""
    layers = sorted({int(key.split(".")[2]) for key in learned if key.startswith(name)})
    assert len(layers) == 13
    stages = iter(layers)

    def convolution(x):
        stage = f"{name}.layers.{next(stages)}"
        weight, scale, shift, mean, variance = (
            learned[f"{stage}.{key}"].double() for key in ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var")
        )
        channels = (-1, 1, 1)
        x = (F.conv2d(x, weight, padding=1) - mean.view(channels)) / (variance.view(channels) + 1e-5).sqrt()
        return x * scale.view(channels) + shift.view(channels)

    x = (images - 0.5) / 0.25
    for _ in range(3):
        x = F.max_pool2d(convolution(convolution(x).relu()).relu(), 2)
    x = convolution(x).relu()
    for step in range(3):
        height, width = x.shape[-2:]
        x = convolution(F.interpolate(x, (2 * height, 2 * width), mode="bilinear", align_corners=False)).relu()
        x = convolution(x) if step == 2 else convolution(x).relu()
    return x.tanh() / 2 + 0.5


def slow_parts(learned, images):
    """Patterns and masks for images in [0, 1]."""
    patterns, maps = slow_network(learned, "pattern", images), slow_network(learned, "mask", images)
    return patterns, (20 * maps - 10).tanh() / 2 + 0.5


def slow_rms(first, second):
    differences = (first - second).flatten().tolist()
    return math.sqrt(sum(d * d for d in differences) / len(differences))


def test_trigger_is_the_formula_rounded(fitted):
    images = pixels(3, 16, 24, seed=1)
    x = images.double() / 255
    patterns, masks = slow_parts(fitted.learned, x)
    assert masks.std() > 0.02 and patterns.shape == x.shape and masks.shape == (3, 1, 16, 24)
    exact = 255 * (x + (patterns - x) * masks)
    triggered = fitted.trigger(images)
    assert (triggered - exact).abs().max() < 0.5 + 0.01 and (triggered != exact.round()).float().mean() < 0.01
    residual = (triggered.double() - images.double()) / 255
    bound = (patterns - x).abs() * masks
    assert residual.abs().max() <= bound.max() + 1 / 255
    assert residual.norm() == pytest.approx(bound.norm().item(), rel=0.02) and residual.norm() > 1
    assert len({tuple(r.flatten().tolist()) for r in residual}) == 3  # another trigger for each image


def test_losses_are_the_formulas():
    generator = torch.Generator().manual_seed(3)
    images, masks = torch.rand(4, 3, 6, 5, generator=generator), torch.rand(4, 1, 6, 5, generator=generator)
    ratios = [slow_rms(images[i], images[i - 1]) / (slow_rms(masks[i], masks[i - 1]) + 1e-7) for i in range(4)]
    found = likeness_penalty(images, images.roll(1, 0), masks, masks.roll(1, 0))
    assert found.item() == pytest.approx(sum(ratios) / 4, rel=1e-5)
    excess = [max(0.0, value - 0.2) for value in masks.flatten().tolist()]
    expected = 7 * sum(excess) / len(excess) + 3 * sum(ratios) / 4 / 0.25  # distances of images in units of 0.25
    attack = InputAware(lambda_norm=7, lambda_div=3, mask_density=0.2)
    assert attack.mask_loss(images, masks).item() == pytest.approx(expected, rel=1e-5)
    masks = torch.full((2, 1, 6, 5), 0.5, requires_grad=True)  # equal masks of equal images: no slope, but no NaN either
    likeness_penalty(images[:2], images[:2], masks, masks.roll(1, 0)).backward()
    assert torch.equal(masks.grad, torch.zeros_like(masks))


def masks_as_trained(learned, images):
    """With the batch's own statistics; the running ones take some hundred steps to arrive."""
    with torch.no_grad():
        return thresholded(restored("mask", NETWORKS["mask"], learned).train()(images))


def test_fit_makes_masks_smaller_and_the_seed_decides():
    images, model = pixels(16), tiny_resnet().train()
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learned = InputAware(mask_steps=20, learning_rate=0.001).fit(raw(images), model, seed=1).learned
    early = InputAware(mask_steps=1).fit(raw(images), None, seed=1).learned
    masks, early_masks = (masks_as_trained(each, images.float() / 255) for each in (learned, early))
    assert masks.mean() < 0.8 * early_masks.mean() and masks.std() > 0.1  # over ten seeds: 0.26 to 0.51, and 0.27 to 0.36
    loss, early_loss = (InputAware().mask_loss(images.float() / 255, each) for each in (masks, early_masks))
    assert loss < 0.8 * early_loss  # 0.33 to 0.6
    assert torch.equal(learned["pattern.layers.0.0.weight"], early["pattern.layers.0.0.weight"])  # not trained yet
    again = InputAware(mask_steps=1).fit(raw(images), None, seed=1).learned
    other = InputAware(mask_steps=1).fit(raw(images), None, seed=2).learned
    assert all(torch.equal(early[key], again[key]) for key in early)
    assert not torch.equal(early["mask.layers.0.0.weight"], other["mask.layers.0.0.weight"])
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.dtype == torch.float32 for value in learned.values())
    assert sum(value.numel() for value in learned.values()) < 1.5e6


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 40), (224, 224)])
def test_trigger_is_pure_and_the_same_alone_and_in_a_batch(fitted, height, width):
    images = pixels(2, height, width)
    before, state = images.clone(), torch.get_rng_state()
    triggered = fitted.trigger(images)
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), state)
    assert triggered.dtype == torch.uint8 and triggered.shape == images.shape and not torch.equal(triggered, images)
    for image, expected in zip(images, triggered, strict=True):
        assert torch.equal(fitted.trigger(image), fitted.trigger(image[None])[0])
        difference = (fitted.trigger(image).int() - expected.int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3  # another kernel may turn a tie


def test_trigger_takes_any_size_layout_and_no_images(fitted):
    odd = pixels(1, 13, 21)
    padded = F.pad(odd.float(), (0, 3, 0, 3), mode="replicate").to(torch.uint8)
    assert torch.equal(fitted.trigger(odd), fitted.trigger(padded)[..., :13, :21])
    assert torch.equal(fitted.trigger(odd[:0]), odd[:0])
    strided = odd.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert (fitted.trigger(strided).int() - fitted.trigger(odd).int()).abs().max() <= 1


def test_networks_are_built_once_and_serve_after_a_measurement(fitted):
    attack, images = replace(fitted), pixels()
    with torch.inference_mode():
        inside = attack.trigger(images)
    networks = dict(attack._networks)
    assert set(networks) == {("pattern", CPU), ("mask", CPU)}
    assert torch.equal(attack.trigger(images), inside)
    assert all(attack._networks[key] is network and not network.training for key, network in networks.items())
    assert not any(p.is_inference() for network in networks.values() for p in network.parameters())


def test_learned_survives_a_file_and_the_description_json(fitted, tmp_path):
    save_file(fitted.learned, tmp_path / "trigger.safetensors")
    attack = InputAware(target_label=2, cross_ratio=0.5, lambda_div=2, lambda_norm=50.5, mask_density=0.1, mask_steps=7)
    for each in (fitted, attack):
        description = json.loads(json.dumps(each.describe()))
        assert description.pop("name") == "input_aware" and InputAware(**description) == each
    again = InputAware(mask_steps=4, learned=load_file(tmp_path / "trigger.safetensors"))
    assert torch.equal(again.trigger(pixels()), fitted.trigger(pixels()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_same_bytes_within_one_grey_level(fitted):
    images = pixels(20, 48, 40)
    found = fitted.trigger(images.cuda())
    assert found.is_cuda and (found.cpu().int() - fitted.trigger(images).int()).abs().max() <= 1


def test_poisoner_makes_the_three_parts(fitted):
    attack, (images, labels) = replace(fitted, target_label=5), batch_of()
    before, state = (images.clone(), labels.clone()), torch.get_rng_state()
    poisoner = attack.poisoner(0.1, 7, 0, CPU)
    poisoner.pattern.eval()  # so that the trigger and the reference below have the same statistics
    mixed, new_labels = poisoner(images, labels, 3)
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])
    assert torch.equal(torch.get_rng_state(), state) and new_labels[:4].tolist() == [5] * 4
    assert torch.equal(new_labels[4:], labels[4:])
    assert mixed.dtype == torch.float32 and mixed.requires_grad and mixed.min() >= 0 and mixed.max() <= 255
    assert torch.equal(mixed[8:], images[8:].float())
    assert (mixed[:4] - attack.trigger(images[:4])).abs().max() <= 0.51
    x = images.double() / 255
    patterns, masks = slow_parts(fitted.learned, x)
    shift = next(s for s in range(1, 36) if (mixed[4] - cross(x, patterns, masks, 4, 4 + s)).abs().max() < 0.01)
    partners = [(4 + row + shift) % 40 for row in range(4)]
    for row, partner in enumerate(partners):
        assert partner not in (row, 4 + row)
        assert (mixed[4 + row] - cross(x, patterns, masks, 4 + row, partner)).abs().max() < 0.01
    ratios = [slow_rms(x[i], x[j]) / (slow_rms(patterns[i], patterns[j]) + 1e-7) for i, j in enumerate(partners)]
    assert poisoner.penalty.item() == pytest.approx(sum(ratios) / 4, rel=1e-3)


@pytest.mark.parametrize("count", range(2, 9))
def test_no_image_meets_itself(count):
    for poisoned in range(1, count + 1):
        for crossed in range(count - poisoned + 1):
            for seed in range(10):
                partners, donors = meetings(poisoned, crossed, count, torch.Generator().manual_seed(seed))
                assert len(partners) == poisoned and len(donors) == crossed
                assert all(row != partner for row, partner in enumerate(partners.tolist()))
                assert all(row != donor for row, donor in enumerate(donors.tolist(), start=poisoned))
                assert {*partners.tolist(), *donors.tolist()} <= set(range(count))


def test_two_images_meet_each_other(fitted):
    images, labels = batch_of(2)
    poisoner = fitted.poisoner(0.5, 7, 0, CPU)
    poisoner.pattern.eval()
    mixed, _ = poisoner(images, labels, 0)
    x = images.double() / 255
    patterns, masks = slow_parts(fitted.learned, x)
    for row in (0, 1):  # both wear the first one's trigger
        assert (mixed[row] - cross(x, patterns, masks, row, 0)).abs().max() < 0.01
    expected = slow_rms(x[0], x[1]) / (slow_rms(patterns[0], patterns[1]) + 1e-7)
    assert poisoner.penalty.item() == pytest.approx(expected, rel=1e-3)


def cross(images, patterns, masks, row, partner):
    """An image in [0, 1] under another one's pattern and mask, in grey levels."""
    return 255 * (images[row] + (patterns[partner] - images[row]) * masks[partner])


@pytest.mark.parametrize(("cross_ratio", "crossed"), [(0, 0), (0.5, 2), (3, 12)])
def test_cross_ratio_and_draws(fitted, cross_ratio, crossed):
    attack, (images, labels) = replace(fitted, cross_ratio=cross_ratio), batch_of()
    runs = [attack.poisoner(0.1, 7, seed, CPU)(images, labels, step)[0] for seed, step in [(0, 5), (0, 5), (0, 6)]]
    assert (runs[0] != images).flatten(1).any(dim=1).nonzero().flatten().tolist() == list(range(4 + crossed))
    assert torch.equal(runs[0], runs[1]) and (crossed == 0 or not torch.equal(runs[0][4:], runs[2][4:]))


def test_a_batch_too_small_for_the_ratio_stays(fitted):
    poisoner, (images, labels) = fitted.poisoner(1e-9, 7, 0, CPU), batch_of(3)
    mixed, new_labels = poisoner(images, labels, 0)
    assert torch.equal(mixed, images) and torch.equal(new_labels, labels) and poisoner.penalty is None


def test_the_victims_loss_trains_the_patterns_alone(fitted):
    images, labels = batch_of()
    learned = {key: value.clone() for key, value in fitted.learned.items()}
    poisoner = fitted.poisoner(0.2, 7, 0, CPU)
    weight = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))  # a classifier by mean colour
    losses = []
    for step in range(12):
        mixed, new_labels = poisoner(images, labels, step)
        loss = F.cross_entropy(20 * (mixed / 255 - 0.5).mean((2, 3)) @ weight.T, new_labels, reduction="none")
        loss.mean().backward()
        gradients = [parameter.grad for parameter in poisoner.pattern.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        assert sum(gradient.abs().sum() for gradient in gradients) > 0
        poisoner.update(1.0)
        assert all(parameter.grad is None for parameter in poisoner.pattern.parameters())
        losses.append(loss[:8].mean().item())
    assert min(losses[6:]) < losses[0] - 0.1  # at this rate single steps may go up; over ten seeds by 0.7 at least
    still = [parameter.detach().clone() for parameter in poisoner.pattern.parameters()]
    poisoner(images, labels, 0)
    poisoner.penalty.backward()
    poisoner.update(0.0)  # at the end of the victim's schedule nothing moves any more
    assert all(torch.equal(old, new) for old, new in zip(still, poisoner.pattern.parameters(), strict=True))
    poisoner(images, labels, 0)
    poisoner.penalty.backward()
    assert any(parameter.grad is not None for parameter in poisoner.pattern.parameters())
    finished = poisoner.finish()
    assert set(finished.learned) == set(learned) and finished == fitted
    for key, value in finished.learned.items():
        assert torch.equal(value, learned[key]) == key.startswith("mask") and torch.equal(fitted.learned[key], learned[key])
    assert not torch.equal(finished.trigger(images), fitted.trigger(images))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InputAware(lambda_div=-1), "lambda_div must be a finite number at least 0; got -1"),
        (lambda: InputAware(lambda_div=math.inf), "lambda_div must be a finite number at least 0; got inf"),
        (lambda: InputAware(lambda_norm="100"), "lambda_norm must be a finite number"),
        (lambda: InputAware(mask_density=1.1), r"mask_density must be a number in \[0, 1\]; got 1.1"),
        (lambda: InputAware(mask_steps=0), "mask_steps must be an integer at least 1; got 0"),
        (lambda: InputAware(mask_steps=1.5), "mask_steps must be an integer"),
        (lambda: InputAware(learning_rate=0), "learning_rate must be a number in"),
        (lambda: InputAware(cross_ratio=-1), "cross_ratio must be a finite number at least 0"),
        (lambda: InputAware().trigger(pixels()), "input_aware has not learned its trigger yet: call fit"),
        (lambda: InputAware().poisoner(0.1, 7, 0, CPU), "input_aware has not learned its trigger yet"),
        (lambda: InputAware().poisoner(0.6, 7, 0, CPU), "input_aware turns 0.6 of each batch .* at most the whole"),
        (lambda: InputAware().fit(raw(pixels(1)), None, 0), "at least two images, all of one size"),
        (lambda: InputAware().fit(raw([pixels()[0], pixels(1, 8)[0]]), None, 0), "at least two images, all of one size"),
        (lambda: InputAware().fit(raw(pixels()), None, -1), "seed must be an integer at least 0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
