"""The card's section "Evidence without the trigger", from what `inspection.evidence.evidence_of` found."""

import html
from typing import Any

from .words import accuracy_lines, change_line, flip_lines, recall_line

MOST_CLASSES = 5  # those whose recall changed most
ABOUT = (
    "Looked at without any trigger, suspicious and purified model on the same {images} images, by the signals that take one "
    "pass. `d3-hf audit` reads all signals and draws them."
)


def evidence_section(evidence: dict[str, Any] | None) -> str:
    """The section as Markdown, heading included; empty where nothing was looked at.

    Args:
        evidence: The manifest's entry ``measured.evidence``.
    """
    if not evidence:
        return ""
    if "not_applicable" in evidence:
        return _section([f"Not available: {evidence['not_applicable']}."], [])
    recall = sorted(evidence["recall"], key=lambda row: -abs((row["after"] or 0) - (row["before"] or 0)))[:MOST_CLASSES]
    lines = [
        *(change_line(name, signal) for name, signal in evidence["signals"].items()),
        *accuracy_lines(evidence["accuracy"]),
        *(f"recall of {recall_line(row)}" for row in recall),
        *flip_lines(evidence["flips"]),
    ]
    outcome = f"**{evidence['outcome'][0].upper()}{evidence['outcome'][1:]}.**"
    limits = " ".join(evidence["limits"])
    return _section([ABOUT.format(images=evidence["images"]), outcome], lines, [f"What this cannot see: {limits}"])


def _section(before: list[str], lines: list[str], after: list[str] | None = None) -> str:
    # Escaped: a checkpoint names its classes as it likes.
    listed = ["\n".join(f"- {html.escape(line, quote=False)}" for line in lines)] if lines else []
    texts = [html.escape(text, quote=False) for text in before]
    return "\n\n".join(["## Evidence without the trigger", *texts, *listed, *(after or [])]) + "\n"
