"""Label columns: their classes, their numbers, and rows drawn by them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import PreTrainedConfig

from ..labels import composed, distinct, in_order, label_names_of, numbers_in_model

WITHHELD = -1  # a label that is not given, by the convention of the Hub's data sets


def with_class_labels(source: DatasetDict, column: str) -> DatasetDict:
    """The splits with a label column of one `ClassLabel`; see `load_images` for the classes of plain columns.

    Rows without a label, null or -1, name no class: the Hub's data sets withhold the labels of a test split so.
    """
    first, *others = (split.features.get(column) for split in source.values())
    if any(other != first for other in others):
        raise ValueError(f"the splits {', '.join(source)} disagree about the classes of {column!r}; give all the same feature")
    if isinstance(first, ClassLabel):
        return source
    found = {value for split in source.values() for value in split.unique(column)} - {None}
    values = found - {WITHHELD}
    if not values:
        raise ValueError(f"label column {column!r} holds no labels: choose another with label_column=, or fill it in")
    if first.dtype.endswith("string"):
        names = in_order(map(composed, values))
        numbers = {value: names.index(composed(value)) for value in values}
    elif sorted(values) == list(range(len(values))):
        names, numbers = [str(value) for value in sorted(values)], {value: value for value in values}
    else:
        raise ValueError(
            f"label column {column!r} holds integers other than 0..k-1 ({len(found)} different from {min(found)} "
            f"to {max(found)}): cast it to a datasets.ClassLabel that names them, or fill in missing labels"
        )
    return DatasetDict({name: _numbered(split, column, numbers, names) for name, split in source.items()})


def map_classes(images: DatasetDict, config: PreTrainedConfig, class_map: Mapping[str, str | int] | None = None) -> DatasetDict:
    """Number the labels of a dataset as a model numbers its outputs: classes in another order, or under other names.

    Args:
        images: Splits that `load_images` made.
        config: The model's.
        class_map: Which of the model's classes, by name or number, each of the dataset's is: every one of these by its name,
            no two the same. The model may have others. Default: the one that is called alike, without regard to case, spaces,
            underscores and hyphens.

    Returns:
        The splits, their classes with the model's names.

    Raises:
        ValueError: See `d3_hf.labels.numbers_in_model`.
    """
    names = next(iter(images.values())).features["label"].names
    numbers = dict(enumerate(numbers_in_model(names, config, class_map)))
    theirs = distinct(label_names_of(config))
    return DatasetDict({name: _numbered(split, "label", numbers, theirs) for name, split in images.items()})


def _numbered(split: Dataset, column: str, numbers: Mapping[Any, int], names: list[str]) -> Dataset:
    """The split with other numbers for its labels; what is not among ``numbers`` is no label."""
    order, values = split.column_names, split.select_columns(column).with_format("arrow")[:][column].to_pylist()
    made = [numbers.get(value) for value in values]
    return split.remove_columns(column).add_column(column, made, feature=ClassLabel(names=names)).select_columns(order)


def labels_of(dataset: Dataset) -> np.ndarray:
    """Labels of a dataset that `load_images` made, as int64 (N,) in ``[0, number of classes)``.

    Raises:
        ValueError: The dataset has no `ClassLabel` column "label" or no rows, or a label is missing (-1 or null) or out of
            range.
    """
    feature = dataset.features.get("label")
    if not isinstance(feature, ClassLabel):
        columns = ", ".join(dataset.column_names)
        raise ValueError(
            f"no ClassLabel column 'label' among the columns {columns}: pass the dataset through load_images first"
        )
    if len(dataset) == 0:
        raise ValueError(f"{split_of(dataset)} holds no images: use another split")
    column = dataset.select_columns("label").with_format("arrow")[:]["label"]
    labels = column.fill_null(WITHHELD).to_numpy().astype(np.int64)
    bad = np.flatnonzero((labels < 0) | (labels >= feature.num_classes))
    if len(bad):
        raise ValueError(
            f"{split_of(dataset)} has {len(bad)} rows whose label is missing (-1 or null) or not in "
            f"[0, {feature.num_classes}), the first is row {bad[0]}: leave them out, or use another split"
        )
    return labels


def split_of(dataset: Dataset) -> str:
    """What to call a dataset in a message."""
    return "the dataset" if dataset.split is None else f"split {str(dataset.split)!r}"


def retain_indices(
    labels: np.ndarray,
    class_names: Sequence[str],
    fraction: float | None = None,
    count: int | None = None,
    balanced: bool = False,
    seed: int = 0,
) -> np.ndarray:
    """Draw the rows of a retain set; arguments and errors as for `retain_split`.

    The draw orders the rows by NumPy's raw PCG64 stream, which is fixed across machines and releases (NEP 19). The
    rows for a smaller ``count`` are among those for a larger one.

    Args:
        labels: int (N,), in ``[0, len(class_names))``.
        class_names: Names for the errors; how many there are is the number of classes.
        fraction: See `retain_split`.
        count: See `retain_split`.
        balanced: See `retain_split`.
        seed: See `retain_split`.

    Returns:
        Sorted, distinct int64 rows.
    """
    if (fraction is None) == (count is None):
        raise ValueError(f"give either fraction or count of the retain set; got fraction={fraction}, count={count}")
    if fraction is not None:
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must be in (0, 1); got {fraction}")
        count = round(fraction * len(labels))
    if not 1 <= count <= len(labels):
        raise ValueError(f"a retain set must have between 1 and all {len(labels)} images; fraction={fraction} or count={count}")
    classes = len(class_names)
    drawn = np.random.PCG64(seed).random_raw(len(labels) + classes)
    order = np.argsort(drawn[: len(labels)], kind="stable")
    if not balanced:
        return np.sort(order[:count])
    quota = np.full(classes, count // classes)
    quota[np.argsort(drawn[len(labels) :], kind="stable")[: count % classes]] += 1
    short = np.flatnonzero(np.bincount(labels, minlength=classes) < quota)
    if len(short):
        raise ValueError(
            f"class {class_names[short[0]]!r} has {np.sum(labels == short[0])} images, but a balanced retain set of "
            f"{count} takes {quota[short[0]]} of it: ask for fewer or set balanced=False"
        )
    return np.sort(np.concatenate([order[labels[order] == number][: quota[number]] for number in range(classes)]))
