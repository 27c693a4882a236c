"""What is known of a purification beyond its trainer."""

from dataclasses import dataclass, field, fields
from typing import Any

from .pictures.triggered import TriggeredImages
from .tables import encoder_table, results_table

REJECTED = "rejected"  # folder below output_dir, and the manifest's entry with the reasons


@dataclass(frozen=True)
class Report:
    """What goes into manifest and card of a run besides what its trainer knows.

    `workflow.purify` is given one with the names of the images that it measures on, and returns it with what was found.

    Attributes:
        data: What the images measured on are called, on the Hub or by the last part of their path.
        configuration: Which configuration of that data set, if one was chosen.
        split: Which split of them.
        warnings: What makes the retain set look unfit, said before the start, and that the test images cannot tell
            whether a guard rail holds, said at the end.
        results: What ``all_results.json`` holds, see `evaluation.measure.results`; empty if nothing was measured, and on all
            processes but the main one.
        trigger: Description of the trigger that was measured with.
        n_images: How many images were measured on.
        seconds: Of measuring before, of training and of measuring after.
        guard_rails: Options of `GuardArguments`.
        rails: What became of each that is on, see `evaluation.guard.Rail.as_dict`.
        classes: ACC of each class before and after, see `evaluation.guard.recall_rows`.
        floor: What the trigger does to a model without a backdoor: its ``source`` and its ``rates``; None where none is known.
        shown: A few images with the trigger and both models' answers, for the card; None where there are none to be shown.
        rejected: Why a guard rail rejected the model, a line each; empty if none did.
        audit: What became of ACC on images that no decision saw, see `evaluation.measure.paired_results`; empty without such.
        evidence: What was found without the trigger, see `inspection.evidence.evidence_of`; empty where nobody looked.
        probe: Of an encoder: how many images its probes were trained on, ``images``, and how often, ``seeds``; empty of others.
        zero_shot: Of a whole CLIP: the ``templates`` that the names of the classes were put into; empty of others.
        chosen: How the method and its settings were chosen, where a rule did it.
    """

    data: str | None = None
    configuration: str | None = None
    split: str | None = None
    warnings: tuple[str, ...] = ()
    results: dict[str, Any] = field(default_factory=dict)
    trigger: dict[str, Any] | None = None
    n_images: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    guard_rails: dict[str, Any] | None = None
    rails: tuple[dict[str, Any], ...] = ()
    classes: tuple[dict[str, Any], ...] = ()
    floor: dict[str, Any] | None = None
    shown: TriggeredImages | None = None
    rejected: tuple[str, ...] = ()
    audit: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, int] = field(default_factory=dict)
    zero_shot: dict[str, Any] = field(default_factory=dict)
    chosen: dict[str, Any] | None = None

    def measured(self) -> dict[str, Any]:
        """The manifest's entry ``measured``: what is set, without what has a place of its own."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("results", "chosen", "shown")}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v or self._must_show(name)}

    def _must_show(self, name: str) -> bool:
        return self.n_images is not None and name in ("trigger", "warnings", "guard_rails")

    def __str__(self) -> str:
        if "before" in self.results:  # of encoders, each of the two by probes
            return encoder_table(self.results)
        return results_table(self.results, (self.floor or {}).get("rates"))
