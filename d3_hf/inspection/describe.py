"""What a loaded classifier is, in facts that go into print and JSON."""

from typing import Any

from transformers import PreTrainedModel

from ..defenses.shared.selection import select_weights
from ..labels import label_names_of
from ..models.batch_norm import batch_norms
from ..models.head import find_head
from ..models.library import architecture_of
from ..models.likely_bases import likely_bases
from ..models.source import preprocessing_of
from ..publishing.manifest import source_facts


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """What a loaded classifier is: source, network, classes, input, sizes, and what D3 could select of it; JSON-able.

    Args:
        model: As `load_classifier` returns it.
    """
    preprocessing = preprocessing_of(model)
    return {
        "source": source_facts(model),
        "class": type(model).__name__,
        "architecture": architecture_of(model),
        "classes": label_names_of(model.config),
        "image_size": list(preprocessing.size),
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
        "parameters": parameters_of(model),
        "batch_norms": len(batch_norms(model)),
        "likely_bases": likely_bases(model),
        "selection": selection_of(model, preprocessing.size),
    }


def selection_of(model: PreTrainedModel, image_size: tuple[int, int]) -> dict[str, Any]:
    """Candidates for ``target_modules``: ``head`` and how many weights ``all-linear`` moves, each None with a ``_why`` where
    D3 would refuse."""
    found: dict[str, Any] = {}
    try:
        found["head"] = find_head(model, image_size)
    except ValueError as reason:
        found |= {"head": None, "head_why": str(reason)}
    try:
        found["linear_weights"] = len(select_weights(model, "all-linear", image_size))
    except ValueError as reason:
        found |= {"linear_weights": None, "linear_weights_why": str(reason)}
    return found


def parameters_of(model: PreTrainedModel) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters())
