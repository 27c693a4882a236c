"""``d3-hf recipes``: the scripts and configurations that come with the package, to use by name or to copy and edit."""

import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..options.parser import Parser
from ..options.recipes import recipes_folder
from . import with_option

LONGEST = 88  # characters, so that a line fits beside its name


@dataclass
class RecipesArguments:
    """Which of them.

    Args:
        file: One of the list, without ``.yaml`` if that is how it ends. Default: list all.
    """

    file: str | None = field(default=None, metadata={"help": "Say where this one lies, as grids/cpu."})


def run(argv: list[str]) -> dict[str, Any]:
    """Run ``[FILE]``: list the recipes, or print where one of them lies, and nothing else.

    Returns:
        ``files``, what each is for by its name below ``recipes/``; or ``file``, the path.

    Raises:
        FileNotFoundError: There is no such recipe.
    """
    (options,) = Parser([RecipesArguments]).read(with_option("file", argv))
    folder = recipes_folder()
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.*") if file.suffix in (".yaml", ".py", ".sh"))
    if options.file is None:
        files = {name: summary_of(folder / name) for name in names}
        for name, summary in files.items():
            print(f"{name:<38} {summary}")
        return {"files": files}
    found = next((name for name in (options.file, f"{options.file}.yaml") if name in names), None)
    if found is None:
        raise FileNotFoundError(f"no recipe {options.file}; there are {', '.join(names)}")
    print(folder / found)
    return {"file": str(folder / found)}


def summary_of(file: Path) -> str:
    """How a recipe's comment or docstring begins: its first sentence, or what of that stands on the first line."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#!")]
    return textwrap.shorten(lines[0].strip('"# ').partition(". ")[0].rstrip("."), LONGEST, placeholder=" ...")
