"""S2: the least distance programme, the shortest shift against a search of all, a planted shortcut."""

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize
from shortcut import CLASSES, TARGET, classifier, network, pictures

from d3_hf.assurance.latent_shift import latent_shift, least_norm, shift_norms, smallest_shift


@pytest.mark.parametrize(("rows", "size"), [(3, 2), (3, 6), (7, 3)])
def test_the_shortest_solution_of_inequalities(rows, size):
    generator = np.random.default_rng(rows)
    matrix = generator.normal(size=(rows, size)) + 1  # all can be satisfied along (1, 1, ...)
    matrix[matrix.sum(1) <= 0] *= -1
    bounds = 5 * generator.normal(size=rows)
    bounds[0] = 4
    found, multipliers = least_norm(matrix, bounds)
    assert (multipliers[matrix @ found > bounds + 1e-6] == 0).all() and multipliers.max() > 0
    assert (matrix @ found >= bounds - 1e-8).all()
    options = dict(jac=lambda s: 2 * s, constraints={"type": "ineq", "fun": lambda s: matrix @ s - bounds}, method="SLSQP")
    slow = minimize(lambda s: s @ s, 50 * np.ones(size), options={"maxiter": 1000, "ftol": 1e-12}, **options)
    assert slow.success and np.linalg.norm(found) == pytest.approx(np.linalg.norm(slow.x), rel=1e-4)


def test_scales_do_not_matter_to_it():
    matrix, bounds = np.array([[3.0, 1.0], [-1.0, 2.0]]), np.array([2.0, 1.0])
    for small in (1e-9, 1e9):
        np.testing.assert_allclose(least_norm(small * matrix, bounds)[0] * small, least_norm(matrix, bounds)[0])
        np.testing.assert_allclose(least_norm(matrix, small * bounds)[0] / small, least_norm(matrix, bounds)[0])


def test_what_holds_already_or_never():
    matrix = np.array([[1.0, 0.0], [-1.0, 0.0]])
    assert [found.tolist() for found in least_norm(matrix, np.array([-1.0, 0.0]))] == [[0, 0], [0, 0]]
    shift, multipliers = least_norm(matrix, np.array([1.0, 1.0]))
    assert shift is None and (multipliers > 0).all()
    shift, multipliers = least_norm(np.zeros((2, 2)), np.array([1.0, -1.0]))
    assert shift is None and multipliers[0] > 0 == multipliers[1]


def toy(classes, size, count, seed):
    """Rows, logits and labels of Gaussian classes around the rows."""
    generator = np.random.default_rng(seed)
    weight, labels = generator.normal(size=(classes, size)), np.arange(count) % classes
    features = weight[labels] + generator.normal(size=(count, size))
    return weight, features @ weight.T + 0.3 * generator.normal(size=classes), labels


@pytest.mark.parametrize(("classes", "size", "points"), [(3, 2, 61), (4, 3, 25)])
@pytest.mark.parametrize("seed", [0, 1])
def test_against_a_search_of_all_shifts(classes, size, points, seed):
    weight, logits, labels = toy(classes, size, 60, seed)
    norms = shift_norms(weight, logits, labels)
    reached = 0
    for k in range(classes):
        others = [j for j in range(classes) if j != k]
        margins = (logits[:, [k]] - logits[:, others])[labels != k]
        differences = weight[k] - weight[others]
        shift = smallest_shift(margins, differences)
        if shift is None:
            assert norms[k] == np.inf
            continue
        reached += 1
        length = np.linalg.norm(shift)
        moved = [all(margin + d @ shift >= -1e-6 for margin, d in zip(row, differences, strict=True)) for row in margins]
        assert sum(moved) >= 0.95 * len(margins) and norms[k] == pytest.approx(length)
        axis = np.linspace(-length, length, points)
        every = np.array(list(itertools.product(axis, repeat=size)))
        enough = (margins + (every @ differences.T)[:, None] >= 0).all(2).mean(1) >= 0.95
        shortest = np.linalg.norm(every[enough], axis=1).min(initial=np.inf)
        assert length <= 1.25 * shortest, (k, length, shortest)
    assert reached >= 2


def test_95_of_100_of_many_images_are_moved_and_little_changes_with_rounding():
    weight, logits, labels = toy(6, 20, 600, 0)
    for k in range(6):
        margins = np.delete(logits[:, [k]] - logits, k, axis=1)[labels != k]
        differences = weight[k] - np.delete(weight, k, axis=0)
        shift, (every, _) = smallest_shift(margins, differences), least_norm(differences, -margins.min(0))
        assert (margins + differences @ shift >= -1e-6).all(1).mean() >= 0.95
        assert (margins + differences @ (0.9 * shift) >= 0).all(1).mean() < 0.95
        assert np.linalg.norm(shift) < np.linalg.norm(every)
        rounded = smallest_shift(margins.astype(np.float32).astype(np.float64), differences)
        np.testing.assert_allclose(rounded, shift, rtol=1e-4, atol=1e-4)


def test_images_that_are_of_the_class_already_need_no_shift_though_no_shift_moves_all():
    margins = np.ones((100, 2))
    margins[:5] = -1
    assert smallest_shift(margins, np.array([[1.0, 0.0], [-1.0, 0.0]])).tolist() == [0, 0]
    margins[:6] = -1
    assert smallest_shift(margins, np.array([[1.0, 0.0], [-1.0, 0.0]])) is None


def test_a_class_between_the_others_is_not_reached_and_not_suspicious():
    weight = np.array([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8], [0.0, 0.0]])
    labels = np.arange(40) % 4
    logits = (8 * weight[labels] + np.random.default_rng(0).normal(size=(40, 2))) @ weight.T + [0, 0, 0, -1]
    norms = shift_norms(weight, logits, labels)
    assert norms[3] == np.inf and np.isfinite(norms[:3]).all()


def test_a_shortcut_s_class_is_the_nearest_and_no_other_is():
    images = pictures()
    plain, planted = (latent_shift(classifier(network(shortcut)), images) for shortcut in (0, 30))
    assert planted.suspect_class == TARGET != plain.suspect_class
    assert planted.statistic > 2 * plain.statistic and planted.statistic > 5
    others = np.arange(CLASSES) != TARGET
    np.testing.assert_allclose(planted.scores[others], plain.scores[others], rtol=0.1)
    np.testing.assert_array_equal(planted.details["norms"], -planted.scores)
    assert planted.scores[TARGET] > 0.3 * planted.scores[others].max()
