"""What commands say of mistakes: one JSON object where JSON is asked for, and what, where and what to do."""

import json
import re
import signal

import pandas
import pytest
from command_line import command

from d3_hf.commands import Command


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["unheard", "--json"], 2),
        (["--json", "info", "absent"], 2),
        (["purify", "--json"], 2),
        (["purify", "--json", "--retain_cuont", "5"], 2),
        (["purify", "--json", "--retain_count", "many"], 2),
        (["measure", "--json"], 2),
        (["victim", "--set", "absent.yaml", "--json"], 2),
        (["benchmark", "absent.parquet", "--json"], 2),
        (["info", "nobody/unheard", "--json"], 1),
        (["push", "absent", "--hub_model_id", "me/x", "--json"], 2),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_with_json_an_error_is_one_object_too(capfd, argv, code):
    assert command(*argv) == code
    shown = capfd.readouterr()
    found = json.loads(shown.out)
    assert found.keys() == {"error", "code"} and found["code"] == code
    assert shown.err.splitlines()[-1].endswith(f": {found['error']}")


def test_sigterm_ends_a_command_as_ctrl_c_does_with_a_code_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(Command, "run", lambda self, argv: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert command("info", "x", "--json") == 143
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found == {"error": "terminated; what is finished stays: run the same command again", "code": 143}
    assert shown.err == f"d3-hf info: {found['error']}\n" and signal.getsignal(signal.SIGTERM) is before


def test_with_json_an_interruption_is_one_object_and_help_none(monkeypatch, capsys):
    def interrupt(self, argv):
        raise KeyboardInterrupt("go on")

    monkeypatch.setattr(Command, "run", interrupt)
    assert command("info", "x", "--json") == 130
    assert json.loads(capsys.readouterr().out) == {"error": "interrupted; go on", "code": 130}
    monkeypatch.undo()
    assert command("info", "--help", "--json") == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not parquet", "other.parquet is no parquet file .*: run the grid again$"),
        (pandas.DataFrame({"victim": [], "retain": []}), "has no column defence: name the results.parquet that a benchmark"),
    ],
    ids=["no parquet", "no benchmark"],
)
def test_a_table_of_something_else_is_named(tmp_path, capsys, content, message):
    file = tmp_path / "other.parquet"
    file.write_text(content) if isinstance(content, str) else content.to_parquet(file)
    assert command("benchmark", file) == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])
