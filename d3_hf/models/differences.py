"""How the weights of a file differ from those of a network, and what of it says that the file holds no head for its classes."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .head import is_matrix
from .weight_names import told

# Beginnings of names of weights that no image classifier needs: poolers and other tasks' heads; the text tower of a pair, and
# what compares the two. Then the endings: what stands for a masked patch in pretraining.
SPARE = (
    *("pooler", "head", "heads", "head_dist", "lm_head", "decode_head", "auxiliary_head", "decoder"),
    *("classifier", "cls_classifier", "distillation_classifier"),
    *("text_model", "text_projection", "visual_projection", "logit_scale", "logit_bias"),
)
MASK = "mask_token"


@dataclass(frozen=True)
class Differences:
    """Names of weights that a network and a file do not share.

    Attributes:
        missing: Those that the file lacks.
        superfluous: Those that the network lacks.
        mismatched: Those of another shape, with what the file and the network have: (name, found, needed).
    """

    missing: tuple[str, ...]
    superfluous: tuple[str, ...]
    mismatched: tuple[tuple[str, Any, Any], ...]

    @classmethod
    def of(cls, missing: Iterable[str], superfluous: Iterable[str], mismatched: Iterable[tuple]) -> "Differences":
        """Those that count: BatchNorm's counter is younger than some checkpoints and changes no logit; torch's own strict
        loading lets it be absent."""
        counted = tuple(name for name in missing if not name.endswith("num_batches_tracked"))
        return cls(counted, tuple(superfluous), tuple(mismatched))

    def refuse(self, where: str) -> None:
        """Raise a ValueError if there are any."""
        shapes = [f"{name} {tuple(found)} instead of {tuple(needed)}" for name, found, needed in self.mismatched]
        faults = [
            f"{len(names)} {what}: {told(names)}"
            for what, names in (("missing", self.missing), ("unexpected", self.superfluous), ("of the wrong shape", shapes))
            if names
        ]
        if faults:
            raise ValueError(
                f"{where}: the weights are not those of this network ({'; '.join(faults)}): check the architecture and "
                "the number of classes"
            )

    def refuse_headless(self, model: PreTrainedModel, where: str) -> None:
        """Raise a ValueError if the file is an encoder's: all that the network misses is the layer for its classes."""
        _, rest = self.without_spare(model)
        if rest.missing and not (rest.superfluous or rest.mismatched) and rest.lone_matrix(model):
            raise headless(where, f"only {told(self.missing)} are missing")

    def without_spare(self, model: PreTrainedModel) -> tuple[tuple[str, ...], "Differences"]:
        """Superfluous weights that are poolers, heads and the like, and the differences without them."""
        start = f"{model.base_model_prefix}."
        parts = {name: name.removeprefix(start).split(".") for name in self.superfluous}
        spare = tuple(name for name, part in parts.items() if part[0] in SPARE or part[-1] == MASK)
        return spare, replace(self, superfluous=tuple(name for name in self.superfluous if name not in spare))

    def without_missing(self, start: str) -> "Differences":
        """The differences without the missing weights whose names begin so."""
        return replace(self, missing=tuple(name for name in self.missing if not name.startswith(start)))

    def lone_matrix(self, model: PreTrainedModel) -> str | None:
        """Name of the layer that all missing and mismatched weights are of, if it has one output for each class."""
        names = {name.rpartition(".")[0] for name in (*self.missing, *(name for name, *_ in self.mismatched))}
        if len(names) != 1:
            return None
        module: nn.Module = model.get_submodule(*names)
        return names.pop() if is_matrix(module) and len(module.weight) == model.config.num_labels else None


class EncoderFound(ValueError):
    """An encoder where a classifier is needed.

    Attributes:
        where: What it is called.
        reason: What shows it.
    """

    def __init__(self, message: str, where: str, reason: str):
        super().__init__(message)
        self.where, self.reason = where, reason


def headless(where: str, reason: str) -> EncoderFound:
    """The error about an encoder where a classifier is needed."""
    message = (
        f"{where} is an encoder without a head ({reason}): give it a new one and train it, --new_head of d3-hf victim (in "
        "Python load_classifier(source, new_head=[class names])); a purification takes the fine-tuned classifier"
    )
    return EncoderFound(message, where, reason)


def with_head(where: str, reason: str) -> ValueError:
    """The error about a classifier where an encoder is needed."""
    return ValueError(
        f"{where} is a classifier with a head ({reason}) and no encoder: load_classifier and the defences of classifiers, as "
        "--defence d3, are for it"
    )
