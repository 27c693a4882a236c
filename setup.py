"""The one thing that pyproject.toml cannot say: a wheel carries the folder ``recipes/`` inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies ``recipes/`` into the wheel as ``d3_hf/recipes``; an editable install finds it in the checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:
            copy = Path(self.build_lib, "d3_hf", "recipes")
            shutil.rmtree(copy, ignore_errors=True)  # what an earlier build left there
            shutil.copytree("recipes", copy, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithRecipes})
