"""What `check` says of victims of a zoo once they are purified: a benchmark whose models are read before and after.

A cell is purified and measured as in a benchmark. The victim and the purified model are then read by `check`'s own function, on
the same images and beside the same twins as in the zoo's study. The twins were not purified: a purified model may stand out of
them for having been trained once more, so that an alarm afterwards says less than one before.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pandas
from accelerate import PartialState
from transformers import PreTrainedModel

from ..assurance.calibration import ALARM_AT
from ..benchmark.cells import Cell, Runner
from ..benchmark.grid import Grid, read_grid
from ..data.images import RawImages
from ..inspection.null import Null
from ..inspection.suspicion import Suspicion, suspicion_of
from ..models import load_classifier
from ..options.recipes import find_recipe
from .study import CHECK, ZooGrid, ZooRunner, settings_of
from .verdicts import null_of, read


@dataclass
class AfterGrid(Grid):
    """A grid of victims that are read before and after.

    Args:
        zoo: The zoo's grid, a YAML file or its name in the recipes; its study has been run.
        images: Which of the zoo's sets of images is read, by its name there.

    Raises:
        ValueError: See `Grid`; models are not kept; the zoo has no such images, or not each of ``seeds``.
        FileNotFoundError: There is no such grid.
    """

    save_models: bool = True
    zoo: str = "zoo"
    images: str = "500 images"

    def __post_init__(self):
        super().__post_init__()
        if not self.save_models:
            raise ValueError("purified models are read, and so kept: leave save_models out")
        zoo = self.zoo_grid
        if self.images not in zoo.retain or not set(self.seeds) <= set(zoo.seeds):
            known = f"{', '.join(zoo.retain)}; seeds {', '.join(map(str, zoo.seeds))}"
            raise ValueError(f"images and seeds must be some of {self.zoo}, which has {known}")

    @cached_property
    def zoo_grid(self) -> ZooGrid:
        """The zoo's grid, on the images and victims of this one."""
        places = {"dataset_name": self.dataset_name, "dataset_config": self.dataset_config, "victims_dir": self.victims_dir}
        return read_grid(find_recipe(self.zoo, "grid"), ZooGrid, **places)


class AfterRunner(Runner):
    """Makes the cells of a grid whose models are read before and after.

    Args:
        grid: The grid.
    """

    grid: AfterGrid

    def __init__(self, grid: AfterGrid):
        super().__init__(grid)
        self.zoo, self._nulls = ZooRunner(grid.zoo_grid), dict[int, Null]()

    @cached_property
    def _zoo_rows(self) -> pandas.DataFrame:
        return read(pandas.DataFrame(self.zoo.rows()))

    def null(self, seed: int) -> Null:
        """The twins of the zoo's half `calibrate`, as its study read them.

        Raises:
            FileNotFoundError: They were not read.
        """
        if seed not in self._nulls:  # which the name of each cell's folder asks for
            rows = self._zoo_rows
            chosen = rows[(rows["retain"] == self.grid.images) & (rows["seed"] == seed)] if len(rows) else rows
            if not len(chosen) or (found := null_of(chosen)) is None:
                raise FileNotFoundError(f"no twins of {self.grid.zoo} were read: run recipes/assurance_study.py first")
            self._nulls[seed] = found
        return self._nulls[seed]

    def spec(self, cell: Cell) -> dict[str, Any]:
        """As the base class, with what is read beside which twins."""
        beside = sorted(twin.weights_sha256 for twin in self.null(cell.seed).twins)
        return super().spec(cell) | {"signals": settings_of(self.zoo.signals), "images": self.grid.images, "beside": beside}

    def purify(self, cell: Cell) -> dict[str, Any]:
        """Purify, and read both models: columns ``alarm_*``, ``p_*``, ``suspect_*`` and ``farthest_*``, before and after.

        ``z_after`` is how far the class that stood out before stands out afterwards.
        """
        row = super().purify(cell)
        images = self.zoo.images(replace(cell, retain=self.grid.images, defence=CHECK))
        before = self._said(cell, images, self.inputs.model(cell.victim))
        after = self._said(cell, images, load_classifier(str(self.folder(cell))))
        for when, said in (("before", before), ("after", after)):
            row |= {f"alarm_{when}": said.verdict.alarm, f"p_{when}": said.p, f"suspect_{when}": said.suspect_class}
            row[f"farthest_{when}"] = float(said.class_z.sum(0).max())
        suspect = before.null.kind.classes.index(before.suspect_class)
        return row | {"z_after": float(after.class_z.sum(0)[suspect]), "twins": len(before.null.twins)}

    def _said(self, cell: Cell, images: RawImages, model: PreTrainedModel) -> Suspicion:
        null, model = self.null(cell.seed), model.to(PartialState().device)
        said = suspicion_of(model, images, null=null, alarm_at=ALARM_AT, signals=self.zoo.signals)
        if not said.compared:
            raise ValueError(f"no signal could be read on {cell.victim}, before and after")
        return said
