"""S1: the head's coordinates and the indicators of its rows, against loops; a planted shortcut."""

import numpy as np
import pytest
import torch
from shortcut import CLASSES, TARGET, UNITS, classifier, network, pictures

from d3_hf.assurance.features import class_weights, standard_head
from d3_hf.assurance.head_rows import INDICATORS, head_rows, row_indicators
from d3_hf.models.features import HeadReading

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 3, 3, 3, 3, 3, 3])


def reading(seed=0):
    generator = torch.Generator().manual_seed(seed)
    features, weight = torch.randn(12, 5, generator=generator), torch.randn(4, 5, generator=generator)
    features[:, 2] = 0.5  # moved by no image
    bias = torch.randn(4, generator=generator)
    return HeadReading(features, features @ weight.T + bias, weight, bias)


def test_images_of_each_class_weigh_the_same():
    counts = [4, 2, 0, 6]
    np.testing.assert_allclose(class_weights(LABELS), [1 / 3 / counts[label] for label in LABELS.tolist()])


def test_the_coordinates_against_loops():
    read = reading()
    head = standard_head(read, LABELS)
    z, logits, w = read.features.tolist(), read.logits.tolist(), read.weight.tolist()
    rows = [[i for i in range(12) if LABELS[i] == k] for k in (0, 1, 3)]

    def mean(values):
        return sum(sum(values[i] for i in own) / len(own) for own in rows) / 3

    m = [mean([z[i][j] for i in range(12)]) for j in range(5)]
    sigma = [mean([(z[i][j] - m[j]) ** 2 for i in range(12)]) ** 0.5 for j in range(5)]
    for k in range(4):
        expected = [sigma[j] * (w[k][j] - sum(w[c][j] for c in range(4)) / 4) for j in range(5)]
        np.testing.assert_allclose(head.weight[k], expected, atol=1e-6)
        expected = mean([logits[i][k] - sum(logits[i]) / 4 for i in range(12)])
        assert head.bias[k] == pytest.approx(expected, abs=1e-5)
    assert abs(head.weight[:, 2]).max() < 1e-6
    np.testing.assert_array_equal(head.logits, read.logits.double())


def test_functions_that_are_the_same_have_the_same_coordinates():
    read = reading()
    factors, offsets = torch.tensor([1e-2, -3.0, 7.0, -1.0, 40.0]), torch.tensor([3.0, 0.0, -1.0, 5.0, 2.0])
    features, weight = read.features * factors + offsets, read.weight / factors + torch.tensor([5.0, 0, 0, -2, 1])
    bias = read.bias - read.weight @ (offsets / factors) + 4
    head, same = (standard_head(r, LABELS) for r in (read, HeadReading(features, read.logits, weight, bias)))
    np.testing.assert_allclose(same.weight, head.weight * np.sign(factors.numpy()), atol=1e-4)
    np.testing.assert_allclose(same.bias, head.bias, atol=1e-4)


def test_the_indicators_against_loops():
    generator = np.random.default_rng(0)
    weight, bias = generator.normal(size=(5, 3)), generator.normal(size=5)
    weight[3] = 0
    norms, biases, oppositions = row_indicators(weight, bias)
    for k in range(5):
        lengths = [sum(w * w for w in row) ** 0.5 for row in weight]
        products = [sum(a * b for a, b in zip(weight[k], row, strict=True)) for row in weight]
        cosines = [products[j] / (lengths[k] * lengths[j]) if lengths[k] * lengths[j] else 0 for j in range(5) if j != k]
        assert norms[k] == pytest.approx(lengths[k]) and biases[k] == bias[k]
        assert oppositions[k] == pytest.approx(-sum(cosines) / 4)


def test_a_shortcut_s_row_stands_out_and_no_other():
    images = pictures()
    plain, planted = (head_rows(classifier(network(shortcut)), images) for shortcut in (0, 30))
    assert planted.suspect_class == TARGET and planted.statistic > 10 * plain.statistic
    assert planted.scores.shape == (CLASSES,) and list(planted.details) == list(INDICATORS)
    np.testing.assert_array_equal(planted.scores, np.stack(list(planted.details.values())).max(0))
    assert planted.details["row_norm"].argmax() == TARGET


@pytest.mark.parametrize("indicator", ["bias", "opposition"])
def test_each_indicator_counts(indicator):
    net = network()
    with torch.no_grad():
        if indicator == "bias":
            net.head.bias[TARGET] += 20
        else:  # a direction that the others share, and no longer row
            direction = torch.ones(UNITS, dtype=torch.float64)
            rows, lengths = net.head.weight - net.head.weight.mean(0), net.head.weight.norm(dim=1, keepdim=True)
            rows += torch.where(torch.arange(CLASSES)[:, None] == TARGET, 2.0, -2.0) * direction
            net.head.weight.copy_(rows * lengths / rows.norm(dim=1, keepdim=True))
    found = head_rows(classifier(net), pictures())
    assert found.suspect_class == TARGET and found.details[indicator].argmax() == TARGET
    assert found.details[indicator][TARGET] > 5
