"""``d3-hf recipes``: every file of the folder is listed with what it is for, and found by its name."""

import json

import pytest
from command_line import command
from places import RECIPES


def test_all_of_them_are_listed_with_what_they_are_for(capsys):
    assert command("recipes") == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    files = [file for ending in ("py", "yaml", "sh") for file in RECIPES.rglob(f"*.{ending}")]
    assert set(shown) == {str(file.relative_to(RECIPES)) for file in files}
    assert shown["accelerate/ddp.yaml"] == "One process per GPU, each with the whole model; any model and any defence"


@pytest.mark.parametrize("name", ["grids/cpu", "grids/cpu.yaml", "slurm/purify.sh", "figures.py"])
def test_one_of_them_is_a_path_alone(name, capsys):
    assert command("recipes", name) == 0
    place = capsys.readouterr().out
    assert place == f"{RECIPES / name}{'' if '.' in name else '.yaml'}\n"
    assert command("recipes", name, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"file": place.strip()}


@pytest.mark.parametrize("name", ["cpu", "../pyproject.toml", "grids"])
def test_what_is_not_there_is_one_line(name, capsys):
    assert command("recipes", name) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"d3-hf recipes: no recipe {name}; there are accelerate/ddp.yaml, ")
