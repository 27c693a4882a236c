"""The plan: what can be tried on a network, with which schedule, on which images. A dry run prints it, a run walks it."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from ..data.images import RawImages
from ..data.preprocessing import Preprocessing
from ..defenses import defence
from ..files import first_line
from ..models.source import preprocessing_of, source_of
from ..publishing import hub
from ..publishing.manifest import MANIFEST, source_facts
from ..training.checkpoints import check_output
from ..training.config import two_digits
from ..training.schedule import resolved, updates_of
from ..training.trainer import PurifyTrainer
from .choose import next_place, walked
from .config import AutoConfig
from .floor import STANDARD_ERRORS, images_needed
from .ladder import Recipe, read_ladder
from .split import PATTERN, Split, split


@dataclass(frozen=True)
class Rung:
    """A recipe as it runs on a network.

    Attributes:
        place: Its number on the ladder, 1 the gentlest.
        recipe: The recipe.
        options: Of its configuration, beside those that are given for every recipe.
        schedule: What the network's rule settled, see `schedule.resolved`.
        updates: Of a trial.
        final_updates: Of the purification by it.
    """

    place: int
    recipe: Recipe
    options: dict[str, Any]
    schedule: dict[str, Any]
    updates: int
    final_updates: int

    def described(self) -> dict[str, Any]:
        """JSON-able."""
        recipe = self.recipe
        described = {"name": recipe.name, "defence": recipe.defence, "options": recipe.options, "rate": recipe.rate}
        return described | {"updates": self.updates}


@dataclass(eq=False)
class Plan:
    """What is going to be tried.

    Attributes:
        model: The suspicious model; only copies of it are trained.
        retain: The retain set.
        images: The same, decoded.
        args: As given.
        max_accuracy_drop: Allowed fall of validation ACC, in [0, 1].
        data_source: What the retain set was loaded from.
        split: Its parts.
        starts: Places of the recipes that the ladder says to try first, rising.
        rungs: Recipes that the options leave possible, from gentle to severe.
        left_out: Why others cannot be tried, by their names; a recipe that its trainer refuses is added when that is known.
    """

    model: PreTrainedModel
    retain: Dataset | RawImages
    images: RawImages
    args: AutoConfig
    max_accuracy_drop: float
    data_source: str | None
    split: Split
    starts: list[int]
    rungs: list[Rung] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def available(self) -> dict[int, Rung]:
        """The rungs that can be tried, as far as is known, by their places."""
        return {rung.place: rung for rung in self.rungs if rung.recipe.name not in self.left_out}

    @property
    def begin(self) -> int:
        """Place of the recipe to try first: of those that the ladder says the most severe that can be tried."""
        available = self.available
        return next((place for place in reversed(self.starts) if place in available), self.starts[0] if self.starts else 1)

    def next_rung(self, held: Mapping[int, bool]) -> Rung | None:
        """The rung to try next, see `next_place`; a ValueError if none can be tried at all."""
        available = self.available
        if not available:
            raise ValueError(f"no recipe of the ladder can be tried: {_listed(self.left_out)}")
        place = next_place(self.begin, held, available)
        return None if place is None else available[place]

    def longest_walks(self) -> list[list[Rung]]:
        """The two ways that take most rungs: each one keeps the floor, or each one breaks it. Every other is part of one."""
        available = self.available
        walks = [walked(self.begin, self.args.auto_budget, available, lambda place, holds=h: holds) for h in (True, False)]
        return [[available[place] for place in walk] for walk in walks]

    @functools.cached_property
    def validation(self) -> RawImages:
        """What trials are measured on."""
        return self.images.select(self.split.validate)

    @functools.cached_property
    def audit(self) -> RawImages:
        """What no decision sees."""
        return self.images.select(self.split.audit)

    @functools.cached_property
    def preprocessing(self) -> Preprocessing:
        """The model's."""
        return preprocessing_of(self.model)

    def inputs(self, batch_size: int, device: torch.device) -> Iterator[Tensor]:
        """All images but the audit's, as the model takes them."""
        for _, images, _ in self.images.select(self.split.retained).batches(batch_size):
            yield self.preprocessing(images.to(device))

    def trial_trainer(self, rung: Rung, model: PreTrainedModel, folder: str) -> PurifyTrainer:
        """The trainer of a trial, of a copy of the model; a ValueError where the defence cannot work on it."""
        config_class, trainer_class = defence(rung.recipe.defence)
        args = config_class(**self.args.of_trials() | rung.options | {"output_dir": folder})
        return trainer_class(model, args, self.images.select(self.split.tune))

    def trainer(self, rung: Rung) -> PurifyTrainer:
        """The trainer of the purification: what ``--defence X`` with the recipe's options makes, on all but the audit's."""
        config_class, trainer_class = defence(rung.recipe.defence)
        args = config_class(**self.args.given | rung.options | {"output_dir": self.args.output_dir})
        retain = self.retain.select(self.split.retained)
        return trainer_class(model=self.model, args=args, train_dataset=retain, data_source=self.data_source)

    def described(self) -> dict[str, Any]:
        """The plan, JSON-able."""
        first = self.next_rung({})
        return {
            "recipes": [rung.described() for rung in self.available.values()],
            "start": first.recipe.name,
            "budget": self.args.auto_budget,
            "split": self.split.counts(),
            "max_accuracy_drop": self.max_accuracy_drop,
            "schedule": first.schedule,
            "left_out": dict(self.left_out),
        }


def make_plan(
    model: PreTrainedModel,
    retain: Dataset | RawImages,
    args: AutoConfig,
    max_accuracy_drop: float | None,
    data_source: str | None = None,
) -> Plan:
    """Resolve the ladder for a network and a retain set; nothing is trained and nothing written.

    Args:
        model: The suspicious model.
        retain: The retain set, as `retain_split` draws it, or decoded.
        args: The options.
        max_accuracy_drop: That of the guard rails; None allows any fall.
        data_source: See `PurifyTrainer`.

    Raises:
        OSError: See `check_output`.
        ValueError: The retain set is too small for the floor, an option is given that recipes settle, or see
            `read_ladder`, `check_output` and `hub.check_push`.
    """
    recipes = read_ladder(args.ladder)
    if settled := sorted({name for recipe in recipes for name in recipe.options} & args.given.keys()):
        raise ValueError(
            f"{', '.join(settled)}: recipes of the ladder settle it; leave it out, name a --defence, or edit a ladder "
            "of your own (--ladder FILE)"
        )
    check_output(args, source_of(model))
    if args.push_to_hub:
        hub.check_push(args, source_facts(model), MANIFEST)
    allowed = 1.0 if max_accuracy_drop is None else max_accuracy_drop
    images = retain if isinstance(retain, RawImages) else RawImages.from_dataset(retain)
    parts = split(images.labels.numpy(), args.seed)
    if len(parts.validate) < (least := images_needed(allowed)):
        raise ValueError(
            f"{len(retain)} images leave {len(parts.validate)} to validate on, of which a single one is more than "
            f"max_accuracy_drop, {100 * allowed:g} points: give at least {least * len(PATTERN)} images (--retain_count), name "
            "a --defence, or allow more"
        )
    starts = [place for place, recipe in enumerate(recipes, 1) if recipe.start]
    plan = Plan(model, retain, images, args, allowed, data_source, parts, starts)
    for place, recipe in enumerate(recipes, 1):
        try:
            plan.rungs.append(_rung(plan, place, recipe))
        except ValueError as reason:
            plan.left_out[recipe.name] = first_line(reason)
    return plan


def _rung(plan: Plan, place: int, recipe: Recipe) -> Rung:
    args, options = plan.args, dict(recipe.options)
    if recipe.needs == "base":
        if not args.base_model:
            raise ValueError("needs --base_model")
        options |= {"base_model": args.base_model, "base_revision": args.base_revision}
    config_class, trainer_class = defence(recipe.defence)
    config = config_class(**args.of_trials() | options | {"output_dir": args.output_dir})
    counts = len(plan.split.tune), len(plan.split.retained)
    mixes = "cutmix" in trainer_class.additions
    (trial, schedule), (final, _) = (resolved(config, plan.model, count, mixes) for count in counts)
    if recipe.rate != 1:
        options["learning_rate"] = two_digits(recipe.rate * trial.learning_rate)
        if "learning_rate" in schedule.get("options", {}):
            schedule["options"]["learning_rate"] = options["learning_rate"]
    return Rung(place, recipe, options, schedule, updates_of(trial, counts[0]), updates_of(final, counts[1]))


def as_text(plan: Plan, minutes_of: Mapping[str, float] | None = None) -> str:
    """The plan for people to read; with the minutes of trials by the recipes' names, where they are known."""
    counts, first = plan.split.counts(), plan.next_rung({})
    options = ", ".join(f"{name} {value}" for name, value in first.schedule.get("options", {}).items())
    lines = [
        f"retain set: {counts['tune']} images to tune, {counts['validate']} to validate, {counts['audit']} kept for an audit",
        f"floor: validation ACC falls by at most {100 * plan.max_accuracy_drop:g} points, less its standard error"
        + (f" times {STANDARD_ERRORS:g}" if STANDARD_ERRORS != 1 else ""),
        *([f"schedule for a network with {first.schedule['rule']}: {options}"] if options else []),
        f"recipes from gentle to severe; at most {plan.args.auto_budget} are tried, from the one with the star:",
    ]
    for rung in plan.available.values():
        star = "*" if rung is first else " "
        minutes = (minutes_of or {}).get(rung.recipe.name)
        takes = "" if minutes is None else f", about {minutes:.1f} minutes"
        lines.append(f"{star} {rung.place:2} {rung.recipe.name}: {rung.recipe.defence}, {rung.updates} updates{takes}")
    return "\n".join(lines + ([f"left out: {_listed(plan.left_out)}"] if plan.left_out else []))


def _listed(left_out: dict[str, str]) -> str:
    return "; ".join(f"{name} ({why})" for name, why in left_out.items())
