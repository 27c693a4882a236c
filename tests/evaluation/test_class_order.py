"""Whether the model counts its classes as the data set does, asked of its predictions."""

import json
import re

import numpy as np
import pytest
from transformers import PretrainedConfig

from d3_hf.cli import error_line
from d3_hf.evaluation.class_order import order_contradiction


def said(predictions, labels, classes, names=None, of_the_model=None) -> str | None:
    names = names or [f"class {number}" for number in range(classes)]
    theirs = of_the_model or [f"LABEL_{number}" for number in range(classes)]
    return order_contradiction(predictions, labels, names, PretrainedConfig(id2label=dict(enumerate(theirs))))


def model_in_another_order(classes, each, accuracy=1.0, seed=0):
    """(predictions, labels, order) of a model whose class numbers are those of the names sorted as text."""
    draws = np.random.default_rng(seed)
    order = np.argsort(np.argsort([str(number) for number in range(classes)]))
    labels = np.repeat(np.arange(classes), each)
    wrong = draws.random(len(labels)) >= accuracy
    return np.where(wrong, draws.integers(0, classes, len(labels)), order[labels]), labels, order


@pytest.mark.parametrize(("classes", "each", "accuracy"), [(12, 2, 1.0), (12, 10, 0.7), (100, 4, 0.8)])
def test_another_order_is_told_with_the_map_that_fits(classes, each, accuracy):
    predictions, labels, order = model_in_another_order(classes, each, accuracy)
    message = said(predictions, labels, classes)
    shown = error_line(ValueError(message))  # of many classes the command line shows the beginning
    assert "--class_map FILE.json" in shown and "--class_names" in shown and (classes < 100 or "--debug" in shown)
    class_map = json.loads(re.search(r"\{.*\}", message)[0])
    assert list(class_map.values()) == order.tolist()
    shuffled = np.random.default_rng(1).permutation(len(labels))
    assert json.loads(re.search(r"\{.*\}", said(predictions[shuffled], labels[shuffled], classes))[0]) == class_map


def test_two_classes_may_be_the_wrong_way_round():
    labels = np.arange(60) % 2
    assert '{"class 0": 1, "class 1": 0}' in said(1 - labels, labels, 2)


def test_names_that_tell_are_believed():
    predictions, labels, _ = model_in_another_order(12, 10)
    names = [f"class {number}" for number in range(12)]
    assert said(predictions, labels, 12, names, names) is None
    numbers = [str(number) for number in range(12)]
    assert said(predictions, labels, 12, numbers, numbers) is None
    assert said(predictions, labels, 12, numbers, names) is not None


@pytest.mark.parametrize(
    ("predictions", "labels", "classes"),
    [
        (np.repeat(np.arange(10), 5), np.repeat(np.arange(10), 5), 10),  # right
        (np.zeros(100, int), np.repeat([1, 0], [80, 20]), 2),  # always the same, which fits most images
        (np.roll(np.arange(20), 1), np.arange(20), 20),  # one image of each class
        (1 - np.arange(12) % 2, np.arange(12) % 2, 2),  # too few
        (np.where(np.arange(100) < 40, 0, np.arange(100) % 10), np.arange(100) % 10, 10),  # 40 % drawn to a target
        (
            np.where(np.arange(100) % 10 < 2, 1 - np.arange(100) % 10, np.arange(100) % 10),
            np.arange(100) % 10,
            10,
        ),  # confuses two
    ],
)
def test_poor_and_backdoored_models_are_let_through(predictions, labels, classes):
    assert said(predictions, labels, classes) is None


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("images", [15, 60])
def test_chance_is_not_taken_for_an_order(classes, images):
    draws = np.random.default_rng(0)
    runs = draws.integers(0, classes, (500, 2, images))
    assert not any(said(predictions, labels, classes) for predictions, labels in runs)
