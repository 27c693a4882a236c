"""Options of the recipes: a YAML file first, the command line over it; and the dataclasses they fill."""

import json
import logging
import sys
import types
from argparse import SUPPRESS, Action
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from inspect import get_annotations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

if TYPE_CHECKING:  # each takes seconds: what a command loads beyond its options it imports when it needs it
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedModel

    from .attacks import Attack
    from .data import RawImages

logger = logging.getLogger(__name__)

# What most runs need of a training's options, of which there are nearly two hundred.
FREQUENT = {
    *("model_name_or_path", "architecture", "image_mean", "image_std", "class_names"),
    *("dataset_name", "retain_fraction", "retain_count", "test_split", "max_test_images", "attack", "poison_ratio"),
    *("output_dir", "overwrite_output_dir", "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("horizontal_flip", "batch_norm", "sam_rho", "seed", "bf16", "save_strategy", "resume_from_checkpoint"),
    *("max_accuracy_drop", "min_class_accuracy", "push_to_hub", "hub_model_id", "hub_create_pr"),
}
NO_IMAGES = "no images: give --dataset_name (a Hub data set, a folder, a parquet file, or digits)"
VALIDATION = ("validation", "val")  # measured on where there is no test split


class Parser(HfArgumentParser):
    """`HfArgumentParser` that raises a ValueError of one line where argparse prints every option and exits.

    The help of a training has a line for each of `FREQUENT` and what its method declares; ``--help_all`` prints all options.

    Args:
        dataclass_types: Dataclasses with disjoint field names.
        kwargs: Further arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, dataclass_types: list[type], **kwargs):
        super().__init__(dataclass_types, usage=SUPPRESS, **kwargs)
        # By name: importing the class would take seconds of every command's help.
        trainings = [kind for kind in self.dataclass_types if "TrainingArguments" in (base.__name__ for base in kind.__mro__)]
        hidden = tuple(start for kind in trainings for start in getattr(kind, "hidden_options", ()))
        for action in self._actions:
            if action.dest.startswith(hidden):
                action.help = SUPPRESS
        self._shown = {action.dest for action in self._actions if action.help != SUPPRESS}
        if trainings:
            self._shown &= FREQUENT.union({"help"}, *map(get_annotations, trainings))
            self.add_argument("--help_all", action=_WholeHelp, nargs=0, dest="help", default=SUPPRESS, help="show every option")

    def format_help(self) -> str:
        """A line for each option that is shown, with its default."""
        shown = [a for a in self._actions if a.dest in self._shown and not a.option_strings[0].startswith("--no_")]
        return "\n".join(["options:", *map(_help_line, shown)]) + "\n"

    def format_whole_help(self) -> str:
        """What argparse would print."""
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Raise what argparse complains about."""
        raise ValueError(f"{message}; --help lists the options")

    def read(self, argv: list[str]) -> tuple:
        """Parse ``argv`` into one instance of each dataclass.

        Raises:
            ValueError: An option is unknown, lacks its value or has one of another kind, or a dataclass refuses it.
        """
        _, unknown = self.parse_known_args(argv)
        if unknown:
            near = get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, 1)
            advice = f"did you mean {near[0]}?" if near else "--help lists the options"
            raise ValueError(f"unknown argument {unknown[0]!r}: {advice}")
        return self.parse_args_into_dataclasses(argv, look_for_args_file=False)


def _help_line(action: Action) -> str:
    """An option's name and choices, the first sentence of its help, and its default where that says something."""
    names = action.option_strings if action.dest == "help" else action.option_strings[:1]  # without the alias with dashes
    choices = f" {{{','.join(map(str, action.choices))}}}" if action.choices else ""
    default = f" [{action.default}]" if action.default and action.default != SUPPRESS else ""
    return f"  {', '.join(names) + choices:<32} {action.help.partition('. ')[0].rstrip('.')}{default}"


class _WholeHelp(Action):
    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_whole_help(), end="")
        parser.exit()


def parse_arguments(
    dataclass_types: list[type], argv: list[str] | None = None, defaults: dict[str, Any] | None = None
) -> tuple:
    """Parse ``[CONFIG.yaml] --option value ...`` into one instance of each dataclass.

    Args:
        dataclass_types: Dataclasses with disjoint field names.
        argv: Arguments without the program's name; default ``sys.argv[1:]``.
        defaults: Options in place of a YAML file's.

    Returns:
        The instances, in the order of the types.

    Raises:
        FileNotFoundError: The YAML file does not exist.
        ValueError: The YAML file is no mapping, or an option is unknown or its value of another kind.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(dataclass_types)
    where = "the options given"
    if defaults is None and argv and argv[0].endswith((".yaml", ".yml")):
        where = argv.pop(0)
        defaults = read_yaml(where)
    if unknown := sorted((defaults or {}).keys() - {action.dest for action in parser._actions}):
        near = get_close_matches(unknown[0], [action.dest for action in parser._actions], 1)
        advice = f"did you mean {near[0]}?" if near else "--help lists the options"
        raise ValueError(f"{where}: unknown option{'s' * (len(unknown) > 1)} {', '.join(unknown)}; {advice}")
    check_types(dataclass_types, defaults or {}, where)
    parser.set_defaults(**defaults or {})
    return parser.read(argv)


def check_types(dataclass_types: list[type], options: dict[str, Any], where: str) -> None:
    """Raise a ValueError for an option, all of them fields of the dataclasses, whose value is of another kind than declared."""
    hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
    for name, value in options.items():
        if not _fits(value, hints[name]):
            # Not the value of a list or mapping: aliases make it endless.
            found = f"a {type(value).__name__}" if isinstance(value, list | dict) else f"{value!r}, a {type(value).__name__}"
            wanted = hints[name] if get_args(hints[name]) else hints[name].__name__
            raise ValueError(f"{where}: {name} must be {wanted}; got {found}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether an option's value can be what its field declares; argparse converts strings, and nothing else."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if isinstance(value, str):
        return kind not in (list, dict, types.NoneType)
    if isinstance(value, list) and kind is list and parts:
        return all(_fits(part, parts[0]) and isinstance(part, str) == (parts[0] not in (int, float)) for part in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return not isinstance(kind, type) or isinstance(value, kind)


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; FileNotFoundError or ValueError where it is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    try:
        options = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} is no mapping of option names to values")
    return options


def read_json(text: str, option: str) -> dict[str, Any]:
    """Read an option's mapping from JSON; ValueError where it is none."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--{option} is no JSON ({error}); got {text}") from error
    if not isinstance(value, dict):
        raise ValueError(f"--{option} must be a JSON mapping; got {text}")
    return value


@dataclass
class ModelArguments:
    """Which checkpoint, for `load_classifier`.

    Args:
        model_name_or_path: Hub id, folder, ``.safetensors`` file or state dict.
        architecture: Network of a bare state dict: a timm name, d3_hf's own networks included.
        class_names: Class names in the order of the logits, where the checkpoint does not carry them.
        image_mean, image_std: Normalisation of a bare state dict, three numbers in units of [0, 1] each.
        image_size: Side of the square input in pixels.
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

    def load(self) -> "PreTrainedModel":
        """Load the checkpoint; see `load_classifier` for the errors."""
        from .models import load_classifier

        given = {name: value for name, value in asdict(self).items() if value is not None}
        if "class_names" in given:  # TrainingArguments has a label_names that means something else
            given["label_names"] = given.pop("class_names")
        return load_classifier(given.pop("model_name_or_path"), **given)


@dataclass
class DataArguments:
    """Which images, for `load_images` and `retain_split`.

    Args:
        dataset_name: Hub data set, folder of images or parquet files, parquet file, or ``digits``.
        train_split, test_split: Splits to draw the retain set from and to measure on. Where there is no ``test``, the default,
            ``validation`` or ``val`` is measured on, and without these the images outside the retain set.
        image_column, label_column: Only needed when several columns qualify.
        retain_fraction, retain_count: Size of the retain set, one of the two; default 5 % (paper).
        retain_balanced: The same number of images of each class.
        retain_seed: Seed of the draw.
        max_test_images: Measure on so many test images, drawn with seed 0: the first ones of a folder are of one class.

    Attributes:
        is_default_size: Whether neither ``retain_fraction`` nor ``retain_count`` was given.
        measured_split: What `load` has chosen to measure on: the name of a split, or ``rest of NAME``; None before.

    Raises:
        ValueError: ``max_test_images`` is below 1, or ``retain_seed`` below 0.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Hub data set, folder, parquet file or `digits`."})
    train_split: str = field(default="train", metadata={"help": "Split that the retain set is drawn from."})
    test_split: str = field(default="test", metadata={"help": "Split to measure on."})
    image_column: str | None = field(default=None, metadata={"help": "Image column, if several qualify."})
    label_column: str | None = field(default=None, metadata={"help": "Label column, if several qualify."})
    retain_fraction: float | None = field(
        default=None, metadata={"help": "Share of the split that is the retain set; 0.05 unless one of the two is given."}
    )
    retain_count: int | None = field(default=None, metadata={"help": "Number of images in the retain set."})
    retain_balanced: bool = field(default=False, metadata={"help": "Draw the same number of each class."})
    retain_seed: int = field(default=0, metadata={"help": "Seed of the retain set."})
    max_test_images: int | None = field(default=None, metadata={"help": "Measure on so many test images, drawn at random."})

    def __post_init__(self):
        self.is_default_size = self.retain_fraction is None and self.retain_count is None
        self.measured_split: str | None = None
        if self.is_default_size:
            self.retain_fraction = 0.05
        if self.max_test_images is not None and self.max_test_images < 1:
            raise ValueError(f"max_test_images must be at least 1; got {self.max_test_images}")
        if self.retain_seed < 0:
            raise ValueError(f"retain_seed must be at least 0; got {self.retain_seed}")

    def load(self) -> tuple["Dataset", "Dataset", "RawImages"]:
        """Load the images.

        Returns:
            (retain, rest, test): the retain set, the remaining rows of its split, and what is measured on, see
            ``measured_split``; which one is logged where it is not ``test_split``.

        Raises:
            ValueError: No data set is named, a split that is named is not there, nothing is left to measure on, or see
                `load_images` and `retain_split`.
        """
        from .data import RawImages, load_images, retain_split
        from .labels import labels_of, retain_indices

        if self.dataset_name is None:
            raise ValueError(NO_IMAGES)
        images = load_images(self.dataset_name, self.image_column, self.label_column)
        named = [self.train_split] if self.test_split == "test" else [self.train_split, self.test_split]
        if missing := [name for name in named if name not in images]:
            raise ValueError(f"{self.dataset_name} has no split {missing[0]!r}; it has {', '.join(images)}")
        split = images[self.train_split]
        retain, rest = retain_split(split, self.retain_fraction, self.retain_count, self.retain_balanced, self.retain_seed)
        test = self._to_measure_on(images, rest)
        if len(test) == 0:
            raise ValueError(
                f"{self.dataset_name} has no split {self.test_split!r} and the retain set is all of {self.train_split!r}: "
                "nothing is left to measure on; retain fewer"
            )
        if self.max_test_images is not None and self.max_test_images < len(test):
            test = test.select(retain_indices(labels_of(test), test.features["label"].names, count=self.max_test_images))
        return retain, rest, RawImages.from_dataset(test)

    def _to_measure_on(self, images: "DatasetDict", rest: "Dataset") -> "Dataset":
        names = [name for name in (self.test_split, *VALIDATION) if name in images and name != self.train_split]
        self.measured_split = names[0] if names else f"rest of {self.train_split}"
        if self.measured_split != self.test_split:
            logger.warning(
                "%s has no separate split %r: measuring on its %s", self.dataset_name, self.test_split, self.measured_split
            )
        return images[names[0]] if names else rest


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

    def load(self) -> "Attack | None":
        """The attack, with what it has learned where a folder is named; None where none is.

        Raises:
            FileNotFoundError: The folder holds no attack.
            ValueError: See `from_description` and `load_attack`.
        """
        from .attacks import ATTACKS, from_description, load_attack

        if not self.attack:
            return None
        name = str(self.attack.get("name"))
        if self.attack.keys() == {"name"} and name not in ATTACKS and (folder := Path(name).expanduser()).is_dir():
            return load_attack(folder)
        return from_description(self.attack)
