"""Conformal p against loops, how often they are small where models are exchangeable, and what is said of them."""

import math

import numpy as np
import pytest
from scipy.integrate import quad

from d3_hf.assurance.calibration import (
    class_z,
    combined_p,
    conformal_p,
    least_p,
    own_classes_p,
    signal_p,
    twins_needed,
    verdict,
)


def slow_z(models, m, s, k):
    others = [models[other][s][k] for other in range(len(models)) if other != m]
    mean = sum(others) / len(others)
    return (models[m][s][k] - mean) / math.sqrt(sum((value - mean) ** 2 for value in others) / (len(others) - 1))


def slow_combined(suspect, twins):
    models = [suspect, *twins]
    signals, classes = range(len(suspect)), range(len(suspect[0]))
    farthest = [max(sum(slow_z(models, m, s, k) for s in signals) for k in classes) for m in range(len(models))]
    return sum(value >= farthest[0] for value in farthest) / len(models)


def test_p_of_one_signal():
    assert conformal_p(3.0, [1, 2, 3, 4]) == 3 / 5
    assert conformal_p(5.0, [1, 2, 3, 4]) == 1 / 5 and conformal_p(0.0, [1, 2]) == 1 and conformal_p(1.0, []) == 1


@pytest.mark.parametrize("shape", [(2, 1, 2), (4, 3, 5), (9, 2, 10), (19, 6, 3)])
def test_p_of_several_signals_against_loops(shape):
    random = np.random.default_rng(shape[0])
    for _ in range(20):
        suspect, twins = random.normal(1, 1, shape[1:]), random.normal(size=shape)
        assert combined_p(suspect, twins) == slow_combined(suspect, twins)
    assert signal_p(suspect[0], twins[:, 0]) == slow_combined(suspect[:1], twins[:, :1])
    models = [suspect, *twins]
    expected = [[[slow_z(models, m, s, k) for k in range(shape[2])] for s in range(shape[1])] for m in range(len(models))]
    np.testing.assert_allclose(class_z(suspect, twins), expected, rtol=1e-9)


def test_a_class_that_leads_in_all_networks_is_not_suspicious_and_another_is():
    random = np.random.default_rng(3)
    twins = random.normal(size=(19, 1, 10))
    twins[:, :, 4] += 50
    usual = random.normal(size=(1, 10))
    usual[:, 4] += 50
    planted = usual.copy()
    planted[:, 7] += 20
    assert combined_p(usual, twins) > 0.2 and combined_p(planted, twins) == 1 / 20
    assert class_z(planted, twins)[0, 0].argmax() == 7


def test_signals_that_agree_on_a_class_outweigh_one_that_is_far_out():
    twins = np.random.default_rng(4).normal(size=(30, 5, 8))
    scores = np.zeros((5, 8))
    scores[:, 2] = 2.0
    scores[1, 6] = 4.0
    assert class_z(scores, twins)[0].sum(0).argmax() == 2


@pytest.mark.parametrize("count", [1, 2])
def test_z_is_finite_beside_few_twins_and_twins_that_are_alike(count):
    suspect, twins = np.array([[0.0, 2.0, -1.0]]), np.zeros((count, 1, 3))
    found = class_z(suspect, twins)
    assert np.isfinite(found).all() and found[0, 0].argmax() == 1
    assert combined_p(np.zeros((2, 3)), np.zeros((count, 2, 3))) == 1


def slow_own(scores):
    highest, others = max(scores), sorted(scores)[:-1]
    n, k = len(others), len(scores) - 2
    mean = sum(others) / n
    spread = math.sqrt(sum((value - mean) ** 2 for value in others) / (n - 1))
    t = (highest - mean) / spread / math.sqrt(1 + 1 / n)
    density = math.gamma((k + 1) / 2) / math.sqrt(k * math.pi) / math.gamma(k / 2)
    return min(1.0, len(scores) * quad(lambda x: density * (1 + x * x / k) ** (-(k + 1) / 2), t, math.inf)[0])


def test_p_against_the_own_other_classes():
    random = np.random.default_rng(0)
    for count in (6, 10, 43):
        for lead in (0, 3, 8):
            scores = random.normal(size=count)
            scores[2] += lead
            assert own_classes_p(scores) == pytest.approx(slow_own(scores.tolist()), rel=1e-5)
    assert own_classes_p(np.arange(5.0)) is None and own_classes_p(np.zeros(2)) is None
    assert own_classes_p(np.full(8, -3.0)) == 1 and own_classes_p(np.eye(8)[3]) < 1e-6


def test_p_against_the_own_other_classes_is_small_as_often_as_it_says():
    random = np.random.default_rng(1)
    found = np.array([own_classes_p(random.normal(size=10)) for _ in range(4000)])
    for level in (0.05, 0.2):
        assert abs((found <= level).mean() - level) < 5 * math.sqrt(level / 4000)


MODELS = {
    "independent": lambda random, shape: random.normal(size=shape),
    "dependent": lambda random, shape: random.normal(size=(shape[0], 1, 1)) + 0.3 * random.normal(size=shape),
    "heavy tails": lambda random, shape: random.standard_cauchy(shape) * 10.0 ** np.arange(shape[2]),
    "ties": lambda random, shape: random.integers(0, 3, shape) / 10,  # whose sums depend on their order in the last bit
    "all alike": lambda random, shape: np.full(shape, 0.1),
}


@pytest.mark.parametrize("kind", MODELS)
def test_p_is_not_small_too_often_where_models_are_exchangeable(kind):
    random, draws, count = np.random.default_rng(0), 800, 10
    drawn = [MODELS[kind](random, (count, 3, 4)) for _ in range(draws)]
    found = np.array([[combined_p(m[0], m[1:]), signal_p(m[0, 0], m[1:, 0])] for m in drawn])
    for level in np.arange(1, count) / count:
        assert (np.mean(found <= level, 0) <= level + 4 * np.sqrt(level * (1 - level) / draws)).all()


@pytest.mark.parametrize("kind", MODELS)
def test_of_models_that_each_are_the_suspect_once_no_more_are_that_small(kind):
    random, count = np.random.default_rng(1), 8
    for _ in range(30):
        models = MODELS[kind](random, (count, 4, 5))
        found = [combined_p(models[m], np.delete(models, m, 0)) for m in range(count)]
        assert all(sum(p <= k / count for p in found) <= k for k in range(1, count + 1))


def test_the_order_of_the_twins_changes_nothing():
    random = np.random.default_rng(5)
    for _ in range(50):
        suspect, twins = random.integers(0, 3, (3, 4)) / 10, random.integers(0, 3, (9, 3, 4)) / 10
        order = random.permutation(9)
        assert combined_p(suspect, twins) == combined_p(suspect, twins[order])
        assert (class_z(suspect, twins)[1:][order] == class_z(suspect, twins[order])[1:]).all()


def test_one_signal_of_many_suffices_where_the_suspect_is_highest_by_far():
    random = np.random.default_rng(2)
    twins, suspect = random.normal(size=(19, 6, 10)), np.zeros((6, 10))
    suspect[3, 5] = 20.0
    assert combined_p(suspect, twins) == 1 / 20
    assert combined_p(np.zeros((6, 10)), twins) > 0.2


@pytest.mark.parametrize(("alarm_at", "count"), [(0.05, 19), (0.01, 99), (0.1, 9), (0.3, 3), (0.5, 1), (0.9, 1)])
def test_how_many_twins_are_needed(alarm_at, count):
    assert twins_needed(alarm_at) == count and least_p(count) <= alarm_at
    assert count == 1 or least_p(count - 1) > alarm_at


@pytest.mark.parametrize(
    ("p", "twins", "alarm", "words"),
    [
        (None, 0, False, "no p and no alarm without twins: nothing can be concluded"),
        (0.1, 9, False, "no alarm possible at this power: 9 twins give p >= 0.1; 19 are needed for 0.05"),
        (0.5, 1, False, "no alarm possible at this power: 1 twin gives p >= 0.5; 19 are needed for 0.05"),
        (None, 19, False, "no alarm possible: no signal could be read"),
        (0.05, 19, True, "alarm at p = 0.05 (19 twins)"),
        (0.1, 19, False, "no alarm at this power: p = 0.1 (19 twins)"),
    ],
)
def test_what_is_said(p, twins, alarm, words):
    found = verdict(p, twins)
    assert found.alarm == alarm and found.words.startswith(words)


@pytest.mark.parametrize("alarm_at", [0.0, 1.0, -1, 5])
def test_a_level_is_a_share(alarm_at):
    with pytest.raises(ValueError, match=r"alarm_at must be in \(0, 1\), as 0.05; got"):
        verdict(0.5, 19, alarm_at)
