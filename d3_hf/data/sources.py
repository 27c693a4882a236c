"""Where images come from, and which of a dataset's columns hold the picture and the label.

Internals of `load_images`: opening a source and finding columns by feature type.
"""

import io
import re
from collections import Counter
from collections.abc import Mapping
from glob import escape, has_magic
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetBuilder, DatasetDict, Features
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import DatasetCard
from PIL import Image
from yaml import YAMLError

from ..errors import go_online
from ..files import first_line
from .folder import files_in, open_pictures, open_tables, pictures_among

ImageSource = str | Path | Mapping[str, str | Path | list[str | Path]] | Dataset | DatasetDict


def open_source(source: ImageSource, revision: str | None = None, configuration: str | None = None) -> DatasetDict:
    """Open a source with whatever columns it has; see `load_images` for the sources and errors."""
    if revision is not None and not _is_hub_name(source):
        raise ValueError(f"revision={revision!r} is for datasets of the Hub; {name_of(source)} is not one")
    if _is_hub_name(source):
        return _open_hub(source, revision, configuration)
    path = Path(source).expanduser() if isinstance(source, str | Path) and source != "digits" else None
    if path and path.is_dir():
        return _open_folder(path.resolve(), str(path), configuration)
    if configuration is not None:
        raise ValueError(f"{name_of(source)} has no configurations: leave --dataset_config {configuration} out")
    if isinstance(source, DatasetDict):
        return source
    if isinstance(source, Dataset):
        return DatasetDict({str(source.split or "train"): source})
    if isinstance(source, Mapping):
        return _open_parquet(source)
    return _open_parquet({"train": path}) if path else digits()


def digits() -> DatasetDict:
    """scikit-learn's 1,797 handwritten digits (UCI "Optical Recognition of Handwritten Digits", test part).

    Enlarged bilinearly from 8x8 to 32x32, grey levels 0..16 spread over 0..255, three equal channels. The split, 1,437
    for training and 360 for testing, is stratified by digit and fixed.
    """
    from sklearn.datasets import load_digits  # takes seconds, which whoever brings images need not wait
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=[str(name) for name in bunch.target_names])})
    train, test = train_test_split(np.arange(len(grey)), test_size=0.2, random_state=0, stratify=bunch.target)
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {"image": [{"bytes": _enlarge(grey[row]), "path": None} for row in rows], "label": bunch.target[rows]},
                features=features,
                split=split,
            )
            for split, rows in (("train", np.sort(train)), ("test", np.sort(test)))
        }
    )


def name_of(source: ImageSource) -> str:
    """What to call a source in a message: its path or name, or the type of one that is already loaded."""
    return str(source) if isinstance(source, str | Path) else f"a {type(source).__name__}"


def image_column(features: Features, requested: str | None) -> str:
    """Name of the picture column: ``requested``, or the only one of type `datasets.Image`."""
    candidates = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    return _choose(features, candidates, requested, "image")


def label_column(features: Features, requested: str | None) -> str:
    """Name of the label column: ``requested``, the only one of type `ClassLabel`, or else of integers or strings."""
    named = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    plain = [name for name, feature in features.items() if re.match(r"u?int|(large_)?string", dtype_of(feature))]
    return _choose(features, (named + plain) if requested else (named or plain), requested, "label")


def has_class_labels(features: Features) -> bool:
    """Whether a column says of each image which class it is of, by name."""
    return any(isinstance(feature, ClassLabel) for feature in features.values())


def _is_hub_name(source: ImageSource) -> bool:
    if not isinstance(source, str) or source == "digits" or Path(source).expanduser().exists():
        return False
    return re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", source) is not None and not source.endswith(".parquet")


def _open_hub(name: str, revision: str | None, configuration: str | None) -> DatasetDict:
    try:
        return _open(name, name, configuration, revision=revision)
    except OSError as error:
        offline = f"; {go_online(True)}" if datasets.config.HF_HUB_OFFLINE else ""
        raise OSError(
            f"cannot load {name!r}, which is no local path, from the Hub: {first_line(error)}{offline}. Check the name, the "
            "revision and the network, or pass a folder, parquet files or a loaded DatasetDict"
        ) from error


def _open_folder(folder: Path, name: str, configuration: str | None) -> DatasetDict:
    """A folder of images or of tables, listed here; what else `datasets` knows, such as configurations in a README, by it."""
    files = files_in(folder)
    tables = [file for file in files if file.endswith(".parquet") and Path(file).name not in ImageFolder.METADATA_FILENAMES]
    pictures = pictures_among(files)
    described = any(Path(file).name in ImageFolder.METADATA_FILENAMES for file in files)
    if _has_card(folder, name) or configuration is not None or not tables and (described or not pictures):
        if has_magic(str(folder)):
            raise ValueError(
                f"{name}: datasets would take {folder} for a pattern and read other folders: rename it without [ ] * and ?"
            )
        return _open(name, str(folder), configuration)
    if not tables:
        return open_pictures(folder, name, pictures)
    return _open_parquet({split: [folder / file for file in of_it] for split, of_it in open_tables(tables, name).items()})


def _has_card(folder: Path, name: str) -> bool:
    """Whether a folder says in its own way, as a repository of the Hub does, what its splits and columns are."""
    if (folder / "dataset_infos.json").is_file() or (folder / ".huggingface.yaml").is_file():
        return True
    card = folder / "README.md"
    if not card.is_file():
        return False
    try:
        return bool({"configs", "dataset_info"} & DatasetCard.load(card, ignore_metadata_errors=True).data.to_dict().keys())
    except (UnicodeDecodeError, YAMLError) as error:
        raise ValueError(f"{name}: its README.md cannot be read ({error}): put it right, or move it away") from error


def _open_parquet(files: Mapping[str, str | Path | list[str | Path]]) -> DatasetDict:
    paths = {split: [Path(f).expanduser() for f in (v if isinstance(v, list) else [v])] for split, v in files.items()}
    for path in (path for several in paths.values() for path in several):
        if not path.is_file():
            raise FileNotFoundError(f"no such file or folder: {path}")
        if path.suffix != ".parquet":
            raise ValueError(f"{path} is not a .parquet file; pass parquet files, a folder of images or a dataset's name")
        if "::" in str(path):
            raise ValueError(f"{path}: datasets takes '::' for a chain of archives: rename it")
    data_files = {split: [escape(str(p)) for p in several] for split, several in paths.items()}
    name = ", ".join(str(path) for several in paths.values() for path in several)
    return _open(name, "parquet", data_files=data_files)


def _open(name: str, place: str, configuration: str | None = None, **options) -> DatasetDict:
    """`datasets.load_dataset`, with errors of one line.

    Raises:
        OSError: Of the disk or the network.
        ValueError: Damage, another format, or see `_builder`.
    """
    builder = _builder(name, place, configuration, **options)
    try:
        builder.download_and_prepare()
        return builder.as_dataset()
    except (DatasetGenerationError, ValueError) as error:
        reason = error.__cause__ or error
        if isinstance(reason, OSError):  # of the disk, not of the data
            raise reason from error
        raise ValueError(f"{name} cannot be read as a data set ({reason}): it is damaged or of another format") from error


def _builder(name: str, place: str, configuration: str | None, **options) -> DatasetBuilder:
    """What reads a set; refuses a configuration that is not there or not chosen, and files that would be in two splits."""
    try:
        builder = datasets.load_dataset_builder(place, configuration, **options)
    except ValueError as error:
        known = _configurations(place, **options)
        if len(known) > 1 and configuration not in known:
            raise ValueError(
                f"{name} has {len(known)} configurations: {', '.join(known)}; choose one with --dataset_config (in Python "
                "configuration=)"
            ) from error
        if known and configuration is not None and configuration not in known:
            raise ValueError(f"{name} has no configurations: leave --dataset_config {configuration} out") from error
        raise ValueError(
            f"{name} cannot be read as a data set ({first_line(error)}): it is damaged or of another format"
        ) from error
    counted = Counter(file for files in (builder.config.data_files or {}).values() for file in files)
    if doubled := [file for file, splits in counted.items() if splits > 1]:
        raise ValueError(
            f"{name}: datasets counts {len(doubled)} files to two splits by words in their names, {doubled[0]} for one; load a "
            "local copy as a folder without README.md, or in Python pass a DatasetDict"
        )
    return builder


def _configurations(place: str, **options) -> list[str]:
    try:
        return datasets.get_dataset_config_names(place, **options)
    except (OSError, ValueError):
        return []


def _choose(features: Features, candidates: list[str], requested: str | None, kind: str) -> str:
    columns = ", ".join(f"{name} ({dtype_of(feature)})" for name, feature in features.items())
    if requested is not None:
        if requested not in candidates:
            raise ValueError(f"{kind}_column={requested!r} is no {kind} column; the dataset has {columns}")
        return requested
    if not candidates:
        found = f"found no {kind} column; the dataset has {columns}"
        if kind == "label":
            found += "; a folder of images takes labels from one sub-folder for each of two or more classes"
        raise ValueError(found)
    if len(candidates) > 1:
        raise ValueError(f"several {kind} columns: {', '.join(candidates)}; choose one with {kind}_column=")
    return candidates[0]


def dtype_of(feature: object) -> str:
    """What a column holds, in a word."""
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def _enlarge(grey: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(grey).resize((32, 32), Image.Resampling.BILINEAR).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
