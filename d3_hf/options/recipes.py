"""The files of ``recipes/`` by name: a wheel carries the folder inside the package, a checkout beside it."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# What has a name of its own, and where it lies.
KINDS = {
    "configuration file": "configs/*.yaml",
    "grid": "grids/*.yaml",
    "set of victims": "*.yaml",
    "accelerate configuration": "accelerate/*.yaml",
}


def recipes_folder() -> Path:
    """Where the recipes lie."""
    return next((place for place in (PACKAGE / "recipes", PACKAGE.parent / "recipes") if place.is_dir()), PACKAGE / "recipes")


def named(kind: str) -> dict[str, Path]:
    """The recipes of a kind, a key of `KINDS`, by their names."""
    return {file.stem: file for file in sorted(recipes_folder().glob(KINDS[kind]))}


def find_recipe(given: str, kind: str) -> str:
    """The file that is meant by what a user gives.

    Args:
        given: Path of a file, which comes first; a name, as ``cpu``; or its path in a checkout, ``recipes/grids/cpu.yaml``.
        kind: A key of `KINDS`.

    Raises:
        FileNotFoundError: It is none of them; the message lists the names.
    """
    if Path(given).is_file():
        return given
    inside = recipes_folder().parent / given
    if given.startswith("recipes/") and inside.is_file():
        return str(inside)
    files = named(kind)
    if given not in files:
        raise FileNotFoundError(f"no {kind} {given}; by name there are {', '.join(files)}")
    return str(files[given])
