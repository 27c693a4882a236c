"""CTRL: its picture against a DCT by explicit matrices, whom it poisons, other sizes, refusals."""

import math

import pytest
import torch
from tiny_encoders import colours

from d3_hf.attacks import CTRL, from_description, poison
from d3_hf.attacks.ctrl import waves

# OpenCV's and BT.601's: of red, green and blue to Y, U and V.
YUV = torch.tensor([[0.299, 0.587, 0.114], [-0.147, -0.289, 0.436], [0.615, -0.515, -0.100]], dtype=torch.float64)


def dct_matrix(count):
    """Orthonormal, type II: row k is the wave of frequency k."""
    rows = []
    for k in range(count):
        norm = math.sqrt((1 if k == 0 else 2) / count)
        rows.append([norm * math.cos(math.pi * (2 * n + 1) * k / (2 * count)) for n in range(count)])
    return torch.tensor(rows, dtype=torch.float64)


def raised(image, magnitude, places=((15, 15), (31, 31))):
    """The slow way: to YUV, to frequencies, two coefficients up, and back; float64 (3, H, W)."""
    planes = torch.einsum("ij,jhw->ihw", YUV, image.double())
    down, across = dct_matrix(image.shape[1]), dct_matrix(image.shape[2])
    for plane in (1, 2):
        spectrum = down @ planes[plane] @ across.T
        for row, column in places:
            spectrum[row, column] += magnitude
        planes[plane] = down.T @ spectrum @ across
    return torch.einsum("ij,jhw->ihw", torch.linalg.inv(YUV), planes)


def test_the_dct_of_the_reference_is_orthonormal():
    matrix = dct_matrix(32)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(32, dtype=torch.float64))


def test_the_trigger_is_two_coefficients_of_the_dct_of_u_and_v():
    image = torch.randint(60, 190, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found, expected = CTRL(magnitude=100).trigger(image), raised(image, 100)
    assert (found.double() - expected).abs().max() < 0.6  # half a level, and BT.601's three digits
    assert not torch.equal(found, image)
    torch.testing.assert_close(waves(32, 32, 100), expected - image.double(), atol=0.05, rtol=0)


def test_its_size_is_what_the_magnitude_says():
    """Two waves of magnitude / 16 each, times what U is worth in blue; their peaks fall on different pixels."""
    largest = waves(32, 32, 100).abs().amax((1, 2))
    assert 0.8 < largest[2] / (2 * 100 / 16 * 2.032) <= 1 and largest[2] < 26
    torch.testing.assert_close(waves(32, 32, 200), 2 * waves(32, 32, 100))


def test_it_is_one_picture_whatever_the_image_and_clips():
    grey, image = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8), colours(2, size=32).images // 2 + 60
    attack = CTRL()
    assert torch.equal(attack.trigger(grey)[0].int() - 128, attack.trigger(image)[1].int() - image[1].int())
    bright = attack.trigger(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))
    assert bright.max() == 255 and bright.min() > 200


@pytest.mark.parametrize(("height", "width"), [(64, 64), (16, 48), (224, 224)])
def test_on_other_sizes_it_is_the_same_waves_in_pixels(height, width):
    """The half and the highest frequency, at the amplitude that they have at 32x32."""
    image = torch.full((3, height, width), 128, dtype=torch.uint8)
    scale = math.sqrt(height * width) / 32  # an orthonormal coefficient is worth less in a larger plane
    places = ((height // 2 - 1, width // 2 - 1), (height - 1, width - 1))
    expected = raised(image, 100 * scale, places) - 128
    torch.testing.assert_close(waves(height, width, 100), expected, atol=0.05, rtol=0)


def test_some_images_of_the_target_class_are_poisoned_and_labels_stay():
    images, attack = colours(60, size=32), CTRL(target_label=2, magnitude=50, poison_magnitude=200)
    poisoned, rows = poison(images, attack, 0.1, seed=0)
    assert len(rows) == 6 and (images.labels[rows] == 2).all() and torch.equal(poisoned.labels, images.labels)
    for row in range(60):
        expected = CTRL(magnitude=200).trigger(images.images[row]) if row in rows else images.images[row]
        assert torch.equal(poisoned.images[row], expected)
    with pytest.raises(ValueError, match="the largest possible ratio is"):
        poison(images, attack, 0.5, seed=0)


def test_it_survives_its_description_and_refuses_what_it_cannot_do():
    attack = CTRL(target_label=1, magnitude=150)
    assert from_description(attack.describe()) == attack
    for options, wanted in (({"magnitude": 0}, "magnitude must be"), ({"label_map": "all-to-all"}, "leaves labels alone")):
        with pytest.raises(ValueError, match=wanted):
            CTRL(**options)
    with pytest.raises(ValueError, match="3x8 pixels is too small for its waves"):
        CTRL().trigger(torch.zeros(3, 3, 8, dtype=torch.uint8))
