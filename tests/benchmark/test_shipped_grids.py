"""The grids that come with the package: each holds together, and is about victims that its sets, or configurations, make."""

import pytest
from places import RECIPES

from d3_hf.benchmark.cells import cells_of
from d3_hf.benchmark.encoders import EncoderGrid
from d3_hf.benchmark.grid import Grid, read_grid
from d3_hf.benchmark.relearning_study import RelearningGrid
from d3_hf.benchmark.study import StudyGrid
from d3_hf.victims.sets import read_set
from d3_hf.zoo.after import AfterGrid
from d3_hf.zoo.study import ZooGrid

KINDS = {"auto": StudyGrid, "zoo": ZooGrid, "after": AfterGrid, "encoders": EncoderGrid, "relearning": RelearningGrid}
GRIDS = sorted((RECIPES / "grids").glob("*.yaml"))


@pytest.mark.parametrize("file", GRIDS, ids=lambda file: file.stem)
def test_shipped_grids_are_about_shipped_victims(file):
    grid = read_grid(str(file), KINDS.get(file.stem.partition("_")[0], Grid))
    assert cells_of(grid)
    if isinstance(grid, EncoderGrid):
        shipped = [config.stem for config in (RECIPES / "configs").glob("*.yaml")]
    else:
        shipped = [name for victims in RECIPES.glob("*.yaml") for name in read_set(str(victims))]
    assert isinstance(grid.victims, dict) or set(grid.victims) <= set(shipped)
