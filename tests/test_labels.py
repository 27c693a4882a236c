"""Class names: their order, where a configuration keeps them, and when they are the same."""

import unicodedata

import pytest
from transformers import PretrainedConfig, TimmWrapperConfig

from d3_hf.labels import (
    check_label_names,
    check_labels,
    distinct,
    in_order,
    label_names_of,
    names_tell,
    numbers_in_model,
    set_label_names,
)

NUMBERS = [str(number) for number in range(12)]
AS_TEXT = sorted(NUMBERS)


def config(names) -> PretrainedConfig:
    return PretrainedConfig(id2label=dict(enumerate(names)))


def apart(name: str) -> str:
    return unicodedata.normalize("NFD", name)


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (AS_TEXT, NUMBERS),
        (["LABEL_10", "LABEL_9", "LABEL_0"], ["LABEL_0", "LABEL_9", "LABEL_10"]),
        (["10", "9", "ten"], ["10", "9", "ten"]),
        (["010", "9", "08"], ["08", "9", "010"]),
        (["class 10", "class 9"], ["class 10", "class 9"]),  # a name as others; torchvision and datasets sort it so
        (["dog", "cat", "dog"], ["cat", "dog"]),
    ],
)
def test_numbers_are_in_the_order_of_numbers(names, order):
    assert in_order(names) == order


@pytest.mark.parametrize("ids", [{1: "cat", 2: "dog"}, {"1": "cat", "2": "dog"}, {0: "cat", 2: "dog"}])
def test_classes_are_numbered_as_logits_are(ids):
    odd = config(["cat", "dog"])
    odd.id2label = ids
    with pytest.raises(ValueError, match=r"from [01] to 2, and the logits count from 0 to 1: .*--class_names"):
        label_names_of(odd)
    with pytest.raises(ValueError, match="the logits count from 0 to 1"):
        check_labels(["cat", "dog"], odd)
    assert label_names_of(config(["cat", "dog"])) == ["cat", "dog"]


def test_new_names_take_away_what_was_said_of_the_old():
    described = {"label_names": ["n01", "n02"], "label_descriptions": {"n01": "tench", "n02": "carp"}}
    timm = TimmWrapperConfig.from_dict({"architecture": "resnet18", "num_classes": 2} | described)
    set_label_names(timm, ["n01", "n02"])
    assert timm.to_dict()["label_descriptions"] == {"n01": "tench", "n02": "carp"}
    set_label_names(timm, ["cat", "dog", "frog"])
    written = timm.to_dict()
    assert (written["label_names"], written["num_classes"]) == (["cat", "dog", "frog"], 3)
    assert "label_descriptions" not in written


def test_names_that_differ_in_their_bytes_alone_are_the_same():
    check_labels([apart("café"), "tür"], config(["café", apart("Tür")]))
    with pytest.raises(ValueError, match="label_names must differ"):
        check_label_names(["café", apart("café")], None)


@pytest.mark.parametrize(
    ("ours", "theirs", "tell"),
    [
        (["cat", "dog"], ["dog", "cat"], True),
        (["cat", "dog"], ["LABEL_0", "LABEL_1"], False),
        (["0", "1"], ["cat", "dog"], False),
        (["0", "1"], ["LABEL_0", "LABEL_1"], False),  # class number 1 may be called so by whoever counts from elsewhere
        (["LABEL_0", "LABEL_1"], ["LABEL_0", "LABEL_1"], True),
        (AS_TEXT, NUMBERS, True),
        (["1", "2"], ["0", "1"], False),
    ],
)
def test_what_names_can_tell(ours, theirs, tell):
    assert names_tell(ours, config(theirs)) == tell


def test_the_same_numbers_in_another_order_are_refused():
    check_labels(NUMBERS, config(NUMBERS))
    check_labels(["00", "01"], config(["0", "1"]))
    with pytest.raises(ValueError, match="class 2 is '10' .* and '2' in the model; the order differs: --class_map names"):
        check_labels(AS_TEXT, config(NUMBERS))


@pytest.mark.parametrize(
    ("class_map", "numbers"),
    [
        (None, [2, 0]),
        ({"cat": 1, "dog": "LABEL-0"}, None),
        ({"cat": "frog", "dog": 2}, [1, 2]),
        ({apart("cat"): "Cat", "dog": "dog, puppy"}, [2, 0]),
    ],
)
def test_a_class_map_gives_numbers(class_map, numbers):
    model = config(["dog, hound", "frog", "cat"])
    if numbers is None:
        with pytest.raises(ValueError, match="class 'dog' of the dataset is to be 'LABEL-0' of the model, which has none"):
            numbers_in_model(["cat", "dog"], model, class_map)
    else:
        assert numbers_in_model(["cat", "dog"], model, class_map) == numbers


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        ({"cat": 0}, "leaves out classes of the dataset: dog"),
        ({"cat": 0, "dog": 1, "cow": 2}, "names cow, which the dataset lacks; it has cat, dog"),
        ({"cat": 0, "dog": 3}, "'dog' of the dataset is to be 3 of the model, which has none; its classes are 0 to 2"),
        ({"cat": 0, "dog": -1}, "is to be -1 of the model"),
        ({"cat": 0, "dog": True}, "is to be True of the model"),
        ({"cat": 0, "dog": None}, "is to be None of the model"),
        ({"cat": 0, "dog": "crane"}, r"'crane' of the model, which has several \(1, 2\): name it by its number"),
        ({"cat": 0, "dog": "DOG"}, r"'cat' and 'dog' of the dataset would both be class 0 \('dog'\) of the model"),
        (None, "'cat' of the dataset is to be 'cat' of the model, which has none"),
    ],
)
def test_class_maps_that_are_refused(class_map, message):
    with pytest.raises(ValueError, match=message):
        numbers_in_model(["cat", "dog"], config(["dog", "crane", "crane"]), class_map)


def test_names_that_occur_twice_still_agree_when_they_are_told_apart():
    names = ["cat", "crane", "crane"]
    assert distinct(names) == ["cat", "crane", "crane, 2"]
    check_labels(distinct(names), config(names))
