"""`check` and `audit` as text for a terminal."""

from typing import Any

from .words import (
    accuracy_lines,
    change_line,
    cost_line,
    file_lines,
    fit_lines,
    flip_lines,
    highest,
    measured_lines,
    quoted,
    recall_line,
    relearning_lines,
    signal_line,
    together_lines,
)

MOST_CLASSES = 12  # in a text, those whose recall changed most


def check_text(found: dict[str, Any]) -> str:
    """The report of a check, from `Check.as_dict`."""
    model, suspicion, names = found["model"], found["suspicion"], found["fit"]["classes"]
    signals = together_lines(suspicion)
    for name, signal in suspicion["signals"].items():
        signals.append(signal_line(name, signal))
        if "scores" in signal:
            signals.append(f"  highest scores: {highest(signal, names)}")
    return "\n".join(
        [
            model_line(model),
            *section("files", file_lines(found["files"])),
            *section("fit", fit_lines(model, found["fit"])),
            *section("cost on this machine", [cost_line(cost) for cost in found["cost"]]),
            *section("suspicion", [*signals, *suspicion["warnings"], *measured_lines(model, suspicion)]),
            *section("limits", found["limits"]),
            "",
            suspicion["outcome"],
        ]
    )


def audit_text(found: dict[str, Any]) -> str:
    """The report of an audit, from `Audit.as_dict`."""
    recall = sorted(found["recall"], key=lambda row: -abs((row["after"] or 0) - (row["before"] or 0)))[:MOST_CLASSES]
    return "\n".join(
        [
            f"purified {model_line(found['purified'])}",
            f"suspicious {model_line(found['suspicious'])}",
            *section("signals", [change_line(name, signal) for name, signal in found["signals"].items()]),
            *section("ACC, on the same images", accuracy_lines(found["accuracy"])),
            *section("recall of the classes, most changed first", [recall_line(row) for row in recall]),
            *section("confident flips", flip_lines(found["flips"])),
            *(section("relearning", relearning_lines(found["relearning"])) if found["relearning"] else []),
            *(section("warnings", found["warnings"]) if found["warnings"] else []),
            *section("limits", found["limits"]),
            "",
            found["outcome"],
        ]
    )


def encoder_text(found: dict[str, Any]) -> str:
    """The report of a check of an encoder, from `EncoderCheck.as_dict`."""
    decree = found["decree"]
    size = (
        f"a mask over {100 * decree['score']:.1f} % of the image" if decree["reached"] else "nothing less than the whole image"
    )
    lines = [
        f"{size} gives all images the same features (score {decree['score']:.4f})",
        f"mean cosine of two images: {decree['likeness_before']:.3f} as they are, {decree['likeness']:.3f} with the mask",
    ]
    if scores := sorted(decree["twins"].values()):
        lines.append(f"scores of {len(scores)} twins: {', '.join(f'{score:.4f}' for score in scores[:MOST_CLASSES])}")
    return "\n".join(
        [
            model_line(found["model"]),
            *section("files", file_lines(found["files"])),
            *section("DECREE", lines),
            *section("limits", found["limits"]),
            "",
            found["outcome"],
        ]
    )


def model_line(model: dict[str, Any]) -> str:
    """What a model is, see `describe`."""
    revision = f" at {model['source']['revision']}" if model["source"]["revision"] else ""
    return f"{quoted(model['source']['name'])}{revision}: {model['architecture']}, {model['parameters']:,} parameters"


def section(title: str, lines: list[str]) -> list[str]:
    """A heading and lines under it."""
    return ["", title, *(f"  {line}" for line in lines)]
