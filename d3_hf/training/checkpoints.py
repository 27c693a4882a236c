"""Checkpoints: which of a folder's are whole, which one to go on from, and whether a folder may be written to.

A checkpoint is a folder, written into `PARTIAL` inside the output folder, flushed, sealed with the digests of its files, and
renamed in one go.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..files import flush_all, sha256
from ..publishing.leftovers import other_weights
from ..publishing.manifest import MANIFEST, VICTIM_FILE
from ..publishing.report import REJECTED

logger = logging.get_logger(__name__)

WHOLE = "whole.json"  # in a checkpoint: the SHA-256 of every other file, written last
FINISHED = (MANIFEST, VICTIM_FILE)  # with a card beside it, either says that a folder holds a finished run's results


def check_output(args: TrainingArguments, source: Any) -> None:
    """Refuse an output folder that would fail at the end of the run or would cost something that is there; writes nothing.

    Args:
        args: Its ``output_dir``, ``overwrite_output_dir`` and ``resume_from_checkpoint``.
        source: The `Source` of the model, or None.

    Raises:
        ValueError: The folder is the model's own; it holds weights that no run replaces; or it or its ``rejected`` holds the
            results of another run and is not to be overwritten.
        OSError: It cannot be written to.
    """
    folder = Path(args.output_dir)
    for place in (folder, folder / REJECTED):
        check_not_source(place, source)
    own = Path(source.name).expanduser().resolve() if source is not None and source.kind == "file" else None
    if others := other_weights(file.name for file in folder.glob("*") if file.resolve() != own):
        raise ValueError(
            f"output_dir {folder} holds other weights ({', '.join(others)}), which many programs would load in place of the "
            "new ones: choose another folder, or move them away"
        )
    found, asked = results_in(folder) or results_in(folder / REJECTED), args.resume_from_checkpoint
    goes_on = is_asked_to_resume(asked) and not begins_anew(asked, folder)
    if found and not (args.overwrite_output_dir or goes_on):
        raise ValueError(
            f"output_dir {folder} holds the results of another run ({found.relative_to(folder)}): choose another, or add "
            "--overwrite_output_dir (overwrite_output_dir=True) to replace them"
        )
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"output_dir {folder} cannot be made: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"output_dir {folder} cannot be written: no permission in {existing}")


def check_not_source(folder: Path, source: Any) -> None:
    """Raise a ValueError where writing into a folder would replace the model of a `Source`."""
    if source is None or source.kind not in ("folder", "file"):
        return
    replaced = (folder, folder / SAFE_WEIGHTS_NAME)
    if Path(source.name).expanduser().resolve() in [place.resolve() for place in replaced]:
        raise ValueError(f"output_dir {folder} is where the suspicious model lies, which must stay: choose another")


def results_in(folder: Path) -> Path | None:
    """The file that says that a folder holds a finished run's results."""
    return next((folder / name for name in FINISHED if (folder / name).is_file() and (folder / "README.md").is_file()), None)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if every file is as it was written."""
    if not checkpoint.is_dir():
        return "no such folder"
    if not (checkpoint / WHOLE).is_file():
        return f"no {WHOLE}, which is written last"
    try:
        digests = json.loads((checkpoint / WHOLE).read_text())
    except ValueError:
        return f"{WHOLE} is no JSON"
    for name, digest in digests.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if sha256(checkpoint / name) != digest:
            return f"{name} is not as it was written"
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, latest step first, whole or not."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint of a folder whose files are all as they were written."""
    return next((path for path in checkpoints_in(folder) if find_damage(path) is None), None)


def outdated(folder: Path, limit: int | None, best: str | None) -> list[Path]:
    """The checkpoints of a folder beyond ``save_total_limit``, the oldest; neither the latest nor the best is among them."""
    if not limit or limit < 0 or not (found := sort_checkpoints(str(folder), use_mtime=True, best_model_checkpoint=best)):
        return []
    protected = {found[-1]} | ({str(Path(best))} if best else set())
    return [Path(path) for path in found[: -max(limit, len(protected))]]


def move_away(checkpoints: Iterable[Path], beside: Path) -> None:
    """Move checkpoints into a folder that is then removed: a kill must leave none half removed under its name."""
    beside.mkdir(exist_ok=True)
    for path in checkpoints:
        os.replace(path, beside / path.name)


def is_asked_to_resume(asked: str | bool | None) -> bool:
    """Whether ``resume_from_checkpoint`` asks for a checkpoint: neither None nor False, which a command line spells out."""
    return asked is not None and str(asked).lower() != "false"


def begins_anew(asked: str | bool | None, folder: Path) -> bool:
    """Whether ``resume_from_checkpoint`` asks for the last checkpoint of a folder that holds none, whole or not."""
    return str(asked).lower() == "true" and not checkpoints_in(folder)


def to_resume_from(asked: str | bool | None, output_dir: Path) -> str | None:
    """The checkpoint that ``resume_from_checkpoint`` means, verified.

    Args:
        asked: A checkpoint's folder; True or ``"true"`` for the last whole one of ``output_dir``; None or False for none.
        output_dir: The run's folder.

    Raises:
        ValueError: The checkpoint is damaged, or there is no whole one.
    """
    if not is_asked_to_resume(asked):
        return None
    if str(asked).lower() == "true":
        last = last_whole_checkpoint(output_dir)
        if last is None:
            raise ValueError(f"{output_dir} holds no whole checkpoint: leave resume_from_checkpoint out to begin anew")
        for path in checkpoints_in(output_dir):
            if path == last:
                return str(last)
            logger.warning("%s is passed over: %s. Resuming from %s", path, find_damage(path), last)
    if fault := find_damage(Path(asked)):
        raise ValueError(f"{asked} is no whole checkpoint ({fault}); {advise_resuming(Path(asked).parent)}")
    return str(asked)


def advise_resuming(folder: Path) -> str:
    """Which checkpoint of a run to go on with, for a message."""
    last = last_whole_checkpoint(folder)
    if last is None:
        return f"there is no whole checkpoint in {folder}: run it again from the beginning"
    return f"the last whole checkpoint is {last}: go on with --resume_from_checkpoint {last}"


def seal(checkpoint: Path) -> None:
    """Flush a checkpoint and write down what it holds."""
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file()]
    digests = {str(file.relative_to(checkpoint)): sha256(file) for file in files}
    (checkpoint / WHOLE).write_text(json.dumps(digests, indent=1) + "\n")
    flush_all(checkpoint)
