"""Errors with an exit code of their own, and what messages share."""

import os
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


class Terminated(KeyboardInterrupt):
    """SIGTERM came, as from Slurm or Kubernetes: it ends a run as Ctrl-C does."""


class ProcessesFailed(RuntimeError):
    """Processes that a command launched have ended with an error.

    Attributes:
        code: Exit code of the first that failed.
        found: What the command has found nevertheless, with ``error`` and ``code``.
    """

    def __init__(self, found: dict[str, Any]):
        super().__init__(found["error"])
        self.code, self.found = found["code"], found


def join_names(names: Sequence[str], most: int = 8) -> str:
    """Join names for a message, the first ``most`` of them."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def go_online(is_offline: bool) -> str:
    """What to do where something has to come from the Hub and cannot.

    Args:
        is_offline: Whether the library that failed was told not to try.
    """
    named = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(name)]
    return f"{' and '.join(named) or 'HF_HUB_OFFLINE'} keeps it offline: unset it" if is_offline else "go online once"
