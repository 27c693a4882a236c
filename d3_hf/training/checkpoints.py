"""Files that appear whole or not at all, and which checkpoints of a folder are whole.

All that a trainer writes is written into `PARTIAL` inside the output folder, flushed to the disk and then renamed. A checkpoint
is a folder and is renamed in one go. The files of a model are renamed one by one into a folder that holds other things as well:
an old model is made unloadable first and the manifest comes last, so that at any instant there is the old model, none, or the
new one.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..files import first_line, sha256
from ..publishing.manifest import MANIFEST, REJECTED
from .config import PurifyConfig

logger = logging.get_logger(__name__)

PARTIAL = ".partial"
WHOLE = "whole.json"  # in a checkpoint: the SHA-256 of every other file, written last
RESULTS = (MANIFEST, "victim.json")  # with a card beside it, either says that a folder holds a finished run's results
MODEL_FILES = (
    *("model*.safetensors", "model*.safetensors.index.json", "all_results.json", "retain_indices.json"),
    *("attack.json", "trigger.safetensors"),  # a victim's
)
# torch.save reports a failed write as a RuntimeError, with one of these in its message.
TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "iostream error")


def check_output(args: PurifyConfig, source: Any) -> None:
    """Refuse an output folder that would fail at the end of the run or would cost something that is there; writes nothing.

    Args:
        args: Its ``output_dir``, ``overwrite_output_dir`` and ``resume_from_checkpoint``.
        source: The `Source` of the model, or None.

    Raises:
        ValueError: The folder is the model's own, or it or its ``rejected`` holds the results of another run and is not to be
            overwritten.
        OSError: It cannot be written to.
    """
    folder = Path(args.output_dir)
    if source is not None and source.kind in ("folder", "file"):
        replaced = [place / file for place in (folder, folder / REJECTED) for file in ("", SAFE_WEIGHTS_NAME)]
        if Path(source.name).expanduser().resolve() in [place.resolve() for place in replaced]:
            raise ValueError(f"output_dir {folder} is where the suspicious model lies, which must stay: choose another")
    found = results_in(folder) or results_in(folder / REJECTED)
    if found and not (args.overwrite_output_dir or is_asked_to_resume(args.resume_from_checkpoint)):
        raise ValueError(
            f"output_dir {folder} holds the results of another run ({found.relative_to(folder)}): choose another, or add "
            "--overwrite_output_dir (overwrite_output_dir=True) to replace them"
        )
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"output_dir {folder} cannot be made: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"output_dir {folder} cannot be written: no permission in {existing}")


def results_in(folder: Path) -> Path | None:
    """The file that says that a folder holds a finished run's results."""
    return next((folder / name for name in RESULTS if (folder / name).is_file() and (folder / "README.md").is_file()), None)


@contextlib.contextmanager
def whole(folder: Path, last: str) -> Iterator[Path]:
    """Yield an empty folder; what it holds in the end replaces the files of those names and `MODEL_FILES` in ``folder``.

    Args:
        folder: Where the files are to appear; made if it is not there.
        last: Name of the file that says that the others are whole: removed first and written last.

    Raises:
        OSError: The files cannot be written; ``folder`` is then as it was.
    """
    if folder.parent.name == PARTIAL:  # inside a checkpoint, which is renamed as a whole
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    beside, is_new = folder / PARTIAL, not folder.exists()
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with one_line(folder, folder):
            beside.mkdir(parents=True)
            yield beside
            flush(beside)
        new = sorted(beside.iterdir(), key=lambda file: (file.name == last, file.suffix == ".safetensors", file.name))
        (folder / last).unlink(missing_ok=True)
        for old in [file for pattern in MODEL_FILES for file in folder.glob(pattern)]:
            old.unlink()
        for file in new:
            os.replace(file, folder / file.name)
        flush(folder, files=False)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if is_new and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def replace_text(file: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    beside = file.with_name(f"{PARTIAL}-{file.name}")
    with one_line(file, file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, file)


def damage(checkpoint: Path) -> str | None:
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


def last_whole(folder: Path) -> Path | None:
    """The latest checkpoint of a folder whose files are all as they were written."""
    return next((path for path in checkpoints_in(folder) if damage(path) is None), None)


def is_asked_to_resume(asked: str | bool | None) -> bool:
    """Whether ``resume_from_checkpoint`` asks for a checkpoint: neither None nor False, which a command line spells out."""
    return asked is not None and str(asked).lower() != "false"


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
        last = last_whole(output_dir)
        if last is None:
            raise ValueError(f"{output_dir} holds no whole checkpoint: leave resume_from_checkpoint out to begin anew")
        for path in checkpoints_in(output_dir):
            if path == last:
                return str(last)
            logger.warning("%s is passed over: %s. Resuming from %s", path, damage(path), last)
    if fault := damage(Path(asked)):
        raise ValueError(f"{asked} is no whole checkpoint ({fault}); {last_named(Path(asked).parent)}")
    return str(asked)


def last_named(folder: Path) -> str:
    """Which checkpoint of a run to go on with, for a message."""
    last = last_whole(folder)
    if last is None:
        return f"there is no whole checkpoint in {folder}: run it again from the beginning"
    return f"the last whole checkpoint is {last}: go on with --resume_from_checkpoint {last}"


@contextlib.contextmanager
def one_line(target: Path, run: Path) -> Iterator[None]:
    """Turn whatever a writer raises on a full or failing disk into one OSError that says what is left of the run."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and not any(word in str(error) for word in TORCH_WRITER):
            raise
        raise OSError(
            f"{target} could not be written ({first_line(error)}): nothing of it was kept; {last_named(run)}"
        ) from error


def seal(checkpoint: Path) -> None:
    """Flush a checkpoint and write down what it holds."""
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file()]
    digests = {str(file.relative_to(checkpoint)): sha256(file) for file in files}
    (checkpoint / WHOLE).write_text(json.dumps(digests, indent=1) + "\n")
    flush(checkpoint)


def flush(folder: Path, files: bool = True) -> None:
    """Wait until the files of a folder, and their names, are on the disk."""
    for path in [*(folder.rglob("*") if files else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
