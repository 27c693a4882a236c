"""``d3-hf drill``, ``--version`` and ``env``: what somebody types first, and what a bug report needs."""

import json
import platform
import re
import sys

import pytest
import torch
from command_line import command

import d3_hf
from d3_hf import cli
from d3_hf.commands import purify
from d3_hf.options.recipes import find_recipe


@pytest.mark.parametrize(("argv", "name"), [([], "fire_drill_vit"), (["--cnn"], "fire_drill_resnet")])
def test_the_drill_is_what_the_recipe_does_without_arguments(argv, name, monkeypatch):
    seen = []
    monkeypatch.setattr(purify, "run", seen.extend)
    assert command("drill", *argv, "--seed", "1") == 0
    assert seen == [name, "--victim_config", f"{name}_victim", "--seed", "1"]
    for given in (name, f"{name}_victim"):
        assert find_recipe(given, "configuration file")


def test_version(capsys, monkeypatch):
    for asked in ("--version", "-V"):
        monkeypatch.setattr(sys, "argv", ["d3-hf", asked])
        cli.main()
        assert capsys.readouterr().out == f"d3_hf {d3_hf.__version__}\n"


def test_env_says_what_a_bug_report_needs_and_nothing_of_the_machine(capsys):
    assert command("env", "--json") == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["d3_hf"] == d3_hf.__version__ and found["torch"] == torch.__version__
    assert found["python"] == platform.python_version() and "cores" in found["cpu"]
    assert {"transformers", "accelerate", "datasets", "timm", "system", "offline"} <= found.keys()
    assert all(re.fullmatch(r"[\w:]+: .+", line) for line in shown.err.splitlines()[-len(found) :])
    assert "/" not in shown.out
    assert command("env", "--all") == 2
