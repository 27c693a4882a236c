"""`check` and `audit` as one HTML file that asks nobody for anything: styles and pictures are in it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..card import TEMPLATES
from . import words
from .pictures import bars, picture
from .text import model_line

Triggers = Mapping[str, Mapping[str, np.ndarray]]


def check_page(found: dict[str, Any], triggers: Triggers) -> str:
    """The page of a check.

    Args:
        found: `Check.as_dict`.
        triggers: By signal, and by what they are called, pictures (3, H, W) of triggers that it recovered.
    """
    names = found["fit"]["classes"]
    figures = {
        name: bars(signal["z"] or signal["scores"], names, signal["class_beside_twins"] or signal["suspect_class"])
        for name, signal in found["suspicion"]["signals"].items()
        if "scores" in signal
    }
    return _render("check.html", found, figures, triggers)


def audit_page(found: dict[str, Any], before: Triggers, after: Triggers) -> str:
    """The page of an audit.

    Args:
        found: `Audit.as_dict`.
        before: As `check_page`'s triggers, of the suspicious model.
        after: Of the purified one.
    """
    figures = {
        name: bars(
            signal["before"]["outliers"], found["classes"], signal["before"]["suspect_class"], signal["after"]["outliers"]
        )
        for name, signal in found["signals"].items()
        if signal["stands_out_still"] is not None
    }
    triggers = {
        name: {
            f"{what}, {when}": pixels
            for when, one in (("before", before), ("after", after))
            for what, pixels in one.get(name, {}).items()
        }
        for name in found["signals"]
    }
    return _render("audit.html", found, figures, triggers)


def _render(template: str, found: dict[str, Any], figures: dict[str, str], triggers: Triggers) -> str:
    # Escaped: a checkpoint and a data set name their classes and files as they like.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shown = {name: {what: picture(pixels) for what, pixels in of_it.items()} for name, of_it in triggers.items()}
    return environment.get_template(template).render(
        found=found, figures=figures, triggers=shown, words=words, model_line=model_line
    )
