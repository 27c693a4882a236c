"""S5: the margin against loops, its maximum against linear programmes, a planted patch."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from shortcut import CLASSES, TARGET, LinearNet, classifier, network, pictures

from d3_hf.assurance.maximum_margin import margins_of, maximum_margin


def test_the_margin_against_loops():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 1, 2, 3, 3, 0])
    expected = [row[k] - max(row[j] for j in range(4) if j != k) for row, k in zip(logits.tolist(), classes, strict=True)]
    assert margins_of(logits, classes).tolist() == pytest.approx(expected)


def test_the_maximum_is_that_of_a_linear_programme():
    net = LinearNet()
    found = maximum_margin(classifier(net), pictures(), starts=2, steps=100)
    weight, bias = net.head.weight.detach().numpy(), net.head.bias.detach().numpy()
    for k in range(CLASSES):
        # max m with m <= (w_k - w_j) x + b_k - b_j for all j and x in [-1, 1]: pixels of the toy are normalised to that
        others = [j for j in range(CLASSES) if j != k]
        rows = np.hstack([weight[others] - weight[k], np.ones((CLASSES - 1, 1))])
        bounds = [(-1, 1)] * weight.shape[1] + [(None, None)]
        cost = np.append(np.zeros(weight.shape[1]), -1)
        best = -linprog(cost, rows, bias[k] - bias[others], bounds=bounds).fun
        assert found.details["margins"][k].max() == found.scores[k]
        assert ((0.99 * best < found.details["margins"][k]) & (found.details["margins"][k] < best + 1e-3)).all()


def test_the_class_of_a_patch_stands_out_and_no_other():
    plain, planted = (maximum_margin(classifier(network(patch=patch)), pictures(), 8, 100) for patch in (0, 5))
    assert planted.suspect_class == TARGET and planted.statistic > 3 * plain.statistic
    others = np.arange(CLASSES) != TARGET
    np.testing.assert_allclose(planted.scores[others], plain.scores[others], rtol=0.15)
    assert planted.details["margins"].shape == (CLASSES, 8)


def test_more_starts_and_steps_do_not_lower_it_by_much():
    model, images = classifier(network()), pictures()
    few, many = maximum_margin(model, images, starts=1, steps=5), maximum_margin(model, images, starts=3, steps=60)
    assert (few.scores < many.scores).all()


@pytest.mark.parametrize("options", [dict(starts=0), dict(steps=0)])
def test_no_starts_or_steps_are_refused(options):
    with pytest.raises(ValueError, match="starts and steps must be at least 1"):
        maximum_margin(classifier(network()), pictures(), **options)
