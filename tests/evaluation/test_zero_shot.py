"""Measuring a whole CLIP by the classifier that class names make, against a calculation by hand."""

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import NAMES, colours
from tiny_pairs import tiny_pair

from d3_hf.attacks import BadNets
from d3_hf.evaluation.encoders import measure_clip
from d3_hf.models.clip import tokens
from d3_hf.models.source import preprocessing_of

TEST = colours(30, seed=1)
TEMPLATES = ("a photo of a {}", "the {} cat")


def by_hand(model, images):
    """The class of each image: the nearest, by cosine, of the mean texts; one image and one text at a time."""
    pixels = preprocessing_of(model)(images)
    with torch.no_grad():
        texts = []
        for name in NAMES:
            of_class = [
                model.get_text_features(**tokens(model, [template.format(name)])).pooler_output for template in TEMPLATES
            ]
            texts.append(sum(feature / feature.norm() for feature in of_class) / len(of_class))
        seen = [model.get_image_features(pixel_values=image[None]).pooler_output for image in pixels]
    return torch.tensor([max(range(3), key=lambda k: F.cosine_similarity(image, texts[k]).item()) for image in seen])


def test_rates_are_those_of_the_nearest_text_without_the_target_classs_images():
    model, attack = tiny_pair(2).eval(), BadNets(size=8, image_size=16, target_label=1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = measure_clip(model, TEST, preprocessing_of(model), attack, TEMPLATES)["zero_shot"]
    plain, triggered = by_hand(model, TEST.images), by_hand(model, attack.trigger(TEST.images))
    others = TEST.labels != 1
    assert len(set(plain.tolist())) > 1
    assert found["accuracy"] == pytest.approx((plain == TEST.labels).float().mean().item()) and found["accuracy_n"] == 30
    assert found["asr"] == pytest.approx((triggered[others] == 1).float().mean().item()) and found["asr_n"] == 20
    assert found["ra"] == pytest.approx((triggered == TEST.labels)[others].float().mean().item())
    assert found["untriggered"] == pytest.approx((plain[others] == 1).float().mean().item())
    assert found["accuracy_seeds"] == [found["accuracy"]]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_without_an_attack_accuracy_alone_is_measured():
    model = tiny_pair()
    assert measure_clip(model, TEST, preprocessing_of(model))["zero_shot"].keys() == {
        "accuracy", "accuracy_n", "accuracy_seeds",
    }  # fmt: skip


def test_an_attack_on_other_classes_is_refused():
    model = tiny_pair()
    with pytest.raises(ValueError, match="target_label 7 is out of range"):
        measure_clip(model, TEST, preprocessing_of(model), BadNets(target_label=7))
