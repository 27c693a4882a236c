"""Losses on features against slow references; views of images."""

import math

import pytest
import torch

from d3_hf.data.views import CROP_AREA, view
from d3_hf.training.encoder_losses import batch_cut_off, nt_xent, relation_losses
from d3_hf.training.features import feature_distances

FIRST, SECOND = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def cosine(a, b):
    a, b = a.tolist(), b.tolist()
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


@pytest.mark.parametrize("temperature", [0.5, 0.1])
def test_nt_xent_equals_a_slow_reference(temperature):
    views, expected = [*FIRST, *SECOND], []
    for image in range(5):
        losses = []
        for anchor, partner in ((image, image + 5), (image + 5, image)):
            scores = {j: math.exp(cosine(views[anchor], views[j]) / temperature) for j in range(10) if j != anchor}
            losses.append(-math.log(scores[partner] / sum(scores.values())))
        expected.append(sum(losses) / 2)
    torch.testing.assert_close(nt_xent(FIRST, SECOND, temperature), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_relation_losses_equal_a_slow_reference_and_do_not_feel_a_rotation():
    expected = [
        sum((cosine(FIRST[i], FIRST[j]) - cosine(SECOND[i], SECOND[j])) ** 2 for j in range(5) if j != i) / 4 for i in range(5)
    ]
    torch.testing.assert_close(relation_losses(FIRST, SECOND), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    rotation, _ = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1)))
    assert relation_losses(FIRST @ rotation, FIRST).max() < 1e-9
    assert feature_distances(FIRST @ rotation, FIRST).min() > 0.1
    features = FIRST.clone().requires_grad_()
    relation_losses(features, SECOND).sum().backward()
    assert features.grad.isfinite().all() and features.grad.any()


def test_pars_cut_off_looks_at_the_mean_of_the_batch():
    """An image beyond tau counts while the mean is below it; beyond it neither value nor gradient is left."""
    for values, threshold in (([0.5, 3.0, 1.0], 2.15), ([2.0, 3.0, 2.5], 2.15), ([1.0, 1.0], 1.0)):
        distances = torch.tensor(values, requires_grad=True)
        mean = sum(values) / len(values)
        found = batch_cut_off(distances, threshold)
        assert found.mean().item() == pytest.approx(mean if mean <= threshold else 0.0)
        found.mean().backward()
        assert distances.grad.tolist() == pytest.approx([1 / len(values) if mean <= threshold else 0.0] * len(values))


# Views -----------------------------------------------------------------------------------------------------------------


def draw(images, seed=0):
    return view(images, torch.Generator().manual_seed(seed))


def test_views_repeat_by_their_generator_and_leave_the_images():
    images = torch.randint(0, 256, (6, 3, 12, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before, state = images.clone(), torch.get_rng_state()
    first, again, other = draw(images), draw(images), draw(images, 1)
    assert first.dtype == torch.uint8 and first.shape == images.shape and torch.equal(first, again)
    assert not torch.equal(first, other) and torch.equal(images, before) and torch.equal(torch.get_rng_state(), state)


def test_a_view_of_one_colour_changes_in_colour_alone():
    images = torch.tensor([100, 60, 30], dtype=torch.uint8).view(1, 3, 1, 1).expand(300, 3, 8, 8)
    found = draw(images).int()
    assert (found.amax((2, 3)) - found.amin((2, 3))).max() <= 1  # rounding
    colours = found[:, :, 0, 0]
    greyed = (colours.amax(1) - colours.amin(1) <= 1).float().mean().item()
    kept = (colours - torch.tensor([100, 60, 30])).abs().amax(1).le(1).float().mean().item()
    assert 0.1 < greyed < 0.3 and 0.08 < kept < 0.28  # 0.2, and 0.8 of the 0.2 that are not jittered
    assert colours[:, 0].min() >= 40 and colours.max() > 110


def test_crops_and_flips():
    """A ramp along the columns: its slope says how wide the crop was, its sign whether it was mirrored."""
    ramp = torch.linspace(0, 255, 64).round().to(torch.uint8).expand(400, 3, 64, 64)
    grey = draw(ramp).float().mean((1, 2))
    slopes = (grey[:, -1] - grey[:, 0]) / 255
    assert 0.4 < (slopes < 0).float().mean() < 0.6
    assert slopes.abs().min() > 0.6 * 0.6 * 0.75 * CROP_AREA[0] ** 0.5  # contrast and brightness lowered, the narrowest crop
    assert slopes.abs().max() <= 1
