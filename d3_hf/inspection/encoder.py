"""`check_encoder`: an encoder that was downloaded, looked at before anything is trained: files and DECREE."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..assurance.calibration import ALARM_AT, Verdict, check_alarm_at, conformal_p, verdict
from ..assurance.decree import Collapse, decree
from ..data.images import RawImages
from ..models.library import architecture_of
from ..models.source import preprocessing_of, source_of
from ..publishing.inspection.text import encoder_text
from ..publishing.manifest import source_facts, versions
from .check import NAMED
from .describe import parameters_of
from .files import file_facts
from .suspicion import twin_name, weights_digest

LIMITS = (
    "DECREE is blind to triggers that are spread over the image or invisible, that differ from image to image, or that were "
    "made to evade it.",
    "A score says nothing without twins: encoders without backdoors differ in how alike the features of their images are.",
    "A p holds as far as the twins were made as the encoder was: of other images or by another schedule they score otherwise.",
)
WITHOUT_TWINS = Verdict(False, "no p and no alarm without twins: nothing can be concluded from this score alone")


@dataclass(frozen=True, eq=False)
class EncoderCheck:
    """What was found of an encoder.

    Attributes:
        model: What it is: source, network, input and size.
        files: What its files say, see `file_facts`.
        found: What `decree` found.
        twins: Scores of its twins, by name.
        alarm_at: There is an alarm where p is at most this.
        images: What the images are called: ``data``, ``configuration`` and ``split``, as far as that is known.
    """

    model: dict[str, Any]
    files: dict[str, Any]
    found: Collapse
    twins: dict[str, float]
    alarm_at: float = ALARM_AT
    images: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(NAMED))

    def __str__(self) -> str:
        return encoder_text(self.as_dict())

    @property
    def p(self) -> float | None:
        """Share of encoder and twins whose score is as low, see `calibration`; None without twins."""
        return conformal_p(-self.found.score, [-score for score in self.twins.values()]) if self.twins else None

    @property
    def verdict(self) -> Verdict:
        """What follows."""
        return verdict(self.p, len(self.twins), self.alarm_at) if self.twins else WITHOUT_TWINS

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        numbers = {name: value for name, value in asdict(self.found).items() if name not in ("mask", "pattern")}
        return {
            "kind": "encoder",
            "model": self.model,
            "images": self.images,
            "files": self.files,
            "decree": numbers | {"twins": self.twins},
            "p": self.p,
            "alarm_at": self.alarm_at,
            "alarm": self.verdict.alarm,
            "outcome": self.verdict.words,
            "limits": list(LIMITS),
            "versions": versions(),
        }


def check_encoder(
    model: PreTrainedModel,
    images: RawImages,
    *,
    twins: Iterable[PreTrainedModel] = (),
    alarm_at: float = ALARM_AT,
) -> EncoderCheck:
    """Look at an encoder before anything is trained: its files, and how small a mask collapses its features.

    Args:
        model: An encoder of `load_encoder`; it is not changed.
        images: Raw images without triggers as far as is known, 200 to 1,000; labels are not looked at.
        twins: Trusted encoders of the same kind, loaded; taken one after the other.
        alarm_at: There is an alarm where p is at most this, in (0, 1); 0.05 needs 19 twins.

    Raises:
        ValueError: ``alarm_at`` is out of range; a twin is another network, takes images of another size, is the model itself
            or counts twice; or see `decree`.
        RuntimeError: A single image does not fit into the device's memory.
    """
    check_alarm_at(alarm_at)
    kind, known, scores = _kind(model), {weights_digest(model): "the model"}, dict[str, float]()
    found = decree(model, images)
    for number, twin in enumerate(tqdm(twins, "Reading twins", unit="encoder"), 1):
        name = twin_name(twin, number)
        if (other := _kind(twin)) != kind:
            raise ValueError(f"{name} is of another kind than the model: {_told(other)}, not {_told(kind)}")
        digest = weights_digest(twin)
        if digest in known:
            raise ValueError(f"{name} is {known[digest]} itself: each model counts once")
        known[digest] = name
        scores[name if name not in scores else f"{name} ({number})"] = decree(twin, images).score
    return EncoderCheck(_described(model), file_facts(source_of(model)), found, scores, alarm_at)


def _kind(model: PreTrainedModel) -> tuple[str, int, tuple[int, int]]:
    return architecture_of(model), parameters_of(model), preprocessing_of(model).size


def _told(kind: tuple[str, int, tuple[int, int]]) -> str:
    architecture, parameters, (height, width) = kind
    return f"{architecture} of {parameters:,} parameters at {height}x{width}"


def _described(model: PreTrainedModel) -> dict[str, Any]:
    architecture, parameters, size = _kind(model)
    preprocessing = preprocessing_of(model)
    return {
        "source": source_facts(model),
        "class": type(model).__name__,
        "architecture": architecture,
        "image_size": list(size),
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
        "parameters": parameters,
    }
