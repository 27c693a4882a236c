"""What the pictures share: figures without a window, colours, names of classes that any font can draw."""

import warnings
from pathlib import Path
from typing import Any

BEFORE, AFTER = "#8a9bb0", "#1f5fa8"  # the suspicious model, the purified one
WRONG, RIGHT = "#c0392b", "#2e7d32"
LONGEST = 32  # characters of a class's name
DPI = 110


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, file: Path) -> None:
    """Write a figure as PNG, the same bytes for the same figure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(file, dpi=DPI, metadata={"Software": None})


def drawn(name: str, longest: int = LONGEST) -> str:
    """A class's name as it is drawn: short, and without what no font and no XML has."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in name)
    return printable if len(printable) <= longest else f"{printable[: longest - 3]}..."


def as_text(label: Any) -> Any:
    """A matplotlib text that is shown as it is written: a class may be called anything, ``$\\frac`` too."""
    label.set_parse_math(False)
    return label
