"""The mathematics against slow references and against autograd."""

import pytest
import torch

from d3_hf.defenses.shared import geometry


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


SHAPES = [(5, 7), (3, 4, 2, 2), (6,)]


def test_distances_are_flattened_frobenius_norms():
    weights, references = draw(*SHAPES), draw(*SHAPES, seed=1)
    slow = [sum((a - b) ** 2 for a, b in zip(w.flatten().tolist(), r.flatten().tolist(), strict=True)) ** 0.5
            for w, r in zip(weights, references, strict=True)]  # fmt: skip
    assert torch.stack(geometry.distances(weights, references)).tolist() == pytest.approx(slow, rel=1e-6)


def test_distance_gradient_equals_autograd():
    weights, references = draw(*SHAPES), draw(*SHAPES, seed=1)
    leaves = [w.clone().requires_grad_() for w in weights]
    (-0.3 * sum((w - r).norm() for w, r in zip(leaves, references, strict=True))).backward()
    gradients = draw(*SHAPES, seed=2)
    expected = [g + leaf.grad for g, leaf in zip(gradients, leaves, strict=True)]
    lengths = geometry.add_distance_gradient(gradients, weights, references, -0.3)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(lengths, geometry.distances(weights, references))


def test_distance_gradient_is_zero_at_the_reference():
    (weight,) = draw((4, 4))
    gradient = torch.zeros(4, 4)
    geometry.add_distance_gradient([gradient], [weight], [weight.clone()], -1.0)
    assert torch.equal(gradient, torch.zeros(4, 4))


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_projections(scale):
    references = draw(*SHAPES)
    radii = geometry.norms(references)
    for projection in geometry.PROJECTIONS:
        weights = [scale * w for w in draw(*SHAPES, seed=3)]
        before = [w.clone() for w in weights]
        geometry.project(weights, radii, projection)
        for weight, old, radius in zip(weights, before, radii, strict=True):
            inside = projection == "ball" and old.norm() <= radius
            want = old if projection == "none" or inside else old * (radius / old.norm())
            torch.testing.assert_close(weight, want)
            again = weight.clone()
            geometry.project([again], [radius], projection)
            torch.testing.assert_close(again, weight)


def test_projection_keeps_a_weight_at_zero_finite():
    weight = torch.zeros(3, 3)
    geometry.project([weight], [torch.tensor(2.0)], "sphere")
    assert torch.equal(weight, torch.zeros(3, 3))


def test_warm_starts():
    (reference,) = draw((40, 50), seed=5)
    radius = reference.norm()

    def start(method, seed=0):
        return geometry.warm_start(reference, method, torch.Generator().manual_seed(seed))

    assert torch.equal(start("far"), -reference)
    assert torch.equal(start("middle"), torch.zeros_like(reference))
    assert (start("near") - reference).norm() / radius == pytest.approx(1e-3, rel=1e-3)
    assert start("random").norm() == pytest.approx(radius.item(), rel=1e-5)
    assert (start("random") - reference).norm() / radius == pytest.approx(2**0.5, abs=0.1)
    uniform = start("random") / start("random").abs().max()
    assert uniform.abs().mean() == pytest.approx(0.5, abs=0.02)
    assert (start("noise") - reference).std() == pytest.approx(reference.std().item(), rel=0.05)
    for method in geometry.WARM_STARTS:
        assert torch.equal(start(method), start(method))
    assert not torch.equal(start("random"), start("random", seed=1))


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_a_random_start_that_was_foreseen_is_drawn_again(shift):
    def start(reference):
        return geometry.warm_start(reference, "random", torch.Generator().manual_seed(42))

    foreseen = start(torch.ones(10, 64)) * (1 + shift)
    assert (start(foreseen) - foreseen).norm() / foreseen.norm() == pytest.approx(2**0.5, abs=0.1)
    assert torch.equal(start(torch.zeros(2, 2)), torch.zeros(2, 2))


@pytest.mark.parametrize(
    "call",
    [
        lambda: geometry.warm_start(torch.ones(2, 2), "close", torch.Generator()),
        lambda: geometry.project([torch.ones(2, 2)], [torch.tensor(1.0)], "cube"),
    ],
)
def test_unknown_choices_raise(call):
    with pytest.raises(ValueError, match="must be one of"):
        call()
