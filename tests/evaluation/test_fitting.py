"""Batches that do not fit into memory are halved, and nothing that was found changes."""

import logging

import pytest
import torch
from tiny import SIZE, tiny_resnet, tiny_vit

from d3_hf.attacks import BadNets
from d3_hf.data.fitting import run_with_fitting_batch
from d3_hf.data.images import RawImages
from d3_hf.data.preprocessing import Preprocessing
from d3_hf.data.training_images import TrainingImages
from d3_hf.evaluation import landscape
from d3_hf.evaluation.measure import measure
from d3_hf.evaluation.retain_check import retain_warnings

ATTACK = BadNets(target_label=1)
SHORT = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (30, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    return RawImages(pixels, torch.arange(30) % 3, ["a", "b", "c"])


def cramped(model, most):
    """The model on a device that has room for so many images; and how many each forward pass was asked for."""
    asked = []

    def check(module, args, kwargs):
        asked.append(len(kwargs["pixel_values"]))
        if asked[-1] > most:
            raise torch.OutOfMemoryError(SHORT)

    model.register_forward_pre_hook(check, with_kwargs=True)
    return model, asked


def test_a_batch_is_halved_until_it_fits(caplog):
    tried = []

    def need(size):
        tried.append(size)
        if size > 10:
            raise torch.OutOfMemoryError(SHORT)
        return "done"

    with caplog.at_level(logging.WARNING, "d3_hf"):
        assert run_with_fitting_batch(need, 100) == "done"
    assert tried == [100, 50, 25, 12, 6]
    assert caplog.messages[-1] == "memory is short: going on with a batch size of 6"


def test_other_errors_are_not_tried_again():
    tried = []

    def fail(size):
        tried.append(size)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_with_fitting_batch(fail, 100)
    assert tried == [100]


def test_a_single_image_that_does_not_fit_is_an_error_of_one_line(images):
    model, asked = cramped(tiny_vit(), 0)
    with pytest.raises(RuntimeError, match=r"^a single image does not fit into memory: .* \(CUDA out of memory.*\)$"):
        measure(model, images, Preprocessing.from_processor(model.image_processor), batch_size=4, progress=False)
    assert asked == [4, 2, 1]


def test_measuring_in_smaller_batches_finds_the_same(images):
    preprocessing = Preprocessing.from_processor(tiny_vit().image_processor)
    expected = measure(tiny_vit(), images, preprocessing, ATTACK, progress=False)
    model, asked = cramped(tiny_vit(), 8)
    found = measure(model, images, preprocessing, ATTACK, progress=False)
    assert asked[0] == 30 and sum(asked[asked.index(8) :]) == 60  # from there on, each image once and once triggered
    for rate in ("accuracy", "asr", "ra", "untriggered", "pacc", "trigger_drift"):
        assert getattr(found, rate) == getattr(expected, rate) is not None
    assert found.predictions.tolist() == expected.predictions.tolist()
    assert found.forward_images == expected.forward_images


def test_the_line_and_the_features_in_smaller_batches_are_the_same(images):
    start, end = tiny_resnet(0).eval(), tiny_resnet(1).eval()
    preprocessing = Preprocessing.from_processor(start.image_processor)
    options = dict(steps=(0.5,), progress=False)
    (expected,) = landscape.path(start, end, images, preprocessing, ATTACK, **options)
    features = landscape.penultimate_features(start, images, preprocessing)
    start, asked = cramped(start, 8)
    (found,) = landscape.path(start, end, images, preprocessing, ATTACK, **options)
    assert found.clean_loss == pytest.approx(expected.clean_loss, rel=1e-5)
    assert found.backdoor_loss == pytest.approx(expected.backdoor_loss, rel=1e-5)
    assert (found.accuracy, found.asr) == (expected.accuracy, expected.asr)
    torch.testing.assert_close(landscape.penultimate_features(start, images, preprocessing), features)
    assert 30 in asked and 8 in asked


def test_batch_norm_in_smaller_batches_is_estimated_from_every_image(images):
    model, asked = cramped(tiny_resnet(), 8)
    preprocessing = Preprocessing.from_processor(model.image_processor)
    options = dict(steps=(0,), batch_norm="re-estimated", retain=images, progress=False)
    (point,) = landscape.path(model, model, images, preprocessing, ATTACK, **options)
    assert sum(asked[asked.index(8) :][:4]) == 30 and point.accuracy.n == 30


def test_a_retain_set_is_checked_in_smaller_batches(images):
    preprocessing = Preprocessing.from_processor(tiny_vit().image_processor)
    before = measure(tiny_vit(), images, preprocessing, progress=False)
    retain = TrainingImages(images.images[:20], images.labels[:20])
    expected = retain_warnings(retain, tiny_vit(), preprocessing, images, before, 20)
    model, asked = cramped(tiny_vit(), 5)
    assert retain_warnings(retain, model, preprocessing, images, before, 20) == expected != []
    assert asked == [20, 10, 5, 5, 5, 5]
