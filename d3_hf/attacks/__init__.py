"""Backdoor attacks, to make victims and to measure them. One file each; ``ATTACKS`` lists them by name."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .badclip import BadCLIP
from .badencoder import BadEncoder
from .badnets import BadNets
from .base import Attack, LearnedAttack
from .blended import Blended
from .bpp import BPP
from .ctrl import CTRL
from .in_training import InTrainingAttack
from .input_aware import InputAware
from .lc import LCLite
from .lf import LF, LFNoise
from .noisy_alignment import NoisyAlignment
from .poisoning import poison, poison_dataset, select_poisoned
from .sig import SIG
from .ssba import SSBALite
from .trojannn import TrojanNN
from .wanet import WaNet

ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack for attack in (BadNets, Blended, SIG, LF, LFNoise, TrojanNN, LCLite, WaNet, BPP, InputAware, SSBALite)
}
# Of encoders. BadEncoder is planted in one, the others poison the images that one is pretrained on, without labels.
ENCODER_ATTACKS: dict[str, type[Attack]] = {attack.name: attack for attack in (BadEncoder, CTRL, NoisyAlignment)}
CLIP_ATTACKS: dict[str, type[Attack]] = {BadCLIP.name: BadCLIP}  # whose trigger is learned on a whole CLIP
ATTACK_FILE = "attack.json"
LEARNED_FILE = "trigger.safetensors"

__all__ = [
    "ATTACKS",
    "BPP",
    "CLIP_ATTACKS",
    "CTRL",
    "ENCODER_ATTACKS",
    "LF",
    "SIG",
    "Attack",
    "BadCLIP",
    "BadEncoder",
    "BadNets",
    "Blended",
    "InTrainingAttack",
    "InputAware",
    "LCLite",
    "LFNoise",
    "LearnedAttack",
    "NoisyAlignment",
    "SSBALite",
    "TrojanNN",
    "WaNet",
    "from_description",
    "load_attack",
    "poison",
    "poison_dataset",
    "save_attack",
    "select_poisoned",
]


def from_description(description: dict[str, Any]) -> Attack:
    """Build the attack that ``Attack.describe`` described.

    Args:
        description: ``{"name": ..., parameters...}``, for instance read from JSON or YAML; a parameter left out takes
            its default.

    Raises:
        ValueError: The name or a parameter is unknown (the message lists the known ones), or a value is out of range.
    """
    parameters = dict(description)
    name = parameters.pop("name", None)
    attacks = ATTACKS | ENCODER_ATTACKS | CLIP_ATTACKS
    if name not in attacks:
        others = f"on encoders {', '.join(ENCODER_ATTACKS)}; on a CLIP {', '.join(CLIP_ATTACKS)}"
        raise ValueError(f"unknown attack {name!r}; known: {', '.join(ATTACKS)}; {others}")
    known = [field.name for field in fields(attacks[name]) if field.compare]
    unknown = [key for key in parameters if key not in known]
    if unknown:
        raise ValueError(f"{name} has no parameter {', '.join(unknown)}; known: {', '.join(known)}")
    return attacks[name](**parameters)


def save_attack(attack: Attack, folder: str | Path) -> None:
    """Write the attack into a folder: ``attack.json`` and, if its trigger was learned, ``trigger.safetensors``."""
    folder = Path(folder)
    (folder / ATTACK_FILE).write_text(json.dumps(attack.describe(), indent=2) + "\n")
    if isinstance(attack, LearnedAttack) and attack.learned is not None:
        save_file({name: tensor.contiguous() for name, tensor in attack.learned.items()}, folder / LEARNED_FILE)


def load_attack(folder: str | Path) -> Attack:
    """Read the attack that `save_attack` wrote.

    Raises:
        FileNotFoundError: The folder has no ``attack.json``, or no ``trigger.safetensors`` where the trigger was learned.
        ValueError: One of the two is damaged, or describes or holds what this package does not know.
    """
    folder = Path(folder)
    if not (folder / ATTACK_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {ATTACK_FILE}: it is no folder that make_victim wrote")
    try:
        attack = from_description(json.loads((folder / ATTACK_FILE).read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / ATTACK_FILE} is no description of an attack ({error}): make the victim again") from error
    if not isinstance(attack, LearnedAttack):
        return attack
    if not (folder / LEARNED_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {LEARNED_FILE}, the trigger of {attack.name}: make the victim again")
    try:
        attack = replace(attack, learned=load_file(folder / LEARNED_FILE))
        attack.trigger(torch.zeros(3, 32, 32, dtype=torch.uint8))  # here, not in a measurement, a missing tensor is found
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{folder / LEARNED_FILE} is damaged or holds no trigger of {attack.name} ({type(error).__name__}): "
            "make the victim again"
        ) from error
    return attack
