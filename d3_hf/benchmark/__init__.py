"""The benchmark: a grid of victims x retain sets x defences x seeds, its tables and plots."""

from .cells import Cell, run_grid
from .grid import Grid, read_grid
from .plots import draw
from .tables import render

__all__ = ["Cell", "Grid", "draw", "read_grid", "render", "run_grid"]
