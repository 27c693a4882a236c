"""`audit`: a purified model beside what it was purified from, without a trigger."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from ..assurance.finding import Finding, outlier_scores
from ..assurance.signals import LIMITS, SIGNALS, Signal, read_signals
from ..data.images import RawImages
from ..evaluation.confidence import Answers, confident_flips
from ..evaluation.guard import recall_rows
from ..evaluation.metrics import Proportion
from ..evaluation.paired import paired_table
from ..models.source import source_of
from ..publishing.inspection.text import audit_text
from ..publishing.manifest import MANIFEST, read_manifest, versions
from ..training.reference import fingerprint_of, fingerprints
from .check import NAMED
from .describe import describe
from .fit import fitting_answers
from .relearning import relearning_of
from .suspicion import finding_facts

SCHEMA = "urn:d3_hf:audit:1"  # of publishing/schemas/audit.schema.json
MOST_PAIRS = 10  # of classes between which predictions flip, the most frequent ones

AUDIT_LIMITS = (
    LIMITS[0],
    "Some class stands out most in every model. What is compared is whether it is the same one, and how far.",
    "head_rows and latent_shift read the head: one that was drawn anew looks unlike the old one, whatever the features hold.",
    "Nothing here says whether a backdoor would come back when the model is trained further: a canary is not that backdoor.",
)


@dataclass(frozen=True, eq=False)
class Audit:
    """A purified model beside the suspicious one.

    Args:
        suspicious, purified: What each is, see `describe`.
        before, after: By signal what it found on each, or why it could not be read.
        said_before, said_after: What each says of the images.
        class_names: Of the images.
        labels: Of the images, int64 (N,).
        warnings: What was not as it should be, a line each.
        images: As `Check.images`.
        relearning: See `relearning_of`; None where it was not asked for.
    """

    suspicious: dict[str, Any]
    purified: dict[str, Any]
    before: dict[str, Finding | str]
    after: dict[str, Finding | str]
    said_before: Answers
    said_after: Answers
    class_names: list[str]
    labels: Tensor
    warnings: list[str] = field(default_factory=list)
    images: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(NAMED))
    relearning: dict[str, Any] | None = None

    def __str__(self) -> str:
        return audit_text(self.as_dict())

    def stands_out_still(self, signal: str) -> bool | None:
        """Whether the class that stood out most still does; None where the signal could not be read on both."""
        before, after = self.before[signal], self.after[signal]
        if isinstance(before, str) or isinstance(after, str):
            return None
        return before.suspect_class == after.suspect_class

    @property
    def outcome(self) -> str:
        """By how many signals the class that stood out most does so still, in a sentence."""
        still = {name: found for name in self.before if (found := self.stands_out_still(name)) is not None}
        if not still:
            return "no signal could be read on both models"
        kept = [name for name, found in still.items() if found]
        gone = len(still) - len(kept)
        said = f"the class that stood out most no longer does by {gone} of {len(still)} signals"
        return f"{said}, and still does by {', '.join(kept)}" if kept else said

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, as ``publishing/schemas/audit.schema.json`` describes it."""
        return {
            "schema": SCHEMA,
            "suspicious": self.suspicious,
            "purified": self.purified,
            "images": self.images,
            "classes": self.class_names,
            "signals": {name: self._signal(name) for name in self.before},
            "accuracy": self._accuracy(),
            "recall": recall_rows(self.said_before.predicted, self.said_after.predicted, self.labels, self.class_names),
            "flips": self._flips(),
            "relearning": self.relearning,
            "outcome": self.outcome,
            "warnings": self.warnings,
            "limits": list(AUDIT_LIMITS),
            "versions": versions(),
        }

    def _signal(self, name: str) -> dict[str, Any]:
        before, after = self.before[name], self.after[name]
        found = {"before": _facts(before), "after": _facts(after), "stands_out_still": self.stands_out_still(name)}
        if found["stands_out_still"] is None:
            return found | {"suspect_after": None}
        return found | {"suspect_after": float(outlier_scores(after.scores)[before.suspect_class])}

    def _accuracy(self) -> dict[str, Any]:
        table = paired_table(self.said_before.predicted, self.said_after.predicted, self.labels)
        counts = {name: getattr(table, name) for name in ("both_right", "lost", "gained", "both_wrong")}
        rates = table.before.as_dict("accuracy_before") | table.after.as_dict("accuracy_after")
        return rates | table.as_dict("accuracy_drop") | counts

    def _flips(self) -> dict[str, Any]:
        flips = confident_flips(self.said_before, self.said_after)
        before, after, labels = (v[flips] for v in (self.said_before.predicted, self.said_after.predicted, self.labels.numpy()))
        pairs = Counter(zip(before.tolist(), after.tolist(), strict=True)).most_common(MOST_PAIRS)
        named = [
            {"before": self.class_names[one], "after": self.class_names[other], "images": count}
            for (one, other), count in pairs
        ]
        right = {"right_before": int(np.sum(before == labels)), "right_after": int(np.sum(after == labels))}
        return Proportion(int(flips.sum()), len(flips)).as_dict("flips") | right | {"pairs": named}


def _facts(finding: Finding | str) -> dict[str, Any]:
    facts = finding_facts(finding)
    return facts if isinstance(finding, str) else facts | {"outliers": outlier_scores(finding.scores).tolist()}


def audit(
    purified: PreTrainedModel,
    suspicious: PreTrainedModel,
    images: RawImages,
    *,
    signals: Mapping[str, Signal] = SIGNALS,
    relearn: bool = False,
    twin: PreTrainedModel | None = None,
) -> Audit:
    """Compare a purified model with what it was purified from, on images without a trigger.

    Args:
        purified: A classifier of `load_classifier`; not changed.
        suspicious: The same, as it was before.
        images: Raw images of their classes that neither was tuned on; 300 to 500 of all classes.
        signals: By name, of `SIGNALS`.
        relearn: Also tune copies of both with a canary, and see how soon it takes; see `relearning_of`.
        twin: A trusted model of the same kind, tuned with it too.

    Raises:
        ValueError: The two are the same model; a twin is given without ``relearn``; the classes of the images are not both
            models'; a logit is not finite; or see `relearning_of`.
        RuntimeError: A single image does not fit into the device's memory.
    """
    if twin is not None and not relearn:
        raise ValueError("a twin is for the relearning test: ask for that too, or leave the twin out")
    own = handed_over(suspicious)
    if handed_over(purified) == own:
        raise ValueError("purified and suspicious model are the same: name what it was purified from as the source")
    said_before, said_after = fitting_answers(suspicious, images), fitting_answers(purified, images)
    before, after = read_signals(suspicious, images, signals), read_signals(purified, images, signals)
    models = {"suspicious": suspicious, "purified": purified} | ({} if twin is None else {"twin": twin})
    return Audit(
        describe(suspicious),
        describe(purified),
        before,
        after,
        said_before,
        said_after,
        list(images.class_names),
        images.labels,
        source_warnings(purified, own),
        relearning=relearning_of(models, images) if relearn else None,
    )


def handed_over(model: PreTrainedModel) -> str:
    """The fingerprint by which a manifest knows the model that a purification began with, ``reference_sha256``."""
    return fingerprint_of(fingerprints(model.state_dict()))


def source_warnings(purified: PreTrainedModel, suspicious_sha256: str) -> list[str]:
    """That the manifest of a purified folder was written of another suspicious model.

    Args:
        purified: The purified model, whose folder may hold a manifest.
        suspicious_sha256: Of the suspicious model, see `handed_over`.

    Raises:
        ValueError: The manifest is damaged.
    """
    source = source_of(purified)
    file = Path(source.name).expanduser() / MANIFEST if source is not None and source.kind == "folder" else None
    if file is None or not file.is_file():
        return []
    facts = read_manifest(file)
    if facts.get("reference_sha256") in (None, suspicious_sha256):
        return []
    return [f"{MANIFEST} says that the model was purified from other weights, of {facts['source']['name']}: check the source"]
