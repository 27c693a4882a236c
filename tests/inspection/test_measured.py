"""Measured hit and false-alarm rates: the file, for which checks they hold, and what a check says of them."""

import json
from dataclasses import replace

import jsonschema
import pandas
import pytest
from places import ROOT
from shortcut import classifier, network, pictures

from d3_hf.assurance.head_rows import head_rows
from d3_hf.evaluation.metrics import Proportion
from d3_hf.inspection import measured
from d3_hf.inspection.check import check
from d3_hf.inspection.measured import MeasuredRates, measured_rates, read_measured, write_measured
from d3_hf.inspection.null import Kind
from d3_hf.publishing.inspection.pages import check_page
from d3_hf.zoo import verdicts as zoo

SCHEMA = json.loads((ROOT / "d3_hf" / "publishing" / "schemas" / "check.schema.json").read_text())
RATES = MeasuredRates(
    "shortcut.Net", 8, ("head_rows",), 0.05, twins=20, images=500, backdoored=24, hits=21, trusted=20, false_alarms=1
)
KIND = Kind("shortcut.Net", 5, tuple("abcdefgh"), 12, "0")


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A file in place of the package's."""
    file = tmp_path / "measured.json"
    monkeypatch.setattr(measured, "FILE", file)
    return file


def checked(**options):
    twins = (classifier(network(seed=seed)) for seed in (2, 3, 4))
    return check(classifier(network(20)), pictures(), twins=twins, signals={"head_rows": head_rows}, defences=(), **options)


def test_a_file_gives_back_what_was_written(shipped):
    others = (RATES, replace(RATES, architecture="vit", signals=("a", "b")))
    write_measured(others, shipped)
    assert read_measured(shipped) == others


@pytest.mark.parametrize(
    ("kind", "signals", "alarm_at", "holds"),
    [
        (KIND, ["head_rows"], 0.05, True),
        (replace(KIND, images=300, parameters=7), ["head_rows"], 0.05, True),
        (replace(KIND, architecture="vit"), ["head_rows"], 0.05, False),
        (replace(KIND, classes=("a", "b")), ["head_rows"], 0.05, False),
        (KIND, ["head_rows", "canary"], 0.05, False),
        (KIND, [], 0.05, False),
        (KIND, ["head_rows"], 0.1, False),
    ],
)
def test_they_hold_for_the_test_that_was_measured_alone(shipped, kind, signals, alarm_at, holds):
    write_measured([replace(RATES, classes=9), RATES], shipped)
    assert measured_rates(kind, signals, alarm_at) == (RATES if holds else None)


def test_signals_are_the_same_in_any_order(shipped):
    write_measured([replace(RATES, signals=("a", "b"))], shipped)
    assert measured_rates(KIND, ["b", "a"], 0.05) is not None


def test_a_check_says_them_with_counts_and_intervals(shipped):
    write_measured([RATES], shipped)
    found = checked()
    facts = found.as_dict()
    jsonschema.validate(facts, SCHEMA)
    said = facts["suspicion"]["measured"]
    low, high = Proportion(21, 24).interval
    assert (said["hit_rate"], said["hit_rate_ci95"], said["hit_rate_n"]) == (21 / 24, [low, high], 24)
    assert (said["false_alarm_rate"], said["false_alarm_rate_n"], said["twins"], said["images"]) == (0.05, 20, 20, 500)
    line = (
        "measured hit and false-alarm rates of exactly this test on models of this kind (shortcut.Net, 8 classes), with 20 "
        f"twins and 500 images: an alarm on 87.5 % [{100 * low:.1f}, {100 * high:.1f}] of 24 models with a backdoor, and on "
        "5.0 % ["
    )
    (shown,) = [text for text in str(found).splitlines() if text.strip().startswith("measured")]
    assert shown.strip().startswith(line) and shown.endswith("of 20 without one")
    assert shown.strip() in check_page(facts, {})


def test_where_there_are_none_it_says_so_in_one_line(shipped):
    line = (
        "hit and false-alarm rates of exactly this test have not been measured on models of this kind (shortcut.Net, 8 classes)"
    )
    for written in ([], [replace(RATES, architecture="vit")]):
        if written:
            write_measured(written, shipped)
        found = checked()
        facts = found.as_dict()
        jsonschema.validate(facts, SCHEMA)
        assert facts["suspicion"]["measured"] is None
        assert [text.strip() for text in str(found).splitlines()].count(line) == 1 and line in check_page(facts, {})


def test_without_a_p_nothing_is_said_of_rates(shipped):
    write_measured([RATES], shipped)
    facts = check(classifier(network(20)), pictures(), signals={"head_rows": head_rows}, defences=())
    assert "rates of exactly this test" not in str(facts) and facts.as_dict()["suspicion"]["measured"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is no file of measured rates"),
        ('{"schema": "urn:d3_hf:measured:9", "kinds": []}', "of this version"),
        ('{"schema": "urn:d3_hf:measured:2", "kinds": [{}]}', "architecture"),
        ('{"schema": "urn:d3_hf:measured:2", "kinds": [RATES]}', "a proportion needs"),
    ],
)
def test_a_damaged_file_is_one_line(shipped, content, message):
    write_measured([RATES], shipped)
    (entry,) = json.loads(shipped.read_text())["kinds"]
    shipped.write_text(content.replace("RATES", json.dumps(entry | {"hits": 25})))
    with pytest.raises(ValueError, match=message) as caught:
        measured_rates(KIND, ["head_rows"], 0.05)
    assert "\n" not in str(caught.value)


def test_the_rates_of_the_package_are_those_of_the_rows_beside_them():
    rows = pandas.read_parquet(ROOT / "model_cards" / "results" / "zoo.parquet")
    found = zoo.measured(zoo.verdicts(rows))
    assert list(read_measured(ROOT / "d3_hf" / "inspection" / "measured.json")) == found and len(found) == 1
    assert f"{found[0].hits} of {found[0].backdoored}" in (ROOT / "model_cards" / "assurance.md").read_text()
