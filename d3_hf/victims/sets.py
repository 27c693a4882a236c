"""From options to victims: one, or a named set of them that is made one by one and resumed."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, set_seed

from ..attacks import Attack
from ..data.images import RawImages
from ..files import atomic_file
from ..labels import check_labels
from ..models import load_classifier, new_model
from ..options.arguments import ModelArguments
from ..options.parser import Parser, parse_arguments, read_yaml
from ..options.recipes import find_recipe
from ..publishing.card import victim_table
from ..publishing.manifest import VICTIM_FILE
from ..publishing.tables import markdown_table
from ..training.checkpoints import check_output, last_whole_checkpoint
from ..training.phases import Phases
from .record import KINDS, VictimArguments, check_files, differences, read_record, recipe_of
from .train import has_own_networks, train_victim


@dataclass
class SetArguments:
    """Which victims of a set.

    Args:
        set: YAML file, or the name of one in ``recipes``: ``output_dir``, and ``groups``, each with ``base`` (options of
            `make_victim`) and ``victims`` (per name the options that differ). A ``clean_model`` may be another victim of the
            set, as GROUP/VICTIM.
        only: Patterns such as ``cifar10-resnet20/*``; default all.
    """

    set: str = field(metadata={"help": "YAML file that names the victims, or its name in the recipes."})
    only: list[str] = field(default_factory=lambda: ["*"], metadata={"help": "Make those that match, as GROUP/VICTIM."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder in place of the file's."})


@dataclass(frozen=True)
class Victim:
    """A victim on disk.

    Attributes:
        folder: Loadable folder with ``victim.json`` beside the weights.
        attack: The planted attack; None for a network without a backdoor.
        measured: Rates of the victim and of a model without backdoor, see ``victim.json``.
    """

    folder: str
    attack: Attack | None
    measured: dict[str, Any]


def make_victim(argv: list[str] | None = None, options: dict[str, Any] | None = None, phases: Phases | None = None) -> Victim:
    """Run ``[CONFIG.yaml] --option value ...``: build or load a network, plant the backdoor, save the victim.

    The victim is trained on the rows that ``retain_*`` leave: the retain set stays unseen, for the defender. Without
    ``--attack`` the same network is trained without a backdoor, as a reference.

    Args:
        argv: Arguments without the program's name; default ``sys.argv[1:]``.
        options: Options in place of the YAML file's.
        phases: Those of the run that this is a part of; None: it is the whole run.

    Returns:
        Where the victim lies and what it carries.

    Raises:
        ValueError: Neither a checkpoint nor an architecture is named, ``output_dir`` holds another run's results and is not to
            be overwritten, or see `train_victim`.
    """
    arguments = parse_arguments(KINDS, argv, options)
    model_args, data_args, attack_args, victim_args, args = arguments
    check_output(args, None)  # before a trigger is learned
    attack = attack_args.load()
    set_seed(args.seed)
    keeps_classes = model_args.model_name_or_path and not victim_args.new_head
    model = model_args.load() if keeps_classes else None
    images = data_args.load(model.config if keeps_classes else None)
    classes = images.test.class_names
    if not keeps_classes:
        model = model_args.load(classes) if model_args.model_name_or_path else _new_model(model_args, classes)
    check_labels(classes, model.config)
    trainer = train_victim(
        model,
        RawImages.from_dataset(images.rest),
        images.test,
        attack,
        args,
        victim_args.poison_ratio,
        victim_args.poison_seed,
        _clean_model(model_args, victim_args),
        recipe_of(*arguments),
        phases,
    )
    measured = trainer.report.measured()
    table = victim_table({"planted": trainer.plan.planted(), "measured": measured})
    print(f"\n{'Victim' if attack else 'Network without backdoor'} in {args.output_dir}\n{table}\n")
    return Victim(args.output_dir, trainer.attack, measured)


def _new_model(model_args: ModelArguments, names: list[str]) -> PreTrainedModel:
    if model_args.architecture is None:
        raise ValueError("no network: give --architecture to train one from scratch, or --model_name_or_path to continue one")
    shape = (model_args.image_mean, model_args.image_std, model_args.image_size)
    return new_model(names, model_args.architecture, *shape, model_args.model_args)


def _clean_model(model_args: ModelArguments, victim_args: VictimArguments) -> PreTrainedModel | None:
    if victim_args.clean_model:
        return load_classifier(victim_args.clean_model)
    return model_args.load() if model_args.model_name_or_path and not victim_args.new_head else None


def make_set(argv: list[str] | None = None) -> list[str]:
    """Run ``--set FILE.yaml [--only PATTERN ...] --option value ...``: make the victims of a set that are not there yet.

    A victim that exists is verified (same options, unchanged weights and trigger) and skipped; one that was interrupted goes on
    from its last whole checkpoint if it has one (``--save_strategy epoch``) and is made anew if not. Any other option goes over
    every victim's own, as ``--dataset_name`` does where the images lie elsewhere.

    Args:
        argv: Arguments without the program's name; default ``sys.argv[1:]``.

    Returns:
        The folders, in the set's order.

    Raises:
        ValueError: No victim matches ``--only``, a folder holds a victim made with other options or changed since, a clean
            model that belongs to the set was not made before, or ``resume_from_checkpoint`` is given.
        KeyboardInterrupt: After Ctrl-C, with a message that says how to go on.
    """
    chosen, rest = Parser([SetArguments]).parse_args_into_dataclasses(argv, True, look_for_args_file=False)
    file = find_recipe(chosen.set, "set of victims")
    if any(option.startswith("--resume_from_checkpoint") for option in rest):
        raise ValueError("a set finds the checkpoints of its victims itself: run it again without --resume_from_checkpoint")
    victims = read_set(file)
    root = Path(chosen.output_dir or read_yaml(file)["output_dir"])
    names = [name for name in victims if any(fnmatch(name, pattern) for pattern in chosen.only)]
    if not names:
        groups = dict.fromkeys(f"'{name.rpartition('/')[0]}/*'" for name in victims)
        raise ValueError(
            f"--only {' '.join(chosen.only)} matches no victim of {chosen.set}: give GROUP/VICTIM, or a whole group, as "
            f"{' or '.join(groups)}; {file} names them all"
        )
    started = time.perf_counter()
    for number, name in enumerate(names, 1):
        options = victims[name] | {"output_dir": str(root / name)}
        if (clean := options.get("clean_model")) in victims:
            options["clean_model"] = str(root / clean)
        if is_made(root / name, options, rest):
            print(f"[{number}/{len(names)}] {name}: exists and verifies")
            continue
        if clean in victims and not (root / clean / VICTIM_FILE).is_file():
            raise ValueError(f"{name} needs {clean}, which is not in {root}: add --only {clean}")
        checkpoint = checkpoint_of(root / name, options, rest)
        begun = f", from {checkpoint.name}" if checkpoint else ""
        print(f"[{number}/{len(names)}] {name}{begun}, {(time.perf_counter() - started) / 60:.1f} minutes so far")
        options |= {"overwrite_output_dir": True, "resume_from_checkpoint": checkpoint and str(checkpoint)}
        try:
            make_victim(rest, options)
        except KeyboardInterrupt as stop:
            raise type(stop)(f"while {name} was made: run the same command again to go on") from None
        PartialState().wait_for_everyone()  # until its files are written
    if PartialState().is_main_process:
        with atomic_file(root / "victims.md") as beside:
            beside.write_text(set_table(root, victims) + "\n")
    return [str(root / name) for name in names]


def read_set(file: str) -> dict[str, dict[str, Any]]:
    """The options of each victim of a set, by ``GROUP/VICTIM``.

    Raises:
        ValueError: The file lacks ``output_dir`` or ``groups``, a group lacks ``base`` or ``victims``, or one of these or a
            victim's options are no mapping.
    """
    content = read_yaml(file)
    if not content.keys() >= {"output_dir", "groups"}:
        raise ValueError(f"{file} must hold output_dir and groups")
    victims = {}
    for group, parts in _mapping(content["groups"], f"{file}: groups").items():
        if not _mapping(parts, f"{file}: group {group}").keys() >= {"base", "victims"}:
            raise ValueError(f"{file}: group {group} must hold base and victims")
        base = _mapping(parts["base"], f"{file}: base of group {group}")
        for name, own in _mapping(parts["victims"], f"{file}: victims of group {group}").items():
            victims[f"{group}/{name}"] = base | _mapping(own or {}, f"{file}: victim {group}/{name}")
    return victims


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a mapping; got a {type(value).__name__}")
    return value


def is_made(folder: Path, options: dict[str, Any], argv: list[str] = ()) -> bool:
    """Whether the folder holds the whole victim that these options describe.

    Raises:
        ValueError: It holds another one, or its record is damaged, or see `check_files`.
        FileNotFoundError: See `check_files`.
    """
    if not (folder / VICTIM_FILE).is_file() or not (folder / "README.md").is_file():
        return False
    record = read_record(folder)
    check_files(folder, record)
    asked = _asked(parse_arguments(KINDS, list(argv), options))
    if different := differences(record, asked):
        raise ValueError(
            f"{folder} holds a victim made with other {', '.join(different)}; delete it or choose another output_dir"
        )
    return True


def checkpoint_of(folder: Path, options: dict[str, Any], argv: list[str] = ()) -> Path | None:
    """The last whole checkpoint in the folder, if it is of the victim that these options describe and can be gone on from."""
    checkpoint = last_whole_checkpoint(folder)
    if checkpoint is None:
        return None
    arguments = parse_arguments(KINDS, list(argv), options)
    attack, args = arguments[2].load(), arguments[-1]
    record = json.loads((checkpoint / VICTIM_FILE).read_text())
    of_another = record["recipe"] is None or differences(record, _asked(arguments))
    return None if of_another or args.random_heads or has_own_networks(attack) else checkpoint


def _asked(arguments: list[Any]) -> dict[str, Any]:
    """The recipe that the options amount to, as it reads in a record."""
    return json.loads(json.dumps(recipe_of(*arguments)))


def set_table(root: Path, names: Iterable[str]) -> str:
    """Markdown table of the victims that exist below ``root``: one row each, percent and minutes."""
    rates = ["ACC", "ASR", "RA", "PACC", "target without trigger", "ASR of clean model"]
    rows = []
    for name in names:
        if not (root / name / VICTIM_FILE).is_file():
            continue
        measured = read_record(root / name)["measured"]
        found, floor = measured["victim"], measured.get("clean_model", {})
        shares = [*(found.get(key) for key in ("accuracy", "asr", "ra", "pacc", "untriggered")), floor.get("asr")]
        seconds = [measured.get(f"{part}_seconds") for part in ("poisoning", "training", "measuring")]
        rows.append([name, *(_shown(value, 100) for value in shares), *(_shown(value, 1 / 60) for value in seconds)])
    return markdown_table(["victim", *rates, "minutes of poisoning", "of training", "of measuring"], rows)


def _shown(value: float | None, scale: float) -> str:
    return "" if value is None else f"{scale * value:.1f}"
