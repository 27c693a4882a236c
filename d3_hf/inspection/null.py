"""The null: scores of twins, trusted models of one kind that were read on the same images, and a file that keeps them."""

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..auto.record import images_digest
from ..data.images import RawImages
from ..errors import join_names
from ..files import atomic_file, read_mapping
from ..models.library import architecture_of
from .describe import parameters_of

SCHEMA = "urn:d3_hf:null:3"
ADVICE = "write one with d3-hf check ... --twins ... --save_null FILE.json"


@dataclass(frozen=True)
class Kind:
    """What models must share to be twins, and what they were read on.

    Args:
        architecture: Name of the network, see `architecture_of`.
        parameters: Numbers that are trained.
        classes: Names of the images' classes, in the order of the logits.
        images: How many images the scores are from.
        images_sha256: Of these, with their labels. Other images of the same number are warned of, not refused.
    """

    architecture: str
    parameters: int
    classes: tuple[str, ...]
    images: int
    images_sha256: str

    @classmethod
    def of(cls, model: PreTrainedModel, images: RawImages) -> "Kind":
        """The kind of a model that is read on images whose classes are its own."""
        classes, digest = tuple(images.class_names), images_digest(images)
        return cls(architecture_of(model), parameters_of(model), classes, len(images), digest)

    def others(self, other: "Kind") -> list[str]:
        """What of another kind differs from this one's, each as a few words; empty where it is the same kind."""
        ours, theirs = asdict(self), asdict(other)
        found = [
            f"{name} {theirs[name]}, not {ours[name]}"
            for name in ("architecture", "parameters", "images")
            if theirs[name] != ours[name]
        ]
        if self.classes != other.classes:
            found.append(f"classes {join_names(other.classes, 4)} ({len(other.classes)}), not {join_names(self.classes, 4)}")
        return found


@dataclass(frozen=True)
class Twin:
    """A trusted model, as far as it is compared.

    Args:
        name: What to call it; no path.
        weights_sha256: Of its parameters and buffers, by which it is known again.
        scores: Of its findings, by the name of the signal, in the order of the classes; one that could not be read is not among
            them.
    """

    name: str
    weights_sha256: str
    scores: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Null:
    """Twins of one kind.

    Args:
        kind: Theirs.
        twins: In any order, none twice.

    Raises:
        ValueError: Two twins are the same model; a twin's scores are not one for each class.
    """

    kind: Kind
    twins: tuple[Twin, ...]

    def __post_init__(self) -> None:
        classes = len(self.kind.classes)
        for twin in self.twins:
            if unfit := [name for name, scores in twin.scores.items() if len(scores) != classes]:
                raise ValueError(f"{twin.name} has {len(twin.scores[unfit[0]])} scores of {unfit[0]} for {classes} classes")
        known: dict[str, str] = {}
        for twin in self.twins:
            if twin.weights_sha256 in known:
                both = f"{known[twin.weights_sha256]} and {twin.name}"
                raise ValueError(f"{both} are the same model, which counts once: leave one out")
            known[twin.weights_sha256] = twin.name

    def with_twins(self, twins: Iterable[Twin]) -> "Null":
        """This null and further twins of the same kind."""
        return Null(self.kind, (*self.twins, *twins))

    def write(self, file: Path) -> None:
        """Write it as JSON; the file appears whole or not at all."""
        content = {"schema": SCHEMA, "kind": asdict(self.kind), "twins": [asdict(twin) for twin in self.twins]}
        with atomic_file(file) as beside:
            beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_null(file: Path) -> Null:
    """Read what `Null.write` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file, or of another version.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no null {file}: {ADVICE}")
    found = read_mapping(file, "null of twins", ADVICE, {"schema": None, "kind": _names(Kind), "twins": None})
    if found["schema"] != SCHEMA:
        raise ValueError(f"{file} is no null of twins of this version ({SCHEMA}): {ADVICE}")
    try:
        kind = Kind(**found["kind"] | {"classes": tuple(found["kind"]["classes"])})
        return Null(kind, tuple(_twin(entry) for entry in found["twins"]))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is no null of twins ({error}): {ADVICE}") from error


def _twin(entry: dict[str, Any]) -> Twin:
    scores = {str(name): tuple(map(float, values)) for name, values in entry["scores"].items()}
    if not all(map(math.isfinite, itertools.chain(*scores.values()))):
        raise ValueError("a score is not finite")
    return Twin(str(entry["name"]), str(entry["weights_sha256"]), scores)


def _names(kind: type) -> dict[str, None]:
    return dict.fromkeys(field.name for field in fields(kind))
