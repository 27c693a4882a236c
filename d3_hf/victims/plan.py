"""What is settled of a victim before its training, and what is found of it afterwards."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..attacks import ATTACK_FILE, LEARNED_FILE, Attack, save_attack
from ..attacks.in_training import BatchPoisoner
from ..files import sha256


@dataclass(frozen=True)
class VictimPlan:
    """What is planted, and what the victim is made of: settled before the training, so that a checkpoint knows whose it is.

    Attributes:
        attack: What is planted, its trigger learned unless it trains with the victim; None for a network without a backdoor.
        poison_ratio: See `train_victim`.
        poison_seed: See `train_victim`.
        rows: Positions of the poisoned images, int64; None where every batch is poisoned anew.
        row_numbers: Their rows in the data set.
        poisoner: Poisons every batch anew.
        recipe: The options behind the run, if they are known.
        images_sha256: Digest of the training images before the attack.
        poisoned_sha256: Digest of them after it; None where every batch is poisoned anew.
        clean_model: Source of the attacker's own classifier.
    """

    attack: Attack | None = None
    poison_ratio: float = 0.0
    poison_seed: int = 0
    rows: Tensor | None = None
    row_numbers: list[int] | None = None
    poisoner: BatchPoisoner | None = None
    recipe: dict[str, Any] | None = None
    images_sha256: str | None = None
    poisoned_sha256: str | None = None
    clean_model: dict[str, Any] | None = None

    def planted(self) -> dict[str, Any] | None:
        """What ``victim.json`` says of the backdoor."""
        if self.attack is None:
            return None
        return {
            "attack": self.attack.describe(),
            "poison_ratio": self.poison_ratio,
            "poison_seed": self.poison_seed,
            "poisoned_rows": "anew in every batch" if self.poisoner else self.row_numbers,
        }


@dataclass(frozen=True)
class VictimReport:
    """What was found of a victim, for ``victim.json`` and the card.

    Attributes:
        found: Its entry ``measured``: the `rates` of ``victim`` and ``clean_model``, ``n_images``, and the seconds.
        quality: What the attack measured of its own trigger, see `Attack.quality`.
    """

    found: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] | None = None
    results: dict[str, Any] = field(default_factory=dict)  # of a purification: none here
    rejected: tuple[str, ...] = ()
    chosen: dict[str, Any] | None = None

    def measured(self) -> dict[str, Any]:
        """The entry ``measured``."""
        return self.found


def write_attack(attack: Attack, folder: Path) -> dict[str, str]:
    """Write an attack beside its victim; returns the SHA-256 of each of its files, by name."""
    save_attack(attack, folder)
    files = [folder / name for name in (ATTACK_FILE, LEARNED_FILE)]
    return {file.name: sha256(file) for file in files if file.is_file()}
