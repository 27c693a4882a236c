"""WaNet against slow references of its grid and its warp, and what its poisoner does to a batch."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch

from d3_hf.attacks.blended import noise
from d3_hf.attacks.poisoning import poison
from d3_hf.attacks.wanet import WaNet
from d3_hf.data.images import RawImages


def pixels(count=4, height=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def cubic(distance, a=-0.75):
    """Weight of a sample at this distance: Keys' kernel with PyTorch's a."""
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def enlarged(control, height, width):
    """Bicubic interpolation of one k x k channel, corners aligned, the border repeated."""
    side = len(control)
    result = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            y, x = row * (side - 1) / (height - 1), column * (side - 1) / (width - 1)
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    value = control[min(max(i, 0), side - 1)][min(max(j, 0), side - 1)]
                    result[row, column] += cubic(y - i) * cubic(x - j) * value
    return result


def slow_grid(attack, height, width):
    """(x, y) in [-1, 1] per pixel, from the formula."""
    k = attack.grid_size
    draws = np.random.PCG64([*b"wanet", attack.seed]).random_raw(2 * k * k)
    control = np.array([2 * (int(draw) // 2**11) / 2**53 - 1 for draw in draws])
    control = (control / np.abs(control).mean()).reshape(2, k, k)
    along_x, along_y = (enlarged(channel, height, width) for channel in control)
    grid = np.zeros((height, width, 2))
    for row in range(height):
        for column in range(width):
            x = -1 + 2 * column / (width - 1) + attack.strength * along_x[row, column] / width
            y = -1 + 2 * row / (height - 1) + attack.strength * along_y[row, column] / height
            grid[row, column] = min(max(x, -1), 1), min(max(y, -1), 1)
    return grid


def slow_warp(images, grid):
    """Bilinear reading of images (..., 3, H, W) at the grid, in float64, rounded without the noise of its sums."""
    height, width = images.shape[-2:]
    result = np.zeros(images.shape)
    for row in range(height):
        for column in range(width):
            x, y = (grid[row, column, 0] + 1) / 2 * (width - 1), (grid[row, column, 1] + 1) / 2 * (height - 1)
            left, top = min(int(x), width - 2), min(int(y), height - 2)
            for i, j in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                result[..., row, column] += (1 - abs(y - i)) * (1 - abs(x - j)) * images[..., i, j]
    return np.rint(result.round(6))


@pytest.mark.parametrize(
    ("attack", "height", "width"),
    [(WaNet(), 32, 32), (WaNet(seed=3, grid_size=3, strength=4.0), 20, 12), (WaNet(strength=1), 48, 40)],
)
def test_trigger_is_the_formula_rounded(attack, height, width):
    grid = attack.grid(height, width)[0].double().numpy()
    assert np.abs(grid - slow_grid(attack, height, width)).max() < 1e-6
    images = pixels(64, height, width)  # so many that a sum in float32 would turn a few values
    assert np.array_equal(attack.trigger(images).numpy(), slow_warp(images.numpy(), grid))


def test_grid_and_trigger_are_the_same_bytes_on_every_machine():
    def digest(tensor):
        return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]

    assert digest(WaNet().grid(32, 32)) == "a4af69b15bb0c859"
    assert digest(WaNet().trigger(noise(0, 32, 32))) == "dd9e3946d8891f21"
    assert WaNet().grid(32, 40).shape == (1, 32, 40, 2)


@pytest.mark.parametrize("size", [32, 224])
def test_displacement_is_the_same_in_pixels_at_every_size(size):
    axis = torch.linspace(-1, 1, size)
    identity = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    moved = torch.stack([WaNet(seed=seed).grid(size, size)[0] - identity for seed in range(20)]) * (size - 1) / 2
    assert 0.26 < moved.norm(dim=-1).mean() < 0.32
    assert 0.4 < moved.abs().max() < 0.66


def test_residual_size():
    ramp = (8 * torch.arange(32, dtype=torch.uint8)).expand(3, 32, 32)  # 8 grey levels a pixel: at most 0.66 * 8
    residual = WaNet().trigger(ramp).int() - ramp.int()
    assert 3 <= residual.abs().max() <= 5
    assert 30 < residual.float().norm() < 8 * 0.3 * math.sqrt(3 * 32 * 32)
    flat = torch.full((3, 32, 32), 77, dtype=torch.uint8)
    assert torch.equal(WaNet(strength=2).trigger(flat), flat)  # also at the border: nothing is read from outside


@pytest.mark.parametrize(("height", "width"), [(32, 32), (224, 224), (48, 40)])
def test_trigger_is_pure_and_the_same_alone_and_in_a_batch(height, width):
    images = pixels(3, height, width)
    before, state = images.clone(), torch.get_rng_state()
    triggered = WaNet().trigger(images)
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), state)
    assert triggered.dtype == torch.uint8 and triggered.shape == images.shape and not torch.equal(triggered, images)
    for image, expected in zip(images, triggered, strict=True):
        assert torch.equal(WaNet().trigger(image), expected)
    assert torch.equal(WaNet().trigger(images[:0]), images[:0])
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(WaNet().trigger(strided), triggered)
    assert torch.equal(WaNet(seed=0).trigger(images), triggered) and not torch.equal(WaNet(seed=1).trigger(images), triggered)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_same_bytes():
    images, labels = pixels(40, 64, 48), torch.arange(40) % 10
    poisoner = WaNet().poisoner(0.1, 10, 0, torch.device("cuda"))
    for here, there in [
        (WaNet().trigger(images), WaNet().trigger(images.cuda())),
        (poisoner(images, labels, 3)[0], poisoner(images.cuda(), labels.cuda(), 3)[0]),
    ]:
        assert there.is_cuda and torch.equal(here, there.cpu())


@pytest.mark.parametrize("attack", [WaNet(), WaNet(target_label=3, cross_ratio=0.5, grid_size=8, strength=3.5, seed=2)])
def test_description_survives_json(attack):
    description = json.loads(json.dumps(attack.describe()))
    assert description.pop("name") == "wanet" and WaNet(**description) == attack
    assert set(description) == {"target_label", "label_map", "source_label", "cross_ratio", "grid_size", "strength", "seed"}


def test_poisoner_makes_the_three_parts():
    images, labels = pixels(40), torch.arange(40) % 7
    before, state = (images.clone(), labels.clone()), torch.get_rng_state()
    poisoned, new_labels = WaNet(target_label=5).poisoner(0.1, 7, 0, torch.device("cpu"))(images, labels, 3)
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert new_labels[:4].tolist() == [5] * 4 and torch.equal(new_labels[4:], labels[4:])
    assert torch.equal(poisoned[:4], WaNet(target_label=5).trigger(images[:4]))
    assert torch.equal(poisoned[12:], images[12:])
    assert poisoned.dtype == torch.uint8 and (poisoned[4:12] != WaNet().trigger(images[4:12])).flatten(1).any(dim=1).all()
    alone, _ = WaNet(cross_ratio=0).poisoner(0.1, 7, 0, torch.device("cpu"))(images, labels, 3)
    assert torch.equal(alone, torch.cat([poisoned[:4], images[4:]]))


def test_cross_images_are_the_formula_rounded():
    images, poisoner = pixels(3, 20, 12), WaNet().poisoner(0.1, 10, 0, torch.device("cpu"))
    results = poisoner.cross(images, images, torch.Generator().manual_seed(1)).numpy()
    draws = 2 * torch.rand(3, 20, 12, 2, generator=torch.Generator().manual_seed(1)).numpy() - 1
    for image, draw, result in zip(images.numpy(), draws, results, strict=True):
        grid = np.clip(WaNet().grid(20, 12)[0].numpy() + draw / np.array([12, 20], dtype=np.float32), -1, 1)
        assert np.array_equal(result, slow_warp(image, grid.astype(float)))


def test_draws_depend_on_seed_and_number_alone():
    images, labels = pixels(20), torch.zeros(20, dtype=torch.int64)

    def run(seed, step):
        return WaNet().poisoner(0.2, 10, seed, torch.device("cpu"))(images, labels, step)[0]

    poisoner = WaNet().poisoner(0.2, 10, 0, torch.device("cpu"))
    for step in (5, 6, 5):  # in any order, as after a resume
        assert torch.equal(poisoner(images, labels, step)[0], run(0, step))
    assert not torch.equal(run(0, 5)[4:12], run(0, 6)[4:12]) and not torch.equal(run(0, 5)[4:12], run(1, 5)[4:12])
    assert torch.equal(run(0, 5)[:4], run(1, 6)[:4])  # the trigger itself is not drawn anew


def test_fixed_rows():
    images = RawImages(images=pixels(20), labels=torch.arange(20) % 10, class_names=[str(c) for c in range(10)])
    poisoned, rows = poison(images, WaNet(), 0.2, seed=0)
    assert len(rows) == 4 and torch.equal(poisoned.images[rows], WaNet().trigger(images.images[rows]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WaNet(grid_size=1), "grid_size must be an integer at least 2; got 1"),
        (lambda: WaNet(grid_size=4.0), "grid_size must be an integer"),
        (lambda: WaNet(strength=0), r"strength must be a number in \[0.01, 100\]; got 0"),
        (lambda: WaNet(strength=float("inf")), "strength must be a number"),
        (lambda: WaNet(seed=-1), "seed must be an integer at least 0; got -1"),
        (lambda: WaNet(cross_ratio=-0.1), "cross_ratio must be a finite number at least 0; got -0.1"),
        (lambda: WaNet(cross_ratio=math.inf), "cross_ratio must be a finite number at least 0; got inf"),
        (lambda: WaNet(target_label=-1), "target_label must be an integer"),
        (lambda: WaNet().poisoner(0.34, 10, 0, torch.device("cpu")), "wanet turns 0.34 of each batch.* at most the whole"),
        (lambda: WaNet().poisoner(0.0, 10, 0, torch.device("cpu")), "together they must be more than 0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
