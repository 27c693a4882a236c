"""DECREE: its likeness and its step against loops, its cost, and that it finds a shortcut that was put in by hand."""

import numpy as np
import pytest
import torch
from shortcut import SIDE, pictures
from torch import nn

from d3_hf.assurance.decree import Schedule, decree, mean_cosine, next_cost
from d3_hf.models import load_encoder

UNITS = 24
QUICK = Schedule(epochs=45, stop_patience=45)


class Net(nn.Module):
    """Random features, and one more that a white corner of 2x2 pixels alone raises, by ``planted``.

    How steep it is was chosen: the search follows gradients, and a shortcut that is flat where it starts is not found. Of five
    that were tried two were, this one and a flatter one; the others scored as the twin does.
    """

    def __init__(self, planted):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.body = nn.Linear(3 * SIDE * SIDE, UNITS)
        self.body.weight.data = torch.randn(self.body.weight.shape, generator=generator) / 14
        self.body.bias.data = torch.zeros(UNITS)
        self.planted = planted

    def forward(self, x):
        whiteness = x[:, :, :2, :2].sum((1, 2, 3))  # 12 where it is white, on pictures hardly above 3
        shortcut = self.planted * nn.functional.softplus(whiteness - 6)
        return torch.cat([self.body(x.flatten(1)), shortcut[:, None]], 1)


def encoder(planted=0.0):
    return load_encoder(Net(planted), image_mean=[0.5] * 3, image_std=[0.5] * 3, image_size=SIDE)


@pytest.fixture(scope="module")
def found():
    return {planted: decree(encoder(planted), pictures(100), QUICK) for planted in (0.0, 200.0)}


def test_likeness_is_the_mean_cosine_of_pairs():
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = [
        (features[i] @ features[j]) / features[i].norm() / features[j].norm() for i in range(7) for j in range(7) if i != j
    ]
    torch.testing.assert_close(mean_cosine(features), torch.stack(pairs).mean().float())
    assert mean_cosine(torch.ones(3, 4)).item() == pytest.approx(1)


def test_the_cost_grows_by_five_after_five_likenesses_and_shrinks_to_its_floor():
    cost, streak, costs = 1.0, 0, []
    for above in [True] * 5 + [False] * 15:
        cost, streak = next_cost(cost, max(streak, 0) + 1 if above else min(streak, 0) - 1, 5, 0.1)
        costs.append(cost)
    assert costs == pytest.approx([1] * 4 + [5] * 5 + [1] * 5 + [0.2] * 5 + [0.1])


def test_a_planted_shortcut_needs_a_smaller_mask_than_its_twin(found):
    twin, planted = found[0.0], found[200.0]
    assert planted.reached and planted.score < 0.5 * twin.score
    assert planted.likeness >= 0.99 and planted.likeness_before < 0.9
    assert planted.mask[:2, :2].sum() > 0.5 * planted.mask.sum()  # where the shortcut is


def test_the_trigger_that_is_shown_is_the_one_that_was_scored(found):
    planted = found[200.0]
    assert planted.mask.shape == (SIDE, SIDE) and planted.pattern.shape == (3, SIDE, SIDE)
    assert planted.score == pytest.approx(planted.mask.mean(), rel=1e-6)
    assert planted.picture.shape == (SIDE, SIDE, 3) and planted.picture.dtype == np.uint8
    fresh = pictures(160).images[100:] / 255
    stamped = (1 - planted.mask) * fresh.numpy() + planted.mask * planted.pattern
    features = Net(200.0)(2 * torch.from_numpy(stamped).float() - 1)
    assert mean_cosine(features) > 0.97


def test_it_is_seeded_and_leaves_the_encoder_as_it_was():
    model, short = encoder(200.0).train(), Schedule(epochs=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = (decree(model, pictures(40), short) for _ in range(2))
    assert first.score == second.score and np.array_equal(first.pattern, second.pattern)
    assert not np.array_equal(decree(model, pictures(40), short, seed=1).mask, first.mask)
    assert model.training and all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_one_step_follows_the_gradient_of_the_written_out_loss():
    """Adam's first step is lr * sign(gradient) of the start, before (tanh + 1) / 2; the gradient is taken by differences."""
    from d3_hf.assurance.inversion import random_start, split_rows

    model, images = encoder(1.0), pictures(20)
    rows, _ = split_rows(20, 0)
    start, batch = random_start((SIDE, SIDE), 0, 0).double(), images.images[rows].double() / 255
    net = Net(1.0).double()

    def loss(raw):
        mask, pattern = (raw[0].tanh() + 1) / 2, (raw[1:].tanh() + 1) / 2
        features = net(2 * ((1 - mask) * batch + mask * pattern) - 1)
        features = features / features.norm(dim=1, keepdim=True)
        cosines = [features[i] @ features[j] for i in range(len(rows)) for j in range(len(rows)) if i != j]
        return -torch.stack(cosines).mean() + 1e-3 * mask.sum()

    found = decree(model, images, Schedule(epochs=1, learning_rates=(0.01,), likeness=0.999999), batch_size=16)
    moved = torch.from_numpy(np.concatenate([found.mask[None], found.pattern])).double()
    for place in ((0, 0, 0), (0, 5, 3), (1, 1, 1), (2, 7, 0), (3, 2, 2)):
        width = torch.zeros_like(start)
        width[place] = 1e-5
        step = -0.01 * torch.sign(loss(start + width) - loss(start - width))
        assert moved[place].item() == pytest.approx(((start[place] + step).tanh().item() + 1) / 2, abs=1e-5)


def test_no_mask_that_serves_scores_one():
    found = decree(encoder(), pictures(20), Schedule(epochs=1, learning_rates=(0.001,)))
    assert not found.reached and found.score == 1 and found.mask.mean() < 0.9


def test_what_it_cannot_read_is_told_in_one_line():
    for options, count, wanted in (({}, 19, "at least 20 images"), ({"batch_size": 1}, 20, "batch_size must be at least 2")):
        with pytest.raises(ValueError, match=wanted):
            decree(encoder(), pictures(count), **options)
    broken = encoder()
    next(broken.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="are not finite"):
        decree(broken, pictures(20))
