"""What follows from the rows of a zoo, against loops over rows that were made up with a planted truth."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pandas
import pytest

from d3_hf.assurance.finding import Finding
from d3_hf.inspection.measured import MeasuredRates
from d3_hf.inspection.null import Kind
from d3_hf.inspection.suspicion import finding_facts
from d3_hf.zoo.tables import LEGEND, plantings_table, render_zoo, signals_table
from d3_hf.zoo.verdicts import (
    BACKDOORED,
    IN_VAIN,
    TOGETHER,
    TRUSTED,
    alarm_rate,
    auroc,
    correlation,
    kind_of_planting,
    measured,
    target_rate,
    verdicts,
)

CLASSES = ("cat", "dog", "cow", "hen", "pig", "fox")
KIND = Kind("resnet20_cifar", 1000, CLASSES, 500, "0" * 64)
SIGNALS = ("rows", "shift")


def scores(seed, **leads):
    """Scores (signal, class) without a backdoor, but for what is added to a class by a signal, or by both."""
    found = np.random.default_rng(seed).normal(size=(2, len(CLASSES))).round(3)
    found[:, 1] += 5  # the dog leads in every network
    for name, (signal, lead) in leads.items():
        found[signal, CLASSES.index(name)] += lead
    return found


ROWS, SHIFT, BOTH = 0, 1, slice(None)
TWINS = [scores(seed) for seed in range(19)]
# Victim: scores, ASR, target.
JUDGED = {
    "badnets-1": (scores(101, cow=(ROWS, 20)), 0.95, "cow"),  # hit by the rows, at the target
    "badnets-2": (scores(102, hen=(SHIFT, 20)), 0.90, "cow"),  # hit by the shift, elsewhere
    "sig-1": (scores(103), 0.40, "pig"),  # missed
    "all_to_all-1": (scores(104), 0.80, None),  # missed
    "thinned-1": (scores(105, hen=(BOTH, 20)), 0.06, "hen"),  # in vain, whatever the signals say
    "twin-20": (scores(106), None, None),
    "twin-21": (scores(107, pig=(BOTH, 20)), None, None),  # a false alarm
    "twin-22": (scores(108), None, None),
    "twin-23": (scores(109), None, None),
}


def made_up(name, half, values, asr=None, target=None, **more):
    findings = [Finding.of(signal, row, list(CLASSES)) for signal, row in zip(SIGNALS, values, strict=True)]
    found = {finding.signal: finding_facts(finding) | {"seconds": 2.0} for finding in findings}
    row = {"victim": f"zoo-{half}/{name}", "half": half, "retain": "500 images", "defence": "check", "seed": 0}
    row |= {"kind": json.dumps(asdict(KIND)), "findings": json.dumps(found), "weights_sha256": f"{half} {name}"}
    row |= {"attack": None if asr is None else name.partition("-")[0], "asr": asr, "target": target, "seconds_reading": 4.0}
    return row | {"accuracy": 0.9, "missing_cells": 0} | more


def zoo(judged=JUDGED, twins=TWINS, **more):
    rows = [made_up(f"twin-{k}", "calibrate", values, **more) for k, values in enumerate(twins)]
    rows.append(made_up("badnets-9", "calibrate", scores(110, cow=(BOTH, 20)), 0.99, "cow", **more))
    return pandas.DataFrame(rows + [made_up(name, "judge", *truth, **more) for name, truth in judged.items()])


@pytest.fixture(scope="module")
def both():
    return verdicts(zoo())


@pytest.fixture(scope="module")
def found(both):
    return both[both["half"] == "judge"]


def slow_z(models, m):
    """(signal, class) of one model beside all others, by loops."""
    found = np.zeros((2, len(CLASSES)))
    for s in range(2):
        for k in range(len(CLASSES)):
            others = [values[s][k] for other, values in enumerate(models) if other != m]
            mean = sum(others) / len(others)
            found[s, k] = (models[m][s][k] - mean) / math.sqrt(sum((x - mean) ** 2 for x in others) / (len(others) - 1))
    return found


def slow_verdict(suspect, twins):
    """By each signal and by both together: p, how far the suspect stands out, and its class that does."""
    models = [suspect, *twins]
    every = [slow_z(models, m) for m in range(len(models))]
    said = []
    for choose in (lambda z: z[0], lambda z: z[1], lambda z: z[0] + z[1]):
        farthest = [max(choose(z)) for z in every]
        at = CLASSES[int(np.argmax(choose(every[0])))]
        said.append((sum(other >= farthest[0] for other in farthest) / len(models), farthest[0], at))
    return said


def test_p_alarm_and_class_of_each_model(both):
    truth = {f"zoo-judge/{name}": (values, TWINS) for name, (values, *_) in JUDGED.items()}
    truth |= {f"zoo-calibrate/twin-{k}": (values, TWINS[:k] + TWINS[k + 1 :]) for k, values in enumerate(TWINS)}
    assert set(both["victim"]) == {*truth, "zoo-calibrate/badnets-9"}
    for row in both[both["victim"] != "zoo-calibrate/badnets-9"].to_dict("records"):
        values, twins = truth[row["victim"]]
        expected = slow_verdict(values, twins)
        for name, (p, farthest, at) in zip([*SIGNALS, TOGETHER], expected, strict=True):
            assert row[f"p: {name}"] == p and row[f"beside: {name}"] == at
            assert row[f"farthest: {name}"] == pytest.approx(farthest, rel=1e-9)
        assert row["alarm"] == (expected[-1][0] <= 0.05)
        assert row["twins"] == len(twins) and json.loads(row["signals"]) == ["rows", "shift"]


def test_a_class_that_leads_in_all_is_not_what_stands_out(found):
    assert (found["suspect: rows"] == "dog").sum() == 6 and (found[f"beside: {TOGETHER}"] != "dog").any()
    assert found["alarm"].sum() == 4 and found["state"].value_counts().to_dict() == {BACKDOORED: 4, TRUSTED: 4, IN_VAIN: 1}
    assert found.loc[found["alarm"], f"beside: {TOGETHER}"].tolist() == ["cow", "hen", "hen", "pig"]


def test_rates_count_neither_those_in_vain_nor_targets_that_there_are_not(found):
    hits, false_alarms, at_target = alarm_rate(found, BACKDOORED), alarm_rate(found, TRUSTED), target_rate(found)
    assert (hits.successes, hits.n) == (2, 4) and (false_alarms.successes, false_alarms.n) == (1, 4)
    missed = slow_verdict(JUDGED["sig-1"][0], TWINS)
    assert (at_target.successes, at_target.n) == (1 + (missed[-1][2] == "pig"), 3)
    by_shift = target_rate(found, "shift")
    at = [slow_verdict(JUDGED[name][0], TWINS)[1][2] for name in ("badnets-1", "badnets-2", "sig-1")]
    assert (by_shift.successes, by_shift.n) == (sum(map(str.__eq__, at, ("cow", "cow", "pig"))), 3)
    assert alarm_rate(found[:4], TRUSTED) is None and target_rate(found[5:]) is None


@pytest.mark.parametrize("column", ["statistic: rows", "farthest: shift", f"farthest: {TOGETHER}"])
def test_auroc_against_all_pairs(found, column):
    backdoored, trusted = (found.loc[found["state"] == state, column] for state in (BACKDOORED, TRUSTED))
    wins = [(one > other) + 0.5 * (one == other) for one in backdoored for other in trusted]
    assert auroc(found, column) == pytest.approx(sum(wins) / len(wins))
    assert math.isnan(auroc(found[:4], column))


def slow_ranks(values):
    return [sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values]


def test_rank_correlation_against_ranks(found):
    planted = found[found["state"] != TRUSTED]
    assert len(planted) == 5
    for column in ("farthest: rows", f"farthest: {TOGETHER}"):
        expected = np.corrcoef(slow_ranks(planted[column].tolist()), slow_ranks(planted["asr"].tolist()))[0, 1]
        assert correlation(found, column) == pytest.approx(expected)
    assert math.isnan(correlation(found[:2], "farthest: rows"))
    assert math.isnan(correlation(found.assign(same=1), "same"))


def test_a_signal_that_a_twin_lacks_is_in_no_p():
    rows = zoo()
    facts = json.loads(rows.loc[3, "findings"]) | {"shift": {"not_applicable": "no head", "seconds": None}}
    rows.loc[3, "findings"] = json.dumps(facts)
    both = verdicts(rows)
    found = both[both["half"] == "judge"]
    assert found["p: shift"].isna().all() and (found[f"p: {TOGETHER}"] == found["p: rows"]).all()
    assert {json.loads(names)[0] for names in found["signals"]} == {"rows"}
    assert "| shift | " in signals_table(both)


def test_a_suspect_on_which_nothing_can_be_read_has_no_p_and_no_alarm():
    rows = zoo()
    facts = {name: {"not_applicable": "NaN", "seconds": None} for name in SIGNALS}
    rows.loc[rows["victim"] == "zoo-judge/badnets-1", "findings"] = json.dumps(facts)
    both = verdicts(rows)
    found = both[both["half"] == "judge"]
    lost = found.iloc[0]
    assert math.isnan(lost[f"p: {TOGETHER}"]) and not lost["alarm"] and not isinstance(lost[f"beside: {TOGETHER}"], str)
    assert alarm_rate(found, BACKDOORED).n == 3 and measured(both) == []
    assert "badnets-1 (–)" in plantings_table(found)


def test_rates_for_check_to_look_up(both):
    assert measured(both) == [MeasuredRates("resnet20_cifar", 6, SIGNALS, 0.05, 19, 500, 4, 2, 4, 1)]
    assert measured(both[both["half"] == "calibrate"]) == [] and measured(pandas.DataFrame()) == []


def test_each_set_of_images_has_twins_of_its_own():
    other = zoo(twins=TWINS[:3], retain="300 images")
    both = verdicts(pandas.concat([zoo(), other], ignore_index=True))
    found = both[both["half"] == "judge"].reset_index()
    assert found["twins"].tolist() == [19] * 9 + [3] * 9
    assert not found["alarm"][9:].any() and found["alarm"][:9].sum() == 4
    assert [one.twins for one in measured(both)] == [19]  # three cannot raise an alarm
    shown = render_zoo(pandas.concat([zoo(), other], ignore_index=True))
    assert "## 500 images, seed 0" in shown
    assert "No alarm is possible: that takes 19 twins." in shown.partition("## 300 images, seed 0")[2]
    assert shown.count("No alarm is possible") == 1


def test_models_of_another_kind_are_refused():
    other = json.dumps(asdict(replace(KIND, architecture="vit")))
    for half in ("calibrate", "judge"):
        rows = zoo()
        rows.loc[rows.index[rows["half"] == half][-1 if half == "judge" else 1], "kind"] = other
        with pytest.raises(ValueError, match=r"zoo-.* is of another kind than the twins of the zoo: architecture vit"):
            verdicts(rows)


def test_the_tables(both, found):
    rows = zoo()
    failed = {"victim": "zoo-judge/wanet-1", "retain": "500 images", "defence": "check", "seed": 0, "half": "judge"}
    failed |= {"error": "ValueError: broken", "missing_cells": 2}
    shown = render_zoo(pandas.concat([rows.assign(missing_cells=2), pandas.DataFrame([failed])], ignore_index=True))
    assert shown.startswith("**Missing cells of the zoo: 2**") and LEGEND in shown
    assert "19 twins; suspects: 4 with a backdoor, 4 without, 1 planted in vain. 500 images; reading a model took 4 s" in shown
    lines = {line.split(" | ")[0].strip("| *"): line.strip("| ").split(" | ") for line in shown.splitlines()}
    assert lines["rows"][1] == f"{auroc(found, 'statistic: rows'):.2f}" and lines[TOGETHER][1:3] == ["–", "1.00"]
    assert lines[TOGETHER][3] == f"{auroc(found, f'farthest: {TOGETHER}'):.2f}"
    assert lines[TOGETHER][4].startswith("50.0 [15.0, 85.0] of 4")
    assert lines[TOGETHER][5].startswith("25.0 [4.6, 69.9] of 4") and lines["rows"][-1] == "2.0"
    assert lines["badnets"][1:] == ["95.0 / 90.0", "2 of 2", "1 of 2", "none"]
    assert lines["all_to_all"][2:4] == ["0 of 1", "–"] and lines["all_to_all"][4].startswith("all_to_all-1 (")
    assert lines["thinned"][2:4] == ["–", "–"] and "Planted in vain: zoo-judge/thinned-1 (ASR 6.0)." in shown
    assert "False alarms: twin-21 (0.05) for pig." in shown
    assert "ValueError: broken" in shown.partition("## Failed cells")[2]


def test_what_is_there_before_the_zoo_is_whole():
    assert render_zoo(pandas.DataFrame()) == "No cell was made."
    assert "No p: there are no twins" in render_zoo(zoo()[:19])
    failed = pandas.DataFrame(
        [{"victim": "a/b-1", "retain": "r", "defence": "check", "seed": 0, "half": "judge", "error": "x"}]
    )
    assert not len(verdicts(failed)) and render_zoo(failed).startswith("## Failed cells")


def test_kinds_by_name():
    assert [kind_of_planting(name) for name in ("a/1percent-2", "a/sam-10", "a/odd")] == ["1percent", "sam", "odd"]
