"""Label columns: their classes, their numbers, and rows drawn by them."""

from collections.abc import Sequence

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict

WITHHELD = -1  # a label that is not given, by the convention of the Hub's data sets


def class_names_of(source: DatasetDict, column: str) -> list[str]:
    """Class names of a label column that all splits share; see `load_images` for those of plain columns.

    Rows without a label, null or -1, name no class: the Hub's data sets withhold the labels of a test split so.
    """
    first, *others = (split.features.get(column) for split in source.values())
    if any(other != first for other in others):
        raise ValueError(f"the splits {', '.join(source)} disagree about the classes of {column!r}; give all the same feature")
    if isinstance(first, ClassLabel):
        return list(first.names)
    values = {value for split in source.values() for value in split.unique(column)} - {None}
    classes = sorted(values - {WITHHELD})
    if not classes:
        raise ValueError(f"label column {column!r} holds no labels: choose another with label_column=, or fill it in")
    if first.dtype.endswith("string"):
        return classes
    if classes != list(range(len(classes))):
        raise ValueError(
            f"label column {column!r} holds integers other than 0..k-1 ({len(values)} different from {min(values)} "
            f"to {max(values)}): cast it to a datasets.ClassLabel that names them, or fill in missing labels"
        )
    return [str(value) for value in classes]


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
