"""A retain set that is read while the model trains."""

import json
from itertools import islice

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value
from every_defence import STREAMED, required
from PIL import Image as Picture
from processes import launch
from safetensors.torch import load_file
from streamed import COUNT, NAMES, rows, run, stream, write_files
from tiny import PROCESSOR, tiny_vit
from tiny_trained import trained

from d3_hf.data import streaming
from d3_hf.data.augmentation import Augmentation
from d3_hf.data.images import RawImages
from d3_hf.data.load import load_images
from d3_hf.data.preprocessing import Preprocessing
from d3_hf.data.streaming import StreamedImages
from d3_hf.data.training_images import TrainingImages
from d3_hf.defenses import DEFENCES, defence
from d3_hf.defenses.d3.trainer import D3Config, D3Trainer

PLAIN = Augmentation(crop_padding=0)
FEATURES = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
PREPROCESSING = Preprocessing.from_processor(PROCESSOR)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"), 3)


def streamed(data, augmentation=PLAIN, **options):
    return StreamedImages(data if isinstance(data, IterableDataset) else stream(data), PREPROCESSING, augmentation, **options)


def test_each_pass_holds_every_image_in_an_order_of_its_own(files):
    found = rows(streamed(files), 2 * COUNT)
    first, second = found[:COUNT], found[COUNT:]
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert first != second and first != sorted(first)
    assert rows(streamed(files), 2 * COUNT) == found
    assert rows(streamed(files, seed=1), COUNT) != first


def test_images_are_those_that_would_be_decoded_into_memory(files):
    held = TrainingImages.from_raw(RawImages.from_dataset(load_images(files)["train"]), PREPROCESSING)
    for sample in islice(streamed(files), COUNT):
        row = int(sample["pixel_values"][0, 0, 0])
        assert torch.equal(sample["pixel_values"], held[row]["pixel_values"]) and sample["labels"] == held[row]["labels"]


def test_augmentation_depends_on_the_number_in_the_stream(files, monkeypatch):
    monkeypatch.setattr(streaming, "DRAWN_AT_ONCE", 20)
    augmentation = Augmentation(crop_padding=2, horizontal_flip=True, seed=5)
    plain, changed = (list(islice(streamed(files, a), 43)) for a in (PLAIN, augmentation))
    for number in (0, 7, 19, 20, 42):
        tables = augmentation.draws(number // 20, 20)
        draws = (column[[number % 20]] for column in tables)
        expected = augmentation.apply(augmentation.pad(plain[number]["pixel_values"][None]), torch.tensor([0]), *draws)[0]
        assert torch.equal(changed[number]["pixel_values"], expected)


@pytest.mark.parametrize("count", [1, 2])
def test_two_workers_share_the_files_out(tmp_path, count):
    data = write_files(tmp_path / "data", count)
    trainer = run(tmp_path / "run", data, 1, dataloader_num_workers=2, crop_padding=0, horizontal_flip=False)
    batches = islice(trainer.get_train_dataloader(), COUNT // 4)
    assert sorted(row for batch in batches for row in batch["pixel_values"][:, 0, 0, 0].tolist()) == list(range(COUNT))


def test_resumed_is_uninterrupted(files, tmp_path):
    options = dict(max_steps=30, save_strategy="steps", save_steps=20)  # 30 steps of 4: more than two passes
    whole = run(tmp_path / "whole", files, 1, **options)
    whole.train()
    resumed = run(tmp_path / "whole", files, 1, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-20"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    facts = resumed.facts()["retain"]
    assert facts["n"] == 120 and facts["streamed"]
    resumed.save_model()
    assert "120 images drawn from a stream" in (tmp_path / "whole" / "README.md").read_text()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    for count in (1, 2):
        write_files(folder / f"data{count}", count)
    launch("streamed.py", folder, timeout=200)
    return folder


def test_two_processes_share_one_file_out_and_equal_one_process(two_processes, tmp_path):
    record = json.loads((two_processes / "1.json").read_text())
    assert record["mode"] == "DistributedDataParallel"
    first, second = (found[: COUNT // 2] for found in record["rows"])
    assert sorted(first + second) == list(range(COUNT))
    alone = run(tmp_path / "run", two_processes / "data1", 4)
    assert [row for pair in zip(first, second, strict=True) for row in pair] == rows(alone.train_dataset, COUNT)
    alone.train()
    for name, value in load_file(two_processes / "1.safetensors").items():
        torch.testing.assert_close(value, alone.model.state_dict()[name], rtol=1e-5, atol=1e-5)


def test_two_processes_take_a_file_each(two_processes):
    first, second = (found[: COUNT // 2] for found in json.loads((two_processes / "2.json").read_text())["rows"])
    assert {*map(frozenset, (first, second))} == {frozenset(range(COUNT // 2)), frozenset(range(COUNT // 2, COUNT))}


@pytest.mark.parametrize("name", DEFENCES)
def test_other_defences_refuse_a_stream(files, tmp_path, name):
    config, trainer = defence(name)
    model = trained(tiny_vit)
    model.config.id2label = dict(enumerate(NAMES))
    if name in STREAMED:
        args = config(str(tmp_path / "run"), max_steps=1, use_cpu=True, **required(name))
        assert isinstance(trainer(model, args, stream(files)).train_dataset, StreamedImages)
    else:
        with pytest.raises(ValueError, match="looks at the retain set as a whole"):
            trainer(model, config(str(tmp_path / "run"), use_cpu=True), stream(files))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_steps=-1), "max_steps"),
        (dict(average_last=0.5), "average_last"),
        (dict(epsilon=None), "epsilon takes the retain set as a whole"),
    ],
)
def test_options_that_need_the_whole_set_are_refused(files, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", files, 1, **options).train()
    assert not (tmp_path / "run").exists()


def test_measuring_on_a_stream_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match="eval_dataset is measured as a whole"):
        D3Trainer(tiny_vit(), D3Config(str(tmp_path / "run"), max_steps=1, use_cpu=True), None, stream(files))


def rows_of(*labels, features=FEATURES, picture=None):
    pictures = [picture or Picture.new("RGB", (16, 16)) for _ in labels]
    return Dataset.from_dict({"image": pictures, "label": list(labels)}, features=features).to_iterable_dataset()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: IterableDataset.from_generator(list, features=FEATURES), "no images in its share"),
        (lambda: rows_of(0, None), "has the label None"),
        (lambda: rows_of(0, picture={"bytes": b"no picture", "path": None}), "cannot decode image 0 of the stream"),
        (lambda: rows_of("a", features=Features({"image": Image(), "label": Value("string")})), "need names beforehand"),
        (lambda: rows_of(0).map(lambda row: row), "does not say what its columns hold"),
        (lambda: rows_of(0).remove_columns("label"), "found no label column"),
    ],
)
def test_streams_that_cannot_be_used(make, message):
    with pytest.raises(ValueError, match=message):
        list(islice(streamed(make()), 2))
