"""LC-lite: corners and PGD against slow references; what poisoning needs and what is kept."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from tiny import SIZE, tiny_resnet, tiny_vit

from d3_hf import attacks
from d3_hf.attacks import lc, poison
from d3_hf.attacks.lc import LCLite
from d3_hf.data.images import RawImages

# The authors' pattern: brightened pixels of the lower right corner, rows and columns counted from its last pixel.
LIT = {(0, 0), (0, 2), (1, 1), (2, 0)}


def pixels(count=3, height=SIZE, width=SIZE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def raw(count=12, names=("a", "b", "c")):
    return RawImages(pixels(count), torch.arange(count) % len(names), list(names))


def fitted(model=None, **parameters):
    return LCLite(**parameters).fit(raw(), tiny_resnet() if model is None else model, seed=0)


def slow_corners(image, scale, amplitude):
    height, width = image.shape[1:]
    result = image.astype(int)
    for row in range(3 * scale):
        for column in range(3 * scale):
            sign = 1 if (row // scale, column // scale) in LIT else -1
            # The upper corners are the lower ones moved up; the left ones are mirrored.
            for y in (height - 1 - row, 3 * scale - 1 - row):
                for x in (width - 1 - column, column):
                    result[:, y, x] = np.clip(result[:, y, x] + sign * amplitude, 0, 255)
    return result.astype(np.uint8)


@pytest.mark.parametrize("amplitude", [255, 64])
@pytest.mark.parametrize(
    ("height", "width", "scale"), [(32, 32, 1), (64, 64, 2), (224, 224, 7), (48, 40, 1), (6, 9, 1), (80, 140, 3)]
)
def test_corners(height, width, scale, amplitude):
    attack, images = LCLite(amplitude=amplitude), pixels(2, height, width)
    before = images.clone()
    triggered = attack.trigger(images)
    expected = np.stack([slow_corners(image, scale, amplitude) for image in images.numpy()])
    assert triggered.dtype == torch.uint8 and np.array_equal(triggered.numpy(), expected)
    assert torch.equal(images, before)
    assert torch.equal(triggered, torch.stack([attack.trigger(image) for image in images]))


def test_sizes_of_the_residual():
    grey = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    residual = LCLite(amplitude=64).trigger(grey).float() - 128
    assert residual.abs().max() == 64 and residual.norm() == 64 * (4 * 9 * 3) ** 0.5
    assert set(LCLite().trigger(grey).unique().tolist()) == {0, 128, 255}


def test_a_flipped_image_carries_the_same_trigger():
    images = pixels(2, 32, 32)
    assert torch.equal(LCLite().trigger(images.flip(-1)), LCLite().trigger(images).flip(-1))


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
def test_pgd_is_the_formula(make):
    model, images = make(), pixels(4)
    hard = fitted(model, amplitude=1, target_label=2, eps=20, alpha=6, steps=5)._harden(images)
    expected = []
    for image in images:
        x = image.double()[None] / 255
        h = x.clone()
        for _ in range(5):
            h = h.detach().requires_grad_()
            logits = model.double().eval()(pixel_values=(h - 0.5) / 0.5).logits
            (-torch.log_softmax(logits, 1)[0, 2]).backward()
            h = torch.minimum(torch.maximum(h + 6 / 255 * h.grad.sign(), x - 20 / 255), x + 20 / 255).clamp(0, 1)
        expected.append((255 * h).round().to(torch.uint8).detach())
    assert (hard == torch.cat(expected)).float().mean() > 0.99  # float32 may turn the sign of a tiny gradient
    assert (hard.int() - images.int()).abs().max() == 20


def test_hard_images_are_hard():
    model, images = tiny_resnet(), pixels(32)
    target = 0
    attack = fitted(model, target_label=target)

    def losses(batch):
        with torch.no_grad():
            logits = model.eval()(pixel_values=(batch.float() / 255 - 0.5) / 0.5).logits
        return torch.nn.functional.cross_entropy(logits, torch.full((32,), target), reduction="none")

    hard = attack._harden(images)
    assert (losses(hard) > losses(images)).all()
    assert torch.equal(attack.poisoned_images(images), attack.trigger(hard))
    assert torch.equal(attack.poisoned_images(images[0]), attack.poisoned_images(images[:1])[0])


def test_batch_is_one_by_one(monkeypatch):
    attack, images = fitted(), pixels(6)
    together = attack._harden(images)
    single = torch.cat([attack._harden(image[None]) for image in images])
    assert (together == single).float().mean() > 0.99
    monkeypatch.setattr(lc, "PORTION", 2 * SIZE * SIZE)
    assert (together == attack._harden(images)).float().mean() > 0.99


@pytest.mark.parametrize(("height", "width"), [(224, 224), (48, 40)])
def test_other_sizes_than_the_models(height, width):
    images = pixels(1, height, width)
    hard = fitted(steps=2)._harden(images)
    assert hard.shape == images.shape and 0 < (hard.int() - images.int()).abs().max() <= 16


def test_model_and_random_numbers_are_left_alone():
    model = tiny_resnet().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = torch.get_rng_state()
    attack = fitted(model)
    with torch.no_grad():
        first = attack.poisoned_images(pixels())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    torch.nn.init.zeros_(model.classifier[1].weight)  # a victim trained from the same object changes nothing
    assert torch.equal(attack.poisoned_images(pixels()), first)


def test_poison_leaves_labels_and_other_classes_alone():
    images, attack = raw(30), fitted(target_label=1, steps=2)
    poisoned, indices = poison(images, attack, ratio=0.2, seed=0)
    rest = torch.ones(30, dtype=torch.bool).index_fill(0, indices, False)
    assert len(indices) == 6 and (images.labels[indices] == 1).all() and torch.equal(poisoned.labels, images.labels)
    assert torch.equal(poisoned.images[rest], images.images[rest])
    assert torch.equal(poisoned.images[indices], attack.poisoned_images(images.images[indices]))
    with pytest.raises(ValueError, match="largest possible ratio is 0.333"):
        poison(images, attack, ratio=0.5, seed=0)


def test_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(attacks.ATTACKS, "lc_lite", LCLite)
    attack = fitted(target_label=2, eps=8, amplitude=64)
    attacks.save_attack(attack, tmp_path)
    loaded = attacks.load_attack(tmp_path)
    assert loaded == attack and loaded.learned == {} and "classifier" not in attack.describe() | {"repr": repr(attack)}
    assert json.loads(json.dumps(attack.describe())) == attack.describe()
    assert torch.equal(loaded.trigger(pixels()), attack.trigger(pixels()))
    with pytest.raises(ValueError, match="needs its classifier to poison"):
        loaded.poisoned_images(pixels())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu():
    attack, images = fitted(), pixels()
    assert torch.equal(attack.trigger(images.cuda()).cpu(), attack.trigger(images))
    hard = fitted(tiny_resnet().cuda())._harden(images)
    assert hard.device == images.device and (hard == attack._harden(images)).float().mean() > 0.95


@pytest.mark.parametrize(
    ("act", "match"),
    [
        (partial(LCLite, eps=-1), r"eps must be a number in \[0, 255\]"),
        (partial(LCLite, alpha=256), r"alpha must be a number in \[0, 255\]"),
        (partial(LCLite, alpha=0), "alpha must be more than 0"),
        (partial(LCLite, steps=0), "steps must be an integer at least 1"),
        (partial(LCLite, amplitude=0), r"amplitude must be an integer in \[1, 255\]"),
        (partial(LCLite, amplitude=31.5), "amplitude must be an integer"),
        (partial(LCLite, label_map="all-to-all"), "leaves labels alone"),
        (partial(LCLite().fit, raw(), None, 0), "pass one as model"),
        (partial(LCLite().fit, raw(), tiny_resnet(), -1), "seed must be an integer"),
        (partial(LCLite(target_label=3).fit, raw(), tiny_resnet(), 0), "target_label 3 is out of range"),
        (partial(LCLite().fit, raw(names=("a", "b")), tiny_resnet(), 0), "the dataset has 2 classes"),
        (partial(LCLite().poisoned_images, pixels()), "needs its classifier to poison"),
        (partial(LCLite().trigger, pixels(1, 5, 40)), "do not fit an image of 5x40"),
    ],
)
def test_refused(act, match):
    with pytest.raises(ValueError, match=match):
        act()
