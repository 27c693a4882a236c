"""The files of a checkpoint: which weights there are, whether they agree, their digests, and what scanners say of them.

Nothing is decided here that `load_classifier` has not decided: it refuses copies of the weights that differ, and a pickle that
wants to run code. What is written down is what it went by, and what lies beside it that other programs might load.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import sha256
from ..models import hub
from ..models.checkpoint_files import SAFE, defining_files, other_weights, read_files, weights_copies
from ..models.source import Source
from ..models.weights import PICKLED
from ..publishing.hub import pickle_scan, source_checks


def file_facts(source: Source | None) -> dict[str, Any]:
    """What is to be said of the files that a classifier was loaded from; JSON-able.

    Args:
        source: The classifier's. None, and a module's that was in memory, have no files.

    Returns:
        ``copies``, the names of the files of each copy of the weights, that which is loaded first; if there are several, the
        loader has compared them and found them the same. ``others``, names of files with weights for other programs, which
        were not compared; None where the Hub does not list its files. ``sha256`` of the weights and settings, by name.
        ``pickles``, by name what picklescan says of each pickled file, see `pickle_scan`. For a Hub id ``hub``, see
        `source_checks`.

    Raises:
        OSError: The files are not there any more.
    """
    if source is None or source.kind == "module":
        return {"copies": [], "others": [], "sha256": {}, "pickles": {}}
    if source.kind == "hub":
        folder, listed = hub.fetched(source.name, source.revision), hub.repository_files(source.name, source.revision)
        copies = weights_copies(folder, source.name, [SAFE])
        digests = {file.name: sha256(file) for file in defining_files(folder, source.name)}
        others = None if listed is None else other_weights(listed, [SAFE])
        return _facts(copies, others, digests, []) | {"hub": source_checks(asdict(source))}
    place = Path(source.name).expanduser()
    if source.kind == "file":
        files = read_files(place)
        return _facts([files], [], source.sha256, [file for file in files if file.suffix in PICKLED])
    copies, there = weights_copies(place, source.name), sorted(place.iterdir())
    digests = source.sha256 | {file.name: sha256(file) for copy in copies[1:] for file in copy}
    others = other_weights([file.name for file in there])
    return _facts(copies, others, digests, [file for file in there if file.is_file() and file.suffix in PICKLED])


def _facts(copies: list[list[Path]], others: list[str] | None, digests: dict[str, str], pickles: list[Path]) -> dict[str, Any]:
    return {
        "copies": [[file.name for file in copy] for copy in copies],
        "others": others,
        "sha256": digests,
        "pickles": {file.name: pickle_scan([file]) for file in pickles},
    }
