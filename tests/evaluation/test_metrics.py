"""ACC, ASR, RA, PACC and drift against their definitions, on lists of predictions."""

import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from d3_hf.evaluation.metrics import (
    Proportion,
    accuracy,
    attack_success_rate,
    compute_metrics,
    poisoned_accuracy,
    robust_accuracy,
    trigger_drift,
)


@pytest.mark.parametrize(("successes", "n"), [(0, 9), (9, 9), (3, 7), (8570, 10_000), (1, 1)])
def test_wilson_interval_is_the_closed_formula(successes, n):
    z, share = 1.959963984540054, successes / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    proportion = Proportion(successes, n)
    assert proportion.value == share
    low, high = proportion.interval
    assert (type(low), type(high)) == (float, float)
    assert (low, high) == pytest.approx((max(0, center - half), min(1, center + half)), abs=1e-12)
    assert proportion.as_dict("asr") == {"asr": share, "asr_ci95": [low, high], "asr_n": n}


def test_pure_functions_count_what_they_say():
    labels = np.array([0, 0, 1, 1, 2, 2, 2])
    predictions = np.array([0, 1, 0, 1, 0, 0, 1])
    assert accuracy(predictions, labels) == Proportion(2, 7)
    assert attack_success_rate(predictions, labels, 0) == Proportion(3, 5)
    assert robust_accuracy(predictions, labels, 0) == Proportion(1, 5)
    assert robust_accuracy(labels, labels, 2) == Proportion(4, 4)
    assert poisoned_accuracy(predictions, labels) == Proportion(2, 7)
    assert trigger_drift(predictions, labels, 0) == Proportion(1, 5)  # one 2 is called 1; one 1 is called 1 rightly
    assert trigger_drift(predictions, labels, 2) == Proportion(1, 4) and trigger_drift(labels, labels, 2) == Proportion(0, 4)
    wanted = (labels + 1) % 3  # all-to-all: every image counts
    assert attack_success_rate(predictions, labels, wanted) == Proportion(3, 7)
    assert robust_accuracy(predictions, labels, wanted) == Proportion(2, 7)
    assert attack_success_rate(predictions, labels, np.full(7, 0)) == attack_success_rate(predictions, labels, 0)
    assert accuracy(predictions.tolist(), torch.from_numpy(labels)) == Proportion(2, 7)


@pytest.mark.parametrize("target", range(5))
def test_drift_against_a_slow_count(target):
    labels, predictions = np.random.default_rng(target).integers(0, 5, (2, 200))
    counted = [(p, y) for p, y in zip(predictions.tolist(), labels.tolist(), strict=True) if y != target]
    drift = max(sum(p == k and y != k for p, y in counted) for k in range(5) if k != target)
    assert trigger_drift(predictions, labels, target) == Proportion(drift, len(counted)) and drift > 10


def test_compute_metrics():
    logits = np.array([[1.0, 2.0], [3.0, 1.0], [0.0, 1.0]])
    assert compute_metrics(EvalPrediction(logits, np.array([1, 0, 0]))) == {"accuracy": 2 / 3}


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Proportion(0, 0), "needs n >= 1 cases and 0 to n successes; got 0 of 0"),
        (lambda: Proportion(3, 2), "got 3 of 2"),
        (lambda: Proportion(-1, 2), "got -1 of 2"),
        (lambda: accuracy([], []), "got 0 of 0"),
        (lambda: accuracy([1, 2], [1]), r"two equally long lists of class indices; got shapes \(2,\) and \(1,\)"),
        (lambda: accuracy(np.zeros((2, 2)), np.zeros((2, 2))), "lists of class indices"),
        (lambda: attack_success_rate([0, 1], [2, 2], 2), "every image's true label is what the attacker wants"),
        (lambda: robust_accuracy([0, 1], [2, 2], 2), "every image's true label is what the attacker wants"),
        (lambda: trigger_drift([0, 1], [2, 2], 2), "every image's true label is what the attacker wants"),
        (lambda: poisoned_accuracy([0], [2, 2]), "equally long"),
        (lambda: robust_accuracy([0, 1], [2, 2], [0]), r"one class, or one for each of 2 images; got shape \(1,\)"),
        (lambda: attack_success_rate([0], [2, 2], 0), "equally long"),
        (lambda: compute_metrics(EvalPrediction(np.array([[0.0, np.nan]]), np.array([1]))), "logits are not finite"),
    ],
)
def test_errors(act, message):
    with pytest.raises(ValueError, match=message):
        act()
