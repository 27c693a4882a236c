"""What a classifier carries besides its network: the image processor that it was trained with, and where it came from.

A transformers model has no place for either. They are two plain attributes of the model, ``image_processor`` and ``source``,
set by `attach` and nowhere else. ``copy.deepcopy`` keeps them; ``save_pretrained`` writes neither, so that ``from_pretrained``
gives a model without them, and `load_classifier` one with both.
"""

from dataclasses import dataclass
from typing import Literal

from transformers import BaseImageProcessor, PreTrainedModel

from ..data.preprocessing import Preprocessing


@dataclass(frozen=True)
class Source:
    """Where a classifier came from.

    Attributes:
        kind: ``"hub"``, ``"folder"``, ``"file"``, or ``"module"`` for one that was in memory.
        name: Hub id, path as it was given, or class name.
        revision: Commit of a Hub id.
        sha256: SHA-256 in hexadecimal, by file name, of the local files that define the classifier.
    """

    kind: Literal["hub", "folder", "file", "module"]
    name: str
    revision: str | None = None
    sha256: dict[str, str] | None = None


def attach(model: PreTrainedModel, image_processor: BaseImageProcessor, source: Source | None = None) -> PreTrainedModel:
    """Set a classifier's ``image_processor`` and ``source``, None for a new network, and return it."""
    model.image_processor = image_processor
    model.source = source
    return model


def image_processor_of(model: PreTrainedModel) -> BaseImageProcessor | None:
    """The image processor that `attach` or the user set; None where there is none, as after ``from_pretrained``."""
    return getattr(model, "image_processor", None)


def source_of(model: PreTrainedModel) -> Source | None:
    """Where a classifier came from; None for a new network and for one that `load_classifier` has not seen."""
    return getattr(model, "source", None)


def preprocessing_of(model: PreTrainedModel) -> Preprocessing:
    """What a classifier's image processor does to images.

    Raises:
        ValueError: The classifier has no image processor, or see `Preprocessing.from_processor`.
    """
    image_processor = image_processor_of(model)
    if image_processor is None:
        raise ValueError(f"{type(model).__name__} has no image processor: load it with d3_hf.load_classifier")
    return Preprocessing.from_processor(image_processor)
