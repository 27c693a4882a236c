"""Compare defences on victims made for the purpose: a grid of attacks x seeds x defences.

    accelerate launch recipes/compare.py recipes/configs/proof_resnet20.yaml --dataset_name uoft-cs/cifar10

Every victim is a folder and every purified cell a JSON file below output_dir; what exists is skipped, so an interrupted grid
goes on where it stopped, and `--shard 0/4 ... 3/4` share one grid. The table is printed and written to table.md.
"""

import json
import sys
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from datasets import Dataset
from transformers import HfArgumentParser, PreTrainedModel, set_seed

from d3_hf.attacks import from_description, load_attack
from d3_hf.data import RawImages, load_images, retain_split
from d3_hf.defenses import defence as load_defence
from d3_hf.evaluation import Measurement, Proportion, measure, measure_trainer, results
from d3_hf.models import load_classifier, new_model
from d3_hf.preprocessing import Preprocessing
from d3_hf.victims import VICTIM_FILE, VictimConfig, train_victim

TWIN = "twin"  # trained like the victims on images without a trigger: its ASR is the floor


@dataclass
class GridArguments:
    """One grid.

    Args:
        config: YAML file of the grid; its keys are those of `Grid`.
        dataset_name: Data set in place of the file's.
        model_name_or_path: Checkpoint that the victims continue from, or the one suspicious model, in place of the file's.
        output_dir: Folder in place of the file's.
        shard: ``i/n``: do the i-th of n shares of the cells.
    """

    config: str = field(metadata={"help": "YAML file of the grid."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set in place of the file's."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint in place of the file's."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder in place of the file's."})
    shard: str = field(default="0/1", metadata={"help": "i/n: the i-th of n shares."})


@dataclass
class Grid:
    """What a grid file says.

    Args:
        output_dir: Where victims, cells and table go.
        dataset_name: See `load_images`.
        attacks: Per name ``attack`` (a description) and ``poison_ratio``; with ``victims`` a list of its folders.
        defences: Per name ``defence`` (a name of `d3_hf.defenses.DEFENCES`) and options of its Config.
        seeds: Each seed draws a retain set and a warm start. The victims are the same for all.
        retain_count: Images in the retain set.
        test_images: Measure on the first so many test images; all if null.
        model: Arguments of `load_classifier`, or of a new network (``architecture`` without ``source``).
        victims: Folder of victims that ``make_victim.py --set`` made, in place of ``model`` and ``victim``.
        victim: Training options of the victims, a `VictimConfig`; ``null`` if the model is the victim already.
        common: Options that all defences share.
    """

    output_dir: str
    dataset_name: str
    attacks: dict[str, dict] | list[str]
    defences: dict[str, dict]
    model: dict[str, Any] = field(default_factory=dict)
    victims: str | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    retain_count: int = 2500
    test_images: int | None = None
    victim: dict[str, Any] | None = None
    common: dict[str, Any] = field(default_factory=dict)


class Comparison:
    """Runs a grid's cells."""

    def __init__(self, grid: Grid):
        self.grid, self.folder = grid, Path(grid.output_dir)
        images = load_images(grid.dataset_name)
        # Victims never see the rows that any seed's retain set is drawn from.
        self.held_out, self.seen = retain_split(images["train"], count=grid.retain_count * len(grid.seeds), seed=0)
        test = images["test"]
        self.test = RawImages.from_dataset(test.select(range(grid.test_images)) if grid.test_images else test)
        self.names = self.test.class_names
        self.victims = Path(grid.victims) if grid.victims else self.folder / "victims"
        if grid.victims:
            self.attacks = {name: load_attack(self.victims / name) for name in grid.attacks}
        else:
            self.attacks = {name: from_description(options["attack"]) for name, options in grid.attacks.items()}

    def retain(self, seed: int) -> Dataset:
        """The retain set of one seed, out of the rows that no victim has seen."""
        return retain_split(self.held_out, count=self.grid.retain_count, seed=seed)[0]

    def victim(self, name: str) -> PreTrainedModel:
        """Load a victim, made if it is not there yet, or the grid's own model where that is the victim already."""
        options = dict(self.grid.model)
        folder = self.victims / name
        if self.grid.victims:
            return load_classifier(str(folder))
        if self.grid.victim is None:
            return load_classifier(options.pop("source"), **options)
        if not (folder / "done").is_file():
            set_seed(0)
            start = (
                load_classifier(options.pop("source"), **options) if "source" in options else new_model(self.names, **options)
            )
            args = VictimConfig(output_dir=str(folder), **self.grid.victim)
            ratio = 0 if name == TWIN else self.grid.attacks[name]["poison_ratio"]
            train_victim(start, RawImages.from_dataset(self.seen), self.test, self.attacks.get(name), args, ratio)
            (folder / "done").touch()
        return load_classifier(str(folder))

    def before(self, name: str, attack: str, model: PreTrainedModel) -> Measurement:
        """Measure an untouched model once and remember it."""
        file = self.folder / "before" / f"{name}-{attack}.json"
        if file.is_file():
            return read_measurement(json.loads(file.read_text()))
        record = self.victims / name / VICTIM_FILE
        measured = json.loads(record.read_text())["measured"] if name == attack and record.is_file() else {}
        if measured.get("n_images") == len(self.test):  # it was measured when it was made
            found = measurement_of(measured["victim"])
        else:
            preprocessing = Preprocessing.from_processor(model.image_processor)
            found = measure(model, self.test, preprocessing, self.attacks[attack])
        write_json(file, asdict(found))
        return found

    def cell(self, attack: str, seed: int, defence: str) -> None:
        """Purify one victim with one defence and write what was measured."""
        file = self.folder / "cells" / f"{attack}-{seed}-{defence}.json"
        if file.is_file():
            return
        model = self.victim(attack)
        before = self.before(attack, attack, model)
        options = dict(self.grid.defences[defence])
        config_class, trainer_class = load_defence(options.pop("defence"))
        args = config_class(output_dir=str(self.folder / "runs"), seed=seed, **(self.grid.common | options))
        trainer = trainer_class(model=model, args=args, train_dataset=self.retain(seed))
        trained = trainer.train()
        after = measure_trainer(trainer, self.test, self.attacks[attack])
        facts = trainer.facts()
        last = next((log for log in reversed(trainer.state.log_history) if "clean_loss" in log), {})
        row = {"attack": attack, "seed": seed, "defence": defence} | results(before, after)
        row |= {"seconds": trained.metrics["train_runtime"], "clean_loss": last.get("clean_loss")}
        row |= {"distance": last.get("distance"), "arguments": facts["arguments"], "versions": facts["versions"]}
        write_json(file, row)

    def floor(self) -> None:
        """Measure every trigger on the twin: what the trigger does to a model without a backdoor."""
        if self.grid.victim is not None or self.grid.victims:
            twin = self.victim(TWIN)
            for attack in self.attacks:
                self.before(TWIN, attack, twin)

    def table(self) -> str:
        """Mean over seeds per attack and defence, with the range of ASR, and the twin's floor."""
        rows = [json.loads(file.read_text()) for file in sorted((self.folder / "cells").glob("*.json"))]
        lines = [
            "| attack | defence | ACC | ASR | RA | DER | seeds | seconds |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for attack in self.attacks:
            cells = [row for row in rows if row["attack"] == attack]
            if not cells:
                continue
            for name in (attack, TWIN):
                file = self.folder / "before" / f"{name}-{attack}.json"
                if file.is_file():
                    found = read_measurement(json.loads(file.read_text()))
                    label = "victim" if name == attack else "twin without backdoor"
                    lines.append(line(attack, label, [results(found, found)], "before"))
            for defence in self.grid.defences:
                if chosen := [row for row in cells if row["defence"] == defence]:
                    lines.append(line(attack, defence, chosen, "after"))
        return "\n".join(lines)


def read_measurement(counts: dict) -> Measurement:
    """The measurement that `asdict` wrote."""
    rates = {key: Proportion(**counts[key]) for key in ("accuracy", "asr", "ra")}
    return Measurement(**rates, seconds=counts["seconds"], forward_images=counts["forward_images"])


def measurement_of(rates: dict) -> Measurement:
    """The measurement behind the rates in ``victim.json``."""
    found = {key: Proportion(round(rates[key] * rates[f"{key}_n"]), rates[f"{key}_n"]) for key in ("accuracy", "asr", "ra")}
    return Measurement(**found, seconds=0.0, forward_images=0)


def line(attack: str, name: str, rows: list[dict], when: str) -> str:
    """One row of the table; percent."""

    def cell(key: str) -> str:
        values = [100 * row[f"{key}_{when}"] for row in rows]
        spread = f" ({min(values):.1f}..{max(values):.1f})" if len(values) > 1 else ""
        return f"{mean(values):.1f}{spread}"

    last = (
        [f"{mean(r['der'] for r in rows):.3f}", len(rows), f"{mean(r['seconds'] for r in rows):.0f}"]
        if when == "after"
        else ["", len(rows), ""]
    )
    return "| " + " | ".join(map(str, [attack, name, cell("accuracy"), cell("asr"), cell("ra"), *last])) + " |"


def write_json(file: Path, content: dict) -> None:
    """Write beside, then rename: a cell is whole or absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".partial")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.rename(file)


def main() -> None:
    """Run the share of the grid that the command line names."""
    (arguments,) = HfArgumentParser(GridArguments).parse_args_into_dataclasses(["--config", *sys.argv[1:]])
    options = yaml.safe_load(Path(arguments.config).read_text())
    if arguments.model_name_or_path:
        options["model"]["source"] = arguments.model_name_or_path
    for name in ("dataset_name", "output_dir"):
        options[name] = getattr(arguments, name) or options[name]
    comparison = Comparison(Grid(**options))
    grid = comparison.grid
    share, shares = map(int, arguments.shard.split("/"))

    def mine(*key) -> bool:
        return zlib.crc32(repr(key).encode()) % shares == share

    if mine(TWIN):
        comparison.floor()
    for seed in grid.seeds:
        for defence in grid.defences:
            for attack in grid.attacks:
                if mine(attack, seed, defence):
                    comparison.cell(attack, seed, defence)
    table = comparison.table()
    (comparison.folder / "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
