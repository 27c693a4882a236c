"""Files: their digests, and the first line of what went wrong with them."""

import hashlib
from pathlib import Path


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
