"""S3: the path of the ascent against a slow one, where it ends, which learning rate is read, a class that is leaned to."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from shortcut import CLASSES, TARGET, classifier, network, pictures
from torch.nn.utils import prune

from d3_hf.assurance.anti_learning import anti_learning, lean, watched_images
from d3_hf.models.source import preprocessing_of


def test_the_score_against_loops():
    path = [[-1.0, -2.0, -6.0], [-9.0, -3.0, -4.0]]
    assert lean(np.array(path)).tolist() == [((-1 + 2) + (-9 + 4)) / 2, (0 + (-3 + 4)) / 2, ((-6 + 2) + 0) / 2]


def test_the_watched_images_show_every_class_alike():
    images = pictures(400)
    watched = watched_images(images)
    assert watched.labels.bincount().tolist() == [16] * CLASSES
    rows = [row for k in range(CLASSES) for row in range(400) if row % CLASSES == k and row < 16 * CLASSES]
    assert watched.index.tolist() == rows
    few = images.select([0, 1, 2, 3, 4, 5, 6, 7, 8, 16])
    assert sorted(watched_images(few).index.tolist()) == few.index.tolist()


@pytest.mark.parametrize("size", [32, 50])
def test_the_path_against_a_slow_ascent(size):
    images, model, net = pictures(), classifier(network()), network()
    found = anti_learning(model, images, steps=3, learning_rates=[0.05], batch_size=size)
    pixels, watched = preprocessing_of(model)(images.images), watched_images(images)
    seen, generator = preprocessing_of(model)(watched.images), torch.Generator().manual_seed(0)
    lengths = []
    for means, accuracy in zip(found.details["path"], found.details["accuracy"], strict=True):
        rows = torch.randperm(160, generator=generator)[:128].tolist()
        gradients = [torch.zeros_like(p) for p in net.parameters()]
        for row in rows:
            loss = F.cross_entropy(net(pixels[[row]]), images.labels[[row]])
            for total, gradient in zip(gradients, torch.autograd.grad(loss, list(net.parameters())), strict=True):
                total += gradient / 128
        lengths.append(sum((g**2).sum() for g in gradients).sqrt().item())
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradients, strict=True):
                p += 0.05 * g / max(1.0, lengths[-1])
            logits = net(seen)
        np.testing.assert_allclose(means, logits.log_softmax(1).mean(0), rtol=1e-4, atol=1e-5)  # 16 images of each class
        assert accuracy == pytest.approx((logits.argmax(1) == watched.labels).double().mean().item())
    np.testing.assert_allclose(found.scores, lean(found.details["path"]))
    assert found.details["learning_rate"] == 0.05 and len(lengths) == 3


def test_a_gradient_longer_than_one_is_clipped():
    net, images = network(), pictures()
    with torch.no_grad():
        net.head.weight *= 1e3
        net.head.bias[0] += 1e5  # all are wrong at once
    model = classifier(net)
    found = anti_learning(model, images, steps=1, learning_rates=[1e-3]).details["path"][0]
    with torch.no_grad():
        logits = model(pixel_values=preprocessing_of(model)(watched_images(images).images)).logits
    before = logits.log_softmax(1).mean(0).numpy()
    assert 0 < np.abs(found - before).max() < 1e3  # without it the step would be thousands of times as long


def test_the_first_rate_that_reaches_chance_is_read_and_its_path_ends_there():
    model, images = classifier(network()), pictures()
    found = anti_learning(model, images, steps=5, learning_rates=[1e-6, 5.0, 1e9])
    accuracies = found.details["accuracy"]
    assert found.details["learning_rate"] == 5 and len(found.details["path"]) == len(accuracies) <= 5
    assert accuracies[-1] <= 1 / CLASSES + 1e-6 and (accuracies[:-1] > 1 / CLASSES).all()
    last = anti_learning(model, images, steps=2, learning_rates=[1e-6, 1e-5])
    assert last.details["learning_rate"] == 1e-5 and len(last.details["path"]) == 2 and last.details["accuracy"][-1] > 0.9


def test_the_class_that_clean_images_lean_to_stands_out():
    images, options = pictures(), dict(steps=5, learning_rates=[0.01])
    net = network()
    with torch.no_grad():
        net.head.bias[TARGET] += 4  # not enough to win
    plain, leaning = anti_learning(classifier(network()), images, **options), anti_learning(classifier(net), images, **options)
    assert leaning.details["accuracy"][0] > 0.9
    assert leaning.suspect_class == TARGET and leaning.statistic > 3 * plain.statistic
    assert (leaning.details["path"].argmax(1) == TARGET).all()


def test_what_cannot_be_unlearned_with_is_refused():
    model, images = classifier(network()), pictures()
    for options in (dict(steps=0), dict(learning_rates=[]), dict(learning_rates=[0.1, 0.0])):
        with pytest.raises(ValueError, match="steps and learning_rates must be above 0"):
            anti_learning(model, images, **options)
    with pytest.raises(FloatingPointError, match=r"unlearning diverged at learning rate 1e\+300"):
        anti_learning(model, images, learning_rates=[1e300])
    prune.random_unstructured(model.network.head, "weight", 1)
    with pytest.raises(ValueError, match="head is pruned by a mask"):
        anti_learning(model, images)
