"""Backdoor attacks, to make victims and to measure them. One file each; ``ATTACKS`` lists them by name."""

from dataclasses import fields
from typing import Any

from .badnets import BadNets
from .base import Attack, poison, poison_dataset, select_poisoned
from .blended import Blended
from .sig import SIG

ATTACKS: dict[str, type[Attack]] = {"badnets": BadNets, "blended": Blended, "sig": SIG}

__all__ = [
    "ATTACKS",
    "SIG",
    "Attack",
    "BadNets",
    "Blended",
    "from_description",
    "poison",
    "poison_dataset",
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
    if name not in ATTACKS:
        raise ValueError(f"unknown attack {name!r}; known: {', '.join(ATTACKS)}")
    known = [field.name for field in fields(ATTACKS[name])]
    unknown = [key for key in parameters if key not in known]
    if unknown:
        raise ValueError(f"{name} has no parameter {', '.join(unknown)}; known: {', '.join(known)}")
    return ATTACKS[name](**parameters)
