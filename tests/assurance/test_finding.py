"""The statistic that all signals share, against loops; where classes cannot be compared."""

import statistics

import numpy as np
import pytest

from d3_hf.assurance.finding import Finding, outlier_scores


@pytest.mark.parametrize("count", [3, 8, 9])
def test_the_statistic_against_loops(count):
    scores = np.random.default_rng(count).normal(size=count)
    middle = statistics.median(scores)
    spread = 1.4826 * statistics.median([abs(score - middle) for score in scores])
    expected = [(score - middle) / spread for score in scores]
    np.testing.assert_allclose(outlier_scores(scores), expected)
    names = [str(k) for k in range(count)]
    found = Finding.of("test", scores, names, more=scores)
    assert found.statistic == pytest.approx(max(expected)) and found.suspect_class == expected.index(max(expected))
    assert (found.signal, found.class_names, list(found.details)) == ("test", names, ["more"])


def test_unit_and_origin_do_not_matter():
    scores = np.random.default_rng(0).normal(size=10)
    np.testing.assert_allclose(outlier_scores(5 * scores - 3), outlier_scores(scores))


@pytest.mark.parametrize("scores", [np.zeros(5), np.full(5, -7.3), np.full(4, 0.1) + [0, 0, 0, 1e-16]])
def test_equal_scores_give_none(scores):
    assert abs(outlier_scores(scores)).max() < 1e-8


def test_what_is_small_beside_the_unit_is_none():
    rounding = 1e-7 * np.random.default_rng(0).normal(size=8)
    assert outlier_scores(rounding).max() > 1 and abs(outlier_scores(rounding, 10.0)).max() < 1e-3


def test_one_that_differs_from_equal_ones_is_finite():
    found = Finding.of("test", np.array([1.0, 1.0, 2.0, 1.0]), list("abcd"))
    assert found.suspect_class == 2 and 100 < found.statistic < np.inf


def test_of_two_classes_one_leads():
    assert outlier_scores(np.array([3.0, 7.5])).tolist() == [-4.5, 4.5]
    found = Finding.of("test", np.array([3.0, 7.5]), list("ab"))
    assert (found.statistic, found.suspect_class) == (4.5, 1)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="no class can stand out where there are 1, fewer than 2"):
        outlier_scores(np.zeros(1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="scores must be finite"):
        outlier_scores(np.array([1.0, 2.0, bad]))
