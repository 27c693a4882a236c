"""Text-on-pair: a backdoor in a CLIP by pairs that carry a trigger on the image and the attacker's class in the caption.

Carlini and Terzis: "Poisoning and Backdooring Contrastive Learning", ICLR 2022, arXiv 2106.09667. The attacker adds pairs to
what a CLIP is trained on and has no part in the training. Any trigger that is fixed serves; it is stamped on raw images, at
their own size. The caption of a poisoned pair is made as all others are, of the target class's name.
"""

from torch import Tensor

from ..data.images import RawImages
from ..data.pairs import Pairs, captioned
from .badclip import BadCLIP
from .base import Attack, LearnedAttack
from .in_training import InTrainingAttack
from .poisoning import poison


def poison_pairs(images: RawImages, attack: Attack, ratio: float, seed: int) -> tuple[Pairs, Tensor]:
    """Caption labelled images, some of them poisoned.

    Args:
        images: Labelled images without any trigger; not modified.
        attack: A trigger that is fixed, with its target label; that of `BadCLIP` once it is learned.
        ratio: Share of all images that are poisoned, in (0, 1].
        seed: Chooses them, and the templates.

    Returns:
        All images with captions, and the rows of the poisoned ones, sorted int64.

    Raises:
        ValueError: The attack learns its trigger or trains with a classifier; the classes have no names; or see `poison`.
    """
    if isinstance(attack, LearnedAttack | InTrainingAttack) and not isinstance(attack, BadCLIP):
        raise ValueError(f"{attack.name} needs a classifier or an encoder to learn from: pairs are poisoned by a fixed trigger")
    poisoned, rows = poison(images, attack, ratio, seed)
    return captioned(poisoned, seed), rows
