"""What a grid file says, and the images and victims that it names."""

from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from datasets import Dataset
from transformers import PreTrainedModel

from ..attacks import Attack, from_description, load_attack
from ..data.images import RawImages
from ..data.labels import retain_indices
from ..data.load import LoadedImages
from ..defenses import defence as load_defence
from ..files import sha256
from ..models import load_classifier
from ..models.checkpoint_files import defining_files
from ..options.arguments import DataArguments, ModelArguments
from ..options.parser import check_types, read_yaml
from ..publishing.manifest import VICTIM_FILE
from ..victims.record import check_files, read_record, recorded_images
from ..victims.train import images_digest
from .retain import RetainSet
from .tables import UNTOUCHED

TWIN = "twin"  # the victim of a group that was trained without a trigger: its ASR is the floor
# The options that choose which images of a data set a victim was trained on.
DRAW = ("train_split", "retain_count", "retain_fraction", "retain_balanced", "retain_seed")


@dataclass
class Grid:
    """One grid; the keys of its YAML file.

    Args:
        output_dir: Where cells, ``results.parquet``, tables and plots go.
        dataset_name: Images, see `load_images`.
        dataset_config: Its configuration, where it has several.
        victims: Folders below ``victims_dir`` that ``make_victim.py --set`` made, as ``GROUP/NAME``; or, for checkpoints of
            other people, per name the options of `ModelArguments` and ``attack``. Give the ``revision`` of a Hub id: what its
            branch holds may change without a cell being made anew.
        defences: Per name ``defence`` (a key of `d3_hf.defenses.DEFENCES`) and options of its Config; entries with the same
            ``curve`` are joined by a line in the plot of ACC against ASR, in their order.
        class_map: See `DataArguments`, where other people's checkpoints, all alike, count their classes in another order.
        victims_dir: See ``victims``.
        retain: Per name one retain set, see `RetainSet`. Default 5 % of CIFAR-10, 2,500 images.
        held_out: Training images that no victim has seen, from which every retain set is drawn: the victims' ``retain_count``.
        retain_from_test: Draw retain sets from so many test images instead and measure on the others only: where the network
            that the victims continue has seen all training images, and so knows those that are held out by heart.
        seeds: Each draws a retain set and seeds the defence.
        test_images: Measure on so many test images, drawn as ``max_test_images`` of `DataArguments`; all if null.
        common: Options that all defences share.
        watch_images: While a defence trains, measure ASR at the end of each epoch on so many of the images that are measured
            on, drawn likewise; the clock and the pass meter stop meanwhile. Not at all if null.
        save_models: Keep each purified model in its cell's folder, for ``recipes/figures.py``.

    Raises:
        ValueError: No victim, defence, seed or retain set, or one that is no mapping; a checkpoint of other people lacks one of
            its two entries or has an option that `ModelArguments` has not; ``test_images`` or ``watch_images`` below 1; an
            unknown defence or a wrong key, or one that is called as the tables call the untouched models; or a retain set is
            larger than ``held_out``, or see `RetainSet`.
    """

    of_encoders: ClassVar[bool] = False  # which form of a defence's name is meant

    output_dir: str
    dataset_name: str
    victims: list[str] | dict[str, dict[str, Any]]
    defences: dict[str, dict[str, Any]]
    dataset_config: str | None = None
    class_map: dict | str | None = None
    victims_dir: str = "outputs/victims"
    retain: dict[str, dict[str, Any]] = field(default_factory=lambda: {"5 %": {"count": 2500}})
    held_out: int = 7500
    retain_from_test: int | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    test_images: int | None = None
    common: dict[str, Any] = field(default_factory=dict)
    watch_images: int | None = None
    save_models: bool = False

    def __post_init__(self):
        for name in ("victims", "defences", "retain", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"the grid has no {name}")
        self._check_mappings()
        for name in ("test_images", "watch_images", "retain_from_test"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, or left out; got {count}")
        self._check_defences()
        self._check_retain()

    def _check_defences(self) -> None:
        for name, options in self.defences.items():
            if name in UNTOUCHED:
                raise ValueError(f"a defence cannot be called {name!r}: the tables call an untouched model so")
            config_class, _ = load_defence(options.get("defence", ""), self.of_encoders)
            known = {f.name for f in fields(config_class)} | {"defence", "curve"}
            if unknown := sorted((options | self.common).keys() - known):
                raise ValueError(f"defence {name!r}: {config_class.__name__} has no option {', '.join(unknown)}")

    def _check_retain(self) -> None:
        source = "held_out" if self.retain_from_test is None else "retain_from_test"
        most = getattr(self, source)
        for name, options in self.retain.items():
            if unknown := sorted(options.keys() - {f.name for f in fields(RetainSet)}):
                raise ValueError(f"retain set {name!r} has no option {', '.join(unknown)}")
            RetainSet(**options)
            if options.get("dataset_name") is None and options.get("count", 0) > most:
                raise ValueError(f"retain set {name!r}: count {options['count']} is more than {source}, {most}")

    def _check_mappings(self) -> None:
        for kind, entries in (("victim", self.victims), ("defence", self.defences), ("retain set", self.retain)):
            for name, options in entries.items() if isinstance(entries, dict) else ():
                if not isinstance(name, str):
                    raise ValueError(f"the name of {kind} {name!r} must be text: put it in quotes")
                if not isinstance(options, dict):
                    raise ValueError(f"{kind} {name!r} must be a mapping of options to values; got {options!r}")
        for name, options in self.victims.items() if isinstance(self.victims, dict) else ():
            if missing := sorted({"model_name_or_path", "attack"} - options.keys()):
                raise ValueError(f"victim {name!r} has no {' and no '.join(missing)}")
            if unknown := sorted(options.keys() - {f.name for f in fields(ModelArguments)} - {"attack"}):
                raise ValueError(f"victim {name!r} has no option {', '.join(unknown)}")

    def checkpoint_at(self, place: str) -> None:
        """Say where the grid's one checkpoint of other people lies.

        Raises:
            ValueError: The grid is not about one such checkpoint.
        """
        if not isinstance(self.victims, dict) or len(self.victims) != 1:
            raise ValueError("model_name_or_path is for a grid about one checkpoint of other people; see victims_dir")
        (options,) = self.victims.values()
        options["model_name_or_path"] = place


Kind = TypeVar("Kind", bound=Grid)


def read_grid(file: str, kind: type[Kind] = Grid, **given: Any) -> Kind:
    """Read a grid file; ``given`` options that are not None go over the file's.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A key is unknown or missing, its value is of another kind, or see the ``kind`` of grid.
    """
    options = read_yaml(file) | {name: value for name, value in given.items() if value is not None}
    known = {f.name for f in fields(kind)}
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"{file}: unknown key {', '.join(unknown)}; a grid has {', '.join(sorted(known))}")
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in options]:
        raise ValueError(f"{file}: {', '.join(missing)} missing")
    check_types([kind], options, file)
    return kind(**options)


class GridInputs:
    """The images and victims of a grid, loaded when they are first needed.

    Args:
        grid: The grid.
    """

    def __init__(self, grid: Grid):
        self.grid = grid
        # As `make_victim` draws them: what a victim holds out for the defender is what the grid may draw retain sets from.
        self.data = DataArguments(
            grid.dataset_name,
            grid.dataset_config,
            class_map=grid.class_map,
            retain_count=grid.held_out,
            max_test_images=grid.test_images,
        )
        self._retain_digests: dict[tuple[str, int], str | None] = {}

    @cached_property
    def _images(self) -> LoadedImages:
        images = self._load(self.data)
        if images.split == f"rest of {self.data.train_split}":
            raise ValueError(f"{self.grid.dataset_name} has no test or validation split, and victims were trained on the rest")
        return images

    @cached_property
    def _unseen(self) -> LoadedImages:
        count = self.grid.retain_from_test
        if count is None:
            return self._images
        return self._load(replace(self.data, train_split=self._images.split, retain_count=count))

    def _load(self, data: DataArguments) -> LoadedImages:
        return data.load(self.model(next(iter(self.grid.victims))).config if self.grid.class_map else None)

    @property
    def held_out(self) -> Dataset:
        """The images that retain sets are drawn from: training images that ``make_victim`` leaves out with ``retain_count`` as
        many, which no victim has seen, or test images."""
        return self._unseen.retain

    @property
    def test(self) -> RawImages:
        """The images to measure on."""
        return self._unseen.test

    @cached_property
    def watched(self) -> RawImages | None:
        """The images to watch ASR on, if any."""
        if self.grid.watch_images is None:
            return None
        count = min(self.grid.watch_images, len(self.test))
        return self.test.select(retain_indices(self.test.labels.numpy(), self.test.class_names, count=count))

    @cached_property
    def test_sha256(self) -> str:
        """Digest of the images to measure on."""
        return images_digest(self.test)

    @cached_property
    def rest_sha256(self) -> str:
        """Digest of the training images that are not held out: of all that a victim may have seen."""
        return images_digest(RawImages.from_dataset(self._images.rest))

    def retain_sha256(self, name: str, seed: int) -> str | None:
        """Digest of a retain set as it was drawn, before its transforms, which may round otherwise on another machine.

        None where it cannot be drawn, as when its own data set is not there: making the cell says why.
        """
        if (name, seed) not in self._retain_digests:
            drawn, held_out = replace(RetainSet(**self.grid.retain[name]), transform=None), self.held_out
            try:
                images = drawn.draw(held_out, seed)
                digest = images_digest(images if isinstance(images, RawImages) else RawImages.from_dataset(images))
            except (OSError, ValueError):
                digest = None
            self._retain_digests[name, seed] = digest
        return self._retain_digests[name, seed]

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
            ValueError: It has, or may have, seen images that the retain sets are drawn from; or its record is damaged.
        """
        if isinstance(self.grid.victims, dict):
            return {}
        folder = Path(self.grid.victims_dir) / victim
        if not self.is_made(victim):
            raise FileNotFoundError(f"no victim {folder}: make it first with d3-hf victim --set")
        record = read_record(folder)
        self._check_unseen(folder, record)
        return record

    def _check_unseen(self, folder: Path, record: dict[str, Any]) -> None:
        """Refuse a victim whose training images are not known to be those that the grid does not hold out.

        By the options first, which say how to put it right. They do not tell versions of a data set apart, the digest does; a
        record of an earlier version has none, so that the data set's last name must do.
        """
        ours, theirs, digest = asdict(self.data), asdict(recorded_images(record)), record.get("images_sha256")
        different = [f"{name} {theirs[name]}, here {ours[name]}" for name in DRAW if theirs[name] != ours[name]]
        if not digest and Path(theirs["dataset_name"] or "").name != Path(ours["dataset_name"]).name:
            different.append(f"dataset_name {theirs['dataset_name']}, here {ours['dataset_name']}")
        if different:
            raise ValueError(
                f"{folder} holds other images out than the grid ({'; '.join(different)}): set held_out or make another victim; "
                "the defence would see this one's own training images"
            )
        if digest and digest != self.rest_sha256:
            raise ValueError(
                f"{folder} was trained on other images than {self.grid.dataset_name} has besides those held out (images_sha256 "
                "differs): name the data set that it was made from, in the same version"
            )

    def is_made(self, victim: str) -> bool:
        """Whether the victim is there; other people's checkpoints are taken to be."""
        return isinstance(self.grid.victims, dict) or (Path(self.grid.victims_dir) / victim / VICTIM_FILE).is_file()

    def identity(self, victim: str) -> Any:
        """What tells a victim's weights from others, wherever they lie: SHA-256; name and revision, as given, of a Hub id."""
        record = self.record(victim)
        return record["weights_sha256"] if record else self._theirs[victim]

    @cached_property
    def _theirs(self) -> dict[str, dict[str, Any]]:
        """Other people's checkpoints, files by their digests: computed once, since every cell asks several times."""
        return {
            victim: options | {"model_name_or_path": content_of(options["model_name_or_path"])}
            for victim, options in self.grid.victims.items()
        }

    def model(self, victim: str) -> PreTrainedModel:
        """Load a victim.

        Raises:
            ValueError: Its weights or its attack are not those that its record speaks of, or see `record`.
        """
        if folder := self.folder(victim):
            check_files(folder, self.record(victim))
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


def content_of(place: str) -> Any:
    """Digests of the file or folder that `load_classifier` would read; a Hub id as it is."""
    path = Path(place).expanduser()
    if path.is_file():
        return sha256(path)
    if path.is_dir():
        return {file.name: sha256(file) for file in defining_files(path, place)}
    return place
