"""Relearning: area and half-life against loops; a curve is that of runs of their own; a backdoored model is before its twin."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from tiny import SGD, SIZE, tiny_resnet
from tiny_trained import QUIET

from d3_hf.attacks import BadNets, poison
from d3_hf.benchmark.relearning import RETUNING, Curve, area, gaps, half_life, relearn
from d3_hf.data.images import RawImages
from d3_hf.defenses.fine_tuning import FineTuningConfig, FineTuningTrainer
from d3_hf.evaluation.measure import measure
from d3_hf.models.source import preprocessing_of

ATTACK = BadNets(size=4, image_size=SIZE, target_label=2)
OPTIONS = dict(use_cpu=True, per_device_train_batch_size=16)


def coloured(count, seed=0):
    """Three classes by their brightest channel."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 120, (count, 3, SIZE, SIZE), generator=generator)
    images[torch.arange(count), labels] += 100
    return RawImages(images.to(torch.uint8), labels, [f"LABEL_{k}" for k in range(3)])


@functools.cache
def weights(ratio, folder):
    images = poison(coloured(96), ATTACK, ratio, 0)[0] if ratio else coloured(96)
    args = FineTuningConfig(folder, max_steps=60, learning_rate=0.1, crop_padding=0, **SGD, **QUIET)
    trainer = FineTuningTrainer(tiny_resnet(), args, images)
    trainer.train()
    return trainer.model.state_dict()


@pytest.fixture
def make(tmp_path_factory):
    def made(ratio):
        model = tiny_resnet()
        model.load_state_dict(weights(ratio, str(tmp_path_factory.getbasetemp() / f"trained-{ratio}")))
        return model

    return made


def test_the_area_against_a_fine_sum():
    steps, rates = [0, 5, 10, 40], [0.1, 0.4, 0.2, 1.0]
    fine = [np.interp(40 * (i + 0.5) / 10_000, steps, rates) for i in range(10_000)]
    assert area(steps, rates) == pytest.approx(sum(fine) / 10_000, abs=1e-4)
    assert area([0, 7], [1, 1]) == 1


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([0.0, 0.25, 0.75, 1.0], 7.5),
        ([0.2, 0.6, 0.1, 1.0], 5.0),  # half of the way is 0.6
        ([0.0, 0.1, 0.2, 0.49], math.inf),
        ([0.0, 1.0, 0.0, 0.0], 2.5),
        ([1.0, 0.3, 0.2, 0.1], 0.0),
        ([0.9, 0.92, 0.94, 0.96], 25.0),
    ],
)
def test_half_of_the_way(rates, expected):
    assert half_life([0, 5, 10, 40], rates) == pytest.approx(expected)


def test_gaps_are_those_of_the_same_runs():
    curves = [Curve(n, s, (0, 4), (0.0, 0.2 * n + 0.1 * s), (1.0, 1.0)) for n in (1, 3) for s in (0, 1)]
    twins = [Curve(n, s, (0, 4), (0.0, 0.1), (1.0, 1.0)) for n in (1, 3) for s in (0, 1)]
    found = gaps(curves, twins)
    assert list(found) == [1, 3] and found[1] == pytest.approx([0.05, 0.1]) and found[3] == pytest.approx([0.25, 0.3])
    with pytest.raises(ValueError, match="model and twin were tuned with other images, steps or seeds"):
        gaps(curves, twins[::-1])


def test_a_curve_is_that_of_separate_runs_and_the_model_stays(make, tmp_path):
    model, images, test = make(0), coloured(48, seed=1), coloured(30, seed=2)
    model.classifier.requires_grad_(False)  # as a purification may leave it
    before = copy.deepcopy(model.state_dict())
    (curve,) = relearn(model, ATTACK, images, test, [16], [2, 5], [3], learning_rate=0.05, **OPTIONS)
    assert (curve.poisoned, curve.seed, curve.steps) == (16, 3, (0, 2, 5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not next(model.classifier.parameters()).requires_grad
    mixed, rows = poison(images, ATTACK, 16 / 48, 3)
    assert len(rows) == 16
    for steps, asr, accuracy in zip(*(values for values in (curve.steps, curve.asr, curve.accuracy)), strict=True):
        other = make(0)
        if steps:
            options = RETUNING | OPTIONS | {"learning_rate": 0.05, "max_steps": steps, "seed": 3}
            FineTuningTrainer(other, FineTuningConfig(str(tmp_path / str(steps)), **options), mixed).train()
        found = measure(other, test, preprocessing_of(other), ATTACK)
        assert (asr, accuracy) == (found.asr.value, found.accuracy.value)


def test_a_model_that_has_the_backdoor_is_before_its_twin(make):
    images, test = coloured(48, seed=1), coloured(60, seed=2)
    curves, twins = (relearn(make(ratio), ATTACK, images, test, [1, 4], [1, 3], [0], **OPTIONS) for ratio in (0.3, 0))
    for found in gaps(curves, twins).values():
        assert found[0] > 0.3
    assert half_life(twins[0].steps, twins[0].asr) > half_life(curves[0].steps, curves[0].asr)


@pytest.mark.parametrize("steps", [[], [0, 3], [3, 2], [2, 2]])
def test_steps_must_rise(steps, make):
    with pytest.raises(ValueError, match="steps must rise and be at least 1"):
        relearn(make(0), ATTACK, coloured(48), coloured(30), steps=steps)
