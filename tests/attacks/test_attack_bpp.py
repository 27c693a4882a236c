"""BPP against slow references of its levels and its dithering, and what its poisoner does to a batch."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch

from d3_hf.attacks.bpp import BPP
from d3_hf.attacks.poisoning import poison
from d3_hf.data.images import RawImages

BOTH = [BPP(), BPP(dithering=True)]
IDS = ["plain", "dithering"]


def pixels(count=4, height=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def to_grey(level, steps):
    return round(Fraction(255 * int(level), steps))  # a tie goes to the even grey level


def slow_dithering(channel, steps):
    """Floyd and Steinberg's loop over one channel (H, W), in float32."""
    height, width = channel.shape
    values, result = channel.astype(np.float32), np.zeros(channel.shape, dtype=np.uint8)
    for y in range(height):
        for x in range(width):
            level = np.clip(np.rint(values[y, x] * np.float32(steps / 255)), 0, steps)
            result[y, x] = to_grey(level, steps)
            error = values[y, x] - level * np.float32(255 / steps)
            for down, right, share in ((0, 1, 7 / 16), (1, -1, 3 / 16), (1, 0, 5 / 16), (1, 1, 1 / 16)):
                if y + down < height and 0 <= x + right < width:
                    values[y + down, x + right] += error * np.float32(share)
    return result


@pytest.mark.parametrize("levels", [2, 3, 6, 7, 8, 128, 255])
def test_every_grey_level_is_quantised_exactly(levels):
    grey = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, 16, 16)
    expected = [to_grey(round(Fraction(value * (levels - 1), 255)), levels - 1) for value in range(256)]
    triggered = BPP(levels=levels).trigger(grey)
    assert triggered[0].flatten().tolist() == expected and len(set(expected)) == levels
    assert torch.equal(triggered[1], triggered[0]) and torch.equal(BPP(levels=levels).trigger(triggered), triggered)


def test_default_levels_are_the_published_ones():
    assert BPP().trigger(pixels()).unique().tolist() == [0, 36, 73, 109, 146, 182, 219, 255]


@pytest.mark.parametrize(("levels", "height", "width"), [(8, 32, 32), (2, 9, 14), (5, 14, 9), (8, 1, 6), (8, 6, 1)])
def test_dithering_bytes(levels, height, width):
    images = pixels(2, height, width)
    images[1] = torch.linspace(0, 255, width).expand(3, height, width).to(torch.uint8)
    expected = [[slow_dithering(channel, levels - 1) for channel in image] for image in images.numpy()]
    assert np.array_equal(BPP(levels=levels, dithering=True).trigger(images).numpy(), np.array(expected))


def test_dithering_keeps_the_mean():
    grey = torch.full((3, 64, 64), 128, dtype=torch.uint8)  # nearest level: 109 or 146, 18 away
    assert abs(BPP(dithering=True).trigger(grey).float().mean() - 128) < 1
    assert BPP().trigger(grey).float().mean() == 146


@pytest.mark.parametrize(("attack", "largest", "variance"), [(BPP(), 18, 1), (BPP(dithering=True), 36, 1 + 84 / 256)])
def test_residual_size(attack, largest, variance):
    images = pixels(8) % 182 + 37  # whole steps of 36.4, away from 0 and 255, where dithering has no room
    residual = (attack.trigger(images).int() - images.int()).float()
    assert 0.9 * largest < residual.abs().max() <= largest
    # The error of a pixel is uniform over one step; dithering adds 7, 3, 5 and 1 sixteenths of its neighbours' errors.
    length = 255 / 7 * (variance / 12 * images[0].numel()) ** 0.5
    assert (residual.flatten(1).norm(dim=1) / length - 1).abs().max() < 0.05


@pytest.mark.parametrize("attack", BOTH, ids=IDS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (224, 224), (48, 40)])
def test_trigger_is_pure_and_the_same_alone_and_in_a_batch(attack, height, width):
    images = pixels(2, height, width)
    before, state = images.clone(), torch.get_rng_state()
    triggered = attack.trigger(images)
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), state)
    assert triggered.dtype == torch.uint8 and triggered.shape == images.shape and triggered.unique().numel() == 8
    for image, expected in zip(images, triggered, strict=True):
        assert torch.equal(attack.trigger(image), expected)
    assert torch.equal(attack.trigger(images[:0]), images[:0])
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(attack.trigger(strided), triggered)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attack", BOTH, ids=IDS)
def test_gpu_gives_the_same_bytes(attack):
    images, labels = pixels(40, 64, 48), torch.arange(40) % 10
    assert torch.equal(attack.trigger(images.cuda()).cpu(), attack.trigger(images))
    poisoner = attack.poisoner(0.1, 10, 0, torch.device("cuda"))
    assert torch.equal(poisoner(images.cuda(), labels.cuda(), 3)[0].cpu(), poisoner(images, labels, 3)[0])


@pytest.mark.parametrize("attack", [*BOTH, BPP(target_label=3, label_map="all-to-all", cross_ratio=0, levels=4)])
def test_description_survives_json(attack):
    description = json.loads(json.dumps(attack.describe()))
    assert description.pop("name") == "bpp" and BPP(**description) == attack
    assert set(description) == {"target_label", "label_map", "source_label", "cross_ratio", "levels", "dithering"}


@pytest.mark.parametrize("attack", BOTH, ids=IDS)
def test_poisoner_makes_the_three_parts(attack):
    images, labels = pixels(40, 12, 12), torch.arange(40) % 7 + 1
    before, state = (images.clone(), labels.clone()), torch.get_rng_state()
    poisoned, new_labels = attack.poisoner(0.1, 8, 0, torch.device("cpu"))(images, labels, 3)
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])
    assert torch.equal(torch.get_rng_state(), state) and poisoned.dtype == torch.uint8
    assert new_labels[:4].tolist() == [0] * 4 and torch.equal(new_labels[4:], labels[4:])
    assert torch.equal(poisoned[:4], attack.trigger(images[:4]))
    assert torch.equal(poisoned[8:], images[8:])
    residuals = attack.trigger(images).int() - images.int()
    for row in range(4, 8):  # each negative carries the residual of exactly one image that is no negative
        donors = [
            donor
            for donor in range(40)
            if torch.equal((images[row].int() + residuals[donor]).clamp(0, 255), poisoned[row].int())
        ]
        assert len(donors) == 1 and donors[0] not in range(4, 8)


def test_negatives_are_clipped():
    black, white = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.full((4, 3, 8, 8), 255, dtype=torch.uint8)
    for negatives, donors, expected in ((white, 20, 255), (black, 10, 0)):  # residuals +16 and -10
        images = torch.full((8, 3, 8, 8), donors, dtype=torch.uint8)
        images[4:] = negatives
        poisoned, _ = BPP().poisoner(0.5, 10, 0, torch.device("cpu"))(images, torch.zeros(8, dtype=torch.int64), 0)
        assert (poisoned[4:] == expected).all()


def test_draws_depend_on_seed_and_number_alone():
    images, labels = pixels(40), torch.zeros(40, dtype=torch.int64)

    def run(seed, step):
        return BPP().poisoner(0.2, 10, seed, torch.device("cpu"))(images, labels, step)[0]

    poisoner = BPP().poisoner(0.2, 10, 0, torch.device("cpu"))
    for step in (5, 6, 5):  # in any order, as after a resume
        assert torch.equal(poisoner(images, labels, step)[0], run(0, step))
    assert not torch.equal(run(0, 5), run(0, 6)) and not torch.equal(run(0, 5), run(1, 5))


def test_a_batch_of_negatives_alone_stays():
    """A last batch of one image, say: there is no other whose residual it could carry."""
    images, labels = pixels(1), torch.ones(1, dtype=torch.int64)
    poisoner, rounded_up = BPP(cross_ratio=9).poisoner(0.1, 10, 0, torch.device("cpu")), 0
    for step in range(20):
        poisoned, new_labels = poisoner(images, labels, step)
        if new_labels == 1:  # not the one in ten that is poisoned
            assert torch.equal(poisoned, images)
            rounded_up += 1
    assert rounded_up > 10


@pytest.mark.parametrize("attack", BOTH, ids=IDS)
@pytest.mark.parametrize("label_map", ["all-to-one", "all-to-all", "one-to-one"])
def test_fixed_rows_as_a_static_attack(attack, label_map):
    attack = BPP(dithering=attack.dithering, label_map=label_map, source_label=2 if label_map == "one-to-one" else None)
    images = RawImages(images=pixels(40, 8, 8), labels=torch.arange(40) % 4, class_names=list("abcd"))
    poisoned, rows = poison(images, attack, 0.2, seed=0)
    rest = [row for row in range(40) if row not in rows]
    assert len(rows) == 8
    assert torch.equal(poisoned.images[rows], attack.trigger(images.images[rows]))
    assert torch.equal(poisoned.labels[rows], attack.poisoned_labels(images.labels[rows], 4))
    assert torch.equal(poisoned.images[rest], images.images[rest]) and torch.equal(poisoned.labels[rest], images.labels[rest])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BPP(levels=1), r"levels must be an integer in \[2, 255\]; got 1"),
        (lambda: BPP(levels=256), "levels must be an integer"),
        (lambda: BPP(levels=8.0), "levels must be an integer"),
        (lambda: BPP(dithering="yes"), "dithering must be true or false; got 'yes'"),
        (lambda: BPP(cross_ratio=-1), "cross_ratio must be a finite number at least 0; got -1"),
        (lambda: BPP(target_label=-1), "target_label must be an integer"),
        (lambda: BPP().poisoner(0.51, 10, 0, torch.device("cpu")), "bpp turns 0.51 of each batch.* at most the whole"),
        (lambda: BPP().poisoner(0.0, 10, 0, torch.device("cpu")), "together they must be more than 0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
