"""The wheel, installed where there is no checkout: everything that help and errors name is there, and a model is purified.

The dependencies are those of the tests' own environment, which the new one sees after its own packages.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from places import RECIPES, ROOT

import d3_hf

pytestmark = pytest.mark.slow
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "d3_hf", "recipes")
SMALL = ["--max_steps", "2", "--use_cpu", "--disable_tqdm", "true", "--max_test_images", "40"]


def build(what, source, target):
    """Build the ``sdist`` or the ``wheel`` of a folder into another one, without pip and its downloads; the file."""
    code = f"from setuptools import build_meta; print(build_meta.build_{what}({str(target)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the sdist as a release is."""
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        place = folder / "checkout" / name
        place.parent.mkdir(exist_ok=True)
        shutil.copytree(ROOT / name, place, ignore=ignored) if (ROOT / name).is_dir() else shutil.copy(ROOT / name, place)
    with tarfile.open(build("sdist", folder / "checkout", folder)) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (source,) = (folder / "sdist").iterdir()
    return build("wheel", source, folder)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Run ``d3-hf`` of an environment that holds the wheel, in an empty folder; what it printed."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    line = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run(line, check=True)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "work").mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*argv, code=0):
        line = [str(folder / "venv" / "bin" / "d3-hf"), *argv]
        done = subprocess.run(line, cwd=folder / "work", env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == code, done.stderr[-3000:]
        return done.stderr if code else done.stdout

    run.folder, run.packages = folder / "work", packages
    return run


def test_the_wheel_holds_the_recipes_as_they_are_and_nothing_else_from_beside_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        files = [file for file in RECIPES.rglob("*") if file.is_file() and file.suffix != ".pyc"]
        recipes = {f"d3_hf/{file.relative_to(ROOT)}": file.read_bytes() for file in files}
        assert {name: archive.read(name) for name in names if name.startswith("d3_hf/recipes/")} == recipes
        assert all(name.startswith("d3_hf/") for name in names) and "d3_hf/auto/ladder.yaml" in names


def test_help_and_names_need_no_checkout(installed):
    assert installed("--version") == f"d3_hf {d3_hf.__version__}\n"
    assert "d3-hf drill" in installed("--help")
    shown = installed("purify", "--help")
    assert "d3-hf recipes" in shown and "--lambda_clean" in shown
    listed = {line.split()[0] for line in installed("recipes").splitlines()}
    assert {"configs/fire_drill_vit.yaml", "grids/cpu.yaml", "slurm/purify.sh", "accelerate/ddp.yaml", "d3_vit.py"} <= listed
    place = Path(installed("recipes", "accelerate/ddp").strip())
    assert place.is_relative_to(installed.packages) and place.is_file()
    grids = installed("benchmark", "unheard", code=2)
    assert grids.startswith("d3-hf benchmark: no grid unheard; by name there are ablation, ")


def test_a_drill_in_two_steps_by_names(installed):
    installed("victim", "fire_drill_vit_victim", *SMALL, "--output_dir", "victim")
    line = ["purify", "fire_drill_vit", *SMALL, "--model_name_or_path", "victim", "--max_accuracy_drop", "1", "--json"]
    found = json.loads(installed(*line, "--attack", "victim", "--output_dir", "purified"))
    assert found["accuracy_after_n"] == 40 and (installed.folder / "purified" / "model.safetensors").is_file()
