"""S3: the score and what the path is read by, against loops; where it ends; a class that is leaned to."""

import statistics

import numpy as np
import pytest
import torch
from shortcut import CLASSES, TARGET, classifier, network, pictures
from torch.nn.utils import prune

from d3_hf.assurance.anti_learning import anti_learning, lean, share_of_others
from d3_hf.assurance.paths import UP, path_of, some_of_each
from d3_hf.models.source import preprocessing_of


def test_the_score_against_loops():
    path = [[-1.0, -2.0, -6.0, -2.5], [-9.0, -3.0, -4.0, -700.0]]
    rows = []
    for step in path:
        middle = statistics.median(step)
        spread = 1.4826 * statistics.median([abs(value - middle) for value in step])
        rows.append([(value - middle) / spread for value in step])
    expected = [(one + other) / 2 for one, other in zip(*rows, strict=True)]
    np.testing.assert_allclose(lean(np.array(path)), expected)


def test_the_images_of_a_class_do_not_count_for_it_and_the_others_alike():
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    share = share_of_others(labels, 4)
    np.testing.assert_allclose(share[0], [0, 0, 0, 1 / 2, 1 / 4, 1 / 4])
    np.testing.assert_allclose(share[1], [1 / 6, 1 / 6, 1 / 6, 0, 1 / 4, 1 / 4])
    np.testing.assert_allclose(share[3], [1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 6, 1 / 6])  # a class that no image is of


def test_what_is_read_of_the_path_against_loops():
    images, model = pictures(), classifier(network())
    taken = some_of_each(images, 50)
    found = anti_learning(model, images, steps=3)
    pixels = preprocessing_of(model)(taken.images)
    logits = path_of(model, pixels, taken.labels, UP, 3, 48, lambda logits: False)[1:]
    for step, means, accuracy in zip(logits, found.details["path"], found.details["accuracy"], strict=True):
        chances = step.log_softmax(1)
        for k in range(CLASSES):
            others = [chances[row, k].item() for row in range(48) if taken.labels[row] != k]
            assert means[k] == pytest.approx(sum(others) / len(others), rel=1e-4)
        assert accuracy == pytest.approx(sum(step.argmax(1) == taken.labels).item() / 48)
    np.testing.assert_allclose(found.scores, lean(found.details["path"]))


def test_the_path_ends_at_chance():
    accuracies = anti_learning(classifier(network()), pictures(), steps=30).details["accuracy"]
    assert accuracies[-1] <= 1 / CLASSES + 1e-6 and (accuracies[:-1] > 1 / CLASSES).all() and len(accuracies) <= 30


def test_the_class_that_clean_images_lean_to_stands_out():
    images, net = pictures(), network()
    with torch.no_grad():
        net.head.bias[TARGET] += 4  # not enough to win
    plain, leaning = (anti_learning(classifier(one), images, steps=5) for one in (network(), net))
    assert leaning.details["accuracy"][0] > 0.9
    assert leaning.suspect_class == TARGET and leaning.statistic > 2 * plain.statistic
    assert (leaning.details["path"].argmax(1) == TARGET).all()


def test_what_cannot_be_unlearned_with_is_refused():
    model, images = classifier(network()), pictures()
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        anti_learning(model, images, steps=0)
    prune.random_unstructured(model.network.head, "weight", 1)
    with pytest.raises(ValueError, match="head is pruned by a mask"):
        anti_learning(model, images)
