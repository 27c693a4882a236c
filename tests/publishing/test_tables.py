"""The Markdown tables: one form for all of them, whatever stands in a cell."""

import pandas

from d3_hf.benchmark.tables import failures
from d3_hf.publishing.tables import audit_line, chosen_table, markdown_table, rates_table, results_table


def rates(key, value, suffix=""):
    return {f"{key}{suffix}": value, f"{key}{suffix}_ci95": [value - 0.01, value + 0.01], f"{key}{suffix}_n": 360}


def test_a_table_has_names_on_the_left_and_numbers_on_the_right():
    table = markdown_table(["", "before", "n"], [["ACC", "97.2", "360"], ["DER", "", ""]])
    assert table.splitlines() == ["| | before | n |", "| --- | ---: | ---: |", "| ACC | 97.2 | 360 |", "| DER | | |"]


def test_what_stands_in_a_cell_neither_ends_it_nor_its_line():
    assert markdown_table(["a"], [["x | y\nz"]]).splitlines()[2:] == [r"| x \| y z |"]
    row = {"victim": "v", "retain": "30", "defence": "ANP", "seed": 0, "error": "ValueError: no BatchNorm|\n  none here"}
    assert failures(pandas.DataFrame([row])).endswith(r"| v | 30 | ANP | 0 | ValueError: no BatchNorm\| none here |")


def test_results_before_and_after():
    results = rates("accuracy", 0.9, "_before") | rates("accuracy", 0.85, "_after") | rates("accuracy_drop", 0.05)
    results["der"] = 0.5
    assert results_table(results).splitlines() == [
        "| | before | after | images |",
        "| --- | ---: | ---: | ---: |",
        "| ACC | 90.0 % [89.0, 91.0] | 85.0 % [84.0, 86.0] | 360 |",
        "| ACC drop | | 5.0 points [4.0, 6.0] | 360 |",
        "| DER | | 0.5000 | |",
    ]


def test_the_floor_is_a_column_of_its_own():
    results = rates("accuracy", 0.9, "_before") | rates("accuracy", 0.85, "_after") | rates("accuracy_drop", 0.05)
    results |= rates("asr", 0.99, "_before") | rates("asr", 0.02, "_after") | {"der": 0.9}
    floor = rates("accuracy", 0.91) | rates("asr", 0.01) | rates("untriggered", 0.5)
    assert results_table(results, floor).splitlines() == [
        "| | before | after | floor | images |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| ACC | 90.0 % [89.0, 91.0] | 85.0 % [84.0, 86.0] | 91.0 % [90.0, 92.0] | 360 |",
        "| ACC drop | | 5.0 points [4.0, 6.0] | | 360 |",
        "| ASR | 99.0 % [98.0, 100.0] | 2.0 % [1.0, 3.0] | 1.0 % [0.0, 2.0] | 360 |",
        "| DER | | 0.9000 | | |",
    ]


def test_a_drift_has_no_interval_and_an_earlier_record_no_row():
    now = rates("pacc", 0.8) | {"trigger_drift": 0.25, "trigger_drift_n": 324}
    then = rates("ra", 0.7)
    lines = ["| PACC | 80.0 % [79.0, 81.0] | | 360 |", "| trigger drift | 25.0 % | | 324 |"]
    assert rates_table({"now": now, "recorded": then}).splitlines()[2:] == lines
    assert "PACC" not in rates_table({"recorded": then, "now": now})
    drift = {"trigger_drift_before": 0, "trigger_drift_after": 0.25, "trigger_drift_after_n": 324}
    results = rates("pacc", 0.1, "_before") | rates("pacc", 0.8, "_after") | drift
    assert results_table(results).splitlines()[2:] == [
        "| PACC | 10.0 % [9.0, 11.0] | 80.0 % [79.0, 81.0] | 360 |",
        "| trigger drift | 0.0 % | 25.0 % | 324 |",
    ]


def test_rates_of_several_models():
    columns = {"victim": rates("accuracy", 0.9) | rates("asr", 0.99), "model without backdoor": rates("accuracy", 0.91)}
    assert rates_table(columns).splitlines() == [
        "| | victim | model without backdoor | images |",
        "| --- | ---: | ---: | ---: |",
        "| ACC | 90.0 % [89.0, 91.0] | 91.0 % [90.0, 92.0] | 360 |",
        "| ASR | 99.0 % [98.0, 100.0] | | 360 |",
    ]


def test_the_table_of_what_was_tried():
    found = {
        "accuracy": 0.9,
        "accuracy_ci95": [0.8, 0.95],
        "accuracy_n": 60,
        "scores": {"place": 2.0, "feature_distance": 0.25},
    }
    tried = [
        found | {"name": "FT", "floor": "kept", "seconds": 12.4},
        {"name": "D3", "floor": "raised", "seconds": 3.0, "error": "diverged | at step 2"},
        found | {"name": "LMR", "floor": "broken", "seconds": 30.0, "scores": {"place": 3.0}},
        found | {"name": "D3 far", "floor": "broken", "seconds": 8.0, "scores": None, "stopped_at": 0.5},
    ]
    assert chosen_table({"recipe": "FT", "tried": tried}).splitlines() == [
        "| recipe | validation ACC | floor | place | feature distance | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| **FT** | 90.0 % [80.0, 95.0] | kept | 2 | 0.25 | 12 |",
        "| D3 | diverged \\| at step 2 | raised | | | 3 |",
        "| LMR | 90.0 % [80.0, 95.0] | broken | 3 | | 30 |",
        "| D3 far | 90.0 % [80.0, 95.0] | broken (stopped at 50 %) | | | 8 |",
    ]


def test_the_audit_in_a_sentence():
    audit = rates("accuracy", 0.906, "_before") | rates("accuracy", 0.891, "_after")
    audit |= {"accuracy_drop": 0.015, "accuracy_drop_ci95": [-0.0082, 0.0391], "accuracy_drop_n": 200, "lost": 5, "gained": 2}
    assert audit_line(audit) == (
        "Images that no decision saw: ACC 90.6 % to 89.1 % of 200 images (5 lost, 2 gained), the fall lies within [-0.8, 3.9] "
        "points (95 %)."
    )
