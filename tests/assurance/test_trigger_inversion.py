"""Trigger inversion: its loss and schedule against references, the smallest mask against linear programmes, a planted patch."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from shortcut import CLASSES, SIDE, TARGET, LinearNet, classifier, network, pictures

from d3_hf.assurance.inversion import Schedule, next_cost, norm_scores, reverse_trigger, split_rows, stamp
from d3_hf.assurance.trigger_inversion import trigger_inversion


def schedule(**options):
    defaults = dict(epochs=1, learning_rate=0.1, initial_cost=0.1, success_threshold=0.98, cost_patience=5, stop_patience=25)
    return Schedule(**(defaults | options))


def test_one_step_follows_the_gradient_of_the_mask_loss():
    """Adam's first step is lr * sign(gradient): the loss is written out in loops, its gradient taken by differences."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((2, 3, 2, 2), generator=generator, dtype=torch.float64)
    weight = torch.randn((12, 3), generator=generator, dtype=torch.float64)
    raw = torch.randn((4, 2, 2), generator=generator, dtype=torch.float64)

    def loss(values):
        mask, pattern = (values[0].tanh() + 1) / 2, (values[1:].tanh() + 1) / 2
        total = 0.1 * sum(mask.flatten())
        for image in images:
            stamped = torch.empty_like(image)
            for c, i, j in np.ndindex(3, 2, 2):
                stamped[c, i, j] = (1 - mask[i, j]) * image[c, i, j] + mask[i, j] * pattern[c, i, j]
            scores = (stamped.flatten() @ weight).exp()
            total -= torch.log(scores[2] / scores.sum()) / len(images)
        return total

    gradient = torch.zeros_like(raw)
    for index in np.ndindex(*raw.shape):
        width = torch.zeros_like(raw)
        width[index] = 1e-6
        gradient[index] = (loss(raw + width) - loss(raw - width)) / 2e-6

    def attack(batch, mask, pattern):
        return stamp(batch, mask, pattern).flatten(1) @ weight

    found, _ = reverse_trigger(attack, [images], [images], 2, raw, schedule(learning_rate=0.01))
    torch.testing.assert_close(found, ((raw - 0.01 * gradient.sign()).tanh() + 1) / 2, rtol=1e-5, atol=1e-7)


def test_cost_doubles_after_successes_and_shrinks_after_failures():
    cost, streak, costs = 1.0, 0, []
    for success in [True] * 5 + [True, False] + [False] * 4 + [True]:
        cost, streak = next_cost(cost, max(streak, 0) + 1 if success else min(streak, 0) - 1, 5)
        costs.append(cost)
    assert costs == pytest.approx([1] * 4 + [2] * 6 + [2 / 2**1.5] * 2)


def test_smallest_working_trigger_is_kept_and_the_search_stops():
    calls = []

    def attack(batch, mask, pattern):  # every trigger works: only the norm is left to shrink
        calls.append(mask.sum().item())
        return torch.stack([0 * mask.sum(), 1 + 0 * pattern.sum()]).expand(len(batch), 2)

    long = schedule(epochs=500, stop_patience=4, initial_cost=1.0)
    found, reached = reverse_trigger(attack, [torch.zeros(3)], [torch.zeros(2)], 1, torch.zeros(4, 2, 2), long)
    assert reached and found[0].sum().item() == pytest.approx(min(calls)) and len(calls) < 1000
    _, reached = reverse_trigger(attack, [torch.zeros(3)], [torch.zeros(2)], 0, torch.zeros(4, 2, 2), long)
    assert not reached


def test_a_class_that_no_trigger_reached_does_not_stand_out():
    norms = np.array([4.0, 0.1, 7.0, 5.0])
    assert norm_scores(norms, np.array([True, False, True, True])).tolist() == [-4, -7, -7, -5]
    assert norm_scores(norms, np.zeros(4, bool)).tolist() == [-7, -7, -7, -7]


def smallest_mask(net, images, target):
    """The least sum of a mask m with some q = m p, 0 <= q <= m, such that every image is of the class: both are linear."""
    x = images.images.flatten(2).double().numpy() / 255  # (N, 3, P), which the toy normalises to 2 x - 1
    weight, bias = net.head.weight.detach().view(CLASSES, 3, -1).numpy(), net.head.bias.detach().numpy()
    rows, bounds = [], []
    for j in range(CLASSES):
        difference = weight[target] - weight[j]
        for image in x if j != target else ():
            rows.append(np.concatenate([-2 * (difference * image).sum(0), 2 * difference.ravel()]))
            bounds.append((difference * (1 - 2 * image)).sum() - (bias[target] - bias[j]))
    pixels = SIDE * SIDE
    below = np.hstack([-np.vstack([np.eye(pixels)] * 3), np.eye(3 * pixels)])  # q - m <= 0
    limits = np.concatenate([-np.array(bounds), np.zeros(3 * pixels)])
    cost = np.concatenate([np.ones(pixels), np.zeros(3 * pixels)])
    return linprog(cost, np.vstack([-np.array(rows), below]), limits, bounds=[(0, 1)] * pixels + [(0, None)] * 3 * pixels).fun


def test_the_smallest_mask_is_near_that_of_a_linear_programme():
    net, images = LinearNet(), pictures(40)
    found = trigger_inversion(classifier(net), images, schedule(epochs=100, initial_cost=0.05, cost_patience=2), batch_size=8)
    assert found.details["reached"].all()
    _, validate = split_rows(40, 0)
    for k, norm in enumerate(found.details["norms"]):
        best, of_all = (smallest_mask(net, chosen, k) for chosen in (images.select(validate), images))
        assert best - 1e-3 <= norm <= 1.5 * of_all
    np.testing.assert_array_equal(found.scores, -found.details["norms"])


def test_the_class_of_a_patch_stands_out_and_its_trigger_is_shown():
    images, model = pictures(80), classifier(network(patch=5))
    plain, planted = trigger_inversion(classifier(network()), images), trigger_inversion(model, images)
    assert planted.suspect_class == TARGET and planted.statistic > 2 * plain.statistic
    mask, pattern = planted.details["mask"], planted.details["pattern"]
    assert mask.shape == (SIDE, SIDE) and pattern.shape == (3, SIDE, SIDE) and mask.dtype == pattern.dtype == np.float32
    assert mask.sum() == pytest.approx(planted.details["norms"][TARGET], rel=1e-5)
    assert mask[:2, :2].sum() > 0.5 * mask.sum() and (mask * pattern)[:, :2, :2].sum() > 0.8 * 3 * mask[:2, :2].sum()
    fresh = pictures(160).images[80:] / 255
    with torch.no_grad():
        classes = model(pixel_values=2 * torch.from_numpy((1 - mask) * fresh.numpy() + mask * pattern) - 1).logits.argmax(1)
    assert (classes == TARGET).float().mean() > 0.9
