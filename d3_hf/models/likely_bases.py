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
# The most downloaded image models of the Hub without their classes' own names: the kind among transformers', what its
# configuration says, and the ids.
PUBLIC: list[tuple[str, dict[str, Any], list[str]]] = [
    ("vit", {"hidden_size": 768, "patch_size": 16}, ["google/vit-base-patch16-224-in21k", "google/vit-base-patch16-224"]),
    ("vit", {"hidden_size": 768, "patch_size": 32}, ["google/vit-base-patch32-224-in21k"]),
    ("vit", {"hidden_size": 1024, "patch_size": 16}, ["google/vit-large-patch16-224-in21k", "google/vit-large-patch16-224"]),
    ("vit", {"hidden_size": 1024, "patch_size": 32}, ["google/vit-large-patch32-224-in21k"]),
    ("vit", {"hidden_size": 1280, "patch_size": 14}, ["google/vit-huge-patch14-224-in21k"]),
    ("vit", {"hidden_size": 384, "patch_size": 16}, ["WinKawaks/vit-small-patch16-224", "facebook/dino-vits16"]),
    ("vit", {"hidden_size": 192, "patch_size": 16}, ["WinKawaks/vit-tiny-patch16-224"]),
    ("dinov2", {"hidden_size": 384, "patch_size": 14}, ["facebook/dinov2-small"]),
    ("dinov2", {"hidden_size": 768, "patch_size": 14}, ["facebook/dinov2-base"]),
    ("dinov2", {"hidden_size": 1024, "patch_size": 14}, ["facebook/dinov2-large"]),
    ("dinov2", {"hidden_size": 1536, "patch_size": 14}, ["facebook/dinov2-giant"]),
    ("dinov2_with_registers", {"hidden_size": 384, "patch_size": 14}, ["facebook/dinov2-with-registers-small"]),
    ("dinov2_with_registers", {"hidden_size": 768, "patch_size": 14}, ["facebook/dinov2-with-registers-base"]),
    ("dinov2_with_registers", {"hidden_size": 1024, "patch_size": 14}, ["facebook/dinov2-with-registers-large"]),
    ("dinov2_with_registers", {"hidden_size": 1536, "patch_size": 14}, ["facebook/dinov2-with-registers-giant"]),
    ("deit", {"hidden_size": 192}, ["facebook/deit-tiny-distilled-patch16-224"]),
    ("deit", {"hidden_size": 384}, ["facebook/deit-small-distilled-patch16-224"]),
    ("deit", {"hidden_size": 768}, ["facebook/deit-base-distilled-patch16-224"]),
    ("beit", {"hidden_size": 768}, ["microsoft/beit-base-patch16-224-pt22k-ft22k", "microsoft/beit-base-patch16-224"]),
    ("beit", {"hidden_size": 1024}, ["microsoft/beit-large-patch16-224-pt22k-ft22k", "microsoft/beit-large-patch16-224"]),
    ("swin", {"embed_dim": 96, "depths": [2, 2, 6, 2]}, ["microsoft/swin-tiny-patch4-window7-224"]),
    ("swin", {"embed_dim": 96, "depths": [2, 2, 18, 2]}, ["microsoft/swin-small-patch4-window7-224"]),
    ("swin", {"embed_dim": 128, "depths": [2, 2, 18, 2]}, ["microsoft/swin-base-patch4-window7-224"]),
    ("convnext", {"hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3]}, ["facebook/convnext-tiny-224"]),
    ("convnext", {"hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 27, 3]}, ["facebook/convnext-small-224"]),
    (
        "convnext",
        {"hidden_sizes": [128, 256, 512, 1024], "depths": [3, 3, 27, 3]},
        ["facebook/convnext-base-224-22k", "facebook/convnext-base-224"],
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
