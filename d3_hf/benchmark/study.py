"""The blind study of ``--defence auto``: every recipe of the ladder on every victim, and what a blind choice is worth.

A cell is one recipe on one victim, retain set and seed, so that a study which is stopped keeps what it has. It is tried as
`auto` does: a copy of the victim is trained on the tuning part of the same split, to its end, and looked at on the validation
part. Only when all that a rule may know of it is found (`Tried`) is the trained copy measured with the trigger on test images.
`study_tables` then lets rules choose from the one and holds the other against it.

What is measured is the trial's model, trained on 60 % of the retain set. The purification by the chosen recipe takes 80 %.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from ..auto.choose import Tried
from ..auto.config import AutoConfig
from ..auto.ladder import Recipe, read_ladder
from ..auto.plan import Plan, make_plan
from ..auto.split import PATTERN
from ..auto.trial import Refused, predictions_before, try_recipe
from ..evaluation.measure import measure, results
from ..training.config import launched_precision
from .cells import Cell, Runner, made_on, network_of
from .grid import Grid, content_of
from .tables import RATES, UNTOUCHED


@dataclass
class StudyGrid(Grid):
    """A grid whose defences are the recipes of a ladder.

    Args:
        defences: Left out: they are the ladder's.
        ladder: YAML of recipes, see `read_ladder`; default the package's.
        bases: Per victim, or per group of victims, the public model that it was fine-tuned from, for the recipes that need it.
        max_accuracy_drop: The floor of the choice. 0.05, as of the guard rails.
        auto_budget: Recipes that a walk tries at most. 3, as of `AutoConfig`. Every recipe is tried for the study: what a walk
            would have seen of them follows from these.

    Raises:
        ValueError: See `Grid` and `read_ladder`; ``defences``, ``watch_images`` or ``save_models`` are given; ``common`` holds
            what a recipe settles; ``bases`` names no victim; a number is out of its range.
    """

    defences: dict[str, dict[str, Any]] = field(default_factory=dict)
    ladder: str | None = None
    bases: dict[str, str] = field(default_factory=dict)
    max_accuracy_drop: float = 0.05
    auto_budget: int = 3

    def __post_init__(self):
        recipes = {recipe.name: {"defence": recipe.defence} | recipe.options for recipe in self.recipes}
        if self.defences not in ({}, recipes):
            raise ValueError("the defences of a study are the recipes of its ladder: leave them out, or give another ladder")
        self.defences = recipes
        super().__post_init__()
        if self.watch_images is not None or self.save_models:
            raise ValueError("a study watches nothing and keeps no models: leave watch_images and save_models out")
        if settled := sorted({name for recipe in self.recipes for name in recipe.options} & self.common.keys()):
            raise ValueError(f"common: recipes of the ladder settle {', '.join(settled)}")
        if unknown := sorted(self.bases.keys() - {name for victim in self.victims for name in (victim, group_of(victim))}):
            raise ValueError(f"bases: neither a victim nor a group of them is called {', '.join(unknown)}")
        if not 0 <= self.max_accuracy_drop <= 1 or self.auto_budget < 1:
            raise ValueError("max_accuracy_drop must be in [0, 1], and auto_budget at least 1")

    @cached_property
    def recipes(self) -> list[Recipe]:
        """The ladder."""
        return read_ladder(self.ladder)

    def recipe_of(self, cell: Cell) -> Recipe:
        """The recipe that a cell tries."""
        return next(recipe for recipe in self.recipes if recipe.name == cell.defence)

    def base_of(self, cell: Cell) -> str | None:
        """The base that a cell's recipe needs, if it does and there is one."""
        recipe = self.recipe_of(cell)
        known = self.bases.get(cell.victim) or self.bases.get(group_of(cell.victim))
        return known if recipe.needs == "base" else None


def group_of(victim: str) -> str:
    """``GROUP`` of a victim that is called ``GROUP/NAME``; empty for others."""
    return victim.rpartition("/")[0]


class StudyRunner(Runner):
    """Makes the cells of a study.

    Args:
        grid: The study's grid.
    """

    grid: StudyGrid

    def spec(self, cell: Cell) -> dict[str, Any]:
        """As the base class, with the split and the base's content. Neither floor nor budget is in it: they are for the tables.

        Nor is the place on the ladder: a ladder in another order makes no cell anew.
        """
        base = self.grid.base_of(cell)
        spec = super().spec(cell) | {"split": PATTERN.tolist(), "rate": self.grid.recipe_of(cell).rate}
        return spec | ({"base": self._bases[base]} if base else {})

    @cached_property
    def _bases(self) -> dict[str, Any]:
        return {base: content_of(base) for base in self.grid.bases.values()}

    def purify(self, cell: Cell) -> dict[str, Any]:
        """Try the recipe and then measure what it made, as one flat row.

        ``tried`` is `Tried` as JSON. A recipe that raised has no more than that, and one that cannot be tried on the network
        only ``left_out``, why.
        """
        plan = self._plan(cell)
        row = asdict(cell) | {"network": network_of(plan.model), "retain_n": len(plan.images)} | made_on()
        rung = next((rung for rung in plan.rungs if rung.recipe.name == cell.defence), None)
        if rung is None:
            return row | {"left_out": plan.left_out[cell.defence]}
        made: list[PreTrainedModel] = []
        try:
            found = try_recipe(plan, rung, predictions_before(plan), stops_early=False, keep=made.append)
        except Refused as reason:
            return row | {"left_out": str(reason)}
        row |= {"tried": json.dumps(asdict(found)), "seconds_training": found.seconds}
        return row | (self._truth(cell, plan, made[0]) if made else {})

    def _plan(self, cell: Cell) -> Plan:
        model, retain = self.inputs.model(cell.victim), self.inputs.retain(cell.retain, cell.seed)
        options = self.grid.common | launched_precision(self.grid.common)
        options |= {"output_dir": str(self.folder(cell)), "overwrite_output_dir": True, "seed": cell.seed}
        args = AutoConfig(ladder=self.grid.ladder, base_model=self.grid.base_of(cell), **options)
        return make_plan(model, retain, args, self.grid.max_accuracy_drop)

    def _truth(self, cell: Cell, plan: Plan, model: PreTrainedModel) -> dict[str, Any]:
        """What only the study knows: ACC, ASR and RA on test images, with the trigger."""
        attack, before = self.inputs.attack(cell.victim), self.before(cell.victim, cell.victim)
        size, device = plan.args.per_device_eval_batch_size, next(model.parameters()).device
        after = measure(model, self.inputs.test, plan.preprocessing, attack, size, device)
        return {"attack": attack.name} | results(before, after, self.inputs.test.labels)

    def summary(self, row: dict[str, Any]) -> str:
        """What a cell came to, in a line."""
        if "left_out" in row:
            return f"left out: {row['left_out']}"
        found = Tried.from_json(json.loads(row["tried"]))
        if found.pair is None:
            return f"broken: {found.error}"
        floor = "kept" if found.holds(self.grid.max_accuracy_drop) else "broken"
        rates = ", ".join(f"{name} {100 * row[key]:.1f}" for name, key in RATES.items())
        return f"floor {floor}; {rates}, {found.seconds:.0f} s"

    def rows(self) -> Iterator[dict[str, Any]]:
        """As the base class; with each recipe's place on the ladder as it is now, and what the choice depends on."""
        ladder = {recipe.name: (place, recipe.start) for place, recipe in enumerate(self.grid.recipes, 1)}
        settings = {name: getattr(self.grid, name) for name in ("max_accuracy_drop", "auto_budget")}
        for row in super().rows():
            if row["defence"] not in UNTOUCHED:
                place, is_start = ladder[row["defence"]]
                row |= settings | {"place": place, "is_start": is_start, "recipes": len(ladder)}
            yield row
