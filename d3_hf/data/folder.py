"""Local folders of images or of tables: which files belong to which split, and which class each image is of.

The files are listed here: `datasets` would take names for patterns, a class ``train_station`` for a split among them.
"""

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from ..errors import join_names
from ..labels import composed, in_order

logger = logging.getLogger(__name__)

# What a split may be called, in whatever case: the words of `datasets` and the names that it gives the splits.
SPLITS = {
    word: split
    for split, words in {
        "train": ("train", "training"),
        "validation": ("validation", "valid", "val", "dev"),
        "test": ("test", "testing", "eval", "evaluation"),
    }.items()
    for word in words
}
SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*\.parquet")  # as the Hub calls them, with any name of a split


def files_in(folder: Path) -> list[str]:
    """All files below a folder but hidden ones and those that a system keeps in ``__...`` folders; relative, sorted."""
    found = []
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        found += [Path(here, name).relative_to(folder).as_posix() for name in files if not name.startswith(".")]
    return sorted(found)


def pictures_among(files: Iterable[str]) -> list[str]:
    """Those that are pictures by their names."""
    return [file for file in files if PurePosixPath(file).suffix.lower() in ImageFolder.EXTENSIONS]


def open_pictures(folder: Path, name: str, files: list[str]) -> DatasetDict:
    """Read a folder of images: ``SPLIT/CLASS/IMAGE`` or ``CLASS/IMAGE``, each image once.

    Folders at the top that are called exactly as a split (`SPLITS`) are splits where images lie in folders below one of them,
    or where there are no other folders; other folders beside them are left out with a warning. Anything else is a class: the
    name of the folder that an image lies in, in composed Unicode, numbers in the order of numbers. A lone folder around all of
    this is passed over. A split with images but no folders has no labels.

    Args:
        folder: The folder.
        name: What to call it.
        files: Its pictures, see `pictures_among`.

    Returns:
        Per split the columns ``image`` and, if there are two classes or more, ``label``; rows in the order of their paths.

    Raises:
        ValueError: Two folders would be one split or, within a split, one class; or images lie in and outside class folders, or
            at different depths.
    """
    parts = [PurePosixPath(file).parts for file in files]
    around = 0
    while all(len(part) - around > 2 for part in parts) and len({part[around] for part in parts}) == 1:
        if parts[0][around].lower() in SPLITS:
            break
        around += 1
    rows: dict[str, list[tuple[str, str | None]]] = {}
    for split, members in _by_split([(file, part[around:]) for file, part in zip(files, parts, strict=True)], name).items():
        rows[split] = [(file, part[-2] if len(part) > 1 else None) for file, part in members]
        _refuse_unclear(members, split, name)
    depths = {len(PurePosixPath(file).parts) for members in rows.values() for file, label in members if label is not None}
    if len(depths) > 1:
        raise ValueError(f"{name}: images lie at different depths; put each into one folder per class, SPLIT/CLASS/IMAGE")
    return _dataset(folder, rows)


def open_tables(files: list[str], name: str) -> dict[str, list[str]]:
    """Which parquet files of a folder belong to which split: by a folder that is called as a split (`SPLITS`), or a word of the
    file's name that is.

    Args:
        files: Relative to the folder.
        name: What to call it.

    Raises:
        ValueError: A name says two splits, or some files have no split and others do.
    """
    shards = {file: SHARD.fullmatch(PurePosixPath(file).name) for file in files}
    if all(shards.values()):
        found = {file: shard[1] for file, shard in shards.items()}
    else:
        found = {file: _split_of(file, name) for file in files}
    if set(found.values()) == {None}:
        return {"train": files}
    if unclear := [file for file in files if found[file] is None]:
        raise ValueError(
            f"{name}: the names of {join_names(unclear)} say no split, those of other files do; rename them, or in Python pass "
            "{'train': files, 'test': files}"
        )
    return {split: [file for file in files if found[file] == split] for split in _sorted_splits(found.values())}


def _by_split(pictures: list[tuple[str, tuple[str, ...]]], name: str) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """Pictures, each with the parts of its path, by split; the parts without the split's folder."""
    tops = {part[0] for _, part in pictures if len(part) > 1}
    named = sorted(top for top in tops if top.lower() in SPLITS)
    nested = any(len(part) > 2 and part[0] in named for _, part in pictures)
    if not named or not nested and named != sorted(tops):
        return {"train": pictures}
    splits = {top: SPLITS[top.lower()] for top in named}
    if len(set(splits.values())) < len(splits):
        raise ValueError(f"{name}: of the folders {', '.join(named)} two are the same split; rename or remove one")
    if left_out := [file for file, part in pictures if len(part) == 1 or part[0] not in splits]:
        logger.warning(
            "%s: %d pictures outside %s are left out, the first is %s", name, len(left_out), " and ".join(named), left_out[0]
        )
    found = {split: [] for split in _sorted_splits(splits.values())}
    for file, part in pictures:
        if len(part) > 1 and part[0] in splits:
            found[splits[part[0]]].append((file, part[1:]))
    return found


def _refuse_unclear(members: list[tuple[str, tuple[str, ...]]], split: str, name: str) -> None:
    loose = [file for file, part in members if len(part) == 1]
    if loose and len(loose) < len(members):
        raise ValueError(
            f"{name}: {len(loose)} pictures of split {split!r} lie outside the folders of the classes, the first is "
            f"{loose[0]}: move them into one, or away"
        )
    homes: dict[str, set[str]] = {}
    for file, part in members:
        if len(part) > 1:
            homes.setdefault(composed(part[-2]), set()).add(str(PurePosixPath(file).parent))
    for label, several in homes.items():
        if len(several) > 1:
            raise ValueError(
                f"{name}: split {split!r} has {len(several)} folders called {label!r}, {join_names(sorted(several)[:2])}: "
                "which class an image is of is the name of the folder that it lies in"
            )


def _dataset(folder: Path, rows: dict[str, list[tuple[str, str | None]]]) -> DatasetDict:
    classes = in_order(composed(label) for members in rows.values() for _, label in members if label is not None)
    features = Features({"image": datasets.Image()} | ({"label": ClassLabel(names=classes)} if len(classes) > 1 else {}))
    numbers = {name: number for number, name in enumerate(classes)} | {None: None}
    made = DatasetDict()
    for split, members in rows.items():
        columns = {"image": [str(folder / file) for file, _ in members]}
        if "label" in features:
            columns["label"] = [numbers[label if label is None else composed(label)] for _, label in members]
        made[split] = Dataset.from_dict(columns, features=features, split=split)
    return made


def _split_of(file: str, name: str) -> str | None:
    path = PurePosixPath(file)
    words = [part.lower() for part in path.parent.parts] + re.split(r"[-._ \d]+", path.stem.lower())
    found = sorted({SPLITS[word] for word in words if word in SPLITS})
    if len(found) > 1:
        raise ValueError(f"{name}: {file} says two splits, {' and '.join(found)}; rename it")
    return found[0] if found else None


def _sorted_splits(splits: Iterable[str]) -> list[str]:
    """Train, validation, test, and then others."""
    known = list(dict.fromkeys(SPLITS.values()))
    return sorted(set(splits), key=lambda split: (known.index(split) if split in known else len(known), split))
