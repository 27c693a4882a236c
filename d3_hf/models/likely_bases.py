"""Which public models a classifier may have been fine-tuned from: by what its folder's card says, and by its architecture.

Neither is proof, and a card is the suspect's own word. Whether a model is the ancestor shows in the weights, see `load_base`;
whether it is to be trusted is the user's to say. `find_base` looks among those of the architecture alone: an attacker can write
any name into a card, and cannot write into their publishers' repositories.
"""

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from ..files import first_line
from .base import Base, load_base
from .source import source_of

logger = logging.getLogger(__name__)

AUTO, NO_BASE = "auto", "none"  # in place of a base's name: look for it; do not
ADVICE = "if you know what this was fine-tuned from, name it as base_model"
GOOGLE = "google/vit-{}-patch{}-224{}"
# The most downloaded image models of the Hub without their classes' own names: the kind among transformers', what its
# configuration says, and the ids.
PUBLIC: list[tuple[str, dict[str, Any], list[str]]] = [
    *(
        ("vit", {"hidden_size": width, "patch_size": patch}, [GOOGLE.format(size, patch, end) for end in ends])
        for size, width, patch, ends in (
            ("base", 768, 16, ("-in21k", "")),
            ("base", 768, 32, ("-in21k",)),
            ("large", 1024, 16, ("-in21k", "")),
            ("large", 1024, 32, ("-in21k",)),
            ("huge", 1280, 14, ("-in21k",)),
        )
    ),
    ("vit", {"hidden_size": 384, "patch_size": 16}, ["WinKawaks/vit-small-patch16-224", "facebook/dino-vits16"]),
    ("vit", {"hidden_size": 192, "patch_size": 16}, ["WinKawaks/vit-tiny-patch16-224"]),
    *(
        (kind, {"hidden_size": width, "patch_size": 14}, [f"facebook/{name}-{size}"])
        for kind, name in (("dinov2", "dinov2"), ("dinov2_with_registers", "dinov2-with-registers"))
        for size, width in (("small", 384), ("base", 768), ("large", 1024), ("giant", 1536))
    ),
    *(
        ("deit", {"hidden_size": width}, [f"facebook/deit-{size}-distilled-patch16-224"])
        for size, width in (("tiny", 192), ("small", 384), ("base", 768))
    ),
    *(
        ("beit", {"hidden_size": width}, [f"microsoft/beit-{size}-patch16-224{end}" for end in ("-pt22k-ft22k", "")])
        for size, width in (("base", 768), ("large", 1024))
    ),
    *(
        ("swin", {"embed_dim": width, "depths": [2, 2, depth, 2]}, [f"microsoft/swin-{size}-patch4-window7-224"])
        for size, width, depth in (("tiny", 96, 6), ("small", 96, 18), ("base", 128, 18))
    ),
    *(
        ("convnext", {"hidden_sizes": [width * factor for factor in (1, 2, 4, 8)], "depths": [3, 3, depth, 3]}, ids)
        for width, depth, ids in (
            (96, 9, ["facebook/convnext-tiny-224"]),
            (96, 27, ["facebook/convnext-small-224"]),
            (128, 27, ["facebook/convnext-base-224-22k", "facebook/convnext-base-224"]),
        )
    ),
]


def likely_bases(model: PreTrainedModel) -> list[str]:
    """Names of public models that a classifier may be a fine-tuned one of, the likeliest first; empty where none is known.

    Args:
        model: As `load_classifier` returns it.
    """
    return list(dict.fromkeys([*said_by_card(model), *of_its_architecture(model.config)]))


def find_base(model: PreTrainedModel, image_size: tuple[int, int]) -> Base:
    """The first of the public models of a classifier's architecture that it was fine-tuned from, by the weights.

    Args:
        model: As `load_classifier` returns it; it is only read.
        image_size: See `load_base`.

    Raises:
        ValueError: No public model of the architecture is known, or none is the ancestor or within reach; each with its reason.
    """
    names, reasons = of_its_architecture(model.config), []
    if not names:
        raise ValueError(f"no public model of this architecture is known here: {ADVICE}")
    for name in names:
        try:
            return load_base(model, name, image_size)
        except (OSError, ValueError) as reason:
            logger.info("%s is not the base: %s", name, reason)
            reasons.append(first_line(reason))
    raise ValueError(f"no public model of this architecture is its base and within reach ({'; '.join(reasons)}): {ADVICE}")


def said_by_card(model: PreTrainedModel) -> list[str]:
    """What the card of a classifier's own folder calls its base, as the Trainer writes it; none if it cannot be read."""
    source = source_of(model)
    card = Path(source.name).expanduser() / "README.md" if source and source.kind == "folder" else None
    if card is None or not card.is_file():
        return []
    try:
        said = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.base_model
    except Exception:  # whatever its metadata hold, they are not needed
        return []
    return [name for name in (said if isinstance(said, list) else [said]) if is_repo_id(name)]


def is_repo_id(name: Any) -> bool:
    """Whether it could be a model's on the Hub; a path of somebody's machine, or anything else, could not."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str)  # None passes


def of_its_architecture(config: Any) -> list[str]:
    """Ids of the public models of a configuration's architecture."""
    if config.model_type == "timm_wrapper":
        return [f"timm/{config.architecture}"]
    return [
        name
        for kind, needed, ids in PUBLIC
        if kind == config.model_type and all(_plain(getattr(config, key, None)) == value for key, value in needed.items())
        for name in ids
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
