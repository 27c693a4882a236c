"""Class names: put in order, set on a configuration, read from it, and compared with a data set's."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedConfig, TimmWrapperConfig

from .errors import join_names


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC): macOS writes the names of folders with their accents apart."""
    return unicodedata.normalize("NFC", name)


def in_order(names: Iterable[str]) -> list[str]:
    """Distinct names sorted as `sorted` does, but by their numbers where all are placeholders (``10``, ``LABEL_10``)."""
    names = sorted(set(names))
    return sorted(names, key=_number) if _are_placeholders(names) else names


def check_label_names(label_names: Sequence[str] | None, num_labels: int | None) -> int | None:
    """Return the number of classes that the two arguments agree on; None where neither is given.

    Raises:
        ValueError: They disagree, there are fewer than 2 classes, or a name occurs twice.
    """
    if label_names is not None:
        if len(set(map(composed, label_names))) != len(label_names):
            raise ValueError(f"label_names must differ from each other; got {', '.join(label_names)}")
        if num_labels is not None and num_labels != len(label_names):
            raise ValueError(f"num_labels={num_labels} but label_names has {len(label_names)} names")
        num_labels = len(label_names)
    if num_labels is not None and num_labels < 2:
        raise ValueError(f"a classifier has at least 2 classes; got num_labels={num_labels}")
    return num_labels


def set_label_names(config: PreTrainedConfig, label_names: Sequence[str]) -> None:
    """Give the classes names that survive saving and reloading, and take away what was said of other classes."""
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: index for index, name in enumerate(label_names)}
    config.num_labels = len(label_names)  # follows by itself, but for PVT's
    if isinstance(config, TimmWrapperConfig):
        config.label_names = list(label_names)  # what it writes; id2label alone is lost on a config that was loaded
        described = getattr(config, "label_descriptions", None)  # timm's own entry, by name
        if described and described.keys() != set(label_names):
            del config.label_descriptions


def label_names_of(config: PreTrainedConfig, where: str = "the model") -> list[str]:
    """The names of a model's classes, in the order of its logits.

    Args:
        config: The model's; ``id2label`` is read.
        where: What to call the model in the error.

    Raises:
        ValueError: ``id2label`` does not number the classes 0, 1, 2, ...
    """
    names = {int(number): str(name) for number, name in config.id2label.items()}
    numbers = sorted(names)
    if numbers != list(range(len(numbers))):
        raise ValueError(
            f"{where}: id2label in its configuration numbers {len(numbers)} classes from {numbers[0]} to {numbers[-1]}, and "
            f"the logits count from 0 to {len(numbers) - 1}: put config.json right, or give the names in the order of the "
            "logits, --class_names (in Python label_names)"
        )
    return [names[number] for number in numbers]


def names_tell(class_names: Sequence[str], config: PreTrainedConfig) -> bool:
    """Whether names can say that a data set's classes are the model's: not where only one side has other than placeholders."""
    theirs = label_names_of(config)
    if not (_are_placeholders(class_names) or _are_placeholders(theirs)):
        return True
    return list(class_names) == theirs or _are_same_numbers(class_names, theirs)


def check_labels(class_names: Sequence[str], config: PreTrainedConfig) -> None:
    """Refuse a dataset whose labels do not mean what the model's outputs mean.

    Names are compared without regard to case, spaces, underscores, hyphens and Unicode's ways of writing an accent;
    ImageNet's comma-separated synonyms agree when one of them does. Placeholders (``LABEL_3``, ``3``) agree with anything,
    since nothing can be compared, unless both sides have the same bare numbers in another order.
    `d3_hf.evaluation.class_order` then asks the model itself.

    Args:
        class_names: The dataset's classes in the order of their numbers.
        config: The model's; ``num_labels`` and ``id2label`` are read.

    Raises:
        ValueError: The numbers of classes differ, or a class number has different names.
    """
    theirs = label_names_of(config)
    if len(class_names) != len(theirs):
        raise ValueError(
            f"the dataset has {len(class_names)} classes ({join_names(class_names)}), the model {len(theirs)} "
            f"({join_names(theirs)}): purify with images of the model's own classes, load the model that fits them, or say "
            "with --class_map FILE.json (in Python map_classes) which of the model's classes each of them is"
        )
    if not names_tell(class_names, config):
        return
    ours, known = ([_spellings(name) for name in names] for names in (class_names, theirs))
    for number, (mine, its) in enumerate(zip(ours, known, strict=True)):
        if mine & its:
            continue
        permuted = all(any(mine & its for its in known) for mine in ours)
        way_out = (
            "the order differs: --class_map names (in Python map_classes(images, model.config)) numbers the dataset's as the "
            "model's"
            if permuted
            else "purify with images of the model's own classes, or say with --class_map FILE.json (in Python map_classes) "
            "which of the model's classes each of them is"
        )
        raise ValueError(
            f"class {number} is {class_names[number]!r} in the dataset and {theirs[number]!r} in the model; {way_out}"
        )


def numbers_in_model(
    class_names: Sequence[str], config: PreTrainedConfig, class_map: Mapping[str, str | int] | None = None
) -> list[int]:
    """The number in the model of each of a dataset's classes.

    Args:
        class_names: The dataset's classes in the order of their numbers.
        config: The model's.
        class_map: The model's class, its name or number, for each of the dataset's by its name. Default: that which is called
            alike, see `check_labels`.

    Raises:
        ValueError: The map leaves out a class or has one that the dataset has not; the model has no such class, or several; or
            two classes of the dataset would become one.
    """
    theirs = label_names_of(config)
    given = dict(zip(class_names, class_names, strict=True)) if class_map is None else class_map
    wanted = {composed(name): value for name, value in given.items()}
    ours = [composed(name) for name in class_names]
    if missing := set(ours) - wanted.keys():
        raise ValueError(f"class_map leaves out classes of the dataset: {join_names(in_order(missing))}")
    if unknown := wanted.keys() - set(ours):
        raise ValueError(f"class_map names {join_names(in_order(unknown))}, which the dataset lacks; it has {join_names(ours)}")
    numbers = [_number_of(wanted[name], theirs, name) for name in ours]
    if doubled := sorted({number for number in numbers if numbers.count(number) > 1}):
        both = " and ".join(repr(name) for name, number in zip(ours, numbers, strict=True) if number == doubled[0])
        raise ValueError(f"{both} of the dataset would both be class {doubled[0]} ({theirs[doubled[0]]!r}) of the model")
    return numbers


def distinct(label_names: Sequence[str]) -> list[str]:
    """The names, with its number as a further synonym for each that was there before: ImageNet has two classes ``crane``."""
    return [f"{name}, {number}" if name in label_names[:number] else name for number, name in enumerate(label_names)]


def _number_of(value: str | int, theirs: Sequence[str], ours: str) -> int:
    """The model's class that a map's entry for the dataset's class ``ours`` names."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(theirs):
        return value
    found = []
    if isinstance(value, str):
        found = [number for number, name in enumerate(theirs) if composed(name) == composed(value)]
        found = found or [number for number, name in enumerate(theirs) if _spellings(name) & _spellings(value)]
    if len(found) != 1:
        several = f"several ({', '.join(map(str, found))}): name it by its number" if found else "none"
        raise ValueError(
            f"class {ours!r} of the dataset is to be {value!r} of the model, which has {several}; its classes are 0 to "
            f"{len(theirs) - 1}: {join_names(theirs)}"
        )
    return found[0]


def _are_placeholders(names: Sequence[str]) -> bool:
    return all(re.fullmatch(r"(label[_ ]?)?[0-9]+", name.strip().lower()) for name in names)


def _are_same_numbers(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether both are the same bare numbers, in whatever order."""
    return all(re.fullmatch("[0-9]+", name) for name in (*ours, *theirs)) and sorted(map(int, ours)) == sorted(map(int, theirs))


def _number(placeholder: str) -> int:
    return int(re.sub(r"[^0-9]", "", placeholder))


def _spellings(name: str) -> set[str]:
    """A name's synonyms as they are compared; a bare number without leading zeros."""
    synonyms = (re.sub(r"[\s_-]+", " ", synonym.strip().lower()) for synonym in composed(name).split(","))
    return {str(int(synonym)) if re.fullmatch("[0-9]+", synonym) else synonym for synonym in synonyms}
