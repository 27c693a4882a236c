"""Class names: checked, set on a configuration, and compared with a data set's."""

import re
from collections.abc import Sequence

from transformers import PreTrainedConfig, TimmWrapperConfig

from .errors import join_names


def check_label_names(label_names: Sequence[str] | None, num_labels: int | None) -> int | None:
    """Return the number of classes that the two arguments agree on; None where neither is given.

    Raises:
        ValueError: They disagree, there are fewer than 2 classes, or a name occurs twice.
    """
    if label_names is not None:
        if len(set(label_names)) != len(label_names):
            raise ValueError(f"label_names must differ from each other; got {', '.join(label_names)}")
        if num_labels is not None and num_labels != len(label_names):
            raise ValueError(f"num_labels={num_labels} but label_names has {len(label_names)} names")
        num_labels = len(label_names)
    if num_labels is not None and num_labels < 2:
        raise ValueError(f"a classifier has at least 2 classes; got num_labels={num_labels}")
    return num_labels


def set_label_names(config: PreTrainedConfig, label_names: Sequence[str]) -> None:
    """Give the classes names that survive saving and reloading."""
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: index for index, name in enumerate(label_names)}
    if isinstance(config, TimmWrapperConfig):
        config.label_names = list(label_names)  # what it writes; id2label alone is lost on a config that was loaded


def check_labels(class_names: Sequence[str], config: PreTrainedConfig) -> None:
    """Refuse a dataset whose labels do not mean what the model's outputs mean.

    Names are compared without regard to case, spaces, underscores and hyphens; ImageNet's comma-separated synonyms
    agree when one of them does. Placeholders (``LABEL_3``, ``3``) on either side agree with anything, since nothing
    can be compared.

    Args:
        class_names: The dataset's classes in the order of their numbers.
        config: The model's; ``num_labels`` and ``id2label`` are read.

    Raises:
        ValueError: The numbers of classes differ, or a class number has different names.
    """
    theirs = [str(config.id2label[number]) for number in range(config.num_labels)]
    if len(class_names) != len(theirs):
        raise ValueError(
            f"the dataset has {len(class_names)} classes ({join_names(class_names)}), the model {len(theirs)} "
            f"({join_names(theirs)}): purify with images of the model's own classes, or load the model that fits them"
        )
    if _are_placeholders(class_names) or _are_placeholders(theirs):
        return
    ours, known = ([_spellings(name) for name in names] for names in (class_names, theirs))
    for number, (mine, its) in enumerate(zip(ours, known, strict=True)):
        if mine & its:
            continue
        permuted = all(any(mine & its for its in known) for mine in ours)
        way_out = (
            "the order differs: dataset.align_labels_with_mapping({name: number for number, name in "
            "model.config.id2label.items()}, 'label') puts it right"
            if permuted
            else "purify with images of the model's own classes, or rename the dataset's if they mean the same"
        )
        raise ValueError(
            f"class {number} is {class_names[number]!r} in the dataset and {theirs[number]!r} in the model; {way_out}"
        )


def _are_placeholders(names: Sequence[str]) -> bool:
    return all(re.fullmatch(r"(label[_ ]?)?\d+", name.strip().lower()) for name in names)


def _spellings(name: str) -> set[str]:
    return {" ".join(re.split(r"[\s_-]+", synonym.strip().lower())) for synonym in name.split(",")}
