"""Feature inversion: the fewest replaced features against linear programmes, their range, a planted shortcut."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from shortcut import CLASSES, TARGET, UNITS, classifier, network, pictures

from d3_hf.assurance.feature_inversion import feature_inversion, invert_features
from d3_hf.assurance.inversion import Schedule, split_rows
from d3_hf.models.features import HeadReading


def reading(count=60, size=12, classes=4):
    """Gaussian classes around the rows of the head; the last feature is moved by no image."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(classes, size, generator=generator)
    features = weight[torch.arange(count) % classes] + 0.5 * torch.randn(count, size, generator=generator)
    features[:, -1] = 0.5
    bias = 0.1 * torch.randn(classes, generator=generator)
    return HeadReading(features, features @ weight.T + bias, weight, bias)


def fewest_features(read, rows, target):
    """The least sum of m with some q = m p, low m <= q <= high m, such that all rows are of the class: both are linear."""
    z, weight, bias = read.features.double().numpy(), read.weight.double().numpy(), read.bias.double().numpy()
    low, high, size = np.diag(z.min(0)), np.diag(z.max(0)), z.shape[1]
    left, right = [], []
    for j in range(len(weight)):
        for i in rows if j != target else ():
            difference = weight[target] - weight[j]
            left.append(np.concatenate([difference * z[i], -difference]))
            right.append(difference @ z[i] + bias[target] - bias[j])
    ranges = np.vstack([np.hstack([low, -np.eye(size)]), np.hstack([-high, np.eye(size)])])
    limits = np.concatenate([right, np.zeros(2 * size)])
    cost = np.concatenate([np.ones(size), np.zeros(size)])
    return linprog(cost, np.vstack([left, ranges]), limits, bounds=[(0, 1)] * size + [(None, None)] * size).fun


def test_the_fewest_features_are_near_those_of_a_linear_programme():
    read = reading()
    triggers, reached = invert_features(read, Schedule(epochs=150, cost_patience=2))
    assert reached.all() and triggers.shape == (4, 2, 12)
    _, validate = split_rows(60, 0)
    for k, norm in enumerate(triggers[:, 0].sum(1)):
        assert fewest_features(read, validate, k) - 1e-3 <= norm <= 1.5 * fewest_features(read, range(60), k)


def test_what_no_image_reaches_is_not_reached():
    read = reading()
    read.weight[3] = read.weight[:3].mean(0)  # never above all three
    read.bias[3] = read.bias[:3].mean() - 1
    _, reached = invert_features(read, Schedule(epochs=20))
    assert reached.tolist() == [True, True, True, False]


def test_the_class_of_a_shortcut_stands_out():
    images = pictures(80)
    plain, planted = (feature_inversion(classifier(network(shortcut)), images) for shortcut in (0, 30))
    assert planted.suspect_class == TARGET and planted.statistic > 2 * plain.statistic
    mask = planted.details["mask"]
    assert mask.shape == (UNITS,) and mask[-2:].sum() > 0.8 * mask.sum()
    assert planted.details["norms"][TARGET] == pytest.approx(mask.sum()) == -planted.scores[TARGET]
    assert planted.details["reached"].shape == (CLASSES,)
