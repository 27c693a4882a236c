"""``d3-hf benchmark``, and what is run in the same way: the blind study of ``--defence auto``, the zoo of ``d3-hf check``, the
grids of encoders and of relearning."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import atomic_file, first_line
from ..options.parser import Parser
from ..options.recipes import find_recipe
from . import with_option

if TYPE_CHECKING:  # what does more than read options is loaded when they are read: help and mistakes answer sooner
    import pandas

    from ..benchmark.cells import Runner
    from ..benchmark.grid import Grid

# A column by which each kind of table is known, once a cell was measured.
MEASURED, STUDIED, READ, AGAIN = "accuracy_after", "recipes", "half", "beside_after"
PROBED, RELEARNED = "accuracy_linear", "curves"


@dataclass
class BenchmarkArguments:
    """Which grid, and which part of it.

    Args:
        grid: YAML file of the grid, see `Grid`, or the name of one of ``recipes/grids``; or the ``results.parquet`` of one, to
            write its tables and plots again.
        shard: ``i/n``: make the i-th of n shares of the cells, i from 0.
        only: Patterns of cells, as ``VICTIM | RETAIN | DEFENCE | SEED``; default all.
        dataset_name: Data set in place of the file's.
        dataset_config: Its configuration, in place of the file's.
        victims_dir: Folder of the victims in place of the file's.
        output_dir: Folder in place of the file's.
        watch_images: See `Grid`, in place of the file's.
        model_name_or_path: Where the one checkpoint of other people lies, in place of the file's.
    """

    grid: str = field(metadata={"help": "YAML file of the grid, its name in the recipes, or a results.parquet to show again."})
    shard: str = field(default="0/1", metadata={"help": "i/n: the i-th of n shares of the cells, i from 0."})
    only: list[str] = field(default_factory=lambda: ["*"], metadata={"help": "'VICTIM | RETAIN | DEFENCE | SEED' patterns."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set in place of the file's."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, in place of the file's."})
    victims_dir: str | None = field(default=None, metadata={"help": "Folder of the victims in place of the file's."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder in place of the file's."})
    watch_images: int | None = field(default=None, metadata={"help": "After each epoch measure ASR on so many test images."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "The one checkpoint of other people's."})


def run(argv: list[str]) -> dict[str, Any]:
    """Run ``GRID.yaml --option value ...``, see `run_benchmark`; ``rows`` are its, one mapping a row."""
    return {"rows": json.loads(run_benchmark(argv).to_json(orient="records"))}


def run_benchmark(argv: list[str]) -> "pandas.DataFrame":
    """Run ``GRID.yaml --option value ...``: make the missing cells, write ``results.parquet``, ``results.md`` and the plots.

    Returns:
        The rows.

    Raises:
        FileNotFoundError: The grid, a victim or an image folder is not there.
        ValueError: The grid does not hold together, the table is none of a benchmark, or more than one process was launched.
    """
    options = _options(argv)
    from ..benchmark.cells import Runner
    from ..benchmark.grid import Grid
    from ..benchmark.plots import draw
    from ..benchmark.tables import render

    rows, folder = _rows(options, Grid, Runner, MEASURED, "a benchmark")
    _show(render(rows), folder)
    draw(rows, folder)
    return rows


def run_study(argv: list[str]) -> "pandas.DataFrame":
    """Run ``GRID.yaml --option value ...``, a `StudyGrid`: make the missing cells, write ``results.parquet``,
    ``choices.parquet`` and ``results.md``.

    Returns:
        What the rules choose, see `choices`.

    Raises:
        FileNotFoundError: See `run_benchmark`.
        ValueError: See `run_benchmark`.
    """
    options = _options(argv)
    from ..benchmark.study import StudyGrid, StudyRunner
    from ..benchmark.study_tables import choices, render_study

    rows, folder = _rows(options, StudyGrid, StudyRunner, STUDIED, "a study")
    found, table = choices(rows), render_study(rows)
    if len(found):
        with atomic_file(folder / "choices.parquet") as beside:
            found.to_parquet(beside)
    _show(table, folder)
    return found


def run_zoo(argv: list[str]) -> "pandas.DataFrame":
    """Run ``GRID.yaml --option value ...``, a `ZooGrid`: read the models that are missing, write ``results.parquet``,
    ``verdicts.parquet``, ``results.md`` and ``measured.json``.

    Returns:
        What the test says of each model, of the twins and suspects of both halves, see `verdicts`.

    Raises:
        FileNotFoundError: The grid, the zoo or an image folder is not there.
        ValueError: See `run_benchmark` and `verdicts`.
    """
    options = _options(argv)
    from ..inspection.measured import write_measured
    from ..zoo.study import ZooGrid, ZooRunner
    from ..zoo.tables import render_zoo
    from ..zoo.verdicts import measured, verdicts

    rows, folder = _rows(options, ZooGrid, ZooRunner, READ, "a zoo")
    found, table = verdicts(rows), render_zoo(rows)
    if len(found):
        with atomic_file(folder / "verdicts.parquet") as beside:
            found.to_parquet(beside)
        write_measured(measured(found), folder / "measured.json")
    _show(table, folder)
    return found


def run_after(argv: list[str]) -> "pandas.DataFrame":
    """Run ``GRID.yaml --option value ...``, an `AfterGrid`: make the missing cells, write ``results.parquet`` and
    ``results.md``.

    Returns:
        The rows.

    Raises:
        FileNotFoundError: See `run_benchmark`; or the zoo's twins were not read.
        ValueError: See `run_benchmark`.
    """
    options = _options(argv)
    from ..zoo.after import AfterGrid, AfterRunner
    from ..zoo.after_tables import render_after

    rows, folder = _rows(options, AfterGrid, AfterRunner, AGAIN, "a study of what check says afterwards")
    _show(render_after(rows), folder)
    return rows


def run_encoders(argv: list[str]) -> "pandas.DataFrame":
    """Run ``GRID.yaml --option value ...``, an `EncoderGrid`: make the missing cells, write ``results.parquet`` and
    ``results.md``.

    Returns:
        The rows.

    Raises:
        FileNotFoundError: See `run_benchmark`.
        ValueError: See `run_benchmark`.
    """
    options = _options(argv)
    from ..benchmark.encoder_tables import render_encoders
    from ..benchmark.encoders import EncoderGrid, EncoderRunner

    rows, folder = _rows(options, EncoderGrid, EncoderRunner, PROBED, "a grid of encoders")
    _show(render_encoders(rows), folder)
    return rows


def run_relearning(argv: list[str]) -> "pandas.DataFrame":
    """Run ``GRID.yaml --option value ...``, a `RelearningGrid`: make the missing cells, write ``results.parquet`` and
    ``results.md``.

    Returns:
        The rows.

    Raises:
        FileNotFoundError: See `run_benchmark`; or the twin of a victim's group is not there.
        ValueError: See `run_benchmark`.
    """
    options = _options(argv)
    from ..benchmark.relearning_study import RelearningGrid, RelearningRunner
    from ..benchmark.relearning_tables import render_relearning

    rows, folder = _rows(options, RelearningGrid, RelearningRunner, RELEARNED, "a grid of relearning")
    _show(render_relearning(rows), folder)
    return rows


def _options(argv: list[str]) -> BenchmarkArguments:
    (options,) = Parser([BenchmarkArguments]).read(with_option("grid", argv))
    return options


def _rows(
    options: BenchmarkArguments, kind: "type[Grid]", runner_class: "type[Runner]", column: str, what: str
) -> "tuple[pandas.DataFrame, Path]":
    """The rows of all cells of a grid, those of the share made, and the grid's folder.

    ``column`` and ``what`` are for `_check_kind`, where a table is shown again.
    """
    from accelerate import PartialState

    from ..benchmark.cells import run_grid
    from ..benchmark.grid import read_grid

    if PartialState().num_processes > 1:
        raise ValueError("a cell runs in one process: launch one for each share of the grid, with --shard i/n")
    if options.grid.endswith(".parquet"):
        rows, folder = read_rows(Path(options.grid)), Path(options.grid).parent
        _check_kind(rows, folder, column, what)
        return rows, folder
    over = ("dataset_name", "dataset_config", "victims_dir", "output_dir", "watch_images")
    grid = read_grid(find_recipe(options.grid, "grid"), kind, **{name: getattr(options, name) for name in over})
    if options.model_name_or_path:
        grid.checkpoint_at(options.model_name_or_path)
    return run_grid(grid, options.shard, options.only, runner_class), Path(grid.output_dir)


def _check_kind(rows: "pandas.DataFrame", folder: Path, column: str, kind: str) -> None:
    """Refuse the table of another kind of run. One whose cells all failed is of any."""
    is_measured = len(rows) and not ("error" in rows and rows["error"].notna().all())
    if is_measured and column not in rows:
        raise ValueError(f"{folder} holds the table of another kind of run: name the results.parquet that {kind} wrote")


def _show(table: str, folder: Path) -> None:
    """Write the tables, and print them."""
    with atomic_file(folder / "results.md") as beside:
        beside.write_text(table + "\n")
    print(table)


def read_rows(file: Path) -> "pandas.DataFrame":
    """Read the ``results.parquet`` of a grid.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no parquet file, or not one of a benchmark.
    """
    import pandas

    if not file.is_file():
        raise FileNotFoundError(f"no table {file}: name the results.parquet in a grid's output_dir")
    try:
        rows = pandas.read_parquet(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no parquet file ({first_line(error)}): run the grid again") from error
    if missing := [name for name in ("victim", "retain", "defence") if name not in rows]:
        raise ValueError(f"{file} has no column {', '.join(missing)}: name the results.parquet that a benchmark wrote")
    return rows
