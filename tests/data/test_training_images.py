"""Images in memory: batches, selections, augmented batches as the loader gives them."""

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from pictures import noise
from torch.utils.data import DataLoader, RandomSampler
from transformers import ViTImageProcessor

from d3_hf.data.augmentation import Augmentation
from d3_hf.data.images import RawImages, content_hashes
from d3_hf.data.preprocessing import Preprocessing
from d3_hf.data.training_images import TrainingImages

NAMES = ["cat", "dog", "frog"]


def raw_images(count: int = 10, height: int = 6, width: int = 5) -> RawImages:
    pixels = torch.from_numpy(noise(count, 3, height, width))
    return RawImages(pixels, torch.arange(count) % 3, NAMES)


def test_batches_and_selections_keep_order_and_origin():
    raw = raw_images()
    batches = list(raw.batches(4))
    assert [rows.tolist() for rows, _, _ in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert torch.equal(torch.cat([images for _, images, _ in batches]), raw.images)
    assert torch.equal(torch.cat([labels for _, _, labels in batches]), raw.labels)
    part = raw.select(np.array([7, 2])).select([1])
    assert torch.equal(part.images[0], raw.images[2]) and part.index.tolist() == [2] and part.labels.tolist() == [2]


def images_of_several_sizes(count: int = 23) -> RawImages:
    sizes = [(6, 5), (5, 6), (6, 5), (9, 4)]
    images = [torch.from_numpy(noise(3, *sizes[row * row % 4], seed=row)) for row in range(count)]
    return RawImages(images, torch.arange(count) % 3, NAMES)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batches_are_of_one_size_and_hold_every_image_once(batch_size):
    raw = images_of_several_sizes()
    seen = []
    for rows, images, labels in raw.batches(batch_size):
        assert 1 <= len(rows) == len(images) == len(labels) <= batch_size
        for row, image, label in zip(rows.tolist(), images, labels, strict=True):
            assert torch.equal(image, raw.images[row]) and label == raw.labels[row]
        seen += rows.tolist()
    assert sorted(seen) == list(range(len(raw)))
    assert len(list(raw.batches(100))) == len({image.shape for image in raw.images})


def test_large_images_come_in_smaller_batches(monkeypatch):
    monkeypatch.setattr("d3_hf.data.images.MOST_PIXELS", 100)
    assert [len(rows) for rows, _, _ in raw_images(10, 6, 5).batches(4)] == [3, 3, 3, 1]
    assert [len(rows) for rows, _, _ in raw_images(2, 20, 30).batches(4)] == [1, 1]


def test_batches_of_no_images_are_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        next(raw_images().batches(0))


def test_images_of_several_sizes_are_resized_as_if_one_by_one():
    raw = images_of_several_sizes()
    preprocessing = Preprocessing.from_processor(ViTImageProcessor(size={"height": 8, "width": 7}))
    found = TrainingImages.from_raw(raw, preprocessing)
    expected = torch.cat([preprocessing.resize(image[None]) for image in raw.images])
    assert torch.equal(found.images, expected)
    assert torch.equal(found.labels, raw.labels) and torch.equal(found.sample_ids, raw.index)


def test_content_hashes_tell_pixels_and_sizes_apart():
    raw = raw_images()
    changed = raw.images.clone()
    changed[3, 0, 0, 0] ^= 1
    equal = [a == b for a, b in zip(content_hashes(raw), content_hashes(RawImages(changed, raw.labels, NAMES)), strict=True)]
    assert equal == [row != 3 for row in range(10)]
    turned = RawImages(raw.images.reshape(10, 3, 5, 6), raw.labels, NAMES)
    assert not set(content_hashes(raw)) & set(content_hashes(turned))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.empty((0, 3, 4, 4), dtype=torch.uint8), "labels": torch.empty(0).long()}, "no images"),
        ({"images": torch.zeros(10, 3, 4, 4)}, "must be uint8"),
        ({"images": torch.zeros((10, 4, 4), dtype=torch.uint8)}, "must be uint8"),
        ({"images": [torch.zeros((1, 4, 4), dtype=torch.uint8)] * 10}, "must be uint8"),
        ({"labels": torch.zeros(9, dtype=torch.int64)}, "9 labels"),
        ({"labels": torch.full((10,), 3)}, r"int64 in \[0, 3\); got torch.int64 3..3"),
        ({"labels": torch.full((10,), -1)}, r"int64 in \[0, 3\)"),
        ({"labels": torch.zeros(10)}, "got torch.float32"),
    ],
)
def test_raw_images_that_are_refused(change, message):
    raw = raw_images()
    with pytest.raises(ValueError, match=message):
        RawImages(**({"images": raw.images, "labels": raw.labels, "class_names": NAMES} | change))


# Augmented batches --------------------------------------------------------------------------------------------------


def training_images(count: int = 20, **options) -> TrainingImages:
    raw = raw_images(count, 8, 7)
    return TrainingImages(raw.images, raw.labels, Augmentation(**{"horizontal_flip": True, **options}))


def slow_augment(image: np.ndarray, seed: int, epoch: int, sample: int, padding: int, flip: bool) -> np.ndarray:
    bits = np.random.PCG64([seed, epoch]).random_raw(3 * (sample + 1))[-3:]
    top, left = (int(value) % (2 * padding + 1) for value in bits[:2])
    _, height, width = image.shape
    result = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            y, x = row + top - padding, column + left - padding
            if 0 <= y < height and 0 <= x < width:
                result[:, row, column] = image[:, y, x]
    return result[:, :, ::-1] if flip and int(bits[2]) >= 2**63 else result


@pytest.mark.parametrize(("padding", "flip"), [(4, True), (2, False), (0, True), (0, False), (9, False)])
def test_augmentation_equals_a_slow_reference(padding, flip):
    images = training_images(crop_padding=padding, horizontal_flip=flip, seed=5)
    originals = images.images.clone()
    images.set_epoch(3)
    batch = images.__getitems__(list(range(20)))
    assert batch["pixel_values"].shape == (20, 3, 8, 7) and batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_values"].is_contiguous() and batch["labels"].tolist() == [row % 3 for row in range(20)]
    for row, image in enumerate(batch["pixel_values"]):
        expected = slow_augment(originals[row].numpy(), 5, 3, row, padding, flip)
        assert np.array_equal(image, expected), row
    assert torch.equal(images.images, originals)


def test_draws_cover_their_range_evenly():
    rows, columns, flips = Augmentation(horizontal_flip=True).draws(epoch=0, count=9000)
    for draws in (rows, columns):
        assert (draws.bincount(minlength=9) - 1000).abs().max() < 150 and len(draws.bincount()) == 9
    assert abs(flips.double().mean() - 0.5) < 0.03
    assert abs(np.corrcoef([rows.numpy(), columns.numpy(), flips.numpy()])[np.triu_indices(3, 1)]).max() < 0.05
    assert not Augmentation().draws(0, 100)[2].any()


def test_a_sample_is_augmented_alike_in_every_batch_and_differently_in_every_epoch():
    images = training_images(200)
    whole = images.__getitems__(list(range(200)))["pixel_values"]
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).tolist()
    for start in range(0, 200, 64):
        part = order[start : start + 64]
        assert torch.equal(images.__getitems__(part)["pixel_values"], whole[part])
    assert torch.equal(images[17]["pixel_values"], whole[17])
    images.set_epoch(1)
    later = images.__getitems__(list(range(200)))["pixel_values"]
    assert (later != whole).flatten(1).any(1).float().mean() > 0.95
    images.set_epoch(0)
    assert torch.equal(images.__getitems__(list(range(200)))["pixel_values"], whole)
    assert not torch.equal(training_images(200, seed=1).__getitems__(list(range(200)))["pixel_values"], whole)


def test_sample_ids_carry_the_draws_into_subsets():
    raw = raw_images(40, 8, 7)
    processor = ViTImageProcessor(size={"height": 8, "width": 7})
    whole, part = (
        TrainingImages.from_raw(some, Preprocessing.from_processor(processor), Augmentation(seed=2))
        for some in (raw, raw.select([5, 30, 31]))
    )
    expected = whole.__getitems__([5, 30, 31])
    assert torch.equal(part.__getitems__([0, 1, 2])["pixel_values"], expected["pixel_values"])
    assert torch.equal(part.__getitems__([0, 1, 2])["labels"], expected["labels"])


def test_without_augmentation_images_pass_unchanged():
    raw = raw_images()
    images = TrainingImages(raw.images, raw.labels)
    assert torch.equal(images.__getitems__([3, 1])["pixel_values"], raw.images[[3, 1]])
    sample = images[4]
    assert sample["pixel_values"].shape == (3, 6, 5) and sample["labels"].shape == () and sample["labels"] == 1
    assert len(list(images)) == 10  # ends with an IndexError, as the sequence protocol asks


def batches_of(images: TrainingImages, epochs: int, **options) -> list[torch.Tensor]:
    loader = DataLoader(images, batch_size=8, collate_fn=TrainingImages.collate, **options)
    found = []
    for epoch in range(epochs):
        images.set_epoch(epoch)
        found += [batch["pixel_values"] for batch in loader]
    return found


def test_loaders_give_whole_batches_and_workers_follow_the_epoch():
    expected = batches_of(training_images(), 3)
    assert [len(batch) for batch in expected] == [8, 8, 4] * 3
    assert not torch.equal(expected[0], expected[3])
    found = batches_of(training_images(), 3, num_workers=2, persistent_workers=True, multiprocessing_context="fork")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_accelerates_loader_passes_the_epoch_on():
    images, reference = training_images(), training_images()
    loader = DataLoader(images, batch_size=8, sampler=RandomSampler(images), collate_fn=TrainingImages.collate)
    loader = prepare_data_loader(loader, put_on_device=False, use_seedable_sampler=True)
    loader.set_epoch(2)
    reference.set_epoch(2)
    expected = {tuple(image.flatten().tolist()) for image in reference.__getitems__(list(range(20)))["pixel_values"]}
    assert {tuple(image.flatten().tolist()) for batch in loader for image in batch["pixel_values"]} == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(10, 3, 4, 4)}, "must be uint8"),
        ({"images": torch.zeros((10, 1, 4, 4), dtype=torch.uint8)}, "must be uint8"),
        ({"images": torch.zeros((0, 3, 4, 4), dtype=torch.uint8)}, "N > 0"),
        ({"labels": torch.zeros(9, dtype=torch.int64)}, "9 labels"),
        ({"labels": torch.zeros(10)}, "must be int64"),
        ({"sample_ids": torch.arange(9)}, "9 sample ids"),
        ({"sample_ids": torch.arange(10) - 1}, "at least 0"),
    ],
)
def test_training_images_that_are_refused(change, message):
    raw = raw_images()
    with pytest.raises(ValueError, match=message):
        TrainingImages(**({"images": raw.images, "labels": raw.labels} | change))


@pytest.mark.parametrize("options", [{"crop_padding": -1}, {"seed": -1}])
def test_augmentations_that_are_refused(options):
    with pytest.raises(ValueError, match="at least 0"):
        Augmentation(**options)
