"""The relearning gap of every method: a benchmark whose cells also ask how fast a purified model takes its backdoor up again.

A cell is purified and measured as in a benchmark. The purified model, and the twin of the victim's group, which was trained
alike and never had a trigger, are then tuned with a few triggered images among others, see `relearning`. They are images that
neither victim nor defence nor measurement has seen.
"""

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from ..data.images import RawImages
from ..data.load import retain_split
from ..models import load_classifier
from .cells import Cell, Runner
from .grid import TWIN, Grid
from .relearning import POISONED, SEEDS, STEPS, Curve, relearn


@dataclass
class RelearningGrid(Grid):
    """A grid whose purified models relearn.

    Args:
        poisoned: How many of the images that models are tuned on carry the trigger; a curve for each.
        steps: After how many steps ASR is read, rising.
        tuning_seeds: A curve for each.
        tuning_images: Images that models are tuned on, of those that retain sets are drawn from. 1,000, the paper's.
        tuning: Options of `FineTuningConfig`, in place of `RETUNING`.

    Raises:
        ValueError: See `Grid`; victims are other people's, which have no twin; a retain set is of other data or all that is
            held out, or it leaves fewer than ``tuning_images``.
    """

    save_models: bool = True
    poisoned: list[int] = field(default_factory=lambda: list(POISONED))
    steps: list[int] = field(default_factory=lambda: list(STEPS))
    tuning_seeds: list[int] = field(default_factory=lambda: list(SEEDS))
    tuning_images: int = 1000
    tuning: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.victims, dict) or not self.save_models:
            raise ValueError(
                "models relearn beside the twin of their group, and are kept: give victims of a set, with save_models"
            )
        most = self.retain_from_test or self.held_out
        for name, options in self.retain.items():
            if options.get("dataset_name") or options.get("count", most) + self.tuning_images > most:
                raise ValueError(
                    f"retain set {name!r} leaves fewer than {self.tuning_images} of {most} images to tune on: give it a "
                    "smaller count, or raise held_out"
                )

    def relearning(self) -> dict[str, Any]:
        """Arguments of `relearn`."""
        return {"poisoned": self.poisoned, "steps": self.steps, "seeds": self.tuning_seeds} | self.tuning


class RelearningRunner(Runner):
    """Makes the cells of a grid whose models relearn.

    Args:
        grid: The grid.
    """

    grid: RelearningGrid

    def spec(self, cell: Cell) -> dict[str, Any]:
        """As the base class, with how the models are tuned, and the twin."""
        twin = self.inputs.twin(cell.victim)
        if twin is None:
            group = cell.victim.rpartition("/")[0]
            raise FileNotFoundError(f"no {group}/{TWIN}, beside which models relearn: make it with d3-hf victim --set")
        tuned = self.grid.relearning() | {"tuning_images": self.grid.tuning_images}
        return super().spec(cell) | {"relearning": tuned, "twin": self.inputs.identity(twin)}

    def purify(self, cell: Cell) -> dict[str, Any]:
        """Purify, and let the purified model and the twin relearn: ``curves`` and ``twin_curves`` are `Curve`s as JSON."""
        row = super().purify(cell)
        curves, twin_curves = self._curves(cell, load_classifier(str(self.folder(cell)))), self._twin_curves(cell)
        as_json = {"curves": curves, "twin_curves": twin_curves}
        return row | {name: json.dumps([asdict(curve) for curve in found]) for name, found in as_json.items()}

    def _curves(self, cell: Cell, model: PreTrainedModel) -> list[Curve]:
        attack, images = self.inputs.attack(cell.victim), self._tuning_images(cell)
        return relearn(model.to(PartialState().device), attack, images, self.inputs.test, **self.grid.relearning())

    def _tuning_images(self, cell: Cell) -> RawImages:
        """Of those that the cell's retain set leaves."""
        _, rest = retain_split(self.inputs.held_out, count=self.grid.retain[cell.retain]["count"], seed=cell.seed)
        return RawImages.from_dataset(retain_split(rest, count=self.grid.tuning_images, seed=0)[0])

    def _twin_curves(self, cell: Cell) -> list[Curve]:
        key = (cell.victim, cell.retain, cell.seed)
        if key not in self._twins:
            self._twins[key] = self._curves(cell, self.inputs.model(self.inputs.twin(cell.victim)))
        return self._twins[key]

    @cached_property
    def _twins(self) -> dict[tuple[str, str, int], list[Curve]]:
        return {}
