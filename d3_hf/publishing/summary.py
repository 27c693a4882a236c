"""The outcome of a purification in a sentence, and of its guard rails in a table."""

from collections.abc import Sequence
from typing import Any

from .tables import PROBES, markdown_table

LEVEL = 0.05  # of McNemar's test: below it a change of ACC is more than chance
RAILS = {  # what each is called, and the unit of its share
    "max_accuracy_drop": ("fall of ACC, at most", "points"),
    "min_class_accuracy": ("lowest ACC of a class, at least", "%"),
    "min_agreement": ("predictions that stay, at least", "%"),
}


def headline(results: dict[str, Any], trigger: dict[str, Any] | None) -> str:
    """What was measured, in a sentence.

    Args:
        results: As `measure.results` makes it.
        trigger: Description of the trigger that was measured with, if one was known.
    """
    accuracy = f"accuracy {_change(results, 'accuracy')}, {_chance(results)}"
    if trigger is None:
        return f"No trigger was known: {accuracy}. What a trigger does to the model was not measured."
    return f"Known trigger ({trigger['name']}): ASR {_change(results, 'asr')}, RA {_change(results, 'ra')}; {accuracy}."


def encoder_headline(results: dict[str, Any], trigger: dict[str, Any] | None) -> str:
    """What was measured of an encoder, by each probe, or of a whole CLIP, zero-shot, in a sentence.

    Args:
        results: As `workflow.purify_encoder` makes it.
        trigger: Description of the trigger that was measured with, if one was known.
    """
    rates = {
        short: key for short, key in (("ASR", "asr"), ("RA", "ra"), ("accuracy", "accuracy")) if trigger or key == "accuracy"
    }
    said = []
    for probe, name in PROBES.items():
        if probe not in results["after"]:
            continue
        found = {f"{key}_{when}": results[when][probe][key] for key in rates.values() for when in ("before", "after")}
        said.append(
            (f"{name} " if probe == "zero_shot" else f"by {name} ")
            + ", ".join(f"{short} {_change(found, key)}" for short, key in rates.items())
        )
    if trigger is None:
        return f"No trigger was known: {'; '.join(said)}. What a trigger does to the encoder was not measured."
    return f"Known trigger ({trigger['name']}): {'; '.join(said)}."


def _change(results: dict[str, Any], key: str) -> str:
    return f"{100 * results[f'{key}_before']:.1f} % to {100 * results[f'{key}_after']:.1f} %"


def _chance(results: dict[str, Any]) -> str:
    """What the paired test says of the change of ACC."""
    count = f"on {results['accuracy_after_n']} images"
    if "accuracy_drop_p" not in results:
        return count
    p = results["accuracy_drop_p"]
    said = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
    if p >= LEVEL:
        return f"within chance {count} ({said})"
    return f"a {'fall' if results['accuracy_drop'] > 0 else 'rise'} beyond chance {count} ({said})"


def rails_table(rails: Sequence[dict[str, Any]]) -> str:
    """Markdown table of the guard rails that are on, see `evaluation.guard.Rail.as_dict`."""
    rows = []
    for rail in rails:
        what, unit = RAILS[rail["name"]]
        outcome = "held" if rail["holds"] else "**broken**"
        outcome += "" if rail["is_certain"] else ", but the images cannot tell"
        shares = [f"{100 * rail[key]:.1f} {unit}" for key in ("limit", "found")]
        rows.append([f"{what} (`{rail['name']}`)", *shares, outcome])
    return markdown_table(["guard rail", "limit", "found", "outcome"], rows)
