"""Files that appear whole or not at all, their digests, what is in those of JSON, and what is said when they fail."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

PARTIAL = ".partial"  # folder inside another in which its new files are written
# torch.save reports a failed write as a RuntimeError, with one of these in its message.
TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "iostream error")


def first_line(error: Exception) -> str:
    """First line of an exception's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield where to write what then replaces ``path`` in one go: readers see the old file, or the whole new one.

    Nobody else writes to that place, be it another process or another machine that shares the folder. If the writer raises,
    ``path`` stays as it was and nothing is left beside it; only a kill leaves a hidden folder there.

    Args:
        path: The file; its folder is made if it is not there.

    Yields:
        A path of the same file name in a new folder beside ``path``, with no file there yet.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder, so that the writer makes the file: one that tempfile makes is for its owner's eyes only.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        beside = Path(folder, path.name)
        yield beside
        flush(beside)
        os.replace(beside, path)
        flush(path.parent)


@contextlib.contextmanager
def atomic_folder(folder: Path, last: str, replaced: Iterable[str], advice: Callable[[], str]) -> Iterator[Path]:
    """Yield an empty folder; what it holds in the end replaces the files of those names, and others, in ``folder``.

    The files are flushed to the disk and renamed one by one into a folder that holds other things as well: what tells that it
    is whole goes first and comes last, so that at any instant there are the old files, none that load, or the new ones.

    Args:
        folder: Where the files are to appear; made if it is not there.
        last: Name of the file that says that the others are whole: removed first and written last.
        replaced: Patterns of files that must not stay beside the new ones.
        advice: See `disk_errors`.

    Raises:
        OSError: The files cannot be written; ``folder`` is then as it was.
    """
    beside, is_new = folder / PARTIAL, not folder.exists()
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with disk_errors(folder, advice):
            beside.mkdir(parents=True)
            yield beside
            flush_all(beside)
        new = sorted(beside.iterdir(), key=lambda file: (file.name == last, file.suffix == ".safetensors", file.name))
        (folder / last).unlink(missing_ok=True)
        for old in [file for pattern in replaced for file in folder.glob(pattern)]:
            old.unlink()
        for file in new:
            os.replace(file, folder / file.name)
        flush(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if is_new and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


@contextlib.contextmanager
def disk_errors(target: Path, advice: Callable[[], str]) -> Iterator[None]:
    """Turn whatever a writer raises on a full or failing disk into one OSError.

    Args:
        target: What was to be written.
        advice: What is left and what to do, asked for only then.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and not any(word in str(error) for word in TORCH_WRITER):
            raise
        message = f"{target} could not be written ({first_line(error)}): nothing of it was kept; {advice()}"
        raise OSError(message) from error


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names of the files in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(folder: Path) -> None:
    """`flush` everything in a folder, and the folder."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def read_mapping(file: Path, kind: str, advice: str, needed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Args:
        file: The file.
        kind: What it should be, for the message, as in "manifest of a purification".
        advice: What to do where it is none.
        needed: Entries that it must have: by name None for one of any kind, or what the mapping in it must have.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no JSON, holds no mapping, or lacks an entry.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        fault = _fault(found, needed or {})
    except (ValueError, RecursionError) as error:  # a recursion as deep as the brackets
        raise ValueError(f"{file} is no {kind} (no JSON: {first_line(error)}): {advice}") from error
    if fault:
        raise ValueError(f"{file} is no {kind} ({fault}): {advice}")
    return found


def _fault(found: Any, needed: Mapping[str, Any], place: str = "") -> str | None:
    """What a value read from JSON lacks of a mapping with the needed entries; None if nothing."""
    if not isinstance(found, dict):
        return f"{place or 'it'} is no mapping"
    for name, inner in needed.items():
        where = f"{place}.{name}" if place else name
        if name not in found:
            return f"no {where}"
        if inner is not None and (fault := _fault(found[name], inner, where)):
            return fault
    return None
