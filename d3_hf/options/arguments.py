"""Options about the model, the images and the attack, and how to load what they name."""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .parser import read_json

if TYPE_CHECKING:  # each takes seconds: what a command loads beyond its options it imports when it needs it
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..attacks import Attack
    from ..data.images import RawImages
    from ..data.load import LoadedImages

logger = logging.getLogger(__name__)

NO_IMAGES = "no images: give --dataset_name (a Hub data set, a folder, a parquet file, or digits)"
VALIDATION = ("validation", "val")  # measured on where there is no test split
RETAIN_FRACTION = 0.05  # paper
BY_NAME = "names"  # in place of a class map: classes that are called alike are the same


@dataclass
class ModelArguments:
    """Which checkpoint, for `load_classifier`.

    Args:
        model_name_or_path: Hub id, folder, ``.safetensors`` file or state dict.
        architecture: Network of a bare state dict: a timm name, d3_hf's own networks included.
        class_names: Class names in the order of the logits, where the checkpoint does not carry them.
        image_mean, image_std: Normalisation of a bare state dict, three numbers in units of [0, 1] each.
        image_size: Side of the square input in pixels, where the checkpoint does not say it, or under a new head.
        revision: Branch, tag or commit of a Hub id.
        model_args: Arguments of the architecture's constructor, of a new network too (on the command line as JSON).
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id, folder or file of the checkpoint."})
    architecture: str | None = field(default=None, metadata={"help": "Network of a bare state dict, a timm name."})
    class_names: list[str] | None = field(default=None, metadata={"help": "Class names in the order of the logits."})
    image_mean: list[float] | None = field(default=None, metadata={"help": "Mean of each channel, in [0, 1]."})
    image_std: list[float] | None = field(default=None, metadata={"help": "Standard deviation of each channel, in [0, 1]."})
    image_size: int | None = field(default=None, metadata={"help": "Side of the square input in pixels."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub id."})
    model_args: dict | str | None = field(default=None, metadata={"help": "Arguments of the architecture, as JSON."})

    def __post_init__(self):
        if isinstance(self.model_args, str):
            self.model_args = read_json(self.model_args, "model_args")

    def load(self, new_head: list[str] | None = None) -> "PreTrainedModel":
        """Load the checkpoint, under an untrained head for these classes if they are given; see `load_classifier`."""
        from ..models import load_classifier

        given = {name: value for name, value in asdict(self).items() if value is not None}
        if "class_names" in given:  # TrainingArguments has a label_names that means something else
            given["label_names"] = given.pop("class_names")
        return load_classifier(given.pop("model_name_or_path"), **given, new_head=new_head)

    def load_encoder(self) -> "PreTrainedModel":
        """Load the encoder; see `load_encoder`. A ValueError where ``class_names`` are given: it has no classes."""
        from ..models import load_encoder

        given = {name: value for name, value in asdict(self).items() if value is not None}
        if "class_names" in given:
            raise ValueError("class_names are a classifier's, and an encoder has no classes: leave them out")
        return load_encoder(given.pop("model_name_or_path"), **given)

    def load_clip(self) -> "PreTrainedModel":
        """Load the whole CLIP; see `load_clip`. A ValueError where an option is given that it settles itself."""
        from ..models import load_clip

        given = {name: value for name, value in asdict(self).items() if value is not None}
        name, revision = given.pop("model_name_or_path"), given.pop("revision", None)
        if given:
            raise ValueError(f"{name}: {', '.join(sorted(given))} cannot be set for a CLIP, which settles it itself")
        return load_clip(name, revision=revision)

    def of(self, place: str, revision: str | None = None) -> "ModelArguments":
        """These options for another checkpoint of the same kind of network: those that its kind of source has a use for.

        Args:
            place: Hub id, folder or file.
            revision: Of a Hub id, in place of these options' own.

        Raises:
            FileNotFoundError: It looks like a path, and nothing is there.
        """
        from ..models.load import OPTIONS, kind_of

        useful = OPTIONS[kind_of(place)] - {"revision"} | {"class_names"}
        kept = {name: value for name, value in asdict(self).items() if name in useful}
        return ModelArguments(place, revision=revision, **kept)


@dataclass
class DataArguments:
    """Which images, for `load_images` and `retain_split`.

    Args:
        dataset_name: Hub data set, folder of images or parquet files, parquet file, or ``digits``.
        dataset_config: Name of one of the data set's configurations, needed where it has several and none is its default.
        train_split, test_split: Splits to draw the retain set from and to measure on. Where there is no ``test``, the default,
            ``validation`` or ``val`` is measured on, and without these the images outside the retain set.
        image_column, label_column: Only needed when several columns qualify.
        class_map: Where the data set's classes are in another order than the checkpoint's, or under other names: ``names`` for
            classes that are called alike; or a JSON file with a mapping from each of the data set's classes to the name or
            number of one of the checkpoint's, see `map_classes`.
        retain_fraction, retain_count: Size of the retain set, one of the two; default 5 % (paper).
        retain_balanced: The same number of images of each class.
        retain_seed: Seed of the draw.
        max_test_images: Measure on so many test images, drawn with seed 0: the first ones of a folder are of one class.

    Raises:
        FileNotFoundError: There is no such file as ``class_map``.
        ValueError: ``max_test_images`` is below 1, or ``retain_seed`` below 0, or ``class_map`` is no such file.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Hub data set, folder, parquet file or `digits`."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set, if it has several."})
    train_split: str = field(default="train", metadata={"help": "Split that the retain set is drawn from."})
    test_split: str = field(default="test", metadata={"help": "Split to measure on."})
    image_column: str | None = field(default=None, metadata={"help": "Image column, if several qualify."})
    label_column: str | None = field(default=None, metadata={"help": "Label column, if several qualify."})
    class_map: dict | str | None = field(
        default=None, metadata={"help": "Which of the model's classes each of the data set's is: `names`, or a JSON file."}
    )
    retain_fraction: float | None = field(
        default=None, metadata={"help": "Share of the split that is the retain set; 0.05 unless one of the two is given."}
    )
    retain_count: int | None = field(default=None, metadata={"help": "Number of images in the retain set."})
    retain_balanced: bool = field(default=False, metadata={"help": "Draw the same number of each class."})
    retain_seed: int = field(default=0, metadata={"help": "Seed of the retain set."})
    max_test_images: int | None = field(default=None, metadata={"help": "Measure on so many test images, drawn at random."})

    def __post_init__(self):
        if self.max_test_images is not None and self.max_test_images < 1:
            raise ValueError(f"max_test_images must be at least 1; got {self.max_test_images}")
        if self.retain_seed < 0:
            raise ValueError(f"retain_seed must be at least 0; got {self.retain_seed}")
        if isinstance(self.class_map, str) and self.class_map != BY_NAME:
            self.class_map = _read_class_map(Path(self.class_map).expanduser())

    @property
    def is_default_size(self) -> bool:
        """Whether neither ``retain_fraction`` nor ``retain_count`` is given, so that 5 % are drawn."""
        return self.retain_fraction is None and self.retain_count is None

    def load(self, config: "PreTrainedConfig | None" = None, needs_test: bool = True) -> "LoadedImages":
        """Load the images.

        Args:
            config: Of the model whose classes ``class_map`` speaks of.
            needs_test: Whether it is a mistake if the retain set is all there is.

        Returns:
            The retain set, the rest of its split and what is measured on; which split that is gets logged where it is not
            ``test_split``. Other splits are not looked at.

        Raises:
            ValueError: No data set is named, a split that is named is not there, nothing is left to measure on and something
                has to be, there is a ``class_map`` and no model, or see `load_images`, `map_classes`, `retain_split` and
                `RawImages.from_dataset`.
        """
        from datasets import DatasetDict

        from ..data import sources
        from ..data.images import RawImages
        from ..data.labels import labels_of, map_classes, retain_indices
        from ..data.load import LoadedImages, load_images, retain_split

        if self.dataset_name is None:
            raise ValueError(NO_IMAGES)
        if self.class_map is not None and config is None:
            raise ValueError("class_map is for the classes of a checkpoint: a new network or head takes the data set's own")
        found = sources.open_source(self.dataset_name, configuration=self.dataset_config)
        measured = self._separate_split(list(found))
        used = [self.train_split, *([measured] if measured else [])]
        images = load_images(DatasetDict({name: found[name] for name in used}), self.image_column, self.label_column)
        if self.class_map is not None:
            images = map_classes(images, config, None if self.class_map == BY_NAME else self.class_map)
        split = images[self.train_split]
        fraction = RETAIN_FRACTION if self.is_default_size else self.retain_fraction
        retain, rest = retain_split(split, fraction, self.retain_count, self.retain_balanced, self.retain_seed)
        if not measured and len(rest) == 0:
            if not needs_test:
                return LoadedImages(retain, rest, None, self.dataset_name, self.dataset_config, None)
            raise ValueError(
                f"{self.dataset_name} has no split {self.test_split!r} and the retain set is all of {self.train_split!r}: "
                "nothing is left to measure on; retain fewer"
            )
        name, test = (measured, images[measured]) if measured else (f"rest of {self.train_split}", rest)
        if name != self.test_split:
            logger.warning("%s has no separate split %r: measuring on its %s", self.dataset_name, self.test_split, name)
        if self.max_test_images is not None and self.max_test_images < len(test):
            test = test.select(retain_indices(labels_of(test), test.features["label"].names, count=self.max_test_images))
        return LoadedImages(retain, rest, RawImages.from_dataset(test), self.dataset_name, self.dataset_config, name)

    def _separate_split(self, there: list[str]) -> str | None:
        """The split to measure on, of those that are there; None where that is the rest of the retain set's."""
        named = [self.train_split] if self.test_split == "test" else [self.train_split, self.test_split]
        if missing := [name for name in named if name not in there]:
            raise ValueError(f"{self.dataset_name} has no split {missing[0]!r}; it has {', '.join(there)}")
        return next((name for name in (self.test_split, *VALIDATION) if name in there and name != self.train_split), None)


@dataclass
class ProbeArguments:
    """What an encoder is measured by, see `measure_encoder`.

    Args:
        probe_count: Labelled images that the probes are trained on, drawn from what the retain set leaves of its split; half of
            that at most.
    """

    probe_count: int = field(default=2000, metadata={"help": "Labelled images that probes are trained on."})

    def __post_init__(self):
        if self.probe_count < 2:
            raise ValueError(f"probe_count must be at least 2; got {self.probe_count}")

    def draw(self, rest: "Dataset") -> tuple["RawImages", "RawImages"]:
        """Of the images that the retain set leaves, those to train probes on and the others, see `split_probe`.

        Raises:
            ValueError: It leaves fewer than two.
        """
        from ..data.images import RawImages
        from ..evaluation.encoders import split_probe

        if len(rest) < 2:
            raise ValueError("the retain set is all there is, and probes are trained on what it leaves: retain fewer")
        return split_probe(RawImages.from_dataset(rest), self.probe_count)


def _read_class_map(file: Path) -> dict[str, str | int]:
    if not file.is_file():
        raise FileNotFoundError(f"--class_map: no file {file}; give one in JSON, or `{BY_NAME}`")
    return read_json(file.read_text(encoding="utf-8"), "class_map")


@dataclass
class AttackArguments:
    """The trigger that is planted or measured.

    Args:
        attack: Name of an attack; a mapping with ``name`` and its parameters (on the command line as JSON); or, for a trigger
            that was learned, the folder of the victim that holds it.
    """

    attack: dict | str | None = field(
        default=None, metadata={"help": "Attack: a name, JSON with name and parameters, or a victim's folder."}
    )

    def __post_init__(self):
        if isinstance(self.attack, str):
            named = not self.attack.startswith("{")
            self.attack = {"name": self.attack} if named else read_json(self.attack, "attack")

    @property
    def folder(self) -> Path | None:
        """The victim's folder that is named in place of an attack, if one is."""
        from ..attacks import ATTACKS, CLIP_ATTACKS, ENCODER_ATTACKS

        name = str((self.attack or {}).get("name"))
        if (self.attack or {}).keys() != {"name"} or name in ATTACKS | ENCODER_ATTACKS | CLIP_ATTACKS:
            return None
        return folder if (folder := Path(name).expanduser()).is_dir() else None

    def load(self) -> "Attack | None":
        """The attack, with what it has learned where a folder is named; None where none is.

        Raises:
            FileNotFoundError: The folder holds no attack.
            ValueError: See `from_description` and `load_attack`.
        """
        from ..attacks import from_description, load_attack

        if not self.attack:
            return None
        return load_attack(self.folder) if self.folder else from_description(self.attack)
