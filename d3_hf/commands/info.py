"""``d3-hf info``: what `load_classifier` would load, and what the folder says of itself."""

import json
from pathlib import Path
from typing import Any

from ..files import read_mapping
from ..inspection.describe import describe
from ..options.arguments import ModelArguments
from ..options.parser import Parser
from ..publishing.manifest import MANIFEST, REJECTED, RESULTS, VICTIM_FILE, read_manifest
from . import with_option

RATES = ("accuracy", "asr", "ra", "pacc", "trigger_drift")
# What is shown with one digit, and its unit.
SHARES = dict.fromkeys((*RATES, "poison_ratio"), "%") | {"accuracy_drop": "points"}


def run(argv: list[str]) -> dict[str, Any]:
    """Run ``SOURCE --option value ...``: load a classifier as a purification would, say what it is.

    Args:
        argv: Arguments without the program's name; the options are those of `ModelArguments`.

    Returns:
        `describe`, and under ``manifest`` `manifest_of` for a local folder.

    Raises:
        ValueError: No source is named, or see `load_classifier`.
    """
    (options,) = Parser([ModelArguments]).read(with_option("model_name_or_path", argv))
    if options.model_name_or_path is None:
        raise ValueError("no checkpoint: name a Hub id, a folder or a file")
    found = describe(options.load()) | {"manifest": manifest_of(Path(options.model_name_or_path).expanduser())}
    print(as_text(found))
    return found


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """What a folder's ``purification.json`` or ``victim.json`` says: method, attack, rates, warnings; None where it has none.

    Raises:
        ValueError: The file is damaged.
    """
    if (folder / MANIFEST).is_file():
        facts, rates = read_manifest(folder / MANIFEST), {}
        if (folder / RESULTS).is_file():
            rates = read_mapping(folder / RESULTS, "table of a purification's results", "purify again")
        measured = facts["measured"]
        kept = {f"{rate}_{when}" for rate in RATES for when in ("before", "after")} | {"accuracy_drop", "der"}
        said = {"method": facts.get("method"), "measured": {key: rates[key] for key in rates if key in kept}}
        shown = ("data", "configuration", "split", "trigger", "warnings", REJECTED)
        said |= {key: measured[key] for key in shown if measured.get(key)}
        return {"file": MANIFEST} | said
    if (folder / VICTIM_FILE).is_file():
        facts = read_mapping(folder / VICTIM_FILE, "record of make_victim", "make the victim again", {"measured": {}})
        rates, planted = facts["measured"].get("victim") or {}, facts.get("planted") or {}
        said = {"method": facts.get("method"), "measured": {key: rates[key] for key in RATES if key in rates}}
        said |= {"planted": {key: planted[key] for key in planted if key != "poisoned_rows"} or None}
        return {"file": VICTIM_FILE} | said
    return None


def as_text(found: dict[str, Any], margin: str = "") -> str:
    """One line an entry, JSON values so that nothing a checkpoint says can steer a terminal; mappings are indented, shares are
    percent with one digit."""
    lines = []
    for name, value in found.items():
        nested = isinstance(value, dict) and bool(value)
        unit = SHARES.get(name.removesuffix("_before").removesuffix("_after")) if isinstance(value, float) else None
        text = f"{100 * value:.1f} {unit}" if unit else json.dumps(value)
        lines.append(f"{margin}{name}:" if nested else f"{margin}{name}: {text}")
        lines += [as_text(value, margin + "  ")] if nested else []
    return "\n".join(lines)
