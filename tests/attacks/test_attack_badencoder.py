"""BadEncoder: its three losses against slow references, its reference, its patch, its folder."""

import math

import pytest
import torch
from tiny_encoders import colours, tiny_resnet

from d3_hf.attacks import BadEncoder, from_description, load_attack, save_attack
from d3_hf.attacks.badencoder import effectiveness_losses, most_typical, reference_losses, utility_losses
from d3_hf.models.encoders import encode_images
from d3_hf.models.source import preprocessing_of

A, B = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))


def cosine(a, b):
    a, b = a.tolist(), b.tolist()
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def test_the_three_losses_equal_slow_references():
    torch.testing.assert_close(effectiveness_losses(A, B[0]), torch.tensor([-cosine(a, B[0]) for a in A]))
    torch.testing.assert_close(reference_losses(A, B[1]), torch.tensor([-cosine(a, B[1]) for a in A]))
    torch.testing.assert_close(utility_losses(A, B), torch.tensor([-cosine(a, b) for a, b in zip(A, B, strict=True)]))


def test_the_reference_learns_too():
    """Both features of the first loss are the victim's."""
    triggered, reference = A.clone().requires_grad_(), B[0].clone().requires_grad_()
    effectiveness_losses(triggered, reference).sum().backward()
    assert triggered.grad.any() and reference.grad.any()


def test_the_reference_is_the_most_typical_image_of_its_class():
    model, images = tiny_resnet(), colours(30)
    attack = BadEncoder(target_label=2).fit(images, model, seed=0)
    features = encode_images(model, images, preprocessing_of(model))
    of_class = [row for row in range(30) if images.labels[row] == 2]
    mean = sum(features) / 30
    of_all = sum(features[row] - mean for row in of_class)
    best = max(of_class, key=lambda row: cosine(features[row] - mean, of_all))
    assert torch.equal(attack.reference, images.images[best])


def test_what_all_images_share_is_not_what_is_typical_of_a_class():
    """Beside a large common part the nearest to the class's mean is one that points half elsewhere."""
    shared, own = torch.tensor([100.0, 0, 0]), torch.tensor([[6, 0.3], [3, 2], [3, -2], [1, -0.3]])
    features = shared + torch.cat([torch.zeros(4, 1), own], 1)
    assert torch.nn.functional.cosine_similarity(features, features.mean(0)[None]).argmax() in (1, 2)
    assert most_typical(features, shared) == 0


def test_the_patch_is_white_and_one_pixel_from_the_corner():
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    lit = BadEncoder().trigger(images)[1, 0] == 255
    assert lit.sum() == 100 and lit[21:31, 21:31].all()


def test_it_survives_its_folder(tmp_path):
    attack = BadEncoder(target_label=1, size=4, lambda_utility=2).fit(colours(12), tiny_resnet(), 0)
    save_attack(attack, tmp_path)
    again = load_attack(tmp_path)
    assert again == attack and torch.equal(again.reference, attack.reference)
    assert from_description(attack.describe()) == attack


def test_what_it_lacks_is_told_in_one_line():
    with pytest.raises(ValueError, match="has not learned its trigger yet"):
        _ = BadEncoder().reference
    with pytest.raises(ValueError, match="chooses its reference by the untouched encoder"):
        BadEncoder().fit(colours(6), None, 0)
    with pytest.raises(ValueError, match="from images of class 2, and there is none"):
        BadEncoder(target_label=2).fit(colours(2), tiny_resnet(), 0)
    with pytest.raises(ValueError, match="label_map must be all-to-one"):
        BadEncoder(label_map="all-to-all")
    with pytest.raises(ValueError, match="reference_views must be an integer at least 1"):
        BadEncoder(reference_views=0)
    with pytest.raises(ValueError, match="unknown attack 'nothing'.*on encoders badencoder"):
        from_description({"name": "nothing"})
