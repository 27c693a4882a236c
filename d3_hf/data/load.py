"""Load any labelled image dataset in one form, and draw a retain set from it."""

import logging
import re
from dataclasses import dataclass

import datasets
import numpy as np
from datasets import Dataset, DatasetDict, Features, NamedSplit, Value

from ..errors import join_names
from . import sources
from .images import RawImages
from .labels import labels_of, retain_indices, with_class_labels

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LoadedImages:
    """The images of a run, and where they come from.

    Attributes:
        retain: The retain set, not decoded yet; see `retain_split` for its columns.
        rest: The other rows of its split.
        test: What is measured on, decoded; None where the retain set is all there is.
        source: The data set's name, as it was given.
        configuration: Which of its configurations, as it was given.
        split: What ``test`` is: the name of a split, or ``rest of NAME``; None without it.
    """

    retain: Dataset
    rest: Dataset
    test: RawImages | None
    source: str
    configuration: str | None
    split: str | None


def load_images(
    source: sources.ImageSource,
    image_column: str | None = None,
    label_column: str | None = None,
    revision: str | None = None,
    configuration: str | None = None,
) -> DatasetDict:
    """Load a labelled image dataset in one form, whatever its columns are called.

    Args:
        source: ``"digits"`` (scikit-learn's handwritten digits as 32x32 RGB, carried by the library: no network); a
            local folder of parquet files or of images in one sub-folder per class, with or without folders for the splits,
            see `folder.open_tables` and `folder.open_pictures`; a parquet file, or a dict from split to file or list of
            files; the name of a dataset on the Hub, such as ``"uoft-cs/cifar10"``; or a `Dataset` or `DatasetDict` that is
            already loaded. A local path goes before a Hub name that is spelled alike.
        image_column: Name of the picture column, needed only where several columns have the type `datasets.Image`.
        label_column: Name of the label column, needed only where several qualify: columns of type `ClassLabel` or, if
            there is none, of integers or strings. Integers must be 0..k-1, or -1 where there is no label, and become the
            class names "0".."k-1"; strings become classes as `labels.in_order` sorts them.
        revision: Branch, tag or commit of a Hub dataset.
        configuration: Name of one of a dataset's configurations, needed where it has several and none is its default.

    Returns:
        Splits with exactly the columns ``image`` (`datasets.Image`, PIL RGB on access) and ``label`` (`ClassLabel`).
        For what becomes of grey, palette, transparent, 16-bit and rotated pictures see `RawImages.from_dataset`. A split
        may be empty or without labels, as the Hub's test splits often are: only what uses it, `retain_split` or
        `RawImages.from_dataset`, refuses it.

    Raises:
        FileNotFoundError: No such file or folder.
        OSError: The Hub has no such dataset or cannot be reached.
        ValueError: No column qualifies or several do; pictures are plain bytes; the splits disagree about the classes;
            integer labels are not 0..k-1, or no split has any label; ``revision`` is given for something that is not on
            the Hub; there are several configurations and none is chosen, or not that one.
    """
    loaded = sources.open_source(source, revision, configuration)
    first = next(iter(loaded.values())).features
    _refuse_plain_bytes(first)
    columns = {
        sources.image_column(first, image_column): "image",
        sources.label_column(first, label_column): "label",
    }
    picture, label = columns
    renamed = {old: new for old, new in columns.items() if old != new}
    images = DatasetDict()
    for name, split in with_class_labels(loaded, label).items():
        split = split.select_columns([picture, label]).cast_column(picture, datasets.Image(mode="RGB"))
        images[name] = _named(split.rename_columns(renamed), name)
    return images


def _named(split: Dataset, name: str) -> Dataset:
    """The split under the name that it has in its `DatasetDict`, for errors: `train_test_split` leaves both parts another."""
    if str(split.split) == name or not re.fullmatch(r"\w+(\.\w+)*", name):  # datasets takes no other name
        return split
    return datasets.concatenate_datasets([split], split=NamedSplit(name))


def _refuse_plain_bytes(features: Features) -> None:
    """Refuse pictures as other libraries write them to a table, where only the feature that decodes them is missing."""
    if any(isinstance(feature, datasets.Image) for feature in features.values()):
        return
    for name, feature in features.items():
        if feature == Value("binary") or isinstance(feature, dict) and feature.get("bytes") == Value("binary"):
            raise ValueError(
                f"column {name!r} holds pictures as plain bytes, not as datasets.Image, which decodes them: write the "
                f"table again after dataset.cast_column({name!r}, datasets.Image())"
            )


def retain_split(
    dataset: Dataset, fraction: float | None = None, count: int | None = None, balanced: bool = False, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """Draw a retain set without replacement; a class that it misses is logged as a warning.

    The field's protocol is uniform and 5 % (authors' code of D3, ``ratio: 0.05``); there the images come from the set
    that the victim was trained on. Images that the victim has not seen are the more honest choice; the caller decides.

    Args:
        dataset: One split as `load_images` makes it.
        fraction: Share of the images to retain, in (0, 1), rounded to the nearest count. Either this or ``count``.
        count: Number of images to retain, from 1 to all.
        balanced: Draw equally many of each class, a remainder going to classes drawn at random, instead of uniformly.
        seed: At least 0. The same seed draws the same rows on every machine.

    Returns:
        (retain, rest): disjoint, together the whole, each in the order of ``dataset`` and with an int column
        ``index``, the row in ``dataset``. An ``index`` that ``dataset`` already has is kept, so that it always counts
        in the original.

    Raises:
        ValueError: Not exactly one of ``fraction`` and ``count`` is given, or it is out of range; ``balanced`` and a
            class has too few images; there are no images, or labels are missing.
    """
    labels = labels_of(dataset)
    names = dataset.features["label"].names
    rows = retain_indices(labels, names, fraction, count, balanced, seed)
    missing = sorted(set(range(len(names))) - set(labels[rows].tolist()))
    if missing:
        logger.warning("the retain set of %d images has none of: %s", len(rows), join_names([names[m] for m in missing]))
    if "index" not in dataset.column_names:
        dataset = dataset.add_column("index", np.arange(len(dataset)))
    return dataset.select(rows), dataset.select(np.setdiff1d(np.arange(len(dataset)), rows))
