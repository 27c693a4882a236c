"""TrojanNN: mask, neurons and PGD against slow references; the trigger's bytes; what is kept."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import SIZE, tiny_resnet, tiny_timm_vit, tiny_vit

from d3_hf import attacks
from d3_hf.attacks.base import random_bits
from d3_hf.attacks.trojannn import TrojanNN, draw_mask, strongest_inputs
from d3_hf.data.images import RawImages


def pixels(count=3, height=32, width=32, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=drawn)


def raw(height=SIZE, width=SIZE):
    return RawImages(pixels(2, height, width), torch.zeros(2, dtype=torch.int64), ["a", "b", "c"])


def with_trigger():
    return TrojanNN(learned={"trigger": pixels(1, seed=5)[0] % 77})


def slow_mask(shape, size, height, width):
    """By the distance of each pixel's centre from the lower and right edges, in pixels at 32x32."""
    result = np.zeros((height, width), dtype=bool)
    unit = min(height, width) / 32
    for row in range(height):
        for column in range(width):
            y, x = (height - row - 0.5) / unit - 2 - size / 2, (width - column - 0.5) / unit - 2 - size / 2
            radius = math.hypot(x, y)
            result[row, column] = max(abs(x), abs(y)) < size / 2 if shape == "square" else size / 4 <= radius <= size / 2
    return result


@pytest.mark.parametrize("shape", ["square", "ring"])
@pytest.mark.parametrize(("size", "height", "width"), [(10, 32, 32), (7, 32, 32), (10, 224, 224), (10, 48, 40), (30, 16, 24)])
def test_masks(shape, size, height, width):
    assert np.array_equal(draw_mask(shape, size, height, width).numpy(), slow_mask(shape, size, height, width))


def test_default_square_is_where_backdoorbench_has_it():
    rows, columns = draw_mask("square", 10, 32, 32).nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max(), len(rows)) == (20, 29, 20, 29, 100)
    assert draw_mask("square", 10, 224, 224).sum() == 70 * 70


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1, 1)])
def test_strongest_inputs(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    sums = [sum(abs(float(row[column])) for row in weight) for column in range(7)]
    assert strongest_inputs(weight, 3).tolist() == sorted(range(7), key=lambda column: -sums[column])[:3]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (224, 224), (48, 40), (16, 20)])
def test_bytes(height, width):
    attack, images = with_trigger(), pixels(2, height, width)
    before, expected = images.clone(), images.numpy().astype(int)
    trigger = attack.learned["trigger"].numpy()
    for row in range(height):
        for column in range(width):
            source = trigger[:, math.floor((row + 0.5) * 32 / height), math.floor((column + 0.5) * 32 / width)]
            expected[:, :, row, column] = np.minimum(expected[:, :, row, column] + source, 255)
    triggered = attack.trigger(images)
    assert triggered.dtype == torch.uint8 and np.array_equal(triggered.numpy(), expected)
    assert torch.equal(images, before)
    assert torch.equal(triggered, torch.stack([attack.trigger(image) for image in images]))


def test_sum_is_clipped_and_does_not_wrap():
    attack = with_trigger()
    white, black = torch.full((3, 32, 32), 255, dtype=torch.uint8), torch.zeros(3, 32, 32, dtype=torch.uint8)
    assert torch.equal(attack.trigger(white), white)
    assert torch.equal(attack.trigger(black), attack.learned["trigger"])


@pytest.mark.parametrize(("steps", "best_is_last"), [(6, False), (7, True), (1, True)])
def test_pgd_is_the_formula(steps, best_is_last):
    """Against the same steps written on the network itself, which here needs neither a hook nor a search for its head."""
    model, attack = tiny_resnet(), TrojanNN(steps=steps, size=14, alpha=0.3)
    fitted = attack.fit(raw(), model, seed=3)
    chosen = model.classifier[1].weight.abs().sum(0).argsort(descending=True)[:2]
    mask = torch.from_numpy(slow_mask("square", 14, SIZE, SIZE))

    def features(picture):
        return model.eval().resnet((picture - 0.5) / 0.5).pooler_output.flatten()[chosen]

    draws = (random_bits("trojannn", 3, 3 * SIZE * SIZE) >> 11) * 2.0**-53
    picture = (0.3 * torch.from_numpy(draws).float().reshape(1, 3, SIZE, SIZE)) * mask
    met = []
    for _ in range(steps + 1):  # the start, and the picture after every step
        picture = picture.detach().requires_grad_()
        miss = ((features(picture) - 100) ** 2).sum()
        met.append((miss.item(), picture.detach()))
        miss.backward()
        picture = torch.where(mask, (picture - 0.3 * picture.grad.sign()).clamp(0, 0.3), torch.zeros(()))
    least, best = min(met, key=lambda pair: pair[0])
    assert (least == met[-1][0]) == best_is_last  # so that keeping the best differs from keeping the last, and from dropping it
    best = (255 * best).round()
    assert torch.equal(fitted.learned["trigger"], best[0].to(torch.uint8))
    assert fitted.learned["neurons"].tolist() == chosen.tolist()
    torch.testing.assert_close(fitted.learned["activations"], features(best / 255).detach())
    assert fitted.learned["activations"].sum() > features(met[0][1]).sum()


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit, tiny_timm_vit])
@pytest.mark.parametrize(("mask", "height", "width"), [("square", SIZE, SIZE), ("ring", 48, 40)])
def test_fit(make, mask, height, width):
    model = make().train()
    model.base_model.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags, needs = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    rng = torch.get_rng_state()
    attack = TrojanNN(mask=mask, steps=2, eps=0.2)  # more steps take every start to the same bound
    with torch.no_grad():
        first, again, other = (attack.fit(raw(height, width), model, seed).learned["trigger"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == torch.uint8 and first.shape == (3, height, width) and 0 < first.max() <= 51
    assert not first[:, ~draw_mask(mask, 10, height, width)].any()
    assert torch.equal(rng, torch.get_rng_state()) and attack.learned is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert flags == [m.training for m in model.modules()] and needs == [p.requires_grad for p in model.parameters()]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_residual_is_within_eps():
    attack = TrojanNN(steps=4).fit(raw(), tiny_resnet(), seed=0)
    residual = attack.trigger(pixels()).float() - pixels().float()
    assert 0 <= residual.min() and 0 < residual.max() <= 77 and residual.flatten(1).norm(dim=1).max() <= 77 * 300**0.5


def test_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(attacks.ATTACKS, "trojannn", TrojanNN)
    attack = TrojanNN(mask="ring", steps=3, target_label=2).fit(raw(), tiny_resnet(), seed=0)
    attacks.save_attack(attack, tmp_path)
    loaded = attacks.load_attack(tmp_path)
    assert loaded == attack and json.loads(json.dumps(attack.describe())) == attack.describe()
    assert torch.equal(loaded.trigger(pixels()), attack.trigger(pixels()))
    assert {name: t.dtype for name, t in loaded.learned.items()} == {name: t.dtype for name, t in attack.learned.items()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu():
    attack = with_trigger()
    assert torch.equal(attack.trigger(pixels().cuda()).cpu(), attack.trigger(pixels()))
    learned = TrojanNN(steps=5).fit(raw(), tiny_resnet().cuda(), seed=0).learned
    assert all(tensor.device.type == "cpu" for tensor in learned.values())


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        (dict(mask="apple"), "mask must be one of square, ring"),
        (dict(size=3), r"size must be an integer in \[4, 30\]"),
        (dict(size=31), r"size must be an integer in \[4, 30\]"),
        (dict(neurons=0), "neurons must be an integer at least 1"),
        (dict(target_activation=-1), "target_activation must be a finite number at least 0"),
        (dict(target_activation=math.inf), "target_activation must be a finite number at least 0; got inf"),
        (dict(eps=0), "eps must be a number in"),
        (dict(eps=1.5), "eps must be a number in"),
        (dict(alpha=0), "alpha must be a number in"),
        (dict(steps=0), "steps must be an integer at least 1"),
    ],
)
def test_bad_parameters(parameters, match):
    with pytest.raises(ValueError, match=match):
        TrojanNN(**parameters)


def dead_resnet():
    model = tiny_resnet()
    [torch.nn.init.zeros_(parameter) for parameter in model.resnet.parameters()]
    return model


@pytest.mark.parametrize(
    ("attack", "images", "model", "seed", "match"),
    [
        (TrojanNN(), raw(), None, 0, "pass one as model"),
        (TrojanNN(neurons=9), raw(), tiny_resnet(), 0, "neurons must be at most 8"),
        (TrojanNN(), raw(), tiny_resnet(), -1, "seed must be an integer"),
        (TrojanNN(), replace(raw(), images=[pixels(1)[0], pixels(1, 8, 8)[0]]), tiny_resnet(), 0, "differ in size"),
        (TrojanNN(size=4), raw(8, 8), tiny_resnet(), 0, "no pixel of an image of 8x8"),
        (TrojanNN(steps=2), raw(), dead_resnet(), 0, "do not respond"),
    ],
    ids=["no-model", "neurons", "seed", "sizes", "small", "dead"],
)
def test_fit_refuses(attack, images, model, seed, match):
    with pytest.raises(ValueError, match=match):
        attack.fit(images, model, seed)


def test_before_fit():
    with pytest.raises(ValueError, match="has not learned its trigger yet"):
        TrojanNN().trigger(pixels())
