"""What the signals say of a model, and how often they say as much of its twins."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..assurance.calibration import (
    ALARM_AT,
    FEWEST_TWINS,
    Verdict,
    check_alarm_at,
    class_z,
    combined_p,
    least_p,
    own_classes_p,
    signal_p,
    verdict,
)
from ..assurance.finding import Finding
from ..assurance.signals import SIGNALS, Signal, read_signal
from ..data.images import RawImages
from ..labels import check_labels
from ..models.source import source_of
from ..publishing.names import public_name
from ..training.reference import fingerprint
from .measured import MeasuredRates, measured_rates
from .null import Kind, Null, Twin


@dataclass(frozen=True, eq=False)
class Suspicion:
    """The findings on a model beside those on its twins.

    Args:
        findings: By signal what it found, or why it could not be read.
        null: The model's kind, and its twins.
        alarm_at: At which p there is an alarm, in (0, 1).
        warnings: What was not as it should be, a line each.
    """

    findings: dict[str, Finding | str]
    null: Null
    alarm_at: float = ALARM_AT
    warnings: list[str] = field(default_factory=list)

    @property
    def compared(self) -> list[str]:
        """The signals that could be read on the model and on all its twins; none without twins."""
        if not self.null.twins:
            return []
        read = [name for name, finding in self.findings.items() if isinstance(finding, Finding)]
        return [name for name in read if all(name in twin.scores for twin in self.null.twins)]

    @property
    def p_values(self) -> dict[str, float]:
        """The p of each signal that is `compared`, without regard to how many are."""
        return {name: signal_p(*(scores[..., s, :] for scores in self._scores)) for s, name in enumerate(self.compared)}

    @property
    def p(self) -> float | None:
        """The p of all signals together; None where none is `compared`."""
        return combined_p(*self._scores) if self.compared else None

    @cached_property
    def class_z(self) -> np.ndarray | None:
        """How far each class stands out of the twins' same class, by each signal that is `compared`, (S, K); None without."""
        return class_z(*self._scores)[0] if self.compared else None

    @cached_property
    def _scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the model (S, K) and of its twins (N, S, K), by the signals that are `compared`."""
        names = self.compared
        suspect = [self.findings[name].scores for name in names]
        return np.array(suspect), np.array([[twin.scores[name] for name in names] for twin in self.null.twins])

    @property
    def verdict(self) -> Verdict:
        """What follows."""
        return verdict(self.p, len(self.null.twins), self.alarm_at)

    @property
    def measured(self) -> MeasuredRates | None:
        """How often exactly this test was right about models of this kind; None where that was not measured."""
        return measured_rates(self.null.kind, self.compared, self.alarm_at)

    @property
    def class_beside_twins(self) -> str | None:
        """The class that stands out of the twins most by all signals together, whether there is an alarm or not."""
        return None if (z := self.class_z) is None else self.null.kind.classes[int(z.sum(0).argmax())]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able. How far classes stand out, and which does, is left out beside fewer than three twins."""
        p_values, twins, measured = self.p_values, self.null.twins, self.measured
        said = self.class_z if len(twins) >= FEWEST_TWINS else None
        z = {} if said is None else dict(zip(self.compared, said.tolist(), strict=True))
        return {
            "signals": {
                name: self._signal(finding, p_values.get(name), z.get(name)) for name, finding in self.findings.items()
            },
            "twins": [twin.name for twin in twins],
            "p": self.p,
            "least_p": least_p(len(twins)) if twins else None,
            "class_beside_twins": None if said is None else self.class_beside_twins,
            "alarm_at": self.alarm_at,
            "alarm": self.verdict.alarm,
            "outcome": self.verdict.words,
            "measured": measured and measured.as_dict(),
            "warnings": self.warnings,
        }

    def _signal(self, finding: Finding | str, p: float | None, z: list[float] | None) -> dict[str, Any]:
        facts = finding_facts(finding)
        if isinstance(finding, str):
            return facts
        beside_twins = None if z is None else finding.class_names[z.index(max(z))]
        facts |= {"p": p, "z": z, "class_beside_twins": beside_twins}
        return facts | {"p_own_classes": own_classes_p(finding.scores)}


def finding_facts(finding: Finding | str) -> dict[str, Any]:
    """What a signal found, JSON-able: or ``not_applicable``, why it could not be read."""
    if isinstance(finding, str):
        return {"not_applicable": finding}
    return {
        "statistic": finding.statistic,
        "suspect_class": finding.class_names[finding.suspect_class],
        "scores": finding.scores.tolist(),
    }


def suspicion_of(
    model: PreTrainedModel,
    images: RawImages,
    twins: Iterable[PreTrainedModel] = (),
    null: Null | None = None,
    alarm_at: float = ALARM_AT,
    signals: Mapping[str, Signal] = SIGNALS,
) -> Suspicion:
    """Read all signals on a model and on its twins.

    Args:
        model: The suspicious model.
        images: Of its classes, without triggers as far as is known.
        twins: Trusted models of the same kind, loaded; taken one after the other, so that a generator need not hold them all.
        null: Scores of further twins.
        alarm_at: At which p there is an alarm.
        signals: By name.

    Raises:
        ValueError: ``alarm_at`` is out of range; a twin, or the null, is of another kind, is the model itself, or counts twice.
    """
    check_alarm_at(alarm_at)
    kind, own, warnings = Kind.of(model, images), weights_digest(model), list[str]()
    if null is not None:
        if differ := kind.others(null.kind):
            raise ValueError(f"the null is of another kind of models: {'; '.join(differ)}")
        if null.kind.images_sha256 != kind.images_sha256:
            warnings.append("the null's scores are from other images: give the same ones, or p may not hold")
    findings = _read(model, images, signals, "the model")
    known = {own: "the model"} | {twin.weights_sha256: twin.name for twin in (null.twins if null else ())}
    if null and any(twin.weights_sha256 == own for twin in null.twins):
        raise ValueError("the model itself is among the null's twins: it cannot be compared with itself")
    read = list[Twin]()
    for number, twin in enumerate(twins, 1):
        name = twin_name(twin, number)
        if differ := kind.others(Kind.of(twin, images)):
            raise ValueError(f"{name} is of another kind than the model: {'; '.join(differ)}")
        try:
            check_labels(images.class_names, twin.config)
        except ValueError as reason:
            raise ValueError(f"{name} is of another kind than the model: {reason}") from None
        digest = weights_digest(twin)
        if digest in known:
            raise ValueError(f"{name} is {known[digest]} itself: each model counts once")
        known[digest] = name
        wanted = {key: signals[key] for key, finding in findings.items() if isinstance(finding, Finding)}
        found = _read(twin, images, wanted, name)
        missing = {key: why for key, why in found.items() if isinstance(why, str)}
        warnings += [f"{key} is left out of p, since it cannot be read on {name}: {why}" for key, why in missing.items()]
        read.append(twin_of(name, digest, found))
    return Suspicion(findings, Null(kind, (null.twins if null else ()) + tuple(read)), alarm_at, warnings)


def _read(model: PreTrainedModel, images: RawImages, signals: Mapping[str, Signal], name: str) -> dict[str, Finding | str]:
    bar = tqdm(signals.items(), f"Reading signals of {name}", unit="signal")
    return {key: read_signal(key, signal, model, images) for key, signal in bar}


def twin_of(name: str, digest: str, found: Mapping[str, Finding | str]) -> Twin:
    """A twin by what was found of it: its name, `weights_digest`, and by signal the finding or why there is none."""
    findings = {key: finding for key, finding in found.items() if isinstance(finding, Finding)}
    return Twin(name, digest, {key: tuple(finding.scores.tolist()) for key, finding in findings.items()})


def twin_name(model: PreTrainedModel, number: int) -> str:
    """What to call a twin: as its source is called, without the folders of this machine."""
    source = source_of(model)
    return f"twin {number}" if source is None or source.kind == "module" else public_name(source.name)


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 of a model's parameters and buffers, wherever it lies."""
    return fingerprint(model.state_dict().values())
