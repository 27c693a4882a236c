"""The ladder: recipes from gentle to severe, read from YAML, so that a user sees and edits them."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..defenses import DEFENCES, defence
from ..options.parser import check_types, read_yaml
from .config import FOR_THE_END

LADDER = Path(__file__).parent / "ladder.yaml"
MOST = 12  # recipes: more would only be nearer to each other
NEEDS = ("base",)


@dataclass(frozen=True)
class Recipe:
    """A rung of the ladder.

    Attributes:
        name: What tables call it.
        defence: A key of `DEFENCES`.
        options: Of the defence's configuration; all others have their defaults or what the user gives.
        rate: > 0, times the learning rate that the network's rule or the user says.
        needs: ``"base"``: only where the user names ``base_model``.
        start: Whether it is tried first; of two the more severe, where that can be tried.
    """

    name: str
    defence: str
    options: dict[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    needs: str | None = None
    start: bool = False


def read_ladder(file: str | Path | None = None) -> list[Recipe]:
    """Read a ladder.

    Args:
        file: YAML with ``recipes``, a list from gentle to severe of the attributes of `Recipe`. Default: this room's.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such YAML; there are no recipes or more than `MOST`; two have the same name, or two that need the
            same say ``start``;
            a defence or an option is unknown, an option is none of the training's, or its value of another kind.
    """
    where = str(LADDER if file is None else file)
    content = read_yaml(where)
    entries = content.get("recipes")
    if content.keys() != {"recipes"} or not isinstance(entries, list) or not 1 <= len(entries) <= MOST:
        raise ValueError(f"{where} must hold `recipes`, a list of 1 to {MOST}, and nothing else")
    recipes = [_recipe(entry, f"{where}: recipe {number}") for number, entry in enumerate(entries, 1)]
    names = [recipe.name for recipe in recipes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{where} has several recipes called {', '.join(twice)}: give each a name of its own")
    starts = [recipe.needs for recipe in recipes if recipe.start]
    if len(starts) > len(set(starts)):
        raise ValueError(f"{where} says `start` of several recipes: one is tried first, or one that needs a base and another")
    return recipes


def _recipe(entry: Any, where: str) -> Recipe:
    if not isinstance(entry, dict) or not {"name", "defence"} <= entry.keys() <= {f.name for f in fields(Recipe)}:
        raise ValueError(f"{where} must be a mapping with name and defence, and perhaps options, rate, needs and start")
    check_types([Recipe], entry, where)
    recipe = Recipe(**entry)
    if recipe.defence not in DEFENCES:
        raise ValueError(f"{where}: unknown defence {recipe.defence!r}; known: {', '.join(DEFENCES)}")
    if recipe.needs not in (None, *NEEDS):
        raise ValueError(f"{where}: needs must be {' or '.join(NEEDS)}, or be left out; got {recipe.needs!r}")
    if isinstance(recipe.rate, str) or not 0 < recipe.rate < float("inf"):
        raise ValueError(f"{where}: rate must be a number above 0; got {recipe.rate!r}")
    config_class, _ = defence(recipe.defence)
    hints = get_type_hints(config_class)
    known = {f.name for f in fields(config_class)}
    if unknown := sorted(map(str, recipe.options.keys() - known)):
        raise ValueError(f"{where}: {recipe.defence} has no option {', '.join(unknown)}")
    if misplaced := sorted(name for name in recipe.options if name.startswith(FOR_THE_END)):
        raise ValueError(f"{where}: {', '.join(misplaced)} is no recipe's: give it to the command")
    check_types([config_class], recipe.options, where)
    for name, value in recipe.options.items():
        if isinstance(value, str) and str not in (hints[name], *get_args(hints[name])):  # which a command line converts
            raise ValueError(f"{where}: {name} must be a number, and {value!r} is text (so is 1e-4 to YAML, unlike 1.0e-4)")
    return recipe
