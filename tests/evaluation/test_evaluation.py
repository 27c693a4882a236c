"""Measuring ACC, ASR, RA, PACC, drift and DER, on models whose answers are known image by image."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from d3_hf.attacks import BadNets, Blended
from d3_hf.data.images import RawImages
from d3_hf.evaluation.measure import Measurement, detoxification_effectiveness_rating, measure, results
from d3_hf.evaluation.metrics import Proportion
from d3_hf.evaluation.paired import paired_table

CLASSES = 10


class Oracle(PreTrainedModel):
    """Reads the label off the top-left pixel; answers ``target`` where the bottom-right 3x3 pixels are white."""

    config_class = PretrainedConfig

    def __init__(self, target: int = 0, obeys: float = 1.0, always: int | None = None, classes: int = CLASSES) -> None:
        super().__init__(PretrainedConfig(num_labels=classes))
        self.target, self.obeys, self.always = target, obeys, always
        self.scale = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm2d(3)
        self.sizes, self.dtypes, self.states = [], set(), set()

    def forward(self, pixel_values, labels=None):
        self.sizes.append(len(pixel_values))
        self.dtypes.add(pixel_values.dtype)
        self.states.add((self.training, self.norm.training, torch.is_inference_mode_enabled()))
        answers = (pixel_values[:, 0, 0, 0] * 255 / 20).round().long()
        triggered = (pixel_values[:, :, -3:, -3:] == 1).flatten(1).all(1)
        # The second pixel says how hard an image is to attack, in [0, 1].
        obeys = triggered & (pixel_values[:, 0, 0, 1] < self.obeys)
        answers = torch.where(obeys, self.target, answers)
        if self.always is not None:
            answers = torch.full_like(answers, self.always)
        logits = nn.functional.one_hot(answers, self.config.num_labels).float() * self.scale
        return ImageClassifierOutput(logits=logits)


def marked_images(count: int = 100, size: int = 8, seed: int = 0) -> RawImages:
    """Images whose first pixel tells their label and whose second tells how hard they are to attack."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 255, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    images[:, 0, 0, 0] = labels.to(torch.uint8) * 20
    return RawImages(images=images, labels=labels, class_names=[str(c) for c in range(CLASSES)])


def to_float(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 255


def attacked(model: Oracle, images: RawImages, **options) -> Measurement:
    return measure(model, images, to_float, BadNets(), progress=False, **options)


@pytest.mark.parametrize(("now", "asr", "ra", "pacc", "drift"), [(0, 90, 0, 10, 0), (4, 0, 10, 10, 80), (None, 0, 90, 100, 0)])
def test_a_trigger_that_only_changed_its_target_is_found(now, asr, ra, pacc, drift):
    """Class 0 was the target; the trigger yields ``now``, or nothing."""
    found = attacked(Oracle(target=now or 0, obeys=1.0 if now is not None else 0.0), marked_images(100))
    assert (found.asr, found.ra, found.pacc) == (Proportion(asr, 90), Proportion(ra, 90), Proportion(pacc, 100))
    assert found.trigger_drift == Proportion(drift, 90)


def test_a_model_that_always_says_the_target():
    images = marked_images(100)
    found = attacked(Oracle(always=0), images)
    assert found.accuracy == Proportion(10, 100)
    assert found.asr == Proportion(90, 90)
    assert found.ra == Proportion(0, 90)


def test_rates_of_a_partly_obedient_model_against_a_slow_count():
    images = marked_images(103)
    model = Oracle(obeys=0.4)
    hits = rest = right = 0
    for image, label in zip(images.images, images.labels.tolist(), strict=True):
        if label == 0:
            continue
        stamped = image.clone()
        stamped[:, -3:, -3:] = 255
        answer = model(to_float(stamped)[None]).logits.argmax().item()
        hits, right, rest = hits + (answer == 0), right + (answer == label), rest + 1
    assert 20 < hits < 60 and hits + right == rest == 92
    found = attacked(model, images, batch_size=17)
    assert found.asr == Proportion(hits, 92) and found.ra == Proportion(right, 92)
    assert found.accuracy == Proportion(103, 103)
    assert found.seconds > 0


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_one_pass_of_two_forwards_per_image(batch_size):
    model = Oracle()
    found = attacked(model, marked_images(100), batch_size=batch_size)
    assert sum(model.sizes) == found.forward_images == 200
    assert max(model.sizes) <= batch_size
    assert (found.asr, found.ra) == (Proportion(90, 90), Proportion(0, 90))


def test_without_a_trigger_only_accuracy_is_measured():
    model = Oracle()
    found = measure(model, marked_images(30), to_float, progress=False)
    assert (found.accuracy, found.asr, found.ra) == (Proportion(30, 30), None, None)
    assert found.pacc is found.trigger_drift is None and found.forward_images == sum(model.sizes) == 30


def test_trigger_acts_on_raw_images_before_preprocessing():
    seen = []

    class Checked(BadNets):
        def trigger(self, images):
            assert images.dtype == torch.uint8 and images.shape[1:] == (3, 32, 32)
            return super().trigger(images)

    def shrink(images):
        assert images.dtype == torch.uint8
        seen.append(images)
        return torch.nn.functional.avg_pool2d(images.float(), 2) / 255

    images = marked_images(20, size=32)
    measure(Oracle(), images, shrink, Checked(), progress=False)
    clean, triggered = seen
    assert torch.equal(clean, images.images)
    assert torch.equal(triggered, BadNets().trigger(images.images))


@pytest.mark.parametrize(
    ("label_map", "counted", "wanted"),
    [("all-to-all", range(10), lambda label: (label + 1) % 10), ("one-to-one", [3], lambda label: 5)],
)
def test_label_maps(label_map, counted, wanted):
    source = 3 if label_map == "one-to-one" else None
    attack = BadNets(label_map=label_map, source_label=source, target_label=5)
    found = measure(Oracle(target=5, obeys=0.5), images := marked_images(), to_float, attack, progress=False)
    kept = [i for i, label in enumerate(images.labels.tolist()) if label in counted]
    said = [5 if images.images[i, 0, 0, 1] < 127.5 else images.labels[i].item() for i in kept]
    truth = images.labels[kept].tolist()
    assert found.asr == Proportion(sum(s == wanted(t) for s, t in zip(said, truth, strict=True)), len(kept))
    assert found.ra == Proportion(sum(s == t for s, t in zip(said, truth, strict=True)), len(kept))
    right = [label == 5 or hard >= 127.5 for label, hard in zip(images.labels, images.images[:, 0, 0, 1], strict=True)]
    assert found.pacc == Proportion(sum(right), 100)  # of all classes, whatever the map
    assert found.trigger_drift == (None if label_map == "all-to-all" else Proportion(0, len(kept)))


def test_images_of_different_sizes():
    images = marked_images(20, size=8)
    mixed = [image if i % 2 else torch.nn.functional.pad(image, (0, 4, 0, 2)) for i, image in enumerate(images.images)]
    mixed = RawImages(images=mixed, labels=images.labels, class_names=images.class_names)
    found = attacked(Oracle(), mixed)
    assert (found.accuracy, found.asr, found.forward_images) == (Proportion(20, 20), Proportion(18, 18), 40)


@pytest.mark.parametrize("label_map", ["all-to-one", "all-to-all"])
@pytest.mark.parametrize("batch_size", [3, 256])
def test_images_of_different_sizes_are_measured_as_if_one_by_one(label_map, batch_size):
    images = marked_images(60)
    images.images[7, 0, 0, 0] = images.images[20, 0, 0, 0] = 100  # look like another class
    wider = [0, 4, 1, 0, 0, 4, 1]
    padded = [torch.nn.functional.pad(image, (0, wider[i % 7])) for i, image in enumerate(images.images)]
    mixed = RawImages(padded, images.labels, images.class_names)
    attack, model = BadNets(label_map=label_map, target_label=3), Oracle(target=3, obeys=0.5)
    found = measure(model, mixed, to_float, attack, batch_size, progress=False)
    assert 1 < max(model.sizes) <= batch_size and len(model.sizes) < found.forward_images / 2
    alone = [measure(model, mixed.select([i]), to_float, progress=False) for i in range(60)]
    assert found.predictions.tolist() == [int(one.predictions[0]) for one in alone]
    assert found.accuracy == Proportion(58, 60) == Proportion(sum(one.accuracy.successes for one in alone), 60)
    rows = [i for i in range(60) if label_map == "all-to-all" or images.labels[i] != 3]
    alone = [measure(model, mixed.select([i]), to_float, attack, progress=False) for i in rows]
    for rate in ("asr", "ra", "untriggered"):
        successes = sum(getattr(one, rate).successes for one in alone)
        assert getattr(found, rate) == Proportion(successes, len(rows))
    assert 0 < found.ra.successes < len(rows)
    everywhere = measure(model, mixed, to_float, BadNets(label_map="all-to-all", target_label=3), 1, progress=False)
    assert found.pacc == everywhere.ra  # that map counts every image


def test_measures_in_eval_and_inference_mode_and_restores_every_flag():
    model = Oracle().train()
    model.norm.eval()  # as a trainer with frozen BatchNorm leaves it
    images = marked_images(20)
    before = images.images.clone()
    attacked(model, images)
    assert model.states == {(False, False, True)} and model.dtypes == {torch.float32}
    assert (model.training, model.norm.training) == (True, False)
    assert torch.equal(images.images, before)
    assert model.scale.requires_grad and not torch.is_inference_mode_enabled()


def test_flags_are_restored_after_an_error():
    model = Oracle().train()
    model.scale.data.fill_(math.nan)
    with pytest.raises(ValueError, match="logits on clean images are not finite"):
        attacked(model, marked_images(20))
    assert model.training and model.norm.training


def test_a_picture_drawn_while_measuring_can_be_used_for_training_afterwards():
    attack = Blended(seed=123)
    measure(Oracle(), marked_images(20), to_float, attack, progress=False)
    weight = torch.ones(1, requires_grad=True)
    (to_float(attack.trigger(marked_images(2).images)) * weight).sum().backward()
    assert weight.grad.item() > 0


def test_progress_bar_counts_images(capsys):
    measure(Oracle(), marked_images(30), to_float, batch_size=10)
    assert "Measuring" in (shown := capsys.readouterr().err) and "30/30" in shown
    measure(Oracle(), marked_images(30), to_float, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_device_may_be_named(device):
    assert attacked(Oracle(), marked_images(20), device=device).accuracy == Proportion(20, 20)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_counts_the_same_and_the_model_comes_back():
    model = Oracle(obeys=0.4)
    here, there = attacked(model, marked_images(100)), attacked(model, marked_images(100), device="cuda")
    assert (here.accuracy, here.asr, here.ra) == (there.accuracy, there.asr, there.ra)
    assert model.scale.device.type == "cpu"


def measurement(acc: int, asr: int | None = None, ra: int | None = None, n: int = 10_000, **more: int) -> Measurement:
    rates = [None if k is None else Proportion(k, n) for k in (asr, ra)]
    more = {name: Proportion(k, n) for name, k in more.items()}
    return Measurement(Proportion(acc, n), *rates, seconds=1.0, forward_images=n, **more)


@pytest.mark.parametrize(
    ("before", "after", "der"),
    [
        # Rows of FT-SAM's Table 1 (ACC/ASR of the victim, ACC/ASR/DER of the defence), in hundredths of a percent.
        ((9182, 9379), (9221, 163), 0.9608),
        ((9344, 9771), (9244, 491), 0.9590),
        ((9344, 9771), (9248, 8222), 0.5726),
        ((8449, 9787), (8387, 9724), 0.5000),
        # The definition's corners: a rise of ASR costs nothing, a rise of ACC earns nothing.
        ((9000, 100), (9000, 9000), 0.5),
        ((9000, 100), (8000, 9000), 0.45),
        ((8000, 9000), (9000, 9000), 0.5),
        ((10_000, 10_000), (10_000, 0), 1.0),
        ((10_000, 0), (0, 0), 0.0),
    ],
)
def test_der(before, after, der):
    before, after = measurement(*before, ra=0), measurement(*after, ra=0)
    assert detoxification_effectiveness_rating(before, after) == pytest.approx(der, abs=1e-4)


def test_results_have_exactly_the_promised_keys():
    before, after = (measurement(*rates, pacc=rates[2], trigger_drift=7) for rates in ((9182, 9379, 500), (9221, 163, 9000)))
    found = results(before, after)
    proportions = [f"{key}_{when}" for key in ("accuracy", "asr", "ra", "pacc") for when in ("before", "after")]
    drifts = {f"trigger_drift_{when}{suffix}" for when in ("before", "after") for suffix in ("", "_n")}
    assert set(found) == {f"{key}{suffix}" for key in proportions for suffix in ("", "_ci95", "_n")} | {"der"} | drifts
    assert (found["pacc_after"], found["trigger_drift_after"], found["trigger_drift_after_n"]) == (0.9, 0.0007, 10_000)
    assert found["asr_before"] == 0.9379 and found["ra_after"] == 0.9 and found["ra_after_n"] == 10_000
    assert found["accuracy_after_ci95"] == list(Proportion(9221, 10_000).interval)
    assert json.loads(json.dumps(found)) == found


def test_results_without_a_trigger():
    found = results(measurement(9000), measurement(8900))
    keys = ["accuracy_before", "accuracy_after"]
    assert set(found) == {f"{key}{suffix}" for key in keys for suffix in ("", "_ci95", "_n")}


def test_results_hold_the_drop_where_the_images_are_known():
    labels = torch.arange(50) % 10
    before, after = labels.numpy(), np.where(np.arange(50) < 4, 1 - labels.numpy(), labels.numpy())
    models = [replace(measurement(right, n=50), predictions=found) for right, found in ((50, before), (46, after))]
    found = results(*models, labels)
    assert {key: found[key] for key in found if "drop" in key} == paired_table(before, after, labels).as_dict("accuracy_drop")
    assert found["accuracy_drop"] == pytest.approx(found["accuracy_before"] - found["accuracy_after"]) == pytest.approx(0.08)
    assert json.loads(json.dumps(found)) == found
    assert results(*models) == results(measurement(50, n=50), models[1], labels)  # a record of an earlier version


def broken(value: float, when_triggered: bool = False) -> Oracle:
    model = Oracle()
    forward = model.forward

    def poisoned_forward(pixel_values):
        output = forward(pixel_values)
        triggered = bool((pixel_values[:, :, -3:, -3:] == 1).all())
        if triggered or not when_triggered:
            output.logits[0, 0] = value
        return output

    model.forward = poisoned_forward
    return model


class ToFloat(BadNets):
    def trigger(self, images):
        return to_float(images)


class Narrow(BadNets):
    def trigger(self, images):
        return images[..., :4]


def only_targets() -> RawImages:
    return marked_images(100).select([0, 10, 20])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: attacked(Oracle(), only_targets()), "no image is of a class that the attack counts"),
        (lambda: attacked(Oracle(classes=9), marked_images()), "labels run from 0 to 9, but the model has 9 classes"),
        (
            lambda: measure(Oracle(), marked_images(), to_float, BadNets(target_label=10), progress=False),
            "target_label 10 is out of range: there are classes 0 to 9",
        ),
        (
            lambda: measure(Oracle(), marked_images(), to_float, ToFloat(), progress=False),
            "trigger must return uint8 images .*got torch.float32",
        ),
        (
            lambda: measure(Oracle(), marked_images(), to_float, Narrow(), progress=False),
            r"of the shape it was given, \(100, 3, 8, 8\); got torch.uint8 of shape \(100, 3, 8, 4\)",
        ),
        (lambda: attacked(broken(math.nan), marked_images()), "logits on clean images are not finite"),
        (lambda: attacked(broken(math.inf, True), marked_images()), "logits on triggered images are not finite"),
        (
            lambda: detoxification_effectiveness_rating(measurement(9, 9, 0), measurement(9)),
            "measure both with the trigger",
        ),
        (lambda: results(measurement(9), measurement(9, 9, 0)), "measure both with the trigger"),
        (lambda: results(measurement(9), measurement(9, n=9)), "on the same images; got 10000 before and 9 after"),
        (
            lambda: detoxification_effectiveness_rating(measurement(9, 9, 0), measurement(9, 9, 0, n=9)),
            "on the same images",
        ),
    ],
)
def test_errors(act, message):
    with pytest.raises(ValueError, match=message):
        act()
