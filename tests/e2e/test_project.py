"""What stands beside the package: citation, issue forms, and the action, whose steps run here with a d3-hf that only ends."""

import os
import re
import subprocess

import pytest
import yaml
from command_line import command
from places import ROOT

import d3_hf
from d3_hf.commands import COMMANDS

ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"] if "name" in step}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == d3_hf.__version__ and citation["cff-version"] == "1.2.0"
    assert [author["family-names"] for author in citation["references"][0]["authors"]] == ["Wei", "Liu", "Zha"]


@pytest.mark.parametrize("form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda file: file.stem)
def test_an_issue_form_is_whole(form):
    content = yaml.safe_load(form.read_text())
    assert content["name"] and content["description"]
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    assert all(field["attributes"]["label"] for field in fields) and len({field["id"] for field in fields}) == len(fields)
    words = (word for field in fields for word in field["attributes"]["label"].split("`")[1::2])
    assert all(word.removeprefix("d3-hf ") in {*COMMANDS, "--debug"} for word in words)


def test_what_the_action_runs_is_there(capsys):
    text = (ROOT / "action.yml").read_text()
    assert all(f"${{{{ inputs.{name} }}}}" in text for name in ACTION["inputs"])
    assert command("check", "--help") == 0
    named = set(re.findall(r"(?<![\w-])--[a-z]\w*_?\w*", STEPS["Check"]["run"])) | {"--null", "--max_test_images"}
    assert named <= set(re.findall(r"--\w+", capsys.readouterr().out))


@pytest.mark.parametrize(
    ("code", "fails", "outputs", "outcome"),
    [
        (0, "true", {"code": "0", "alarm": "false"}, 0),
        (4, "true", {"code": "4", "alarm": "true"}, 4),
        (4, "false", {"code": "4", "alarm": "true"}, 0),
        (1, "false", {"code": "1"}, 1),
    ],
)
def test_the_action_keeps_the_report_and_fails_by_the_code(tmp_path, code, fails, outputs, outcome):
    (tmp_path / "d3-hf").write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > given\necho "{{}}"\nexit {code}\n')
    (tmp_path / "d3-hf").chmod(0o755)
    inputs = {
        "MODEL": "$(touch ran)",
        "IMAGES": "my images",
        "TWINS": "me/0 me/1",
        "OPTIONS": "--max_test_images 500\n--alarm_at 0.01",
    }
    assert STEPS["Check"]["env"].keys() == inputs.keys()
    here = {"RUNNER_TEMP": str(tmp_path), "GITHUB_OUTPUT": str(tmp_path / "outputs")}
    environment = os.environ | inputs | here | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    assert bash(STEPS["Check"]["run"], tmp_path, environment) == 0
    report = tmp_path / "d3-hf-check" / "report"
    options = ["--twins", "me/0", "me/1", "--max_test_images", "500", "--alarm_at", "0.01"]
    given = ["check", "$(touch ran)", "--dataset_name", "my images", "--report", f"{report}.html", "--json", *options]
    assert (tmp_path / "given").read_text().splitlines() == given and not (tmp_path / "ran").exists()
    assert report.with_suffix(".json").read_text() == "{}\n"
    found = dict(line.split("=") for line in (tmp_path / "outputs").read_text().splitlines())
    assert found == outputs
    assert bash(STEPS["Outcome"]["run"], tmp_path, environment | {"CODE": found["code"], "FAILS": fails}) == outcome


def bash(script, folder, environment):
    """As GitHub runs it; the exit code."""
    line = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True).returncode
