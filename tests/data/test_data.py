"""Sources, columns, labels and retain sets."""

import logging

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from pictures import encoded, noise
from PIL import Image
from transformers import PretrainedConfig

from d3_hf.data.images import RawImages, content_hashes
from d3_hf.data.labels import retain_indices
from d3_hf.data.load import load_images, retain_split
from d3_hf.labels import check_labels

NAMES = ["cat", "dog", "frog"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(labels, names=NAMES, picture="img", label="fine", size=(6, 5), **columns) -> Dataset:
    rows = [{"bytes": encoded(noise(*size, 3, seed=row)), "path": None} for row in range(len(labels))]
    feature = ClassLabel(names=names) if names else Value("string" if isinstance(labels[0], str) else "int64")
    features = {picture: datasets.Image(), label: feature} | {name: Value("int64") for name in columns}
    return Dataset.from_dict({picture: rows, label: labels} | columns, features=Features(features), split="train")


def beyond_its_classes() -> Dataset:
    features = Features({"img": datasets.Image(), "fine": ClassLabel(names=NAMES)})
    return Dataset(table([0, 5], names=None).data, datasets.DatasetInfo(features=features))


def plain_bytes(pictures) -> Dataset:
    """As other libraries than datasets write a table."""
    return Dataset.from_dict({"picture": pictures, "label": [0, 1]})


# Sources ------------------------------------------------------------------------------------------------------------


def test_digits_are_fixed_stratified_rgb():
    digits = load_images("digits")
    train, test = (RawImages.from_dataset(digits[split]) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360) and train.images.shape == (1437, 3, 32, 32)
    assert train.class_names == [str(digit) for digit in range(10)]
    assert train.images.min() == 0 and train.images.max() == 255
    assert torch.equal(train.images[:, 0], train.images[:, 2])
    shares = train.labels.bincount() / 1437 - test.labels.bincount() / 360
    assert shares.abs().max() < 0.005
    assert load_images("digits")["test"]["label"][:] == digits["test"]["label"][:]
    assert not set(content_hashes(train)) & set(content_hashes(test))


@pytest.mark.parametrize("form", ["file", "path", "dict", "list", "folder", "dataset", "dict of datasets"])
def test_every_form_of_a_table_gives_the_same_images(form, tmp_path):
    train, test = table([0, 1, 2, 1]), table([2, 0])
    folder = tmp_path / "tables"
    folder.mkdir()
    train.to_parquet(folder / "train-00000.parquet")
    test.to_parquet(folder / "test-00000.parquet")
    first = folder / "train-00000.parquet"
    source, splits = {
        "file": (str(first), ["train"]),
        "path": (first, ["train"]),
        "dict": ({"train": first, "held_out": folder / "test-00000.parquet"}, ["train", "held_out"]),
        "list": ({"train": [first, str(folder / "test-00000.parquet")]}, ["train"]),
        "folder": (folder, ["train", "test"]),
        "dataset": (train, ["train"]),
        "dict of datasets": (DatasetDict(train=train, test=test), ["train", "test"]),
    }[form]
    images = load_images(source)
    assert list(images) == splits
    for split in images.values():
        assert split.features == Features({"image": datasets.Image(mode="RGB"), "label": ClassLabel(names=NAMES)})
    raw = RawImages.from_dataset(images["train"])
    assert raw.labels.tolist() == [0, 1, 2, 1] + ([2, 0] if form == "list" else [])
    assert np.array_equal(raw.images[1].permute(1, 2, 0), noise(6, 5, 3, seed=1))


def test_a_folder_of_images_takes_its_classes_from_its_folders(tmp_path):
    for row, (split, name) in enumerate([("train", "dog"), ("train", "cat"), ("test", "dog"), ("test", "cat")]):
        (tmp_path / "photos" / split / name).mkdir(parents=True)
        Image.fromarray(noise(4, 4 + row, 3, seed=row)).save(tmp_path / "photos" / split / name / "a.png")
    images = load_images(tmp_path / "photos")
    raw = RawImages.from_dataset(images["train"])
    assert list(images) == ["train", "test"] and raw.class_names == ["cat", "dog"]
    dog = raw.images[raw.labels.tolist().index(1)]
    assert np.array_equal(dog.permute(1, 2, 0), noise(4, 4, 3, seed=0))


def test_cifar10_as_the_hub_has_it(shared):
    images = load_images(shared / "data" / "cifar10")
    assert {name: len(split) for name, split in images.items()} == {"train": 50_000, "test": 10_000}
    retain, rest = retain_split(images["train"], fraction=0.05)
    assert (len(retain), len(rest)) == (2500, 47_500)
    raw = RawImages.from_dataset(images["test"].select(range(500)))
    assert raw.images.shape == (500, 3, 32, 32) and raw.class_names[5] == "dog"
    assert abs(raw.images.double().mean() / 255 - 0.4734) < 0.01


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("uoft-cs/no-such-dataset", OSError, "cannot load 'uoft-cs/no-such-dataset'.*Check the name"),
        ("./nowhere", FileNotFoundError, "no such file or folder: nowhere"),
        ("/no/such/folder", FileNotFoundError, "no such file or folder: /no/such/folder"),
        ("nowhere.parquet", FileNotFoundError, "no such file or folder: nowhere.parquet"),
        ({"train": "nowhere.parquet"}, FileNotFoundError, "no such file or folder"),
        (__file__, ValueError, "is not a .parquet file"),
    ],
)
def test_sources_that_cannot_be_opened(source, error, message):
    with pytest.raises(error, match=message):
        load_images(source)


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        load_images(tmp_path / "empty")


def test_a_revision_is_for_the_hub_only():
    with pytest.raises(ValueError, match="revision='main' is for datasets of the Hub; digits is not one"):
        load_images("digits", revision="main")


# Columns and labels -------------------------------------------------------------------------------------------------


def test_columns_are_found_by_type_and_chosen_by_argument():
    source = table([0, 1, 2], picture="label", label="image")
    source = source.add_column("coarse", [1, 0, 1], feature=ClassLabel(names=["a", "b"]))
    with pytest.raises(ValueError, match="several label columns: image, coarse; choose one with label_column="):
        load_images(source)
    assert load_images(source, label_column="coarse")["train"]["label"][:] == [1, 0, 1]
    images = load_images(source, label_column="image")["train"]
    assert images["label"][:] == [0, 1, 2] and images["image"][0].mode == "RGB"


def test_integers_and_strings_become_classes():
    integers = load_images(table([2, 0, 1], names=None))["train"]
    assert integers.features["label"].names == ["0", "1", "2"] and integers["label"][:] == [2, 0, 1]
    both = DatasetDict(train=table(["dog", "cat"], names=None), test=table(["frog"], names=None))
    strings = load_images(both)
    assert strings["test"].features["label"].names == NAMES and strings["test"]["label"][:] == [2]
    assert strings["train"]["label"][:] == [1, 0]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (lambda: table([0, 1]).remove_columns("img"), {}, r"found no image column; the dataset has fine \(ClassLabel\)"),
        (lambda: table([0, 1]).remove_columns("fine"), {}, r"found no label column; the dataset has img \(Image\)"),
        (lambda: table([0, 1], names=None, other=[1, 0]), {}, "several label columns: fine, other"),
        (lambda: plain_bytes([b""] * 2), {}, "column 'picture' holds pictures as plain bytes.*cast_column"),
        (lambda: plain_bytes([{"bytes": b"", "path": None}] * 2), {}, r"cast_column\('picture', datasets.Image\(\)\)"),
        (lambda: table([0, 1]), {"image_column": "fine"}, "image_column='fine' is no image column"),
        (lambda: table([0, 1]), {"label_column": "nothing"}, "label_column='nothing' is no label column"),
        (lambda: table([1, 2], names=None), {}, "integers other than 0..k-1"),
        (lambda: table([1, -1], names=None), {}, r"integers other than 0..k-1 \(2 different from -1 to 1\)"),
        (lambda: table([-1, None], names=None), {}, "label column 'fine' holds no labels"),
        (lambda: DatasetDict(train=table([0]), test=table([0], names=NAMES[::-1])), {}, "splits train, test disagree"),
        (lambda: DatasetDict(train=table([0]), test=table([0], label="other")), {}, "splits train, test disagree"),
    ],
)
def test_datasets_that_are_refused(source, options, message):
    with pytest.raises(ValueError, match=message):
        load_images(source(), **options)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: table([0, 1, -1, 2, None]), "split 'train' has 2 rows whose label is missing.* first is row 2"),
        (lambda: table([0, -1], names=None), "split 'train' has 1 rows whose label is missing.* first is row 1"),
        (beyond_its_classes, r"split 'train' has 1 rows whose label .* not in \[0, 3\), the first is row 1"),
        (lambda: table([0, 1]).select([]), "split 'train' holds no images"),
        (lambda: DatasetDict(train=table([0, None])), "split 'train' has 1 rows whose label is missing"),
    ],
)
def test_labels_are_checked_where_a_split_is_used(source, message):
    images = load_images(source())["train"]
    for use in (RawImages.from_dataset, lambda split: retain_split(split, count=1)):
        with pytest.raises(ValueError, match=message):
            use(images)


def test_errors_call_a_split_what_its_dictionary_calls_it():
    parts = table([0, 1, 2, None] * 5).train_test_split(0.5, seed=0)  # datasets calls both parts "train"
    images = load_images(DatasetDict(parts | {"held-out": table([0])}))  # and a name with a hyphen it does not take
    for name in ("train", "test"):
        with pytest.raises(ValueError, match=f"split '{name}' has"):
            RawImages.from_dataset(images[name])
    assert [len(split) for split in images.values()] == [10, 10, 1]


def config(names: list[str]) -> PretrainedConfig:
    return PretrainedConfig(id2label=dict(enumerate(names)))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (NAMES, NAMES),
        (NAMES, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        (["0", "1", "2"], NAMES),
        (["Cassette_Player", "gas-pump"], ["cassette player", "gas pump, petrol pump, island dispenser"]),
        (["tench, Tinca tinca", "crane", "crane"], ["Tench", "crane", "Crane"]),
    ],
)
def test_labels_that_agree(ours, theirs):
    check_labels(ours, config(theirs))


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (NAMES, NAMES[:2], r"3 classes \(cat, dog, frog\), the model 2 \(cat, dog\)"),
        (NAMES, [str(name) for name in range(1000)], r"the model 1000 \(0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\)"),
        (NAMES, ["cat", "dog", "ship"], "class 2 is 'frog' in the dataset and 'ship' in the model; purify with images"),
        (NAMES, ["dog", "cat", "frog"], "class 0 is 'cat' in the dataset and 'dog' in the model; the order differs"),
    ],
)
def test_labels_that_do_not_match_the_model(ours, theirs, message):
    with pytest.raises(ValueError, match=message):
        check_labels(ours, config(theirs))


def test_the_way_out_of_another_order_works():
    model = config(["dog", "frog", "cat"])
    images = load_images(table([0, 1, 2]))["train"].align_labels_with_mapping(
        {name: number for number, name in model.id2label.items()}, "label"
    )
    check_labels(images.features["label"].names, model)
    assert images["label"][:] == [2, 0, 1]


# Retain set ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"fraction": 0.25}, {"count": 10}, {"count": 10, "balanced": True}, {"count": 40}])
def test_retain_and_rest_are_disjoint_and_the_whole(options):
    images = load_images(table(list(np.arange(40) % 3)))["train"]
    retain, rest = retain_split(images, seed=1, **options)
    assert len(retain) == options.get("count", 10) and len(retain) + len(rest) == 40
    assert sorted(retain["index"][:] + rest["index"][:]) == list(range(40))
    for part in (retain, rest):
        assert part["index"][:] == sorted(part["index"][:])
        assert part["label"][:] == [images["label"][row] for row in part["index"]]
    again, _ = retain_split(images, seed=1, **options)
    other, _ = retain_split(images, seed=2, **options)
    assert again["index"][:] == retain["index"][:]
    assert len(retain) == 40 or other["index"][:] != retain["index"][:]


def test_the_index_counts_in_the_original():
    images = load_images(table(list(np.arange(40) % 3)))["train"]
    retain, _ = retain_split(images, count=20)
    tune, validate = retain_split(retain, fraction=0.8)
    assert sorted(tune["index"][:] + validate["index"][:]) == retain["index"][:]
    raw = RawImages.from_dataset(validate)
    assert raw.index.tolist() == validate["index"][:]
    assert np.array_equal(raw.images[0].permute(1, 2, 0), noise(6, 5, 3, seed=int(raw.index[0])))


def test_the_draw_is_the_same_on_every_machine():
    labels = np.arange(1000) % 10
    assert retain_indices(labels, list("abcdefghij"), count=8).tolist() == [11, 196, 269, 403, 600, 850, 855, 921]


def test_balanced_draws_are_even_and_uniform_ones_are_not():
    labels = np.repeat([0, 1, 2], [500, 300, 30])
    balanced = np.bincount(labels[retain_indices(labels, NAMES, count=50, balanced=True, seed=3)])
    assert sorted(balanced) == [16, 17, 17]
    extra = {tuple(np.bincount(labels[retain_indices(labels, NAMES, count=50, balanced=True, seed=s)])) for s in range(20)}
    assert len(extra) == 3  # the remainder does not always go to the same classes
    uniform = np.bincount(labels[retain_indices(labels, NAMES, count=415)], minlength=3)
    assert abs(uniform[0] - 250) < 40 and abs(uniform[2] - 15) < 12


@pytest.mark.parametrize("balanced", [False, True])
def test_a_smaller_retain_set_lies_in_a_larger_one(balanced):
    labels = np.arange(300) % 3
    small, large = (set(retain_indices(labels, NAMES, count=n, balanced=balanced).tolist()) for n in (20, 50))
    assert small < large


def test_every_row_is_drawn_equally_often():
    labels = np.arange(30) % 3
    counts = np.zeros(30)
    for seed in range(600):
        counts[retain_indices(labels, NAMES, count=10, seed=seed)] += 1
    assert np.all(np.abs(counts - 200) < 60)  # standard deviation 11.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either fraction or count"),
        ({"fraction": 0.5, "count": 3}, "either fraction or count"),
        ({"fraction": 0.0}, r"fraction must be in \(0, 1\)"),
        ({"fraction": 1.0}, r"fraction must be in \(0, 1\)"),
        ({"fraction": 0.001}, "between 1 and all 12 images"),
        ({"count": 0}, "between 1 and all 12 images"),
        ({"count": 13}, "between 1 and all 12 images"),
        ({"count": 9, "balanced": True}, "class 'frog' has 2 images, but a balanced retain set of 9 takes 3 of it"),
    ],
)
def test_retain_sets_that_cannot_be_drawn(options, message):
    with pytest.raises(ValueError, match=message):
        retain_indices(np.repeat([0, 1, 2], [5, 5, 2]), NAMES, **options)


def test_a_missing_class_is_logged(caplog):
    images = load_images(table([0, 0, 0, 0, 1, 1], names=NAMES))["train"]
    with caplog.at_level(logging.WARNING):
        retain_split(images, count=6)
    assert "retain set of 6 images has none of: frog" in caplog.text


def test_retain_split_asks_for_load_images_first():
    with pytest.raises(ValueError, match="no ClassLabel column 'label' among the columns img, fine: pass the dataset"):
        retain_split(table([0, 1]), count=1)
