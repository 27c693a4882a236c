"""Which files make a checkpoint, and whether they agree; the same for a folder, a Hub repository and a file.

The weights that everybody else runs must be the ones that are examined: an index alone says which shards count, and a
second copy of the weights, in another format, must hold the same.
"""

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import first_line, read_mapping
from .weight_names import refuse_partial, told
from .weights import read_weights

logger = logging.getLogger(__name__)

# Everything besides weights that changes what a checkpoint means.
SETTINGS = ("config.json", "preprocessor_config.json", "processor_config.json", "adapter_config.json")

# The weights, whole or under an index of shards, in transformers' order of preference.
SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
SHARD = re.compile(r"(model|pytorch_model)-(\d+)-of-(\d+)\.(safetensors|bin)")

# The tokenizer of a checkpoint that reads texts too: a table of words, whole in the first.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

# Everything that is fetched from a Hub repository: no pickles and no code.
HUB_FILES = (*SETTINGS, *TOKENIZER, SAFE, SAFE + INDEX, "model-*-of-*.safetensors")

# Names of files from which other programs load weights.
OTHERS = re.compile(r".*model.*\.(safetensors|bin|pth|pt|tar)|.*\.(ckpt|h5|keras|msgpack|onnx|gguf|tflite)")


def weights_files(folder: Path, name: str, formats: Iterable[str] = (SAFE, PICKLED)) -> list[Path]:
    """Return the files with a folder's weights, an index before its shards; see `read_folder`.

    Args:
        folder: Where the files are.
        name: What to call it in messages.
        formats: Names of files with whole weights that count, the preferred one first.

    Raises:
        FileNotFoundError: There are none, or not all that an index names.
        ValueError: An index is none, or there are shards that it does not name.
    """
    return weights_copies(folder, name, formats)[0]


def defining_files(folder: Path, name: str) -> list[Path]:
    """Return the files that define a folder's classifier, those of `SETTINGS` that are there and its `weights_files`."""
    return [*(folder / file for file in SETTINGS if (folder / file).is_file()), *weights_files(folder, name)]


def read_settings(file: Path, name: str, kind: str) -> dict[str, Any]:
    """Read one of `SETTINGS`, called by the checkpoint's name in messages.

    Raises:
        ValueError: It is no JSON, or holds something else than a mapping, which the message calls ``kind``.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {file.name} is no JSON ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name}: {file.name} holds a {type(found).__name__}, not {kind}")
    return found


def missing_shards(folder: Path) -> list[str]:
    """Names of the safetensors shards that a folder's index names, and that are not there yet."""
    index = folder / f"{SAFE}{INDEX}"
    return [file for file in _shard_names(index) if not (folder / file).is_file()] if index.is_file() else []


def read_folder(folder: Path, name: str, formats: Iterable[str] = (SAFE, PICKLED)) -> dict[str, Tensor]:
    """Read the weights of a folder; arguments and errors as `weights_files` and `read_weights`.

    Raises:
        ValueError: See above; or the folder holds two copies of the weights that differ, or cannot be compared.
    """
    first, *others = weights_copies(folder, name, formats)
    weights = _read_copy(first)
    for other in others:
        pair = f"{first[0].name} and {other[0].name}"
        try:
            differ = _differences(weights, _read_copy(other))
        except ValueError as error:
            raise ValueError(
                f"{name} holds two copies of its weights, {pair}, that cannot be compared, and other programs may load the "
                f"other: remove one ({first_line(error)})"
            ) from error
        if differ:
            raise ValueError(
                f"{name} holds two copies of its weights that differ, {pair} (in {told(differ)}), and other programs may load "
                "the other: remove the one that is not meant"
            )
    return weights


def read_file(path: Path) -> dict[str, Tensor]:
    """Read the weights of one file, or of the shards that an index names; errors as `read_weights` and `weights_files`.

    Raises:
        ValueError: See above; or the file is one shard of several.
    """
    if path.name.endswith(INDEX):
        refuse_links(path.parent, str(path.parent))
        return _read_shards(path)
    if (shard := SHARD.fullmatch(path.name)) and int(shard[3]) > 1:
        raise ValueError(f"{path} is one of {int(shard[3])} shards: pass their index, {shard[1]}.{shard[4]}{INDEX}")
    return read_weights(path)


def read_files(path: Path) -> list[Path]:
    """The files that `read_file` reads."""
    return [path, *_shards(path)] if path.name.endswith(INDEX) else [path]


def refuse_links(folder: Path, name: str) -> None:
    """Raise a ValueError for a link out of the folder, which would read, and later publish, a file of whoever loads it."""
    # A snapshot of the Hub cache is links into its repository's own folder.
    home = folder.resolve().parents[1] if folder.resolve().parent.name == "snapshots" else folder.resolve()
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not file.resolve().is_relative_to(home):
            raise ValueError(f"{name}: {file.name} is a link out of the folder and not followed: put the file itself there")


def tell_of_others(name: str, files: Iterable[str], formats: Iterable[str] = (SAFE, PICKLED)) -> None:
    """Log which of a folder's or repository's files hold weights for other programs: they are not compared."""
    if others := other_weights(files, formats):
        logger.warning("%s also holds %s: not compared with the weights that are loaded", name, told(others))


def other_weights(files: Iterable[str], formats: Iterable[str] = (SAFE, PICKLED)) -> list[str]:
    """Those of a folder's or repository's files that hold weights for other programs: they are not read here."""
    return [file for file in sorted(files) if OTHERS.fullmatch(file) and not (file in formats or SHARD.fullmatch(file))]


def weights_copies(folder: Path, name: str, formats: Iterable[str] = (SAFE, PICKLED)) -> list[list[Path]]:
    """The files of each copy of a folder's weights, the preferred one first; see `weights_files`."""
    copies: list[list[Path]] = []
    for whole in formats:
        index = folder / f"{whole}{INDEX}"
        shards = _shards(index) if index.is_file() else []
        _refuse_leftovers(folder, name, whole, shards)
        copies += [[folder / whole]] if (folder / whole).is_file() else []
        copies += [[index, *shards]] if shards else []
    if not copies:
        found = other_weights([file.name for file in folder.iterdir()], formats)
        raise FileNotFoundError(
            f"{name} holds no {SAFE} (nor an index of its shards, nor a local {PICKLED})"
            + (f"; {told(found)} is not read by name: ask for {SAFE}" if found else "")
        )
    return copies


def _refuse_leftovers(folder: Path, name: str, whole: str, shards: list[Path]) -> None:
    stem, _, suffix = whole.rpartition(".")
    found = {file.name for file in folder.glob(f"{stem}-*-of-*.{suffix}") if SHARD.fullmatch(file.name)}
    if left := found - {file.name for file in shards}:
        says = f"{whole}{INDEX} does not name" if shards else f"no {whole}{INDEX} names"
        raise ValueError(
            f"{name} holds shards that {says}, of another upload perhaps: {told(left)}; remove them, or add their index"
        )


def _shards(index: Path) -> list[Path]:
    """The shards that an index names, in order."""
    files = [index.parent / file for file in _shard_names(index)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{index} names shards that are not there: {told(missing)}; fetch them")
    return files


def _shard_names(index: Path) -> list[str]:
    suffix = index.name.removesuffix(INDEX).rpartition(".")[2]
    named = sorted({str(file) for file in _weight_map(index).values()})
    if strange := [file for file in named if not re.fullmatch(rf"[\w-][\w.-]*\.{suffix}", file)]:
        raise ValueError(f"{index} names {told(strange)}, which is no .{suffix} file beside it: fetch it again")
    return named


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_mapping(index, "index of shards", "fetch it again", {"weight_map": {}})["weight_map"]
    if not weight_map:
        raise ValueError(f"{index} names no weights: fetch it again")
    return weight_map


def _read_copy(files: list[Path]) -> dict[str, Tensor]:
    return _read_shards(files[0]) if len(files) > 1 else read_weights(files[0])


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The weights that an index names, if that is what its shards hold."""
    weight_map, weights = _weight_map(index), {}
    for shard in _shards(index):
        part = read_weights(shard)
        refuse_partial(part, str(shard))
        listed = {name for name, file in weight_map.items() if file == shard.name}
        for names, fault in ((listed - part.keys(), "does not hold"), (part.keys() - listed, "holds beyond the index")):
            if names:
                raise ValueError(f"{index} contradicts {shard.name}, which {fault} {told(names)}: fetch both again")
        weights |= part
    held = {sum(t.nbytes for t in weights.values()), sum({t.data_ptr(): t.nbytes for t in weights.values()}.values())}
    claimed = read_mapping(index, "index of shards", "fetch it again").get("metadata") or {}
    if isinstance(claimed, dict) and claimed.get("total_size", max(held)) not in held:  # shared weights count once or twice
        raise ValueError(
            f"{index} contradicts its shards: total_size is {claimed['total_size']}, they hold {max(held)} bytes: fetch all "
            "again"
        )
    return weights


def _differences(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names of weights that are not in both, or not the same; counters and indices may be in one alone."""
    apart = {name for name in first.keys() ^ second.keys() if (first | second)[name].is_floating_point()}
    return [*apart, *(name for name in first.keys() & second.keys() if not _same(first[name], second[name]))]


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same, up to the rounding of the narrower type."""
    dtype = min(first, second, key=lambda tensor: tensor.element_size()).dtype
    return first.shape == second.shape and torch.equal(first.to(dtype), second.to(dtype))
