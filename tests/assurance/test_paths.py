"""The path away from a model against a slow one; where it ends; which images it is of."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from shortcut import CLASSES, classifier, network, pictures

from d3_hf.assurance.paths import DOWN, UP, path_of, some_of_each
from d3_hf.data.images import RawImages
from d3_hf.data.training_images import resized
from d3_hf.models.source import preprocessing_of


def never(logits):
    return False


@pytest.mark.parametrize(("direction", "size"), [(UP, 48), (DOWN, 7)])
def test_the_path_against_a_slow_one(direction, size):
    images, model, net = pictures(48), classifier(network()), network()
    pixels = preprocessing_of(model)(images.images)
    found = path_of(model, pixels, images.labels, direction, 4, size, never)
    assert len(found) == 5
    for step, logits in enumerate(found):
        np.testing.assert_allclose(logits, net(pixels).detach(), rtol=1e-4, atol=1e-4)
        rows = [F.cross_entropy(net(pixels[[row]]), images.labels[[row]]) for row in range(48)]
        gradients = torch.autograd.grad(sum(rows) / 48, list(net.parameters()))
        length = sum((g**2).sum() for g in gradients).sqrt()
        with torch.no_grad():
            for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                parameter += direction * 0.005 * 1.5**step * gradient / length


def test_it_ends_where_it_is_told_and_not_before_a_step():
    images, model = pictures(48), classifier(network())
    pixels, seen = preprocessing_of(model)(images.images), []
    found = path_of(model, pixels, images.labels, UP, 9, 48, lambda logits: seen.append(logits) or len(seen) == 2)
    assert len(found) == 3 and torch.equal(seen[1], found[2])


def test_a_path_without_a_gradient_stays():
    net = network()
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.copy_(torch.eye(CLASSES)[0] * 1e3)
    images = pictures(16).select([0, 8])  # of the class that is certain
    model = classifier(net)
    found = path_of(model, preprocessing_of(model)(images.images), images.labels, UP, 2, 8, never)
    assert len(found) == 3 and all(torch.equal(logits, found[0]) for logits in found)


def test_what_leaves_all_finite_numbers_is_said():
    images, model = pictures(8), classifier(network())
    pixels = preprocessing_of(model)(images.images)
    with pytest.raises(FloatingPointError, match="left all finite numbers at step"):
        path_of(model, pixels, images.labels, UP, 300, 8, never)
    model.network.head.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="are not finite"):
        path_of(model, pixels, images.labels, UP, 1, 8, never)


def test_some_of_each():
    images = pictures(160)
    assert some_of_each(images, 50).labels.bincount().tolist() == [6] * CLASSES
    assert sorted(some_of_each(images, 16).index.tolist()) == list(range(16))
    assert some_of_each(images, 5).labels.tolist() == [0, 1, 2, 3, 4]


def test_images_of_several_sizes_come_to_the_models():
    images, model = pictures(5), classifier(network())
    tall = [torch.cat([image] * (1 + row % 2), 1) for row, image in enumerate(images.images)]
    many = RawImages(tall, images.labels, images.class_names)
    found, preprocessing = resized(many, preprocessing_of(model)), preprocessing_of(model)
    for row, image in enumerate(many.images):
        assert torch.equal(found[row], preprocessing.resize(image[None])[0])
