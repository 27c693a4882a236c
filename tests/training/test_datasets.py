"""Every form in which a Trainer's user holds images: trained on as what it is, or refused by a line that names it."""

import logging

import datasets
import pytest
import torch
from datasets import ClassLabel
from forms import (
    COUNT,
    LABELS,
    NAMES,
    PAIRS,
    PICTURE_FORMS,
    PICTURES,
    PIXELS,
    READY,
    SAMPLES,
    SPLITS,
    Folder,
    Generated,
    generated,
    images,
    mapped,
    of_rows,
    trained,
    trainer,
)  # fmt: skip
from PIL import Image
from tiny import CLASSES, FAST, tiny_vit
from torch.utils.data import DataLoader, Subset, TensorDataset
from transformers import default_data_collator

from d3_hf import FineTuningConfig, FineTuningTrainer, RawImages


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What training on the same images in the forms that always worked makes of the weights."""
    folder = tmp_path_factory.mktemp("expected")
    return {"ready": trained(folder / "a", SAMPLES), "pictures": trained(folder / "b", images())}


@pytest.mark.parametrize("form", READY)
def test_samples_that_are_ready_for_the_model_are_trained_on(tmp_path, expected, form):
    torch.testing.assert_close(trained(tmp_path, READY[form]()), expected["ready"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", [lambda: Generated(), lambda: datasets.IterableDataset.from_generator(generated)])
def test_streams_that_are_ready_for_the_model_are_trained_on_in_their_order(tmp_path, form):
    in_order = trained(tmp_path / "a", SAMPLES, train_sampling_strategy="sequential")
    streamed = trainer(tmp_path / "b", form())
    streamed.train()
    streamed.save_model()
    found = torch.cat([parameter.detach().flatten() for parameter in streamed.model.parameters()])
    torch.testing.assert_close(found, in_order, rtol=0, atol=1e-6)
    assert streamed.facts()["retain"] == {"n": 16, "source": None, "streamed": True}


@pytest.mark.parametrize("form", PICTURE_FORMS)
def test_pictures_are_resized_augmented_and_normalised(tmp_path, expected, form):
    assert torch.equal(trained(tmp_path, PICTURE_FORMS[form]()), expected["pictures"])


def test_a_turned_picture_is_put_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = []
    for picture, label in PAIRS:
        half_turn = picture.rotate(180)
        half_turn.info["exif"] = exif.tobytes()
        turned.append((half_turn, label))
    made = trainer(tmp_path, turned)
    assert torch.equal(made.train_dataset.images, trainer(tmp_path, PAIRS).train_dataset.images)


def test_rows_are_known_below_a_transform(tmp_path):
    data = READY["transform"]().add_column("index", list(range(100, 100 + COUNT)))
    assert trainer(tmp_path, data).retain_indices == list(range(100, 100 + COUNT))
    assert trainer(tmp_path, images(index=[7] * COUNT).with_format("torch")).retain_indices == [7] * COUNT


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SPLITS, r"is a DatasetDict: pass one of its splits, train_dataset\['train'\] or train_dataset\['test'\]"),
        (lambda: {"pixel_values": PIXELS, "labels": LABELS}, r"is a dict: pass torch.utils.data.TensorDataset\(pixel_values"),
        (lambda: PIXELS.numpy(), "is a ndarray: pass torch.utils.data.TensorDataset"),
        (lambda: "uoft-cs/cifar10", r"is a str: pass load_images\(name_or_path\)"),
        (lambda: DataLoader(SAMPLES), "is a DataLoader: pass its dataset, and per_device_train_batch_size="),
        (lambda: (sample for sample in SAMPLES), "is a generator, no data set of samples; of a sample it must be"),
        (lambda: [], "train_dataset holds no images"),
        (lambda: TensorDataset(PIXELS), "train_dataset: a sample is a tuple of 1: it must be pixel_values"),
        (lambda: (PIXELS, LABELS), "a sample is a Tensor: it must be"),
        (lambda: [{"pixels": p} for p in PIXELS], "a sample is a dict of pixels: it must be"),
        (lambda: TensorDataset(PIXELS, torch.eye(CLASSES)[LABELS]), r"a label must be one integer in \[0, 3\)"),
        (lambda: TensorDataset(PIXELS, LABELS + 1 + CLASSES), r"a label must be one integer in \[0, 3\), .*; got tensor\(4\)"),
        (lambda: TensorDataset(PIXELS.flatten(1), LABELS), r"pixel_values must be \(3, h, w\), all of one size; got \(768,\)"),
        (lambda: TensorDataset((PIXELS * 9).long(), LABELS), "must be floats, ready for the model, or uint8; got torch.int64"),
        (lambda: mapped().remove_columns("labels"), "train_dataset needs a tensor column `labels` in every batch"),
        (lambda: of_rows(lambda rows: {"picture": rows, "y": rows}), r"transform off\): a sample is a dict of picture, y: it"),
        (lambda: images().with_transform(lambda batch: batch), "a sample is a dict of image, label: it must be pixel_values"),
        (lambda: Folder(PAIRS, transform=lambda picture: picture), "has a transform and yields pictures, which are read once"),
        (lambda: Subset(Folder(PAIRS, NAMES[::-1]), range(COUNT)), "class 0 is 'frog' in the dataset and 'cat' in the model"),
        (lambda: mapped().cast_column("labels", ClassLabel(names=NAMES[::-1])), "class 0 is 'frog' in the dataset and 'cat'"),
        (lambda: [(PICTURES[0].convert("F"), 0)] * 2, "sample 0 holds no RGB or grey picture"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_named_before_anything_is_written(tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as refused:
        trainer(tmp_path / "run", make())
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_what_goes_wrong_in_a_later_sample_is_named_too(tmp_path):
    samples = [*SAMPLES[:8], *({"pixel_values": torch.zeros(3, 8, 8), "labels": 0} for _ in range(8))]
    with pytest.raises(ValueError, match=r"all of one size; got \(3, 8, 8\) and \(3, 16, 16\)"):
        trainer(tmp_path, samples, per_device_train_batch_size=16).train()


@pytest.mark.parametrize("option", [{"cutout": 4}, {"horizontal_flip": True}])
def test_augmentation_of_ready_samples_is_refused(tmp_path, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is for images that the trainer augments"):
        trainer(tmp_path, SAMPLES, **option)


def test_decoding_does_not_pass_over_a_transform():
    with pytest.raises(ValueError, match="has a transform, which decoding the pictures would pass over"):
        RawImages.from_dataset(images().with_transform(lambda batch: batch))


def test_pixels_that_were_not_normalised_are_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, TensorDataset(PIXELS, LABELS))
        assert "normalise them" not in caplog.text
        trainer(tmp_path, TensorDataset(PIXELS.clamp(0, 1), LABELS))
    assert (
        "train_dataset yields pixel_values in [0, 1]" in caplog.text
        and "normalise them with mean (0.5, 0.5, 0.5)" in caplog.text
    )


def test_a_collator_of_ones_own_gets_single_samples(tmp_path, expected):
    seen = []

    def collate(samples):
        seen.append(samples)
        return {
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            "labels": torch.tensor([sample["labels"] for sample in samples]),
        }

    args = FineTuningConfig(str(tmp_path), per_device_train_batch_size=8, learning_rate=0.1, **FAST)
    for data, known in ((images(), "pictures"), (SAMPLES, "ready")):
        for own in (collate, default_data_collator):
            model = tiny_vit()
            made = FineTuningTrainer(model, args, data, data_collator=own)
            made.train()
            assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), expected[known])
    assert all(sample.keys() == {"pixel_values", "labels"} for samples in seen for sample in samples) and len(seen[1]) == 8


def mixed(samples):
    batch = default_data_collator(samples)
    return batch | {"labels": torch.eye(CLASSES)[batch["labels"]]}


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        (lambda samples: {"images": PIXELS}, r"`pixel_values` in every batch, \(B, 3, h, w\); found images"),
        (lambda samples: (PIXELS, LABELS), r"`pixel_values` in every batch, \(B, 3, h, w\); found a tuple"),
        (mixed, r"`labels` in every batch, int64 \(B,\); found"),
    ],
)
def test_batches_of_another_form_are_refused(tmp_path, collate, message):
    args = FineTuningConfig(str(tmp_path), **FAST)
    with pytest.raises(ValueError, match=f"train_dataset needs a tensor column {message}"):
        FineTuningTrainer(tiny_vit(), args, SAMPLES, data_collator=collate)


def test_the_stream_of_a_format_is_read(tmp_path):
    stream = images().to_iterable_dataset()
    plain, formatted = (trained(tmp_path, data) for data in (stream, stream.with_format("torch")))
    assert torch.equal(plain, formatted)
