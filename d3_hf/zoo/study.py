"""The study behind the hit and false-alarm rates of `check`: every model of a zoo, read as `check` reads a suspicious one.

A zoo is a set of victims and twins in two groups: twins of the one, ``calibrate``, are the null, and models of the other,
``judge``, the suspects. Who chooses a signal, a test or a setting by what a table says looks at the first alone, and what was
looked at belongs there. A cell is one model on one set of images and one seed, which draws them: test images, as `check`
takes them, since even what the models were fine-tuned from has seen those that they hold out. It is read without twins, by
the function that `check` calls; what its p would be beside the null follows from the rows (`verdicts`). Only when it has been
read, ACC and ASR are measured.
"""

import inspect
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from accelerate import PartialState
from transformers import PreTrainedModel

from ..assurance.finding import Finding
from ..assurance.signals import SIGNALS, Signal
from ..attacks import Attack
from ..benchmark.cells import Cell, Runner, cells_of, made_on, network_of
from ..benchmark.grid import Grid
from ..benchmark.study import group_of
from ..data.images import RawImages
from ..data.labels import retain_indices
from ..evaluation.measure import measure, rates
from ..files import first_line
from ..inspection.suspicion import finding_facts, suspicion_of, weights_digest
from ..models.source import preprocessing_of
from ..options.recipes import find_recipe
from ..victims.sets import read_set

CHECK = "check"  # what stands in place of a defence
CALIBRATE, JUDGE = "calibrate", "judge"


@dataclass
class ZooGrid(Grid):
    """A grid whose cells are models that are read, and not purified.

    Args:
        victims: Left out: they are the set's, those of the two groups.
        defences: Left out: there is none.
        retain: Per name ``count``, how many of the test images are read, and nothing else. `check` takes 500.
        set: The zoo, a set of victims: a YAML file, or its name in the recipes.
        calibrate: Group of the set whose twins are the null.
        judge: Group of the set whose models are the suspects.

    Raises:
        ValueError: See `Grid` and `read_set`; ``victims``, ``defences``, ``common``, ``watch_images``, ``save_models`` or
            ``class_map`` are given; the set has no such group, or both are one; ``retain`` asks for other images, or for more
            than ``test_images``.
    """

    victims: list[str] = field(default_factory=list)
    defences: dict[str, dict[str, Any]] = field(default_factory=dict)
    set: str = "zoo"
    calibrate: str = "zoo-calibrate"
    judge: str = "zoo-judge"

    def __post_init__(self):
        names = list(read_set(find_recipe(self.set, "set of victims")))
        groups = dict.fromkeys(map(group_of, names))
        if self.calibrate == self.judge or not {self.calibrate, self.judge} <= groups.keys():
            raise ValueError(f"calibrate and judge must be two groups of {self.set}; it has {', '.join(groups)}")
        names = [name for name in names if group_of(name) in (self.calibrate, self.judge)]
        if self.victims not in ([], names) or self.defences not in ({}, {CHECK: {}}):
            raise ValueError("the models of a zoo are those of its set, and none is purified: leave victims and defences out")
        self.victims, self.defences = names, {CHECK: {}}
        super().__post_init__()
        if self.common or self.watch_images is not None or self.save_models or self.class_map is not None:
            raise ValueError("nothing is trained in a zoo: leave common, watch_images, save_models and class_map out")

    def _check_defences(self) -> None:
        """There are none."""

    def _check_retain(self) -> None:
        for name, options in self.retain.items():
            if options.keys() != {"count"} or options["count"] > (self.test_images or options["count"]):
                raise ValueError(f"retain set {name!r} of a zoo is a count of test images, at most test_images; got {options}")

    def half_of(self, victim: str) -> str:
        """``calibrate`` or ``judge``."""
        return CALIBRATE if group_of(victim) == self.calibrate else JUDGE


class ZooRunner(Runner):
    """Makes the cells of a zoo.

    Args:
        grid: The zoo's grid.
    """

    grid: ZooGrid
    signals: ClassVar[Mapping[str, Signal]] = SIGNALS

    def spec(self, cell: Cell) -> dict[str, Any]:
        """The model, the images, and the signals with their settings; their code is not compared.

        A model that is not there, or whose record is damaged, is another cell than the same one when it is whole.
        """
        spec = asdict(cell) | {"retain_set": self.grid.retain[cell.retain], "test_sha256": self.inputs.test_sha256}
        spec |= {"signals": settings_of(self.signals)}
        try:
            return spec | {"weights": self.inputs.identity(cell.victim)}
        except (OSError, ValueError) as reason:  # of this model alone: images that are not there were found before
            return spec | {"unread": first_line(reason)}

    def images(self, cell: Cell) -> RawImages:
        """What is read: so many test images, drawn by the cell's seed."""
        test = self.inputs.test
        drawn = retain_indices(test.labels.numpy(), test.class_names, **self.grid.retain[cell.retain], seed=cell.seed)
        return test.select(drawn)

    def purify(self, cell: Cell) -> dict[str, Any]:
        """Read the model as `check` does, and then measure it, as one flat row.

        ``findings`` is JSON: by signal `finding_facts` and ``seconds``. ``kind`` is `Kind` as JSON. ``attack``, ``label_map``,
        ``poison_ratio`` and ``target``, the name of the class, are None without a backdoor, the last also of all-to-all ones.
        """
        model = self.inputs.model(cell.victim).to(PartialState().device)
        planted, attack = self.inputs.record(cell.victim)["planted"], self._attack(cell.victim)
        row = asdict(cell) | {"network": network_of(model)} | made_on() | self.reading(model, self.images(cell))
        row |= {"attack": None, "label_map": None, "target": None, "poison_ratio": None}
        if attack is not None:
            target = target_of(attack, self.inputs.test.class_names)
            row |= {"attack": attack.name, "label_map": attack.label_map, "target": target}
            row |= {"poison_ratio": planted["poison_ratio"]}
        return row | rates(measure(model, self.inputs.test, preprocessing_of(model), attack))

    def reading(self, model: PreTrainedModel, images: RawImages) -> dict[str, Any]:
        """What `check` reads of a model on images: the columns of a row from ``retain_n`` to ``seconds_reading``."""
        started, seconds = time.perf_counter(), dict[str, float]()
        read = suspicion_of(model, images, signals={key: _timed(key, signal, seconds) for key, signal in self.signals.items()})
        all_seconds = time.perf_counter() - started
        findings = {key: finding_facts(found) | {"seconds": seconds.get(key)} for key, found in read.findings.items()}
        row = {"retain_n": len(images), "kind": json.dumps(asdict(read.null.kind)), "weights_sha256": weights_digest(model)}
        return row | {"findings": json.dumps(findings), "seconds_reading": all_seconds}

    def _attack(self, victim: str) -> Attack | None:
        return self.inputs.attack(victim) if self.inputs.record(victim)["planted"] else None

    def summary(self, row: dict[str, Any]) -> str:
        """What a cell came to, in a line."""
        findings = json.loads(row["findings"]).items()
        said = [f"{name} {found['suspect_class']} {found['statistic']:.3g}" for name, found in findings if "scores" in found]
        planted = f"{row['attack']}, ASR {100 * row['asr']:.1f}, target {row['target']}" if row["attack"] else "no backdoor"
        return f"{planted}: {', '.join(said)}; {row['seconds_reading']:.0f} s"

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each cell that was made or failed, with the model's ``half``."""
        for cell in cells_of(self.grid):
            if row := self.read(cell):
                yield row | {"half": self.grid.half_of(cell.victim)}


def target_of(attack: Attack, class_names: Sequence[str]) -> str | None:
    """The name of the one class that triggered images get; None where there is not one."""
    return None if attack.label_map == "all-to-all" else class_names[attack.target_label]


def settings_of(signals: Mapping[str, Signal]) -> dict[str, dict[str, Any]]:
    """By signal the defaults of what it can be told; batches excepted, which only fit memory."""
    every = {name: inspect.signature(signal).parameters.values() for name, signal in signals.items()}
    return {
        name: {one.name: one.default for one in parameters if one.default is not one.empty and one.name != "batch_size"}
        for name, parameters in every.items()
    }


def _timed(name: str, signal: Signal, seconds: dict[str, float]) -> Signal:
    """The signal, which leaves its seconds behind where it could be read."""

    def read(model: PreTrainedModel, images: RawImages) -> Finding:
        started = time.perf_counter()
        found = signal(model, images)
        seconds[name] = time.perf_counter() - started
        return found

    return read
