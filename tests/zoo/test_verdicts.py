"""What follows from the rows of a zoo, against loops over rows that were made up with a planted truth."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pandas
import pytest

from d3_hf.inspection.measured import MeasuredRates
from d3_hf.inspection.null import Kind
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
    read,
    target_rate,
    verdicts,
)

CLASSES = ("cat", "dog", "cow", "hen", "pig", "fox")
KIND = Kind("resnet20_cifar", 1000, CLASSES, 500, "0" * 64)
SIGNALS = ("rows", "shift")
TWINS = [(1.0 + 0.1 * k, 5.0 - 0.1 * ((7 * k) % 19)) for k in range(19)]  # rows 1.0 to 2.8, shift 3.2 to 5.0
# Victim: statistics, class that stands out by each, ASR, target.
JUDGED = {
    "badnets-1": ((9.0, 4.0), ("cow", "hen"), 0.95, "cow"),  # hit by the rows, at the target
    "badnets-2": ((2.0, 9.0), ("dog", "dog"), 0.90, "cow"),  # hit by the shift, elsewhere
    "sig-1": ((2.75, 4.9), ("fox", "pig"), 0.40, "pig"),  # missed
    "all_to_all-1": ((1.05, 3.25), ("cat", "cat"), 0.80, None),  # missed
    "thinned-1": ((8.0, 6.0), ("hen", "hen"), 0.06, "hen"),  # in vain, whatever the signals say
    "twin-20": ((1.55, 4.0), ("cat", "dog"), None, None),
    "twin-21": ((5.0, 4.0), ("pig", "dog"), None, None),  # a false alarm
    "twin-22": ((1.25, 3.5), ("cat", "dog"), None, None),
    "twin-23": ((0.9, 3.1), ("cat", "dog"), None, None),
}


def made_up(name, half, values, suspects=("cat", "dog"), asr=None, target=None, **more):
    scores = [
        [float(value if one == suspect else 0) for one in CLASSES] for value, suspect in zip(values, suspects, strict=True)
    ]
    found = {
        signal: {"statistic": value, "suspect_class": suspect, "scores": row, "seconds": 2.0}
        for signal, value, suspect, row in zip(SIGNALS, values, suspects, scores, strict=True)
    }
    row = {"victim": f"zoo-{half}/{name}", "half": half, "retain": "500 images", "defence": "check", "seed": 0}
    row |= {"kind": json.dumps(asdict(KIND)), "findings": json.dumps(found), "weights_sha256": f"{half} {name}"}
    row |= {"attack": None if asr is None else name.partition("-")[0], "asr": asr, "target": target, "seconds_reading": 4.0}
    return row | {"accuracy": 0.9, "missing_cells": 0} | more


def zoo(judged=JUDGED, twins=TWINS, **more):
    rows = [made_up(f"twin-{k}", "calibrate", values, **more) for k, values in enumerate(twins)]
    rows.append(made_up("badnets-9", "calibrate", (7.0, 4.0), ("cow", "cow"), 0.99, "cow", **more))
    return pandas.DataFrame(rows + [made_up(name, "judge", *truth, **more) for name, truth in judged.items()])


@pytest.fixture(scope="module")
def found():
    return verdicts(zoo())


def slow_standing(values):
    """(Highest rank, farthest z, the signal that leads) of a suspect beside the twins, by loops."""
    best = []
    for s, value in enumerate(values):
        column = sorted([value, *(twin[s] for twin in TWINS)])
        middle = (column[9] + column[10]) / 2
        away = sorted(abs(other - middle) for other in column)
        z = (value - middle) / (1.4826 * (away[9] + away[10]) / 2)
        best.append((sum(other <= value for other in column), z))
    lead = 0 if best[0] >= best[1] else 1
    return max(rank for rank, _ in best), max(z for _, z in best), lead


def slow_p(values):
    """Of all signals, by comparing the suspect with each twin in the same company."""
    models = [values, *TWINS]

    def place(model):
        places = []
        for s in range(2):
            column = sorted(other[s] for other in models)
            middle = (column[9] + column[10]) / 2
            away = sorted(abs(other - middle) for other in column)
            rank = sum(other <= model[s] for other in column)
            places.append((rank, (model[s] - middle) / (1.4826 * (away[9] + away[10]) / 2)))
        return max(rank for rank, _ in places), max(z for _, z in places)

    return sum(place(model) >= place(values) for model in models) / 20


def test_p_alarm_and_place_of_each_suspect(found):
    assert found["victim"].tolist() == [f"zoo-judge/{name}" for name in JUDGED]
    for row, (values, suspects, *_) in zip(found.to_dict("records"), JUDGED.values(), strict=True):
        for s, signal in enumerate(SIGNALS):
            assert row[f"p: {signal}"] == (1 + sum(twin[s] >= values[s] for twin in TWINS)) / 20
            assert (row[f"statistic: {signal}"], row[f"suspect: {signal}"]) == (values[s], suspects[s])
        assert row[f"p: {TOGETHER}"] == slow_p(values) and row["alarm"] == (slow_p(values) <= 0.05)
        *_, lead = slow_standing(values)
        assert (row["leading"], row[f"suspect: {TOGETHER}"]) == (SIGNALS[lead], suspects[lead])
        assert row["twins"] == 19 and json.loads(row["signals"]) == ["rows", "shift"]
    t = [slow_standing(values)[:2] for values, *_ in JUDGED.values()]
    assert found["place"].tolist() == [sum(other < one for other in set(t)) for one in t]
    assert found["alarm"].sum() == 4 and found["state"].value_counts().to_dict() == {BACKDOORED: 4, TRUSTED: 4, IN_VAIN: 1}


def test_rates_count_neither_those_in_vain_nor_targets_that_there_are_not(found):
    hits, false_alarms, at_target = alarm_rate(found, BACKDOORED), alarm_rate(found, TRUSTED), target_rate(found)
    assert (hits.successes, hits.n) == (2, 4) and (false_alarms.successes, false_alarms.n) == (1, 4)
    assert (at_target.successes, at_target.n) == (1 + (slow_standing((2.75, 4.9))[2] == 1), 3)
    by_shift = target_rate(found, "shift")
    assert (by_shift.successes, by_shift.n) == (1, 3) and alarm_rate(found, BACKDOORED, "shift").successes == 1
    assert alarm_rate(found[:4], TRUSTED) is None and target_rate(found[5:]) is None


@pytest.mark.parametrize("column", ["statistic: rows", "statistic: shift", "place"])
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
    for column in ("statistic: rows", "place"):
        expected = np.corrcoef(slow_ranks(planted[column].tolist()), slow_ranks(planted["asr"].tolist()))[0, 1]
        assert correlation(found, column) == pytest.approx(expected)
    assert math.isnan(correlation(found[:2], "place")) and math.isnan(correlation(found.assign(place=1), "place"))


def test_a_signal_that_a_twin_lacks_is_in_no_p():
    rows = zoo()
    facts = json.loads(rows.loc[3, "findings"]) | {"shift": {"not_applicable": "no head", "seconds": None}}
    rows.loc[3, "findings"] = json.dumps(facts)
    found = verdicts(rows)
    assert found["p: shift"].isna().all() and (found[f"p: {TOGETHER}"] == found["p: rows"]).all()
    assert set(found["leading"]) == {"rows"} and {json.loads(names)[0] for names in found["signals"]} == {"rows"}
    assert "| shift | " in signals_table(read(rows), found)


def test_a_suspect_on_which_nothing_can_be_read_has_no_p_and_no_alarm():
    rows = zoo()
    facts = {name: {"not_applicable": "NaN", "seconds": None} for name in SIGNALS}
    rows.loc[rows["victim"] == "zoo-judge/badnets-1", "findings"] = json.dumps(facts)
    found = verdicts(rows)
    lost = found.iloc[0]
    assert math.isnan(lost[f"p: {TOGETHER}"]) and not lost["alarm"] and not isinstance(lost["leading"], str)
    assert lost["place"] == 0 and alarm_rate(found, BACKDOORED).n == 3 and measured(found) == []
    assert "badnets-1 (–)" in plantings_table(found)


def test_rates_for_check_to_look_up(found):
    assert measured(found) == [MeasuredRates("resnet20_cifar", 6, SIGNALS, 0.05, 19, 500, 4, 2, 4, 1)]
    assert measured(found[:4]) == [] and measured(pandas.DataFrame()) == []


def test_each_set_of_images_has_twins_of_its_own():
    other = zoo(twins=[(10.0, 10.0)] * 3, retain="300 images")
    other["weights_sha256"] = other["victim"]
    found = verdicts(pandas.concat([zoo(), other], ignore_index=True))
    assert found["twins"].tolist() == [19] * 9 + [3] * 9
    assert not found["alarm"][9:].any() and found["alarm"][:9].sum() == 4
    assert [one.twins for one in measured(found)] == [19]  # three cannot raise an alarm
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


def test_the_tables(found):
    rows = zoo()
    failed = {"victim": "zoo-judge/wanet-1", "retain": "500 images", "defence": "check", "seed": 0, "half": "judge"}
    failed |= {"error": "ValueError: broken", "missing_cells": 2}
    shown = render_zoo(pandas.concat([rows.assign(missing_cells=2), pandas.DataFrame([failed])], ignore_index=True))
    assert shown.startswith("**Missing cells of the zoo: 2**") and LEGEND in shown
    assert "19 twins; suspects: 4 with a backdoor, 4 without, 1 planted in vain. 500 images; reading a model took 4 s" in shown
    lines = {line.split(" | ")[0].strip("| *"): line.strip("| ").split(" | ") for line in shown.splitlines()}
    assert lines["rows"][1] == "1.00" and lines["shift"][1] == "0.45"  # 8 of 19 shifts are below 4.0, one is equal
    assert lines[TOGETHER][2] == f"{auroc(found, 'place'):.2f}" and lines[TOGETHER][3].startswith("50.0 [15.0, 85.0] of 4")
    assert lines[TOGETHER][4].startswith("25.0 [4.6, 69.9] of 4") and lines["rows"][-1] == "2.0"
    assert lines["badnets"][1:] == ["95.0 / 90.0", "2 of 2", "1 of 2", "none"]
    assert lines["all_to_all"][2:4] == ["0 of 1", "–"] and lines["all_to_all"][4].startswith("all_to_all-1 (")
    assert lines["thinned"][2:4] == ["–", "–"] and "Planted in vain: zoo-judge/thinned-1 (ASR 6.0)." in shown
    assert "False alarms: twin-21 (0.05) by rows, pig." in shown
    assert "ValueError: broken" in shown.partition("## Failed cells")[2]


def test_what_is_there_before_the_zoo_is_whole():
    assert render_zoo(pandas.DataFrame()) == "No cell was made."
    twins = zoo()[:19]
    assert not len(verdicts(twins)) and "No p: there are no twins" in render_zoo(twins)
    failed = pandas.DataFrame(
        [{"victim": "a/b-1", "retain": "r", "defence": "check", "seed": 0, "half": "judge", "error": "x"}]
    )
    assert not len(verdicts(failed)) and render_zoo(failed).startswith("## Failed cells")


def test_kinds_by_name():
    assert [kind_of_planting(name) for name in ("a/1percent-2", "a/sam-10", "a/odd")] == ["1percent", "sam", "odd"]
