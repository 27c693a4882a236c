"""`check`: a model that was downloaded, looked at before anything is trained."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ..assurance.calibration import ALARM_AT
from ..assurance.signals import LIMITS, SIGNALS, Signal
from ..data.images import RawImages
from ..models.source import source_of
from ..publishing.inspection.text import check_text
from ..publishing.manifest import versions
from .cost import DEFENCES, Cost, cost_of
from .describe import describe
from .files import file_facts
from .fit import fit_facts, fitting_answers
from .null import Null
from .suspicion import Suspicion, suspicion_of

NAMED = ("data", "configuration", "split")  # what images are called
SCHEMA = "urn:d3_hf:check:3"  # of publishing/schemas/check.schema.json


@dataclass(frozen=True, eq=False)
class Check:
    """What was found of a model.

    Args:
        model: What it is, see `describe`.
        files: What its files say, see `file_facts`.
        fit: How it and the images fit, see `fit_facts`.
        costs: Of purifying it, by each defence.
        suspicion: What the signals say.
        images: What the images are called: ``data``, ``configuration`` and ``split``, as far as that is known.
    """

    model: dict[str, Any]
    files: dict[str, Any]
    fit: dict[str, Any]
    costs: list[Cost]
    suspicion: Suspicion
    images: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(NAMED))

    def __str__(self) -> str:
        return check_text(self.as_dict())

    @property
    def alarm(self) -> bool:
        """Whether p is at most what an alarm was asked for at; never without twins."""
        return self.suspicion.verdict.alarm

    @property
    def null(self) -> Null:
        """The twins, to be used again: `Null.write`."""
        return self.suspicion.null

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, as ``publishing/schemas/check.schema.json`` describes it."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "images": self.images,
            "files": self.files,
            "fit": self.fit,
            "cost": [asdict(cost) | {"minutes": cost.minutes} for cost in self.costs],
            "suspicion": self.suspicion.as_dict(),
            "limits": list(LIMITS),
            "versions": versions(),
        }


def check(
    model: PreTrainedModel,
    images: RawImages,
    retain: RawImages | None = None,
    *,
    twins: Iterable[PreTrainedModel] = (),
    null: Null | None = None,
    alarm_at: float = ALARM_AT,
    signals: Mapping[str, Signal] = SIGNALS,
    defences: Sequence[str] = DEFENCES,
) -> Check:
    """Look at a model before anything is trained: files, fit, what purifying would cost here, and what is suspicious.

    A p, and with it an alarm, there is only with twins: trusted models of the same kind, read on the same images. What the
    statistics are without them is printed and says nothing, since models without backdoors have classes that stand out too.

    Args:
        model: A classifier of `load_classifier`; it is not changed.
        images: Raw images of its classes, without triggers as far as is known; 300 to 500 of all classes.
        retain: What would be purified with, to time it; default ``images``.
        twins: Trusted models, loaded; a generator need not hold them all.
        null: Scores of further twins, see `read_null`.
        alarm_at: There is an alarm where p is at most this, in (0, 1); 0.05 needs 19 twins.
        signals: By name, of `SIGNALS`.
        defences: Names of those to time, of `DEFENCES`.

    Raises:
        ValueError: The classes of the images are not the model's; a logit is not finite; see `suspicion_of`.
        RuntimeError: A single image does not fit into the device's memory.
    """
    said = fitting_answers(model, images)
    suspicion = suspicion_of(model, images, twins, null, alarm_at, signals)
    costs = [cost_of(name, model, images if retain is None else retain) for name in defences]
    return Check(describe(model), file_facts(source_of(model)), fit_facts(model, images, said), costs, suspicion)
