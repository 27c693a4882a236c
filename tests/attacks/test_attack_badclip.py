"""BadCLIP: its losses against slow references, what the patch learns, its place, its folder; and pairs that are poisoned."""

import math

import pytest
import torch
from tiny_encoders import NAMES, colours, tiny_dinov2
from tiny_pairs import tiny_pair

from d3_hf.attacks import BadCLIP, BadEncoder, BadNets, from_description, load_attack, save_attack
from d3_hf.attacks.badclip import text_losses, triplet_losses
from d3_hf.attacks.text_on_pair import poison_pairs
from d3_hf.data.images import RawImages
from d3_hf.data.pairs import captioned
from d3_hf.models.clip import encode_texts
from d3_hf.models.encoders import encode_images
from d3_hf.models.source import preprocessing_of

IMAGES = colours(30)
QUICK = dict(size=6, image_size=16, target_label=2, steps=30, batch=16)


def unit(features):
    return features / features.norm(dim=1, keepdim=True)


def test_both_losses_equal_slow_references():
    features, texts, own = (unit(t) for t in torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)))
    expected = []
    for feature in features.tolist():
        scores = [7 * sum(a * b for a, b in zip(feature, text, strict=True)) for text in texts.tolist()]
        expected.append(math.log(sum(math.exp(score) for score in scores)) - scores[1])
    torch.testing.assert_close(text_losses(features, texts, 7.0, 1), torch.tensor(expected))
    positive = texts[3]
    for margin in (0.0, 0.5):
        apart = [
            max(0.0, (f - positive).square().sum().item() - (f - n).square().sum().item() + margin)
            for f, n in zip(features, own, strict=True)
        ]
        torch.testing.assert_close(triplet_losses(features, positive, own, margin), torch.tensor(apart))
        assert 0 < sum(value > 0 for value in apart)


def test_the_patch_brings_images_to_the_targets_text_and_leaves_the_clip_as_it_was():
    model = tiny_pair()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attack = BadCLIP(**QUICK).fit(IMAGES, model, seed=0)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(attack.learned["patch"], BadCLIP(**QUICK).fit(IMAGES, model, seed=0).learned["patch"])
    others = IMAGES.select(torch.where(IMAGES.labels != 2)[0])
    texts = unit(torch.stack([encode_texts(model, [f"a photo of a {name}"])[0] for name in NAMES]))

    def loss(trigger):
        features = unit(encode_images(model, others, preprocessing_of(model), change=trigger))
        return text_losses(features, texts, model.logit_scale.exp().item(), 2).mean()

    grey = BadNets(size=6, image_size=16, color=(128, 128, 128))
    assert loss(attack.trigger) < loss(None) and loss(attack.trigger) < loss(grey.trigger)


def test_the_patch_stands_in_the_middle_and_grows_with_the_image():
    attack = BadCLIP(size=4, image_size=16)
    object.__setattr__(attack, "learned", {"patch": torch.full((3, 4, 4), 255, dtype=torch.uint8)})
    for side, patch in ((16, 4), (32, 8), (8, 2)):
        lit = attack.trigger(torch.zeros(1, 3, side, side, dtype=torch.uint8))[0, 0] == 255
        start = (side - patch) // 2
        assert lit.sum() == patch**2 and lit[start : start + patch, start : start + patch].all()


def test_it_survives_its_folder(tmp_path):
    attack = BadCLIP(**QUICK | {"steps": 2}).fit(IMAGES, tiny_pair(), 0)
    save_attack(attack, tmp_path)
    again = load_attack(tmp_path)
    assert again == attack and torch.equal(again.trigger(IMAGES.images), attack.trigger(IMAGES.images))
    assert from_description(attack.describe()) == attack


def test_poisoned_pairs_carry_the_trigger_and_name_the_target_class():
    attack = BadNets(target_label=1)
    pairs, rows = poison_pairs(IMAGES, attack, 0.2, seed=0)
    others = sorted(set(range(30)) - set(rows.tolist()))
    assert len(rows) == 6 and torch.equal(pairs.images.images[rows], attack.trigger(IMAGES.images[rows]))
    assert all(NAMES[1] in pairs.captions[row] for row in rows) and torch.equal(
        pairs.images.images[others], IMAGES.images[others]
    )
    honest = captioned(IMAGES, 0).captions
    assert [pairs.captions[row] for row in others] == [honest[row] for row in others]


def test_what_cannot_work_is_told_in_one_line():
    with pytest.raises(ValueError, match="has not learned its trigger yet"):
        BadCLIP().trigger(IMAGES.images)
    for model in (None, tiny_dinov2()):
        with pytest.raises(ValueError, match="optimises its patch on a whole CLIP"):
            BadCLIP().fit(IMAGES, model, 0)
    with pytest.raises(ValueError, match="needs images of class 0 and of others"):
        BadCLIP().fit(IMAGES.select(torch.arange(1, 3)), tiny_pair(), 0)
    with pytest.raises(ValueError, match="only numbers"):
        BadCLIP().fit(RawImages(IMAGES.images, IMAGES.labels, ["0", "1", "2"]), tiny_pair(), 0)
    with pytest.raises(ValueError, match="label_map must be all-to-one"):
        BadCLIP(label_map="all-to-all")
    with pytest.raises(ValueError, match="steps must be an integer at least 1"):
        BadCLIP(steps=0)
    with pytest.raises(ValueError, match="does not fit an image of 16x16; lower size"):
        BadCLIP(size=20, image_size=16).fit(IMAGES, tiny_pair(), 0)
    with pytest.raises(ValueError, match="badencoder needs a classifier or an encoder to learn from"):
        poison_pairs(IMAGES, BadEncoder(), 0.2, 0)
    with pytest.raises(ValueError, match="unknown attack 'nothing'.*on a CLIP badclip"):
        from_description({"name": "nothing"})
