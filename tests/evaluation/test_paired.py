"""The paired table of two models: counts, Newcombe's interval against root finding and by its coverage, McNemar's test."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binom, norm

from d3_hf.evaluation.metrics import Proportion, accuracy
from d3_hf.evaluation.paired import PairedTable, paired_table


def test_counts_are_those_of_single_images():
    labels, before, after = np.random.default_rng(0).integers(0, 3, (3, 200))
    pairs = [(p == y, q == y) for p, q, y in zip(before.tolist(), after.tolist(), labels.tolist(), strict=True)]
    table = paired_table(before, after, labels)
    assert table == PairedTable(*(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))))
    assert (table.before, table.after) == (accuracy(before, labels), accuracy(after, labels))
    assert table.n == 200 and table.drop == pytest.approx(table.before.value - table.after.value) != 0


TABLES = [
    *((1, 1, 7, 12), (14, 5, 0, 22), (36, 12, 2, 0), (53, 0, 1, 0), (3, 20, 20, 3), (900, 60, 10, 30)),
    *((50, 0, 0, 0), (0, 0, 0, 9), (30, 0, 0, 20), (0, 9, 0, 0), (0, 1, 0, 0)),  # no image discordant, or every one
]


def slow_wilson(rate, z):
    """The shares whose standard error puts the found one z of them away."""
    found = rate.value

    def away(share):
        return abs(found - share) - z * math.sqrt(share * (1 - share) / rate.n)

    inside = min(max(found, 1e-12), 1 - 1e-12)  # 0 and 1 are roots themselves where they were found
    low = 0.0 if found == 0 else brentq(away, 0, inside, xtol=1e-14)
    return low, 1.0 if found == 1 else brentq(away, inside, 1, xtol=1e-14)


def slow_interval(counts, confidence):
    """Newcombe's interval, with the correlation taken from the images themselves."""
    table, z = PairedTable(*counts), norm.ppf(0.5 + confidence / 2)
    was = np.repeat([1, 1, 0, 0], counts)
    now = np.repeat([1, 0, 1, 0], counts)
    phi = 0.0
    if was.std() > 0 < now.std():
        phi = np.corrcoef(was, now)[0, 1]
        if phi > 0:
            phi = max(0, phi - 1 / (2 * len(was) * was.std() * now.std()))
    (l1, u1), (l2, u2) = slow_wilson(table.before, z), slow_wilson(table.after, z)
    p1, p2 = was.mean(), now.mean()
    low = p1 - p2 - math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    high = p1 - p2 + math.sqrt((u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2)
    return max(-1, low), min(1, high)


@pytest.mark.parametrize("confidence", [0.95, 0.8])
@pytest.mark.parametrize("counts", TABLES)
def test_interval_against_root_finding(counts, confidence):
    low, high = PairedTable(*counts).interval(confidence)
    assert (low, high) == pytest.approx(slow_interval(counts, confidence), abs=1e-8)
    assert -1 <= low <= PairedTable(*counts).drop <= high <= 1 and low < high


@pytest.mark.parametrize(
    ("counts", "interval"),
    [((36, 12, 2, 0), (0.0569, 0.3404)), ((14, 5, 0, 22), (0.0115, 0.2265)), ((1, 1, 7, 12), (-0.5069, -0.0256))],
)
def test_worked_examples_of_method_10(counts, interval):
    assert PairedTable(*counts).interval() == pytest.approx(interval, abs=5e-5)


@pytest.mark.parametrize("counts", TABLES)
def test_exchanging_the_models_turns_the_interval_round(counts):
    both, lost, gained, neither = counts
    there, back = PairedTable(*counts), PairedTable(both, gained, lost, neither)
    assert there.interval() == pytest.approx([-end for end in reversed(back.interval())])
    assert there.p_value == pytest.approx(back.p_value)


@pytest.mark.parametrize(("lost", "gained", "n"), [(0.05, 0, 100), (0.055, 0.005, 100), (0.02, 0.02, 60)])
def test_the_interval_holds_the_true_drop(lost, gained, n):
    """In 95 % of 500 samples less three standard errors; the exact conditional one does in 56 % of those of the first case."""
    shares = [0.9 - lost, lost, gained, 0.1 - gained]
    tables, times = np.unique(np.random.default_rng(0).multinomial(n, shares, 500), axis=0, return_counts=True)
    intervals = [PairedTable(*map(int, counts)).interval() for counts in tables]
    assert np.average([low <= lost - gained <= high for low, high in intervals], weights=times) > 0.92


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 0), (3, 8), (40, 22), (7, 7)])
def test_mcnemar_is_the_sum_of_what_is_no_likelier(lost, gained):
    n = lost + gained
    chances = [binom.pmf(k, n, 0.5) for k in range(n + 1)]
    exact = sum(chance for chance in chances if chance <= chances[lost] * (1 + 1e-9))
    assert PairedTable(100, lost, gained, 3).p_value == pytest.approx(exact)


def test_form_in_result_files():
    table = PairedTable(90, 6, 1, 3)
    found = table.as_dict("drop")
    assert found.pop("drop_ci95") == list(table.interval())
    assert found == pytest.approx({"drop": 0.05, "drop_n": 100, "drop_p": 0.125}) and table.before == Proportion(96, 100)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: PairedTable(0, 0, 0, 0), r"at least one of them over 0; got \(0, 0, 0, 0\)"),
        (lambda: PairedTable(3, -1, 0, 0), "four counts"),
        (lambda: paired_table([1, 2], [1], [1, 2]), "equally long"),
        (lambda: paired_table([], [], []), "got 0 of 0"),
    ],
)
def test_errors(act, message):
    with pytest.raises(ValueError, match=message):
        act()
