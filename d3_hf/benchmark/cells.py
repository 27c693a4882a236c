"""The cells of a grid: each a folder that exists and verifies or is made; and the loop over a shard of them."""

import hashlib
import json
import re
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from ..data.preprocessing import Preprocessing
from ..defenses import defence as load_defence
from ..evaluation.class_order import order_contradiction
from ..evaluation.measure import Measurement, measure, measure_trainer, results
from ..evaluation.metrics import Proportion
from ..files import atomic_file, sha256
from ..labels import check_labels
from ..publishing import manifest
from ..publishing.report import Report
from ..training.config import launched_precision
from ..training.schedule import numbers
from ..training.trainer import PurifyTrainer
from .grid import Grid, GridInputs
from .meters import PassMeter, hardware, peak_memory, reset_peak_memory
from .tables import MISSING, RATES, UNTOUCHED
from .watch import Watch

RESULTS = "results.parquet"
CELL = "cell.json"
OPTIONS_IN_FILES = ("accelerator_config", "fsdp_config", "deepspeed")  # a file of them, a mapping, or a mapping as JSON
PLACES = ("dataset_name", "dataset_config")  # of a retain set, which is known by its images


@dataclass(frozen=True)
class Cell:
    """One purification: a victim, a retain set, a defence, a seed, by their names in the grid."""

    victim: str
    retain: str
    defence: str
    seed: int

    def __str__(self) -> str:
        return f"{self.victim} | {self.retain} | {self.defence} | {self.seed}"


def cells_of(grid: Grid, shard: str = "0/1", only: Sequence[str] = ("*",)) -> list[Cell]:
    """The cells of the i-th of n shares, ``i/n``: every n-th cell from the i-th on, i from 0.

    Args:
        grid: The grid.
        shard: ``i/n``.
        only: Patterns of shell kind; a cell is ``VICTIM | RETAIN | DEFENCE | SEED`` to them.

    Raises:
        ValueError: ``shard`` is not of that form, or no cell matches ``only``.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    share, shares = map(int, found.groups()) if found else (0, 0)
    if share >= shares:
        raise ValueError(f"shard must be i/n with 0 <= i < n, as in 0/4 to 3/4; got {shard!r}")
    every = [
        Cell(victim, retain, defence, seed)
        for seed in grid.seeds
        for retain in grid.retain
        for defence in grid.defences
        for victim in grid.victims
    ]
    if not (chosen := [cell for cell in every if any(fnmatch(str(cell), pattern) for pattern in only)]):
        raise ValueError(f"--only {' '.join(only)} matches no cell; a cell is called, for instance, {str(every[0])!r}")
    return chosen[share::shares]


class Runner:
    """Makes cells.

    Args:
        grid: The grid; its images and victims are loaded when a cell needs them.
    """

    inputs_class: ClassVar[type[GridInputs]] = GridInputs

    def __init__(self, grid: Grid):
        self.grid, self.inputs, self.root = grid, self.inputs_class(grid), Path(grid.output_dir)

    def options(self, cell: Cell) -> dict[str, Any]:
        """What the grid says of the cell's defence, ``defence`` and options of its Config; the launcher may add a precision."""
        own = {name: value for name, value in self.grid.defences[cell.defence].items() if name != "curve"}
        options = self.grid.common | own
        return options | launched_precision(options)

    def spec(self, cell: Cell) -> dict[str, Any]:
        """All that defines what a cell computes; two cells with the same one are the same cell.

        Images and weights are known by their content, wherever they lie, and so is a file that an option names. Options have
        their defaults filled in, so that a cell that was made with other ones is not taken for this one. Versions and hardware
        are written into the row and not compared: each release of a package would throw away weeks of work, and which of them
        matters nobody knows beforehand.
        """
        config_class, _ = load_defence(self.grid.defences[cell.defence]["defence"], self.grid.of_encoders)
        own, declared = manifest.own_defaults(config_class), {f.name: f.default for f in fields(config_class)}
        given = {name: value for name, value in self.options(cell).items() if name in own or value != declared.get(name)}
        named = [n for n in OPTIONS_IN_FILES if isinstance(given.get(n), str) and not given[n].startswith("{")]
        given |= {name: sha256(Path(given[name])) for name in named if Path(given[name]).is_file()}
        drawn = self.grid.retain[cell.retain].items()
        spec = asdict(cell) | {
            "weights": self.inputs.identity(cell.victim),
            "options": own | given,
            "rules": numbers(),
            "retain_set": {name: value for name, value in drawn if value is not None and name not in PLACES},
            "retain_sha256": self.inputs.retain_sha256(cell.retain, cell.seed),
            "test_sha256": self.inputs.test_sha256,
        }
        return spec | ({"watch_images": self.grid.watch_images} if self.grid.watch_images else {})

    def folder(self, cell: Cell) -> Path:
        """Where a cell lies; its name ends in a digest of `spec`, so that a changed grid makes new cells beside the old."""
        names = "--".join(re.sub(r"[^\w.%=-]+", "_", name) for name in (cell.victim, cell.retain, cell.defence))
        return self.root / "cells" / f"{names}--{cell.seed}--{_digest(self.spec(cell))[:8]}"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """The row of a cell; None where it, or the model it should hold, was not made or is damaged.

        A cell that failed has a row with ``error``. One that an earlier version made, before PACC was measured, stays made; the
        tables show that it lacks PACC. Its model is gone as a rule, and making it again costs the whole purification.
        """
        folder = self.folder(cell)
        row = _verified(folder / CELL)
        if row is not None and self.grid.save_models and "error" not in row:
            weights = folder / SAFE_WEIGHTS_NAME
            return row if weights.is_file() and sha256(weights) == row.get("weights_sha256") else None
        return row

    def make(self, cell: Cell) -> dict[str, Any]:
        """Make a cell, or write down why it could not be made; returns its row."""
        content = {"spec": self.spec(cell)}
        try:
            row = self.purify(cell)
        except Exception as problem:  # whatever a method raises: the other cells go on
            row = asdict(cell) | {"error": f"{type(problem).__name__}: {problem}"}
            content["traceback"] = traceback.format_exc()
        _write(self.folder(cell) / CELL, content, row)
        return row

    def purify(self, cell: Cell) -> dict[str, Any]:
        """Purify the victim and return what was measured, as one flat row."""
        model, attack = self.inputs.model(cell.victim), self.inputs.attack(cell.victim)
        before = self.before(cell.victim, cell.victim)
        retain = self.inputs.retain(cell.retain, cell.seed)
        options = self.options(cell)
        config_class, trainer_class = load_defence(options.pop("defence"))
        # A cell that is made again replaces what the first time left.
        args = config_class(output_dir=str(self.folder(cell)), overwrite_output_dir=True, seed=cell.seed, **options)
        meter = PassMeter()
        with meter.counting(model):  # around the constructor too, which may copy the model
            trainer = trainer_class(model=model, args=args, train_dataset=retain)
            meter.forward = meter.backward = 0
            reset_peak_memory()
            watch = Watch(trainer, self.inputs.watched, attack, meter)
            trainer.add_callback(watch)
            trainer.train()
        seconds, peak = watch.seconds, peak_memory()
        after = measure_trainer(trainer, self.inputs.test, attack)
        last = next((log for log in reversed(trainer.state.log_history) if "clean_loss" in log), {})
        row = asdict(cell) | {"method": trainer.method, "attack": attack.name, "network": network_of(model)}
        row |= {"curve": self.grid.defences[cell.defence].get("curve"), "retain_n": len(retain)}
        row |= (found := results(before, after, self.inputs.test.labels))
        row |= {"seconds_training": seconds, "seconds_measuring": after.seconds, "peak_memory_mib": peak}
        if watch.images is not None:
            series = [*watch.series, (seconds, after.asr.value)]  # for methods without epochs, and what they do after these
            row |= {"asr_over_time": json.dumps(series)}
        row |= {"forward_images": meter.forward, "backward_images": meter.backward}
        row |= {"clean_loss": last.get("clean_loss"), "distance": last.get("distance")} | made_by(trainer, model)
        if self.grid.save_models:
            trainer.record(Report(results=found, trigger=attack.describe(), n_images=len(self.inputs.test)))
            trainer.save_model()
            row["weights_sha256"] = sha256(self.folder(cell) / SAFE_WEIGHTS_NAME)
        return row

    def summary(self, row: dict[str, Any]) -> str:
        """What a cell that was measured came to, in a line."""
        rates = ", ".join(f"{name} {100 * row[key]:.1f}" for name, key in RATES.items())
        return f"{rates}, {row['seconds_training']:.0f} s"

    def before(self, model_of: str, attack_of: str) -> Measurement:
        """Measure an untouched model under a victim's trigger, once; by what is compared and what is not see `spec`.

        What an earlier version measured without PACC is measured again: unlike a cell it costs one pass. One that did not keep
        the predictions, which only ``accuracy_drop`` needs, is taken as it is.
        """
        name = re.sub(r"[^\w.-]+", "_", f"{model_of}--{attack_of}")
        attack = self.inputs.attack(attack_of)
        weights, planted = self.inputs.identity(model_of), self.inputs.identity(attack_of)
        images = self.inputs.test_sha256
        spec = {"weights": weights, "planted": planted, "attack": attack.describe(), "test_sha256": images}
        file = self.root / "before" / f"{name}--{_digest(spec)[:8]}.json"
        counts = _verified(file)
        if counts and "pacc" in counts:
            rates = ("accuracy", "asr", "ra", "pacc", "trigger_drift")
            shares = {key: counts[key] and Proportion(**counts[key]) for key in rates}
            kept = counts.get("predictions") and np.array(counts["predictions"])
            return Measurement(**shares, seconds=counts["seconds"], forward_images=counts["forward_images"], predictions=kept)
        model, test = self.inputs.model(model_of), self.inputs.test
        preprocessing = Preprocessing.from_processor(model.image_processor)
        check_labels(test.class_names, model.config)
        found = measure(model, test, preprocessing, attack, device=PartialState().device)
        if said := order_contradiction(found.predictions, test.labels, test.class_names, model.config):
            raise ValueError(said)
        _write(file, {"spec": spec}, asdict(replace(found, predictions=found.predictions.tolist(), triggered_predictions=None)))
        return found

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each cell of the whole grid that was made or failed, and for each victim and twin that was measured."""
        made = []
        for cell in cells_of(self.grid):
            if self.inputs.is_made(cell.victim) and (row := self.read(cell)):
                yield row
                made += [] if "error" in row else [cell.victim]
        for victim in dict.fromkeys(made):
            yield from self.untouched(victim)

    def untouched(self, victim: str) -> Iterator[dict[str, Any]]:
        """A row for a victim, and one for its twin if there is one."""
        for name, model_of in zip(UNTOUCHED, (victim, self.inputs.twin(victim)), strict=True):
            if model_of:
                found = self.before(model_of, victim)
                yield {"victim": victim, "defence": name} | results(found, found) | {"der": None}


def run_grid(
    grid: Grid, shard: str = "0/1", only: Sequence[str] = ("*",), runner_class: type[Runner] = Runner
) -> pandas.DataFrame:
    """Make the cells of one share that are not there yet, and collect all that exist.

    A cell that exists and verifies is skipped, one that is damaged or failed is made again; shares need no coordination, they
    may run at the same time on machines that share the folder. Each writes the table of all cells that exist when it ends, and
    into it how many cells of the grid it lacks: those that others still make, and what ``only`` leaves out.

    Args:
        grid: The grid.
        shard: ``i/n``, see `cells_of`.
        only: Patterns, see `cells_of`.
        runner_class: What makes the cells.

    Returns:
        The content of ``results.parquet``: one row a cell, and the untouched models under ``defence`` "victim" and
        "twin without backdoor". ``missing_cells`` is the same in every row: how many cells of the grid have none.

    Raises:
        FileNotFoundError: A victim is not there.
        ValueError: See `cells_of` and `GridInputs.record`.
    """
    runner, chosen = runner_class(grid), cells_of(grid, shard, only)
    todo = [cell for cell in chosen if "error" in (runner.read(cell) or {"error": None})]
    for victim in dict.fromkeys(cell.victim for cell in chosen):
        if twin := runner.inputs.twin(victim):
            runner.inputs.record(twin)  # refused before the work, not when its floor is measured for the table
    failed = 0
    try:
        for cell in (bar := tqdm(todo, desc="Cells", unit="cell")):
            bar.set_postfix_str(str(cell))
            row = runner.make(cell)
            failed += "error" in row
            said = f"failed: {row['error']}" if "error" in row else runner.summary(row)
            bar.write(f"{cell} | {said}")
    finally:  # also after Ctrl-C: what was made is in the table
        frame = _collect(runner)
    if failed:
        print(f"{failed} of {len(todo)} cells failed; their errors are in the table, their tracebacks in {CELL} of each folder")
    return frame


def _collect(runner: Runner) -> pandas.DataFrame:
    """Write the rows of all cells that exist, if there are any, and say how many are missing."""
    rows, total = list(runner.rows()), len(cells_of(runner.grid))
    missing = total - sum(row["defence"] not in UNTOUCHED for row in rows)
    frame = pandas.DataFrame(rows)
    if rows:
        frame[MISSING] = missing
        with atomic_file(runner.root / RESULTS) as beside:
            frame.to_parquet(beside)
    if missing:
        print(f"{missing} of the grid's {total} cells are not made yet and missing from the tables; run it again to make them")
    return frame


def made_on() -> dict[str, Any]:
    """The columns that say where a row was made: ``hardware``, and a ``version_*`` of each package."""
    return {"hardware": hardware()} | {f"version_{name}": version for name, version in manifest.versions().items()}


def made_by(trainer: PurifyTrainer, model: PreTrainedModel) -> dict[str, Any]:
    """`made_on`, and as JSON the arguments as they were settled, how it ran, and where the model came from."""
    facts = {"arguments": manifest.arguments_of(trainer.args), "execution": trainer.execution}
    facts["source"] = manifest.source_facts(model)
    return made_on() | {name: json.dumps(found) for name, found in facts.items()}


def network_of(model: PreTrainedModel) -> str:
    """What the tables call a network: its timm name, or the type of a transformers one."""
    return getattr(model.config, "architecture", None) or model.config.model_type


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write(file: Path, content: dict, row: dict) -> None:
    """Write what was measured, ``row``, with its digest, and what else there is to say."""
    with atomic_file(file) as beside:
        beside.write_text(json.dumps(content | {"row": row, "sha256": _digest(row)}, indent=1) + "\n")


def _verified(file: Path) -> dict[str, Any] | None:
    """The row that `_write` wrote; None if the file is not there or is damaged."""
    try:
        content = json.loads(file.read_text())
        row, digest = content["row"], content["sha256"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # TypeError: JSON, but no object
        return None
    return row if digest == _digest(row) else None
