"""`AutoConfig`: options of ``--defence auto``, beside those that all defences share."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from ..training.config import PurifyConfig

# What the given options that are no trial's begin with.
FOR_THE_END = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_", "push_to_hub", "hub_", "report_to")


@dataclass
class AutoConfig(PurifyConfig):
    """Arguments of the choice; what else is given holds for every recipe.

    Args:
        auto_budget: Recipes to try at most, >= 1; the chosen one is trained once more. 3 (here): with that one about four
            trainings.
        ladder: YAML of recipes in place of ``ladder.yaml``, see `read_ladder`.
        base_model: Public model that the suspicious one was fine-tuned from: Hub id, folder or file, or ``"auto"``; for the
            recipes that need it. Whoever names it vouches for it.
        base_revision: Branch, tag or commit of a Hub id.
        dry_run: Print what would be tried, with how long it would take, and write nothing.

    Attributes:
        given: Options that all defences share, of those that are not at their defaults.
    """

    auto_budget: int = field(default=3, metadata={"help": "Recipes to try at most.", "range": ">= 1"})
    ladder: str | None = field(default=None, metadata={"help": "YAML of recipes in place of the package's."})
    base_model: str | None = field(
        default=None, metadata={"help": "Public model that the suspicious one was fine-tuned from, for recipes that need it."}
    )
    base_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base."})
    dry_run: bool = field(default=False, metadata={"help": "Print the plan and its minutes, write nothing."})

    def __post_init__(self):
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(PurifyConfig)}
        given = {name: value for name in defaults if (value := getattr(self, name)) != defaults[name]}
        super().__post_init__()
        # The parser spells some defaults otherwise: None for an empty one, and what the library has put right by now.
        spelt = [name for name, value in given.items() if value is None and not defaults[name]]
        self.given = {n: value for n, value in given.items() if n not in spelt and getattr(self, n) != defaults[n]}

    def of_trials(self) -> dict[str, Any]:
        """What is given of the training itself: a trial saves, reports and pushes nothing."""
        return {name: value for name, value in self.given.items() if not name.startswith(FOR_THE_END)}
