"""Distillation from the suspicious model: the divergence against its definition, and its place in the objective."""

import copy

import pytest
import torch
import torch.nn.functional as F
from raising import D3, FT, build, same_weights
from tiny import tiny_resnet, tiny_samples, tiny_vit
from transformers import TrainerCallback

from d3_hf.training.distillation import distillation_losses


def slow_divergence(logits, teacher_logits, temperature=2.0):
    """T^2 KL by its definition, image by image and class by class."""
    total = []
    for z, t in zip(logits / temperature, teacher_logits / temperature, strict=True):
        q, p = z.exp() / z.exp().sum(), t.exp() / t.exp().sum()
        total.append(temperature**2 * sum(p[c] * (p[c].log() - q[c].log()) for c in range(len(p))))
    return torch.stack(total)


def test_distillation_losses_equal_the_definition():
    logits, teacher = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)) * 3
    torch.testing.assert_close(distillation_losses(logits, teacher), slow_divergence(logits, teacher), rtol=1e-5, atol=1e-6)
    assert distillation_losses(logits, logits + 5).abs().max() < 1e-6


class Recorder(TrainerCallback):
    """The gradients before each step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
@pytest.mark.parametrize("defence", [D3, FT])
def test_distillation_in_the_objective(tmp_path, make, defence):
    suspicious, samples = make(), tiny_samples(8)
    start = {"warm_start": "random", "lambda_clean": 4.0, "sam_rho": 0.0} if defence is D3 else {}
    made = build(defence, tmp_path, make(), samples, per_device_train_batch_size=8, max_steps=1, distillation=0.7, **start)
    recorder = Recorder()
    made.add_callback(recorder)
    made.start()
    plain = copy.deepcopy(made.model).train()
    made.train()
    pixels = torch.stack([s["pixel_values"] for s in samples])
    labels = torch.tensor([s["labels"] for s in samples])
    with torch.no_grad():
        teacher = suspicious.eval()(pixel_values=pixels).logits
    logits = plain(pixel_values=pixels).logits
    losses, divergences = F.cross_entropy(logits, labels, reduction="none"), slow_divergence(logits, teacher)
    if defence is D3:
        distance = (plain.get_parameter(made.segments[0].name) - made.references[0]).norm()
        objective = (4 * (F.relu(losses - 0.1).mean() + 0.7 * divergences.mean()) - distance) / 5
    else:
        objective = losses.mean() + 0.7 * divergences.mean()
    objective.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(recorder.gradients[0][name], parameter.grad, rtol=1e-3, atol=1e-5)
    log = made.state.log_history[0]
    assert log["objective"] == pytest.approx(objective.item(), rel=1e-4)
    assert log["distillation_loss"] == pytest.approx(divergences.mean().item(), rel=1e-4)
    assert log["clean_loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    same_weights(made.suspect.model, make())


@pytest.mark.parametrize("defence", [D3, FT])
def test_two_micro_batches_equal_one_with_distillation(tmp_path, defence):
    runs = []
    for size, steps in ((8, 1), (4, 2)):
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps, distillation=2.0, max_steps=4)
        runs.append(build(defence, tmp_path, tiny_vit(), tiny_samples(20), **options))
        runs[-1].train()
    same_weights(runs[1].model, runs[0].model, rtol=0, atol=1e-6)
    for one, two in zip(*(run.state.log_history[:4] for run in runs), strict=True):
        assert two["distillation_loss"] == pytest.approx(one["distillation_loss"], rel=1e-4)


def test_sharpness_aware_steps_ask_the_teacher_once_a_batch(tmp_path):
    made = build(FT, tmp_path, tiny_vit(), distillation=0.5, sam_rho=1.0)
    passes = []
    made.suspect.model.register_forward_hook(lambda *passed: passes.append(None))
    made.train()
    assert len(passes) == made.state.global_step == 3
