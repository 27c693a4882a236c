"""Class names in a transformers configuration."""

from collections.abc import Sequence

from transformers import PreTrainedConfig, TimmWrapperConfig


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
