"""Errors with an exit code of their own, and what messages share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class GuardRailBroken(RuntimeError):
    """A purified model broke a guard rail: it was saved apart and not pushed.

    Attributes:
        reasons: One line for each rail that broke.
        folder: Where the rejected model lies.
        results: What was measured, see `workflow.purify`.
    """

    def __init__(self, reasons: list[str], folder: Path, results: dict[str, Any]):
        super().__init__(f"{'; '.join(reasons)}. The model is in {folder}, nothing was pushed")
        self.reasons, self.folder, self.results = reasons, folder, results


def join_names(names: Sequence[str]) -> str:
    """Join names for a message, the first eight of them."""
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
