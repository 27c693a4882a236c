"""Every command line of the README, the docs and the cards is parsed by the command that it names, up to where work begins."""

import re
import runpy
import shlex
from dataclasses import is_dataclass

import pytest
from pages import CARDS, PAGES, README, arguments, commands
from places import ROOT

from d3_hf.benchmark import cells
from d3_hf.commands import COMMANDS
from d3_hf.commands.benchmark import run_after, run_encoders, run_relearning, run_study, run_zoo
from d3_hf.commands.launch import take_launch
from d3_hf.options.arguments import DataArguments, ModelArguments
from d3_hf.options.parser import Parser
from d3_hf.publishing import hub
from d3_hf.victims import record

SHOWN = [(file.stem, argv) for file in (README, *PAGES, *CARDS) for argv in commands(file.read_text())]
RECIPES = {"d3_vit.py": "purify", "d3_resnet.py": "purify", "make_victim.py": "victim", "benchmark.py": "benchmark"}
RECIPES |= {"purify.sh": "purify", "benchmark.sh": "benchmark"}
STUDIES = {"assurance_study.py": run_zoo, "auto_study.py": run_study}
STUDIES |= {"encoder_study.py": run_encoders, "relearning_study.py": run_relearning, "after_study.py": run_after}
DRILLS = {"d3_vit.py": "fire_drill_vit", "d3_resnet.py": "fire_drill_resnet"}  # what a recipe runs without arguments


class Parsed(Exception):
    """The command has read its options and would go to work."""


def stop(*args, **kwargs):
    raise Parsed


def choose_cells(grid, shard, only, *args):
    cells.cells_of(grid, shard, only)
    raise Parsed


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with nothing but recipes/, in which no command gets to work."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    for kind in (ModelArguments, DataArguments):
        monkeypatch.setattr(kind, "load", stop)
    monkeypatch.setattr(ModelArguments, "load_encoder", stop)
    monkeypatch.setattr(ModelArguments, "load_clip", stop)
    monkeypatch.setattr(cells, "run_grid", choose_cells)
    monkeypatch.setattr(record, "read_record", stop)
    monkeypatch.setattr(hub, "push_folder", stop)


def run(argv):
    what, rest = arguments(argv)
    _, rest = take_launch([word for word in rest if word not in ("--json", "--debug")])
    script = what.rpartition("/")[2]
    if what in COMMANDS:
        COMMANDS[what].run(rest)
    elif script in STUDIES:
        assert (ROOT / what).is_file()
        STUDIES[script](rest)
    elif script in RECIPES:
        assert (ROOT / what).is_file()
        drill = DRILLS.get(script)
        COMMANDS[RECIPES[script]].run(
            rest or [f"recipes/configs/{drill}.yaml", "--victim_config", f"recipes/configs/{drill}_victim.yaml"]
        )
    else:
        kinds = [
            thing for thing in runpy.run_path(what).values() if is_dataclass(thing) and thing.__name__.endswith("Arguments")
        ]
        Parser([kind for kind in kinds if kind.__module__ == "<run_path>"]).read(rest)
        raise Parsed


@pytest.mark.parametrize("argv", [argv for _, argv in SHOWN], ids=[f"{page}: {shlex.join(argv)[:60]}" for page, argv in SHOWN])
def test_a_command_is_understood(argv, place):
    with pytest.raises(Parsed):
        run(argv)


def test_a_mistake_would_be_found(place):
    for line in (
        "d3-hf purify --dataset_name x --model_name_or_path y --lamda_clean 3",
        "d3-hf benchmark recipes/grids/gpu.yaml",
    ):
        with pytest.raises((ValueError, FileNotFoundError), match="lamda_clean|gpu.yaml"):
            run(shlex.split(line))


def test_there_are_commands_of_every_kind():
    kinds = {arguments(argv)[0].rpartition("/")[2] for _, argv in SHOWN}
    assert kinds >= {"purify", "measure", "benchmark", "push", "info"} | {*RECIPES} - {"d3_resnet.py"} and len(SHOWN) > 40


def test_launchers_are_given_files_that_exist():
    for _, argv in SHOWN:
        for file in re.findall(r"--config_file (\S+)", shlex.join(argv)):
            assert (ROOT / file).is_file()
