"""Pairs of image and caption: read from columns, made of class names, drawn, and what is refused."""

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image
from tiny import PROCESSOR
from tiny_encoders import NAMES, colours

from d3_hf.data.images import RawImages
from d3_hf.data.pairs import TEMPLATES, Pairs, TrainingPairs, caption, captioned
from d3_hf.data.preprocessing import Preprocessing
from d3_hf.options.arguments import DataArguments
from d3_hf.options.pairs import PairArguments

IMAGES = colours(12)
TEXTS = [f"a {name} thing number {row}" for row, name in enumerate(NAMES * 4)]


def table(text="text", label=None, images=IMAGES):
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images.images]
    columns, features = {"image": pictures, text: TEXTS}, {"image": ImageColumn(), text: Value("string")}
    if label is not None:
        columns["label"], features["label"] = images.labels.tolist(), label
    return Dataset.from_dict(columns, features=Features(features))


def parquet(folder, **kwargs):
    folder.mkdir()
    table(**kwargs).to_parquet(folder / "train.parquet")
    return str(folder)


def test_captions_are_made_of_class_names_and_depend_on_the_seed_alone():
    pairs = captioned(IMAGES, seed=3)
    assert pairs.captions == captioned(IMAGES, seed=3).captions != captioned(IMAGES, seed=4).captions
    for label, text in zip(IMAGES.labels.tolist(), pairs.captions, strict=True):
        assert text in [template.format(NAMES[label]) for template in TEMPLATES]
    assert len({text.replace(NAMES[k], "{}") for k, text in zip(IMAGES.labels.tolist(), pairs.captions, strict=True)}) > 1
    assert caption("traffic_light", "a photo of a {}") == "a photo of a traffic light"


def test_a_batch_is_images_and_the_numbers_of_their_captions():
    pairs = Pairs.from_dataset(table().add_column("index", range(100, 112)))
    held = TrainingPairs.from_pairs(pairs, Preprocessing.from_processor(PROCESSOR))
    batch = held.__getitems__([4, 1])
    assert torch.equal(batch["pixel_values"], IMAGES.images[[4, 1]]) and batch["captions"].tolist() == [4, 1]
    assert held.captions == TEXTS and held.sample_ids.tolist() == list(range(100, 112)) and not batch["labels"].any()
    other = TrainingPairs.from_pairs(Pairs(pairs.images, TEXTS[::-1]), Preprocessing.from_processor(PROCESSOR))
    assert held.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("captions", [["a"] * 11, ["a"] * 11 + [None], ["a"] * 11 + [" "], ["a"] * 11 + [3]])
def test_an_image_without_a_caption_is_refused(captions):
    with pytest.raises(ValueError, match="every image needs"):
        Pairs(IMAGES, captions)


def test_numbers_are_no_class_names():
    with pytest.raises(ValueError, match="no captions and no class names to make them of, only numbers: name the column"):
        captioned(RawImages(IMAGES.images, IMAGES.labels, ["0", "1", "2"]))


# What options load -----------------------------------------------------------------------------------------------------


def load(folder, count=6, label_column=None, **options):
    return PairArguments(**options).load(DataArguments(folder, retain_count=count, label_column=label_column))


def test_captions_of_a_column_go_with_the_rows_that_are_retained_and_labels_measure(tmp_path):
    folder = parquet(tmp_path / "set", text="words", label=ClassLabel(names=NAMES))
    images, pairs = load(folder, text_column="words")
    rows = images.retain["index"]
    assert pairs.captions == [TEXTS[row] for row in rows] and torch.equal(pairs.images.images, IMAGES.images[rows])
    assert pairs.images.index.tolist() == list(rows) and images.test.class_names == NAMES and len(images.test) == 6


def test_without_a_column_captions_are_made_of_the_labels(tmp_path):
    images, pairs = load(parquet(tmp_path / "set", label=ClassLabel(names=NAMES)))
    assert [NAMES[k] in text for k, text in zip(images.retain["label"], pairs.captions, strict=True)] == [True] * 6


def test_captions_without_labels_are_measured_on_another_set(tmp_path):
    captions, labelled = parquet(tmp_path / "set", text="words"), parquet(tmp_path / "other", label=ClassLabel(names=NAMES))
    with pytest.raises(ValueError, match="has captions and no labels .* to measure by: name labelled images, --zero_shot_da"):
        load(captions, text_column="words")
    images, pairs = load(captions, text_column="words", zero_shot_dataset=labelled)
    assert pairs.captions == [TEXTS[row] for row in images.retain["index"]] and len(pairs) == 6
    assert images.test.class_names == NAMES and images.source == captions


def test_what_has_neither_captions_nor_class_names_is_refused_in_one_line(tmp_path):
    numbers = parquet(tmp_path / "numbers", label=Value("int64"))
    for options, wanted in (
        ({"label_column": "label"}, "no captions and no class names to make them of"),
        ({"label_column": "text"}, "12 images of 12 classes: are the names captions, name their column by --text_column"),
        ({"text_column": "caption"}, r"text_column='caption' is no column of texts; the dataset has image \(Image\), text"),
        ({"text_column": "label"}, "text_column='label' is no column of texts"),
        ({"zero_shot_dataset": "x"}, "zero_shot_dataset is for captions without labels"),
        ({"text_column": "text", "label_column": "label"}, "no captions and no class names"),
    ):
        with pytest.raises(ValueError, match=wanted) as caught:
            load(numbers, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="has no split 'training'"):
        PairArguments("text").load(DataArguments(numbers, train_split="training"))
