"""The parser of recipes and commands: a YAML file first, the command line over it."""

import copy
import json
import sys
import types
from argparse import SUPPRESS, Action
from difflib import get_close_matches
from inspect import get_annotations
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from .recipes import find_recipe

# What most runs need of a training's options, of which there are nearly two hundred, and what messages recommend, as help
# groups them. What a method declares itself joins METHOD.
METHOD = "method"
GROUPS: dict[str, tuple[str, ...]] = {
    "model": (
        "model_name_or_path",
        "revision",
        "architecture",
        "class_names",
        "image_size",
        "image_mean",
        "image_std",
        "new_head",
    ),
    "images": (
        "dataset_name",
        "dataset_config",
        "image_column",
        "label_column",
        "text_column",
        "zero_shot_dataset",
        "class_map",
        "retain_fraction",
        "retain_count",
        "test_split",
        "max_test_images",
        "attack",
        "clean_model",
        "poison_ratio",
        "victim_config",
    ),
    METHOD: (
        "optim",
        "learning_rate",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "horizontal_flip",
        "cutmix",
        "batch_norm",
        "sam_rho",
    ),
    "what must hold": ("max_accuracy_drop", "min_class_accuracy", "min_agreement"),
    "run": (
        "output_dir",
        "overwrite_output_dir",
        "seed",
        "bf16",
        "use_cpu",
        "save_strategy",
        "resume_from_checkpoint",
        "dry_run",
    ),
    "Hub": ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_create_pr", "license", "finetuned_from"),
    "help": ("help",),
}
FREQUENT = {name for names in GROUPS.values() for name in names}


class Parser(HfArgumentParser):
    """`HfArgumentParser` that raises a ValueError of one line where argparse prints every option and exits.

    The help of a training has a line for each of `GROUPS` and what its method declares; ``--help_all`` prints all options.

    Args:
        dataclass_types: Dataclasses with disjoint field names.
        kwargs: Further arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, dataclass_types: list[type], **kwargs):
        super().__init__(dataclass_types, usage=SUPPRESS, **kwargs)
        trainings = [kind for kind in self.dataclass_types if _is_training(kind)]
        hidden = tuple(start for kind in trainings for start in getattr(kind, "hidden_options", ()))
        for action in self._actions:
            if action.dest.startswith(hidden):
                action.help = SUPPRESS
        self._shown = {action.dest for action in self._actions if action.help != SUPPRESS}
        self._groups: dict[str, tuple[str, ...]] = {}
        if trainings:
            own = [name for kind in trainings for name in get_annotations(kind) if name not in FREQUENT]
            self._groups = GROUPS | {METHOD: (*own, *GROUPS[METHOD])}
            self._shown &= FREQUENT.union(own)
            self.add_argument("--help_all", action=_WholeHelp, nargs=0, dest="help", default=SUPPRESS, help="show every option")

    @staticmethod
    def _parse_dataclass_field(parser, field) -> None:
        # What the base class makes of a field's metadata goes to argparse, which knows no ranges: configurations check them.
        own = copy.copy(field)
        own.metadata = {key: value for key, value in field.metadata.items() if key != "range"}
        HfArgumentParser._parse_dataclass_field(parser, own)

    def format_help(self) -> str:
        """A line for each option that is shown, with its default; a training's in groups."""
        shown = [a for a in self._actions if a.dest in self._shown and not a.option_strings[0].startswith("--no_")]
        groups = self._groups or {"options": tuple(dict.fromkeys(action.dest for action in shown))}
        lines = []
        for title, names in groups.items():
            found = [_help_line(action) for name in names for action in shown if action.dest == name]
            lines += [f"{title}:", *found] if found else []
        return "\n".join(lines) + "\n"

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


def _is_training(kind: type) -> bool:
    """Whether it derives from `TrainingArguments`. Importing that takes seconds, but where there is such a kind it is done."""
    loaded = sys.modules.get("transformers.training_args")
    return loaded is not None and issubclass(kind, loaded.TrainingArguments)


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
    """Parse ``[CONFIG] --option value ...`` into one instance of each dataclass.

    Args:
        dataclass_types: Dataclasses with disjoint field names.
        argv: Arguments without the program's name; default ``sys.argv[1:]``. CONFIG is a YAML file, or the name of one of
            ``recipes/configs``.
        defaults: Options in place of a YAML file's.

    Returns:
        The instances, in the order of the types.

    Raises:
        FileNotFoundError: There is no such file, and none of that name.
        ValueError: The YAML file is no mapping, or an option is unknown or its value of another kind.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(dataclass_types)
    where = "the options given"
    if defaults is None:
        where, defaults = _take_file(argv) or (where, None)
    if unknown := sorted((defaults or {}).keys() - {action.dest for action in parser._actions}):
        near = get_close_matches(unknown[0], [action.dest for action in parser._actions], 1)
        advice = f"did you mean {near[0]}?" if near else "--help lists the options"
        what = "unknown option" if len(unknown) == 1 else "unknown options"
        raise ValueError(f"{where}: {what} {', '.join(unknown)}; {advice}")
    check_types(dataclass_types, defaults or {}, where)
    parser.set_defaults(**defaults or {})
    return parser.read(argv)


def parse_part(kind: type, argv: list[str]) -> Any:
    """Parse what one dataclass has fields for, of arguments as `parse_arguments` takes them; all others are left to that.

    Raises:
        FileNotFoundError, ValueError: See `parse_arguments`.
    """
    argv, parser = list(argv), Parser([kind], add_help=False)
    where, options = _take_file(argv) or ("", {})
    known = {action.dest for action in parser._actions}
    options = {name: value for name, value in options.items() if name in known}
    check_types([kind], options, where)
    parser.set_defaults(**options)
    return parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)[0]


def _take_file(argv: list[str]) -> tuple[str, dict[str, Any]] | None:
    """Take the configuration off the arguments, where there is one: its file and its options."""
    if not argv or argv[0].startswith("-"):
        return None
    file = find_recipe(argv.pop(0), "configuration file")
    return file, read_yaml(file)


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
    if no_text := [name for name in options if not isinstance(name, str)]:
        raise ValueError(f"{path}: {no_text[0]!r} is no name of an option")
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
