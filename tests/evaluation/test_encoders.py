"""Probes on frozen features: what they see, what is counted, three draws of the training images."""

import numpy as np
import pytest
import torch
from tiny_encoders import NAMES, colours, tiny_resnet

from d3_hf.attacks import BadNets
from d3_hf.data.images import RawImages
from d3_hf.evaluation.encoders import SHARE, measure_encoder, nearest_neighbours, reference_similarity, trained_probes
from d3_hf.models.encoders import encode_images
from d3_hf.models.source import preprocessing_of

TRAIN, TEST = colours(60), colours(30, seed=1)


class Spy(BadNets):
    """A trigger that paints images red, the target's colour, and remembers what it was put on."""

    name = "spy"

    def _stamp(self, images):
        SEEN.append(images.clone())
        painted = images.clone()
        painted[:, 0], painted[:, 1:] = 230, images[:, 1:] // 4
        return painted


SEEN = []


@pytest.fixture(scope="module")
def found():
    SEEN.clear()
    model = tiny_resnet()
    return measure_encoder(model, TRAIN, TEST, preprocessing_of(model), Spy(target_label=0))


def test_probes_tell_colours_apart_and_the_red_trigger_misleads_them(found):
    assert sorted(found) == ["knn", "linear"]
    for rates in found.values():
        assert rates["accuracy"] > 0.9 and rates["asr"] > 0.9 and rates["ra"] < 0.1 and rates["untriggered"] < 0.1
        assert len(rates["asr_seeds"]) == 3 and rates["asr"] == pytest.approx(np.mean(rates["asr_seeds"]))


def test_asr_leaves_images_of_the_target_class_out(found):
    assert all(rates["accuracy_n"] == 30 and rates["asr_n"] == rates["ra_n"] == 20 for rates in found.values())
    model = tiny_resnet()
    only_target = TEST.select(torch.where(TEST.labels == 0)[0])
    with pytest.raises(ValueError, match="no image is of a class that the attack counts"):
        measure_encoder(model, TRAIN, only_target, preprocessing_of(model), BadNets())


def test_a_probe_never_sees_a_trigger(found):
    assert torch.equal(torch.cat(SEEN), TEST.images)
    own = {image.numpy().tobytes() for image in TRAIN.images}
    assert not own & {image.numpy().tobytes() for image in torch.cat(SEEN)}


def test_without_an_attack_there_is_acc_alone():
    model = tiny_resnet()
    found = measure_encoder(model, TRAIN, TEST, preprocessing_of(model))
    assert all(set(rates) == {"accuracy", "accuracy_n", "accuracy_seeds"} for rates in found.values())


def test_each_seed_draws_other_images(monkeypatch):
    drawn = []
    monkeypatch.setattr("d3_hf.evaluation.encoders.linear_probe", lambda features, labels: drawn.append(features))
    features = np.arange(40.0)[:, None]
    trained_probes(features, np.arange(40) % 2, (0, 1, 2))
    assert [len(rows) for rows in drawn] == [SHARE * 40] * 3 and len({rows.tobytes() for rows in drawn}) == 3
    with pytest.raises(ValueError, match="hold one class in a draw"):
        trained_probes(features, np.zeros(40, dtype=int), (0,))


def test_nearest_neighbours_equal_a_slow_reference():
    generator = np.random.default_rng(0)
    features, labels, others = generator.normal(size=(50, 4)), generator.integers(0, 3, 50), generator.normal(size=(9, 4))
    expected = []
    for one in others:
        cosines = [one @ f / np.linalg.norm(one) / np.linalg.norm(f) for f in features]
        nearest = sorted(range(50), key=lambda row: -cosines[row])[:20]
        votes = [sum(labels[row] == number for row in nearest) for number in range(3)]
        expected.append(votes.index(max(votes)))
    assert nearest_neighbours(features, labels)(others).tolist() == expected


def test_similarity_to_the_reference_equals_a_slow_reference():
    model = tiny_resnet()
    preprocessing = preprocessing_of(model)
    got = reference_similarity(model, TEST, preprocessing, lambda raw: 255 - raw, TRAIN.images[0])
    inverted = RawImages(255 - TEST.images, TEST.labels, NAMES)
    features, wanted = (encode_images(model, images, preprocessing) for images in (inverted, TRAIN.select([0])))
    cosines = [float(f @ wanted[0] / f.norm() / wanted[0].norm()) for f in features]
    assert got == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)


def test_other_classes_are_refused():
    other = RawImages(TEST.images, TEST.labels, ["a", "b", "c"])
    with pytest.raises(ValueError, match="images of the same classes"):
        measure_encoder(tiny_resnet(), TRAIN, other, preprocessing_of(tiny_resnet()))
