"""Recipes by name: a file comes first, then a name, then the path in a checkout; a wheel's folder is the package's own."""

import pytest
import yaml
from places import RECIPES

from d3_hf.options import recipes
from d3_hf.options.parser import parse_arguments
from d3_hf.options.recipes import KINDS, find_recipe, named
from d3_hf.victims.record import KINDS as OF_A_VICTIM


@pytest.mark.parametrize(
    ("given", "kind", "file"),
    [
        ("cpu", "grid", "grids/cpu.yaml"),
        ("victims_vit", "set of victims", "victims_vit.yaml"),
        ("ddp", "accelerate configuration", "accelerate/ddp.yaml"),
        ("fire_drill_vit", "configuration file", "configs/fire_drill_vit.yaml"),
        ("recipes/grids/cpu.yaml", "grid", "grids/cpu.yaml"),
    ],
)
def test_a_name_is_found_from_any_folder(given, kind, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(given, kind) == str(RECIPES / file)


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cpu").mkdir()
    assert find_recipe("cpu", "grid") == str(RECIPES / "grids/cpu.yaml")
    (tmp_path / "cpu").rmdir()
    (tmp_path / "cpu").write_text("{}")
    assert find_recipe("cpu", "grid") == "cpu"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_there_is_answered_with_what_is(kind):
    assert len(named(kind)) >= 4
    for given in ("unheard", "recipes/unheard.yaml", "../configs/fire_drill_vit"):
        with pytest.raises(FileNotFoundError, match=f"no {kind} .*; by name there are {', '.join(named(kind))}$"):
            find_recipe(given, kind)


def test_a_wheels_folder_is_the_packages_own(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "PACKAGE", tmp_path / "d3_hf")
    for place, number in ((tmp_path / "recipes", 1), (tmp_path / "d3_hf" / "recipes", 2)):
        (place / "grids").mkdir(parents=True)
        (place / "grids" / "mine.yaml").write_text(f"{number}")
        assert open(find_recipe("mine", "grid")).read() == f"{number}"
    with pytest.raises(FileNotFoundError, match="there are mine$"):
        find_recipe("cpu", "grid")


def test_the_command_line_goes_over_a_named_configuration():
    *_, args = parse_arguments(OF_A_VICTIM, ["fire_drill_vit_victim", "--num_train_epochs", "3", "--use_cpu"])
    content = yaml.safe_load((RECIPES / "configs/fire_drill_vit_victim.yaml").read_text())
    assert args.num_train_epochs == 3 and args.learning_rate == content["learning_rate"]
