"""What a grid file says, and the images and victims that it names."""

from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from ..attacks import Attack, from_description, load_attack
from ..data.images import RawImages
from ..data.load import load_images, retain_split
from ..defenses import defence as load_defence
from ..files import sha256
from ..models import load_classifier
from ..options.arguments import ModelArguments
from ..options.parser import check_types, read_yaml
from ..victims.record import read_record
from ..victims.train import VICTIM_FILE
from .retain import RetainSet

TWIN = "twin"  # the victim of a group that was trained without a trigger: its ASR is the floor


@dataclass
class Grid:
    """One grid; the keys of its YAML file.

    Args:
        output_dir: Where cells, ``results.parquet``, tables and plots go.
        dataset_name: Images, see `load_images`.
        victims: Folders below ``victims_dir`` that ``make_victim.py --set`` made, as ``GROUP/NAME``; or, for checkpoints of
            other people, per name the options of `ModelArguments` and ``attack``.
        defences: Per name ``defence`` (a key of `d3_hf.defenses.DEFENCES`) and options of its Config; entries with the same
            ``curve`` are joined by a line in the plot of ACC against ASR, in their order.
        victims_dir: See ``victims``.
        retain: Per name one retain set, see `RetainSet`. Default 5 % of CIFAR-10, 2,500 images.
        held_out: Training images that no victim has seen, from which every retain set is drawn: the victims' ``retain_count``.
        seeds: Each draws a retain set and seeds the defence.
        test_images: Measure on the first so many test images; all if null.
        common: Options that all defences share.
        watch_images: While a defence trains, measure ASR on the first so many test images at the end of each epoch; the clock
            and the pass meter stop meanwhile. Not at all if null.
        save_models: Keep each purified model in its cell's folder, for ``recipes/figures.py``.

    Raises:
        ValueError: No victim, defence, seed or retain set; ``watch_images`` below 1; an unknown defence or a wrong key; or a
            retain set is larger than ``held_out``.
    """

    output_dir: str
    dataset_name: str
    victims: list[str] | dict[str, dict[str, Any]]
    defences: dict[str, dict[str, Any]]
    victims_dir: str = "outputs/victims"
    retain: dict[str, dict[str, Any]] = field(default_factory=lambda: {"5 %": {"count": 2500}})
    held_out: int = 7500
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    test_images: int | None = None
    common: dict[str, Any] = field(default_factory=dict)
    watch_images: int | None = None
    save_models: bool = False

    def __post_init__(self):
        for name in ("victims", "defences", "retain", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"the grid has no {name}")
        if self.watch_images is not None and self.watch_images < 1:
            raise ValueError(f"watch_images must be at least 1, or left out; got {self.watch_images}")
        for name, options in self.defences.items():
            config_class, _ = load_defence(options.get("defence", ""))
            known = {f.name for f in fields(config_class)} | {"defence", "curve"}
            if unknown := sorted((options | self.common).keys() - known):
                raise ValueError(f"defence {name!r}: {config_class.__name__} has no option {', '.join(unknown)}")
        for name, options in self.retain.items():
            if unknown := sorted(options.keys() - {f.name for f in fields(RetainSet)}):
                raise ValueError(f"retain set {name!r} has no option {', '.join(unknown)}")
            if options.get("dataset_name") is None and options.get("count", 0) > self.held_out:
                raise ValueError(f"retain set {name!r}: count {options['count']} is more than held_out, {self.held_out}")

    def checkpoint_at(self, place: str) -> None:
        """Say where the grid's one checkpoint of other people lies.

        Raises:
            ValueError: The grid is not about one such checkpoint.
        """
        if not isinstance(self.victims, dict) or len(self.victims) != 1:
            raise ValueError("model_name_or_path is for a grid about one checkpoint of other people; see victims_dir")
        (options,) = self.victims.values()
        options["model_name_or_path"] = place


def read_grid(file: str, **given: Any) -> Grid:
    """Read a grid file; ``given`` options that are not None go over the file's.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A key is unknown or missing, its value is of another kind, or see `Grid`.
    """
    options = read_yaml(file) | {name: value for name, value in given.items() if value is not None}
    known = {f.name for f in fields(Grid)}
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"{file}: unknown key {', '.join(unknown)}; a grid has {', '.join(sorted(known))}")
    if missing := [name for name in ("output_dir", "dataset_name", "victims", "defences") if name not in options]:
        raise ValueError(f"{file}: {', '.join(missing)} missing")
    check_types([Grid], options, file)
    return Grid(**options)


class GridInputs:
    """The images and victims of a grid, loaded when they are first needed.

    Args:
        grid: The grid.
    """

    def __init__(self, grid: Grid):
        self.grid = grid

    @cached_property
    def _images(self) -> tuple[Dataset, Dataset]:
        images = load_images(self.grid.dataset_name)
        return images["train"], images["test"]

    @cached_property
    def test(self) -> RawImages:
        """The test images."""
        count = self.grid.test_images
        return RawImages.from_dataset(self._images[1].select(range(count)) if count else self._images[1])

    @cached_property
    def watched(self) -> RawImages | None:
        """The test images to watch ASR on, if any."""
        count = self.grid.watch_images
        return self.test.select(range(min(count, len(self.test)))) if count else None

    @cached_property
    def held_out(self) -> Dataset:
        """The training images that no victim has seen: those that ``make_victim`` leaves out with ``retain_count`` as many."""
        return retain_split(self._images[0], count=self.grid.held_out, seed=0)[0]

    def retain(self, name: str, seed: int) -> Dataset | RawImages:
        """The retain set ``name`` of one seed."""
        return RetainSet(**self.grid.retain[name]).draw(self.held_out, seed)

    def folder(self, victim: str) -> Path | None:
        """The folder of a victim of this project; None for other people's checkpoints. Raises as `record`."""
        return Path(self.grid.victims_dir) / victim if self.record(victim) else None

    def record(self, victim: str) -> dict[str, Any]:
        """What ``victim.json`` says; empty for other people's checkpoints.

        Raises:
            FileNotFoundError: The victim is not there.
            ValueError: It has seen images that the retain sets are drawn from, or its record is damaged.
        """
        if isinstance(self.grid.victims, dict):
            return {}
        folder = Path(self.grid.victims_dir) / victim
        if not self.is_made(victim):
            raise FileNotFoundError(f"no victim {folder}: make it first with recipes/make_victim.py --set")
        record = read_record(folder)
        count, seed = record["recipe"].get("retain_count"), record["recipe"]["retain_seed"]
        if (count, seed) != (self.grid.held_out, 0):
            raise ValueError(
                f"{folder} holds {count} images out (seed {seed}), the grid {self.grid.held_out} (seed 0): set held_out, or "
                "the defence would see the victim's own training images"
            )
        return record

    def is_made(self, victim: str) -> bool:
        """Whether the victim is there; other people's checkpoints are taken to be."""
        return isinstance(self.grid.victims, dict) or (Path(self.grid.victims_dir) / victim / VICTIM_FILE).is_file()

    def identity(self, victim: str) -> Any:
        """What tells a victim's weights from others, wherever they lie: SHA-256, or name and revision of a Hub id."""
        record = self.record(victim)
        return record["weights_sha256"] if record else self._theirs[victim]

    @cached_property
    def _theirs(self) -> dict[str, dict[str, Any]]:
        """Other people's checkpoints, a file by its digest: computed once, since every cell asks several times."""
        found = {}
        for victim, options in self.grid.victims.items():
            file = Path(options["model_name_or_path"])
            found[victim] = options | {"model_name_or_path": sha256(file)} if file.is_file() else options
        return found

    def model(self, victim: str) -> PreTrainedModel:
        """Load a victim."""
        if folder := self.folder(victim):
            return load_classifier(str(folder))
        options = {name: value for name, value in self.grid.victims[victim].items() if name != "attack"}
        return ModelArguments(**options).load()

    def attack(self, victim: str) -> Attack:
        """The attack of a victim, its trigger included."""
        if folder := self.folder(victim):
            return load_attack(folder)
        return from_description(self.grid.victims[victim]["attack"])

    def twin(self, victim: str) -> str | None:
        """The network of the victim's group that was trained without a trigger, if it was made."""
        twin = f"{victim.rpartition('/')[0]}/{TWIN}"
        return twin if isinstance(self.grid.victims, list) and self.is_made(twin) else None
