"""Options of the recipes: a YAML file first, the command line over it; and the dataclasses they fill."""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from transformers import HfArgumentParser, PreTrainedModel

from .data import RawImages, load_images, retain_split
from .models import load_classifier


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
        ValueError: The YAML file is no mapping, or an option is unknown.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(dataclass_types)
    where = "the options given"
    if defaults is None and argv and argv[0].endswith((".yaml", ".yml")):
        where = argv.pop(0)
        defaults = read_yaml(where)
    if unknown := sorted((defaults or {}).keys() - {action.dest for action in parser._actions}):
        raise ValueError(f"{where}: unknown option{'s' * (len(unknown) > 1)} {', '.join(unknown)}")
    parser.set_defaults(**defaults or {})
    return parser.parse_args_into_dataclasses(args=argv)


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; FileNotFoundError or ValueError where it is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    options = yaml.safe_load(Path(path).read_text())
    if not isinstance(options, dict):
        raise ValueError(f"{path} is no mapping of option names to values")
    return options


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
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id, folder or file of the checkpoint."})
    architecture: str | None = field(default=None, metadata={"help": "Network of a bare state dict, a timm name."})
    class_names: list[str] | None = field(default=None, metadata={"help": "Class names in the order of the logits."})
    image_mean: list[float] | None = field(default=None, metadata={"help": "Mean of each channel, in [0, 1]."})
    image_std: list[float] | None = field(default=None, metadata={"help": "Standard deviation of each channel, in [0, 1]."})
    image_size: int | None = field(default=None, metadata={"help": "Side of the square input in pixels."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub id."})

    def load(self) -> PreTrainedModel:
        """Load the checkpoint; see `load_classifier` for the errors."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if "class_names" in given:  # TrainingArguments has a label_names that means something else
            given["label_names"] = given.pop("class_names")
        return load_classifier(given.pop("model_name_or_path"), **given)


@dataclass
class DataArguments:
    """Which images, for `load_images` and `retain_split`.

    Args:
        dataset_name: Hub data set, folder of images or parquet files, parquet file, or ``digits``.
        train_split, test_split: Splits to draw the retain set from and to measure on. Without a test split the images outside
            the retain set are measured on.
        image_column, label_column: Only needed when several columns qualify.
        retain_fraction, retain_count: Size of the retain set, one of the two; default 5 % (paper).
        retain_balanced: The same number of images of each class.
        retain_seed: Seed of the draw.
        max_test_images: Measure on the first so many test images only.
    """

    dataset_name: str = field(default="digits", metadata={"help": "Hub data set, folder, parquet file or `digits`."})
    train_split: str = field(default="train", metadata={"help": "Split that the retain set is drawn from."})
    test_split: str = field(default="test", metadata={"help": "Split to measure on."})
    image_column: str | None = field(default=None, metadata={"help": "Image column, if several qualify."})
    label_column: str | None = field(default=None, metadata={"help": "Label column, if several qualify."})
    retain_fraction: float | None = field(default=None, metadata={"help": "Share of the split that is the retain set."})
    retain_count: int | None = field(default=None, metadata={"help": "Number of images in the retain set."})
    retain_balanced: bool = field(default=False, metadata={"help": "Draw the same number of each class."})
    retain_seed: int = field(default=0, metadata={"help": "Seed of the retain set."})
    max_test_images: int | None = field(default=None, metadata={"help": "Measure on the first so many test images."})

    def __post_init__(self):
        if self.retain_fraction is None and self.retain_count is None:
            self.retain_fraction = 0.05

    def load(self) -> tuple[Dataset, Dataset, RawImages]:
        """Load the images.

        Returns:
            (retain, rest, test): the retain set, the remaining rows of its split, and what is measured on: the test split, or
            the rest where there is none.
        """
        images = load_images(self.dataset_name, self.image_column, self.label_column)
        if self.train_split not in images:
            raise ValueError(f"{self.dataset_name} has no split {self.train_split!r}; it has {', '.join(images)}")
        split = images[self.train_split]
        retain, rest = retain_split(split, self.retain_fraction, self.retain_count, self.retain_balanced, self.retain_seed)
        test = images.get(self.test_split, rest)
        if self.max_test_images is not None:
            test = test.select(range(min(self.max_test_images, len(test))))
        return retain, rest, RawImages.from_dataset(test)


@dataclass
class AttackArguments:
    """The trigger that is planted or measured.

    Args:
        attack: Name of an attack, or a mapping with ``name`` and its parameters (on the command line as JSON).
    """

    attack: dict | str | None = field(default=None, metadata={"help": "Attack: a name, or JSON with name and parameters."})

    def __post_init__(self):
        if isinstance(self.attack, str):
            self.attack = json.loads(self.attack) if self.attack.startswith("{") else {"name": self.attack}
