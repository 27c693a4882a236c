"""The suspicious model that a run began with: recognised when resuming, compared with at the end."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

KEY = "reference_sha256"
# Relative distance below which weights count as unmoved: a projection or a copy alone moves them by rounding.
UNMOVED = 1e-5


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over the tensors' bytes, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_fingerprint(
    manifest: Path,
    expected: str,
    origin: str = "from another model",
    needed: str = "the suspicious model that the run began with",
    key: str = KEY,
) -> None:
    """Compare a checkpoint's manifest with the model at hand.

    Args:
        manifest: The file, in the checkpoint's folder.
        expected: The fingerprint of the model at hand.
        origin: What sets the checkpoint apart, for the error.
        needed: What to resume with, for the error.
        key: The manifest's entry that is read.

    Raises:
        ValueError: They differ, or the manifest has no such entry.
    """
    if json.loads(manifest.read_text()).get(key) != expected:
        raise ValueError(f"{manifest.parent} belongs to a run {origin}: resume with {needed}")


def remembered(model: nn.Module) -> list[Tensor]:
    """Copies of all parameters on the CPU, for `check_changed`."""
    return [parameter.detach().to("cpu", copy=True) for parameter in model.parameters()]


def check_changed(model: nn.Module, start: Iterable[Tensor]) -> None:
    """Raise a RuntimeError if every parameter is as it was: nothing unchanged is handed out as purified."""
    if all(torch.equal(p.cpu(), s.cpu()) for p, s in zip(model.parameters(), start, strict=True)):
        raise RuntimeError("no weight changed: the model is not purified. Check learning_rate and num_train_epochs")
