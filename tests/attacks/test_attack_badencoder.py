"""BadEncoder: its three losses against slow references, its reference, its patch, its folder."""

import math

import pytest
import torch
from tiny_encoders import colours, tiny_resnet

from d3_hf.attacks import BadEncoder, from_description, load_attack, save_attack
from d3_hf.attacks.badencoder import PENALTY, effectiveness_losses, reference_losses, surest, utility_losses
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


def test_the_reference_is_the_image_that_a_head_is_surest_of():
    model, images = tiny_resnet(), colours(30)
    attack = BadEncoder(target_label=2).fit(images, model, seed=0)
    features = encode_images(model, images, preprocessing_of(model)).double()
    spread = features.std(0, unbiased=False)
    scaled = (features - features.mean(0)) / torch.where(spread > 0, spread, 1)
    is_class = images.labels == 2
    weight, bias = (
        torch.zeros(scaled.shape[1], dtype=torch.double, requires_grad=True),
        torch.zeros(1).double().requires_grad_(),
    )
    share = torch.where(is_class, 15 / is_class.sum(), 15 / (~is_class).sum()).double()  # both sorts weigh the same
    head = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        head.zero_grad()
        terms = torch.nn.functional.softplus(torch.where(is_class, -1, 1) * (scaled @ weight + bias))
        total = PENALTY * (share * terms).sum() + weight @ weight / 2
        total.backward()
        return total

    head.step(loss)
    rows = torch.where(is_class)[0]
    assert torch.equal(attack.reference, images.images[rows[(scaled @ weight + bias)[rows].argmax()]])


def test_an_image_that_is_only_near_the_mean_of_its_class_is_no_reference():
    """Beside a large common part the nearest to the class's mean may be one that points half elsewhere."""
    shared, own = torch.tensor([100.0, 0, 0]), torch.tensor([[6, 0.3], [3, 2], [3, -2], [1, -0.3]])
    features = shared + torch.cat([torch.zeros(4, 1), own], 1)
    others = shared + torch.tensor([[0, -2, 2], [0, -2, -2], [0, 1, 4], [0, 1, -4.0]])
    assert torch.nn.functional.cosine_similarity(features, features.mean(0)[None]).argmax() in (1, 2)
    assert surest(features, others) == 0


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
    with pytest.raises(ValueError, match="of class 0, and there are no others to tell them from"):
        BadEncoder(target_label=0).fit(colours(1), tiny_resnet(), 0)
    with pytest.raises(ValueError, match="label_map must be all-to-one"):
        BadEncoder(label_map="all-to-all")
    with pytest.raises(ValueError, match="reference_views must be an integer at least 1"):
        BadEncoder(reference_views=0)
    with pytest.raises(ValueError, match="unknown attack 'nothing'.*on encoders badencoder"):
        from_description({"name": "nothing"})
