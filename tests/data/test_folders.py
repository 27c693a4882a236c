"""Local folders: which split and class each image is of, paths that look like patterns, configurations."""

import logging
import unicodedata
from collections import Counter

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from pictures import encoded, noise
from transformers import PretrainedConfig

from d3_hf.data.images import RawImages
from d3_hf.data.labels import map_classes
from d3_hf.data.load import load_images

NUMBERS = [str(number) for number in range(12)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def photos(folder, *files):
    """Pictures below a folder, each of its own size, so that it can be told: 4 + its position wide."""
    for position, file in enumerate(files):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(noise(4, 4 + position, 3, seed=position)))
    return folder


def contents(images: DatasetDict) -> dict[str, dict[str, int]]:
    """Per split how many images each class has; every picture is counted once."""
    found, widths = {}, []
    for name, split in images.items():
        raw = RawImages.from_dataset(split)
        widths += [image.shape[-1] for image in raw.images]
        found[name] = dict(Counter(raw.class_names[label] for label in raw.labels))
    assert len(set(widths)) == len(widths)
    return found


def table(labels, feature=None) -> Dataset:
    rows = [{"bytes": encoded(noise(4, 4 + row, 3, seed=row)), "path": None} for row in range(len(labels))]
    features = Features({"image": Image(), "label": feature or ClassLabel(2)})
    return Dataset.from_dict({"image": rows, "label": labels}, features=features)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (
            ["train/beach/a.png", "train/train_station/a.png", "test/beach/a.png", "test/train_station/a.png"],
            {"train": {"beach": 1, "train_station": 1}, "test": {"beach": 1, "train_station": 1}},
        ),
        (["test_tube/a.png", "test_tube/b.png", "flask/a.png"], {"train": {"test_tube": 2, "flask": 1}}),
        (["bus/a.png", "car/a.png", "train/a.png"], {"train": {"bus": 1, "car": 1, "train": 1}}),
        (["train/a.png", "validation/a.png"], None),
        (
            ["train/bus/a.png", "train/train/a.png", "test/bus/a.png", "test/train/a.png"],
            {"train": {"bus": 1, "train": 1}, "test": {"bus": 1, "train": 1}},
        ),
        (["Train/0/a.png", "Train/1/a.png", "Test/0/a.png"], {"train": {"0": 1, "1": 1}, "test": {"0": 1}}),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png", "eval/b/1.PNG"],
         {"train": {"a": 1, "b": 1}, "validation": {"a": 1}, "test": {"b": 1}}),
        (["photos/training/a/1.png", "photos/training/b/1.png"], {"train": {"a": 1, "b": 1}}),
        (["train/a/1.png", "train/b/._1.png", "train/b/1.png", "__MACOSX/train/a/1.png"], {"train": {"a": 1, "b": 1}}),
        ([f"{number}/a.png" for number in NUMBERS], {"train": dict.fromkeys(NUMBERS, 1)}),
        (["train/big/cat/a.png", "train/small/dog/a.png"], {"train": {"cat": 1, "dog": 1}}),
    ],
)  # fmt: skip
def test_splits_are_folders_of_exactly_their_names(files, found, tmp_path):
    photos(tmp_path / "photos of mine", *files)
    if found is None:
        with pytest.raises(ValueError, match="found no label column.*one sub-folder for each of two or more classes"):
            load_images(tmp_path / "photos of mine")
        return
    assert contents(load_images(tmp_path / "photos of mine")) == found


def test_numbered_folders_are_numbered_so(tmp_path):
    images = load_images(photos(tmp_path / "p", *(f"{number}/a.png" for number in NUMBERS)))["train"]
    assert images.features["label"].names == NUMBERS
    raw = RawImages.from_dataset(images)
    assert [image.shape[-1] - 4 for image in raw.images] == raw.labels.tolist()  # the widths say which is which


@pytest.mark.parametrize("feature", [Value("string"), Value("large_string")])
def test_strings_are_numbered_so_too(feature):
    images = load_images(table([*NUMBERS, None], feature))["train"]
    assert images.features["label"].names == NUMBERS
    assert images["label"][:] == [*range(12), None]


def test_one_class_may_be_written_in_two_ways(tmp_path):
    composed, apart = "café", unicodedata.normalize("NFD", "café")
    folder = photos(tmp_path / "p", f"train/{apart}/a.png", "train/tea/a.png", f"test/{composed}/a.png", "test/tea/a.png")
    assert contents(load_images(folder)) == {"train": {"café": 1, "tea": 1}, "test": {"café": 1, "tea": 1}}
    strings = load_images(table([apart, "tea", composed], Value("string")))["train"]
    assert strings.features["label"].names == ["café", "tea"] and strings["label"][:] == [0, 1, 0]


def test_a_split_without_class_folders_has_no_labels(tmp_path):
    images = load_images(photos(tmp_path / "p", "train/a/1.png", "train/b/1.png", "test/1.png"))
    assert images["test"]["label"][:] == [None]
    with pytest.raises(ValueError, match="split 'test' has 1 rows whose label is missing"):
        RawImages.from_dataset(images["test"])


def test_what_lies_beside_the_splits_is_left_out_aloud(tmp_path, caplog):
    folder = photos(tmp_path / "p", "train/a/1.png", "train/b/1.png", "samples/a/1.png", "banner.png")
    with caplog.at_level(logging.WARNING):
        assert contents(load_images(folder)) == {"train": {"a": 1, "b": 1}}
    assert "2 pictures outside train are left out, the first is banner.png" in caplog.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a/1.png", "b/1.png", "banner.png"], "1 pictures of split 'train' lie outside .* classes, the first is banner.png"),
        (["train/a/1.png", "train/b/1.png", "Training/a/1.png"], "of the folders Training, train two are the same split"),
        (["train/a/1.png", "train/b/c/1.png"], "images lie at different depths; put each into one folder per class"),
        (["train/x/cat/1.png", "train/y/cat/1.png", "train/y/dog/1.png"], "split 'train' has 2 folders called 'cat'"),
    ],
)
def test_folders_that_are_unclear_are_refused(files, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_images(photos(tmp_path / "p", *files))


@pytest.mark.parametrize("name", ["photos[12]", "photos*", "photos?", "a::b", "[v2] photos", "~", "photos {a,b}"])
def test_a_path_is_no_pattern(name, tmp_path):
    """Folders that these would match as patterns lie beside them."""
    photos(tmp_path / "photos1", "train/a/1.png", "train/b/1.png", "train/b/2.png")
    assert contents(load_images(photos(tmp_path / name, "train/a/1.png", "train/b/1.png"))) == {"train": {"a": 1, "b": 1}}
    tables = tmp_path / "tables" / name
    tables.mkdir(parents=True)
    for folder, count in ((tables, 2), (tmp_path / "tables" / "photos1", 4)):
        folder.mkdir(exist_ok=True)
        with open(folder / "train.parquet", "wb") as file:
            table([0, 1] * (count // 2)).to_parquet(file)
    if "::" in name:
        with pytest.raises(ValueError, match="datasets takes '::' for a chain of archives: rename it"):
            load_images(tables)
        return
    for source in (tables, tables / "train.parquet", {"train": [tables / "train.parquet"]}):
        assert contents(load_images(source)) == {"train": {"0": 1, "1": 1}}


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/extra-00000-of-00001.parquet"],
         {"extra": 1, "train": 2}),
        (["mnist_train.parquet", "mnist_test.parquet"], {"train": 1, "test": 1}),
        (["Train/0.parquet", "val/0.parquet", "val/1.parquet"], {"train": 1, "validation": 2}),
        (["a.parquet", "b.parquet"], {"train": 2}),
        (["train_station.parquet", "beach.parquet"], "the names of beach.parquet say no split, those of other files do"),
        (["train/test.parquet", "train/0.parquet"], "train/test.parquet says two splits, test and train; rename it"),
    ],
)  # fmt: skip
def test_tables_are_of_the_split_that_their_names_say(files, splits, tmp_path):
    for file in files:
        (tmp_path / "t" / file).parent.mkdir(parents=True, exist_ok=True)
        table([0, 1]).to_parquet(tmp_path / "t" / file)
    if isinstance(splits, str):
        with pytest.raises(ValueError, match=splits):
            load_images(tmp_path / "t")
    else:
        assert {name: len(split) // 2 for name, split in load_images(tmp_path / "t").items()} == splits


def with_configurations(folder):
    photos(
        folder,
        "small/train/a/1.png",
        "small/train/b/1.png",
        "large/train/a/1.png",
        "large/train/b/1.png",
        "large/train/b/2.png",
    )
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_dir: small\n- config_name: large\n  data_dir: large\n---\n"
    )
    return folder


def test_a_configuration_is_chosen_among_those_that_are_listed(tmp_path):
    folder = with_configurations(tmp_path / "several")
    assert [len(load_images(folder, configuration=name)["train"]) for name in ("small", "large")] == [2, 3]
    for name in (None, "medium"):
        with pytest.raises(ValueError, match="several has 2 configurations: small, large; choose one with --dataset_config"):
            load_images(folder, configuration=name)
    with pytest.raises(ValueError, match=r"rename it without \[ \] \* and \?"):
        load_images(folder.rename(tmp_path / "several [2]"), configuration="small")


@pytest.mark.parametrize(
    "source", ["digits", {"train": "x.parquet"}, table([0, 1]), "FOLDER"], ids=["digits", "dict", "dataset", "folder"]
)
def test_a_source_without_configurations_takes_none(source, tmp_path):
    source = photos(tmp_path / "p", "a/1.png", "b/1.png") if source == "FOLDER" else source
    with pytest.raises(ValueError, match="has no configurations: leave --dataset_config small out"):
        load_images(source, configuration="small")


def test_files_that_datasets_would_count_twice_are_refused(tmp_path):
    """Where it reads a folder itself, as one with metadata."""
    folder = photos(tmp_path / "p", "train/test_tube/1.png", "train/flask/1.png", "test/flask/1.png")
    for split, files in (("train", ["test_tube/1.png", "flask/1.png"]), ("test", ["flask/1.png"])):
        rows = [f"{file},{number}" for number, file in enumerate(files)]
        (folder / split / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    with pytest.raises(ValueError, match=r"datasets counts \d files to two splits by words in their names, .*test_tube"):
        load_images(folder)


# Class maps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_map", "labels", "names"),
    [
        (None, [2, 0, None], ["dog, hound", "frog", "cat"]),
        ({"cat": "frog", "dog": 2}, [1, 2, None], ["dog, hound", "frog", "cat"]),
    ],
)
def test_classes_are_numbered_as_the_models(class_map, labels, names):
    cats = ClassLabel(names=["cat", "dog"])
    images = load_images(DatasetDict(train=table([0, 1, -1], cats), test=table([1, 0], cats)))
    mapped = map_classes(images, PretrainedConfig(id2label=dict(enumerate(names))), class_map)
    assert mapped["train"]["label"][:] == labels
    assert mapped["test"]["label"][:] == [labels[1], labels[0]] and mapped["test"].features["label"].names == names
    assert mapped["train"].column_names == images["train"].column_names
    assert [image.shape[-1] for image in RawImages.from_dataset(mapped["test"]).images] == [4, 5]
