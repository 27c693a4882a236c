"""i-BAU: the hypergradient against dense solves and finite differences, the trainer's gradient against its formula."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import CLASSES, SIZE, tiny_resnet, tiny_samples, tiny_timm_vit, tiny_vit
from torch.autograd.functional import hessian, hvp

from d3_hf.data.images import RawImages
from d3_hf.defenses.ibau import PERTURBATION, IBAUConfig, IBAUTrainer, fixed_point, implicit_gradient, inner_objective
from d3_hf.publishing.manifest import MANIFEST


def config(folder, **options):
    defaults = dict(per_device_train_batch_size=8, max_steps=3, learning_rate=0.01, logging_steps=1, perturbed_share=0.5)
    return IBAUConfig(str(folder), disable_tqdm=True, use_cpu=True, **(defaults | options))


class Recorder(IBAUTrainer):
    def finish_gradient(self, window_loss):
        objective = super().finish_gradient(window_loss)
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        return objective


def trained(folder, make=tiny_vit, data=None, resume=None, **options):
    trainer = Recorder(make(), config(folder, **options), data or tiny_samples())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# The mathematics -------------------------------------------------------------------------------------------------------


def matrix(size=5):
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return a @ a.T / size + torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("iterations", [1, 2, 5, 400])
def test_fixed_point_is_the_truncated_series_and_solves_in_the_limit(iterations):
    a, target, step = matrix(), torch.arange(1.0, 6.0, dtype=torch.float64), 0.1
    shrink = torch.eye(5, dtype=torch.float64) - step * a
    series = step * sum(torch.linalg.matrix_power(shrink, k) @ target for k in range(iterations))
    found = fixed_point(lambda v: a @ v, target, step, iterations)
    torch.testing.assert_close(found, series)
    if iterations == 400:
        torch.testing.assert_close(found, torch.linalg.solve(a, target))


def toy(delta, theta):
    """Inner and outer objectives of a small bilevel problem; the inner one is convex in delta, and not quadratic."""
    inner = delta @ matrix() @ delta / 2 + torch.cosh(delta * theta).sum() - (theta * theta.roll(1)) @ delta
    return inner, torch.sin(delta).sum() * theta.exp().mean() + (delta * theta).square().sum()


def solved(theta):
    delta = torch.zeros_like(theta)
    for _ in range(50):
        delta = delta.requires_grad_()
        gradient = torch.autograd.grad(toy(delta, theta)[0], delta)[0]
        delta = (delta - torch.linalg.solve(hessian(lambda d: toy(d, theta)[0], delta.detach()), gradient)).detach()
    return delta


def test_hypergradient_equals_a_dense_solve_and_finite_differences():
    theta = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
    delta = solved(theta.detach()).requires_grad_()
    inner, outer = toy(delta, theta)
    to_delta, to_theta = torch.autograd.grad(outer, [delta, theta])
    (implicit,) = implicit_gradient(inner, delta, to_delta, [theta], lambda a, b: fixed_point(a, b, 0.1, 800))
    blocks = hessian(lambda d, t: toy(d, t)[0], (delta.detach(), theta.detach()))
    dense = -blocks[1][0] @ torch.linalg.solve(blocks[0][0], to_delta)
    torch.testing.assert_close(implicit, dense)
    for i, width in enumerate(1e-5 * torch.eye(5, dtype=torch.float64)):
        ahead, behind = (toy(solved(t), t)[1] for t in (theta.detach() + width, theta.detach() - width))
        assert (to_theta + implicit)[i].item() == pytest.approx((ahead - behind).item() / 2e-5, rel=1e-6)
    assert implicit.norm() > 0.1


def test_parameters_that_the_inner_problem_does_not_see_get_zero():
    theta, other = torch.ones(5, dtype=torch.float64, requires_grad=True), torch.ones(2, requires_grad=True)
    delta = torch.ones(5, dtype=torch.float64, requires_grad=True)
    terms = implicit_gradient(toy(delta, theta)[0], delta, delta.detach(), [theta, other], lambda a, b: a(b))
    assert terms[0].any() and not terms[1].any() and terms[1].shape == (2,)


# The trainer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet, tiny_timm_vit])
def test_first_update_has_the_gradient_of_the_formula(tmp_path, make):
    """One batch of all images, all of them perturbed: delta and dH/dtheta written out in pixels."""
    trainer = trained(tmp_path, make, per_device_train_batch_size=16, max_steps=1, perturbed_share=1.0, fixed_point_step=0.3)
    args, std = trainer.args, torch.full((1, 3, 1, 1), 0.5)
    images = torch.stack([sample["pixel_values"] for sample in tiny_samples()])
    labels = torch.tensor([sample["labels"] for sample in tiny_samples()])
    model = make().eval()
    model.set_attn_implementation("eager") if make is tiny_vit else None
    classes = model(pixel_values=images).logits.argmax(1)
    if make is tiny_timm_vit:
        for block in model.timm_model.blocks:
            block.attn.fused_attn = False

    def inner(delta):
        losses = F.cross_entropy(model(pixel_values=images + delta / std).logits, classes, reduction="none")
        return -sum(losses) / len(losses) + args.penalty * sum(v**2 for v in delta.flatten())

    def outer(delta):
        return F.cross_entropy(model(pixel_values=images + delta / std).logits, labels)

    zero = torch.zeros(1, 3, SIZE, SIZE, requires_grad=True)
    delta = -args.inner_learning_rate * torch.autograd.grad(inner(zero), zero)[0]
    torch.testing.assert_close(trainer.delta.detach(), delta, rtol=1e-4, atol=1e-6)
    delta.requires_grad_()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    target = torch.autograd.grad(outer(delta), delta)[0]
    q = torch.zeros_like(target)
    for _ in range(args.fixed_point_iterations):
        q = q + args.fixed_point_step * (target - hvp(inner, delta.detach(), q)[1])
    mixed = (torch.autograd.grad(inner(delta), delta, create_graph=True)[0] * q).sum()
    implicit = torch.autograd.grad(mixed, list(parameters.values()), allow_unused=True, materialize_grads=True)
    direct = torch.autograd.grad(outer(delta), list(parameters.values()), allow_unused=True, materialize_grads=True)
    assert sum(term.norm() for term in implicit) > 1e-3 * sum(term.norm() for term in direct)
    for name, term, plain in zip(parameters, implicit, direct, strict=True):
        torch.testing.assert_close(
            trainer.gradients[name], plain - term, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_share_of_a_batch_is_perturbed_and_at_least_one_image(tmp_path):
    trainer = IBAUTrainer(tiny_vit(), config(tmp_path, perturbed_share=0.25), tiny_samples())
    assert trainer._chosen(8).sum() == 2 and trainer._chosen(1).sum() == 1 and trainer._chosen(40).sum() == 10
    first = trainer._chosen(40)
    assert torch.equal(first, trainer._chosen(40))
    trainer.batch_number = 1
    assert not torch.equal(first, trainer._chosen(40))


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet, tiny_timm_vit])
def test_statistics_stay_and_the_perturbation_is_published(tmp_path, make):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (16, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    data = RawImages(pixels, torch.arange(16) % CLASSES, [f"LABEL_{i}" for i in range(CLASSES)])
    trainer = trained(tmp_path, make, data, gradient_accumulation_steps=2, save_strategy="steps", save_steps=2)
    victim = make().state_dict()
    for name, value in trainer.model.state_dict().items():
        assert "running" not in name or torch.equal(value, victim[name]), "BatchNorm statistics must stay"
    trainer.save_model()
    found = trainer.facts()["perturbation"]
    assert torch.equal(load_file(tmp_path / found["file"])["delta"], trainer.delta) and found["l2"] > 0
    checkpoint = tmp_path / "checkpoint-2"
    assert not (checkpoint / PERTURBATION).exists() and PERTURBATION not in (checkpoint / MANIFEST).read_text()


@pytest.mark.parametrize("steps", [3, 4])
def test_resumed_equals_uninterrupted(tmp_path, steps):
    """Two updates a round: after three the checkpoint brings the delta of its round, after four a new round begins."""
    options = dict(max_steps=6, save_strategy="steps", save_steps=steps)
    whole = trained(tmp_path / "whole", **options)
    resumed = trained(tmp_path / "resumed", resume=str(tmp_path / "whole" / f"checkpoint-{steps}"), **options)
    assert torch.equal(resumed.delta, whole.delta) and whole.round == 2
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def test_training_again_finds_a_perturbation_anew(tmp_path):
    trainer = trained(tmp_path, max_steps=1)
    first = trainer.delta.detach().clone()
    trainer.train()
    assert trainer.round == 0 and not torch.equal(trainer.delta, first)


def test_inner_objective():
    logits, delta = torch.randn(4, 3), torch.randn(1, 3, 2, 2)
    losses = [-logits[i].softmax(0)[i % 3].log() for i in range(4)]
    wanted = -sum(losses) / 4 + 0.3 * sum(v**2 for v in delta.flatten())
    torch.testing.assert_close(inner_objective(logits, torch.arange(4) % 3, delta, 0.3), wanted)


def test_fp16_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fp16 rounds second derivatives"):
        config(tmp_path, fp16=True)


def test_attention_without_second_derivative_is_refused(tmp_path):
    model = tiny_vit()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2 has no second derivative"):
        IBAUTrainer(model, config(tmp_path), tiny_samples())
