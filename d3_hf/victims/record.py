"""What a victim's folder says of itself: ``victim.json``, and how to tell whether it is still true and whose it is."""

import json
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_NAME

from ..attacks import load_attack
from ..data.images import RawImages
from ..files import read_mapping, sha256
from ..options.arguments import RETAIN_FRACTION, AttackArguments, DataArguments, ModelArguments
from ..publishing.manifest import PLACES, VICTIM_FILE, arguments_of, declared_defaults
from .train import VictimConfig, images_digest

# Options that make no other victim: where its files went, and on what machine and how fast it was trained.
CIRCUMSTANCES = set(PLACES) | {
    "use_cpu",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "per_device_eval_batch_size",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "save_strategy",
    "save_steps",
    "save_total_limit",
}
# Options that say where something lies, which may have moved.
LOCATIONS = ("dataset_name", "model_name_or_path", "clean_model")


@dataclass
class VictimArguments:
    """How the victim comes about.

    Args:
        poison_ratio: Share of all training images that carry the trigger, in (0, 1]. Default 10 % as BackdoorBench.
        poison_seed: Chooses the poisoned images.
        clean_model: Folder of a classifier without a backdoor: the attacker's own, where a trigger is computed from one, and
            the floor of the ASR. Default: the checkpoint that is continued, if one is and keeps its head.
        new_head: Give the checkpoint an untrained head for the data set's classes, in place of its own if it has one: for
            encoders and for networks that were trained on other classes.
    """

    poison_ratio: float = field(default=0.1, metadata={"help": "Share of the training images that are poisoned."})
    poison_seed: int = field(default=0, metadata={"help": "Chooses the poisoned images."})
    clean_model: str | None = field(default=None, metadata={"help": "Folder of a classifier without a backdoor."})
    new_head: bool = field(default=False, metadata={"help": "Train a new head, for the data set's classes."})


# Whose options stand in a record's ``recipe``.
KINDS = [ModelArguments, DataArguments, AttackArguments, VictimArguments, VictimConfig]


def recipe_of(*arguments: Any) -> dict[str, Any]:
    """The options that define a victim: those given for network, data and attack, how much is retained, the training's."""
    *plain, args = arguments
    given = {name: value for kind in plain for name, value in asdict(kind).items() if value is not None}
    if "retain_count" not in given:
        given.setdefault("retain_fraction", RETAIN_FRACTION)
    return given | arguments_of(args)


def read_record(folder: Path) -> dict[str, Any]:
    """The content of ``victim.json``, with at least ``recipe``, ``planted`` and ``measured``.

    Raises:
        FileNotFoundError: The folder is none that `make_victim` wrote.
        ValueError: The record is damaged.
    """
    file = folder / VICTIM_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {VICTIM_FILE}: it is no folder that make_victim wrote")
    needed = {"recipe": {}, "planted": None, "measured": {"victim": {}}}  # what the readers rely on
    return read_mapping(file, "record of make_victim", "make the victim again in an empty folder", needed)


def clean_model_of(folder: Path) -> str | None:
    """The model without a backdoor that a victim was measured beside; None where there was none, or is none any more."""
    if not (folder / VICTIM_FILE).is_file():
        return None
    place = read_record(folder)["recipe"].get("clean_model")
    return place if place and Path(place).expanduser().exists() else None


def recorded_images(record: dict[str, Any], **given: Any) -> DataArguments:
    """The images that a victim was made with; ``given`` options that are not None go over the recorded ones."""
    recipe = record["recipe"]
    recorded = {field.name: recipe[field.name] for field in fields(DataArguments) if field.name in recipe}
    return DataArguments(**recorded | {name: value for name, value in given.items() if value is not None})


def check_files(folder: Path, record: dict[str, Any]) -> None:
    """Check that the weights and the attack are those that were written.

    Raises:
        ValueError: They are not, or an attack of which an earlier version recorded no digests does not load.
        FileNotFoundError: A file of such an attack is missing.
    """
    attack = record.get("attack_sha256", {})
    for name, digest in ({SAFE_WEIGHTS_NAME: record.get("weights_sha256")} | attack).items():
        if not _is(folder / name, digest):
            raise ValueError(f"{folder}: {name} is not what {VICTIM_FILE} says; delete the folder to make the victim anew")
    if record["planted"] and not attack:
        load_attack(folder)


def differences(record: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """The options, sorted, by which another victim is asked for than the recorded one.

    Those of `CIRCUMSTANCES` do not count. An option that one side lacks, as what an earlier version did not have yet, has its
    default there; so have the parameters of an attack. A checkpoint is the same if its content is, and so is a data set in
    another place; where that is not at hand, or was not recorded by an earlier version, if its last name is, as in
    ``uoft-cs/cifar10`` and ``/data/cifar10``.

    Args:
        record: See `read_record`.
        asked: Options as they stand in a record's ``recipe``.
    """
    defaults = {name: value for kind in KINDS for name, value in declared_defaults(kind).items()}
    then, now = defaults | record["recipe"], defaults | asked
    names = (record["recipe"].keys() | asked.keys()) - CIRCUMSTANCES
    return sorted(name for name in names if not _is_same(name, record, then.get(name), now.get(name)))


def _is_same(name: str, record: dict[str, Any], then: Any, now: Any) -> bool:
    """Whether an option asks for what was recorded."""
    if name == "attack":
        attack = AttackArguments(now).load()
        return (attack and attack.describe()) == (record["planted"] or {}).get("attack")
    if name not in LOCATIONS or not then or not now:
        return then == now
    if name == "dataset_name":
        if then == now:  # decoding all images again takes too long
            return True
        known = record.get("images_sha256")
    else:
        known = (record.get("source" if name == "model_name_or_path" else name) or {}).get("sha256")
    place = Path(now).expanduser()
    if not known or not place.exists() or record["recipe"].get("class_map"):  # whose model is not at hand
        return place.name == Path(then).name
    if name == "dataset_name":
        return _images_sha256(json.dumps(asdict(recorded_images(record, dataset_name=now)))) == known
    if place.is_file():
        return sha256(place) in known.values()
    return all(_is(place / file, digest) for file, digest in known.items())


@lru_cache  # the victims of a set are made of the same images
def _images_sha256(options: str) -> str:
    images = DataArguments(**json.loads(options)).load()
    return images_digest(RawImages.from_dataset(images.rest))


def _is(file: Path, digest: str | None) -> bool:
    return file.is_file() and sha256(file) == digest
