"""What `check` says of victims of a zoo once they are purified: a benchmark whose models are read before and after.

A cell is purified and measured as in a benchmark. The victim and the purified model are then read by `check`'s own function, on
the same images and beside the same twins as in the zoo's study. The twins were not purified: a purified model may stand out of
them for having been trained once more, so that an alarm afterwards says less than one before.
"""

import json
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
from .study import CALIBRATE, CHECK, ZooGrid, ZooRunner, settings_of, target_of
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
            FileNotFoundError: Not all models of that half were read.
        """
        if seed not in self._nulls:  # which the name of each cell's folder asks for
            rows, zoo = self._zoo_rows, self.zoo.grid
            chosen = rows[(rows["retain"] == self.grid.images) & (rows["seed"] == seed)] if len(rows) else rows
            wanted = {victim for victim in zoo.victims if zoo.half_of(victim) == CALIBRATE}
            missing = wanted - set(chosen["victim"] if len(chosen) else ())
            found = None if missing else null_of(chosen)
            if found is None:
                lacks = f"{len(missing)} of {len(wanted)} models" if missing else "all twins"
                raise FileNotFoundError(
                    f"{lacks} of {zoo.calibrate}, {self.grid.images}, seed {seed}, were not read in {zoo.output_dir}: "
                    f"run recipes/assurance_study.py with {self.grid.zoo} first"
                )
            self._nulls[seed] = found
        return self._nulls[seed]

    def spec(self, cell: Cell) -> dict[str, Any]:
        """As the base class, with what is read, on which images and beside which twins."""
        null = self.null(cell.seed)
        beside = sorted(twin.weights_sha256 for twin in null.twins)
        read_on = {"images": self.grid.images, "images_sha256": null.kind.images_sha256}
        return super().spec(cell) | {"signals": settings_of(self.zoo.signals), "beside": beside} | read_on

    def purify(self, cell: Cell) -> dict[str, Any]:
        """Purify, and read both models: columns ``alarm_*``, ``p_*``, ``farthest_*`` and ``beside_*``, before and after.

        Both are judged by the signals that could be read on either. ``target`` is the name of the attacker's class, None of an
        all-to-all backdoor.
        """
        row, attack = super().purify(cell), self.inputs.attack(cell.victim)
        images = self.zoo.images(replace(cell, retain=self.grid.images, defence=CHECK))
        models = {"before": self.inputs.model(cell.victim), "after": load_classifier(str(self.folder(cell)))}
        found = {when: self._said(cell, images, model) for when, model in models.items()}
        common = [name for name in found["before"].compared if name in found["after"].compared]
        if not common:
            raise ValueError(f"no signal could be read on {cell.victim}, on its purified model and on all twins")
        for when, said in found.items():
            said = replace(said, findings={name: said.findings[name] for name in common})
            row |= {f"alarm_{when}": said.verdict.alarm, f"p_{when}": said.p, f"beside_{when}": said.class_beside_twins}
            row[f"farthest_{when}"] = float(said.class_z.sum(0).max())
        return row | {"signals": json.dumps(sorted(common)), "target": target_of(attack, images.class_names)}

    def _said(self, cell: Cell, images: RawImages, model: PreTrainedModel) -> Suspicion:
        null, model = self.null(cell.seed), model.to(PartialState().device)
        said = suspicion_of(model, images, null=null, alarm_at=ALARM_AT, signals=self.zoo.signals)
        if said.warnings:  # that the images are others than the twins'
            raise ValueError(f"{cell.victim}: {'; '.join(said.warnings)}")
        return said
