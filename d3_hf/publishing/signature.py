"""What a signature by model-signing covers: a push must not change what was signed. It is not verified here."""

import base64
import json
from pathlib import Path

SIGNATURE = "model.sig"


class SignedFileChanged(ValueError):
    """A push would change a file that the signature beside it covers."""


def signed_files(signature: Path) -> set[str]:
    """The names of the files that a signature covers: a sigstore bundle around an in-toto statement; none of anything else."""
    try:
        envelope = json.loads(signature.read_text(encoding="utf-8"))["dsseEnvelope"]
        statement = json.loads(base64.b64decode(envelope["payload"]))
        return {resource["name"] for resource in statement["predicate"]["resources"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
