"""ANP: the min-max loss, the search, the choice of the threshold, the pruning."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_resnet, tiny_samples, tiny_vit
from tiny_trained import QUIET, assert_reloads, differing, right, trained
from torch import nn

from d3_hf.defenses.anp import ANPConfig, ANPTrainer, uniform_noise

SAMPLES = tiny_samples(40)


def trainer_of(folder, make=tiny_resnet, model=None, **options):
    args = ANPConfig(str(folder), **(dict(max_steps=12, learning_rate=0.2, max_validation_drop=0.3) | QUIET | options))
    return ANPTrainer(model or trained(make), args, SAMPLES)


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def with_scales(model, masks, noise):
    """A copy whose scales are (m + delta) gamma and whose shifts are (1 + xi) beta."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in layers(model).items():
            for channel in range(len(layer.weight)):
                layer.weight[channel] *= masks[name][channel] + noise[name][0][channel]
                layer.bias[channel] *= 1 + noise[name][1][channel]
    return model


def cross_entropy(model, batch):
    return F.cross_entropy(model.train()(pixel_values=batch["pixel_values"]).logits, batch["labels"])


@pytest.mark.parametrize("steps", [1, 3])
def test_loss_is_the_min_max_objective(tmp_path, steps):
    trainer = trainer_of(tmp_path, anp_steps=steps, anp_alpha=0.3)
    victim = trained(tiny_resnet)
    trainer.start()
    batch = next(trainer.tune_batches(0))
    generator = torch.Generator().manual_seed(7)
    masks = {n: torch.rand(len(m.weight), generator=generator).requires_grad_() for n, m in layers(victim).items()}
    loss = trainer.mask_loss(masks, batch)

    start = uniform_noise(trainer.scales, 0.4, torch.Generator().manual_seed(trainer.args.seed))
    noise = {name: [tensor.clone() for tensor in pair] for name, pair in start.items()}
    for _ in range(steps):
        noisy = with_scales(victim, masks, noise)
        cross_entropy(noisy, batch).backward()
        for name, layer in layers(noisy).items():  # d loss / d delta = gamma d loss / d scale
            own = layers(victim)[name]
            noise[name][0] += 0.4 / steps * (own.weight.detach() * layer.weight.grad).sign()
            noise[name][1] += 0.4 / steps * (own.bias.detach() * layer.bias.grad).sign()
    silent = {name: [0 * t for t in pair] for name, pair in noise.items()}
    clean, noisy = with_scales(victim, masks, silent), with_scales(victim, masks, noise)
    parts = [cross_entropy(clean, batch), cross_entropy(noisy, batch)]
    assert loss.item() == pytest.approx((0.3 * parts[0] + 0.7 * parts[1]).item(), rel=1e-4)
    assert parts[1] > parts[0]
    (0.3 * parts[0] + 0.7 * parts[1]).backward()
    loss.backward()
    for name, mask in masks.items():
        slope = layers(victim)[name].weight.detach() * (layers(clean)[name].weight.grad + layers(noisy)[name].weight.grad)
        torch.testing.assert_close(mask.grad, slope, rtol=1e-3, atol=1e-5)


def test_noise_is_uniform_in_its_range():
    noise = uniform_noise({"bn": (torch.ones(4000), torch.ones(4000))}, 0.4, torch.Generator().manual_seed(0))
    for tensor in noise["bn"]:
        assert tensor.abs().max() <= 0.4 and abs(tensor.mean()) < 0.02 and tensor.std().item() == pytest.approx(0.231, abs=0.01)


def test_threshold_is_the_largest_that_accuracy_allows_and_only_scales_change(tmp_path):
    trainer, victim = trainer_of(tmp_path), trained(tiny_resnet)
    found = {}
    agree = trainer.agree
    trainer.agree = lambda data: found.update(data) or data if isinstance(data, dict) else agree(data)
    state = torch.get_rng_state()
    output = trainer.train()
    assert torch.equal(torch.get_rng_state(), state)
    assert output.global_step == 12 and output.training_loss > 0 and output.metrics["train_runtime"] > 0
    assert all(0 <= mask.min() and mask.max() <= 1 for mask in found.values())
    silent = {name: (torch.zeros(8), torch.zeros(8)) for name in found}

    def pruned(threshold):
        return with_scales(victim, {name: (mask > threshold).float() for name, mask in found.items()}, silent)

    before, best = right(victim, trainer.validate), None
    for step in range(19):
        prunes = any((mask <= step / 20).any() for mask in found.values())
        if prunes and right(pruned(step / 20), trainer.validate) >= 0.7 * before:
            best = step / 20
    facts = trainer.facts()["pruning"]
    assert facts["threshold"] == best and facts["neurons"] == 8 * len(found)
    assert facts["pruned"] == sum(int((mask <= best).sum()) for mask in found.values()) > 0
    assert differing(trainer.model, pruned(best)) == []
    changed = differing(trainer.model, victim)
    assert changed and set(changed) <= {f"{name}.weight" for name in found}
    assert facts["validation_accuracy_after"] == right(trainer.model, trainer.validate)
    assert_reloads(trainer, tmp_path)


def test_no_weight_is_left_with_a_gradient(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    assert [name for name, p in trainer.model.named_parameters() if p.grad is not None] == []


@pytest.mark.parametrize(
    ("accuracies", "threshold", "pruned"),
    [
        ([1.0, 0.9, 0.8, 0.69], 0.45, 2),  # the third neuron, 0.5, costs too much: the last threshold below it
        ([1.0, 0.9, 0.6, 0.99], 0.9, 3),  # whatever the second neuron costs by itself
        ([1.0, 0.6, 0.8, 0.6], 0.45, 2),
        ([1.0, 0.9, 0.8, 0.7], 0.9, 3),
    ],
)
def test_threshold_is_the_largest_tolerable_one(tmp_path, monkeypatch, accuracies, threshold, pruned):
    trainer = trainer_of(tmp_path)
    trainer.scales = {"bn": (torch.ones(4), torch.ones(4))}
    found = iter(accuracies)
    monkeypatch.setattr(ANPTrainer, "accuracy", lambda self, rows, tensors=None: next(found))
    facts = trainer.choose_threshold({"bn": torch.tensor([0.1, 0.3, 0.5, 1.0])})
    assert (facts["threshold"], facts["pruned"]) == (threshold, pruned)


def test_running_statistics_are_used_on_request_and_never_changed(tmp_path):
    trainer = trainer_of(tmp_path, batch_norm="eval")
    (batch,) = trainer.images_at([0, 1, 2])
    trained_mode, own = trainer.training_logits_with({}, batch), trainer.model.eval()(pixel_values=batch["pixel_values"]).logits
    torch.testing.assert_close(trained_mode, own)
    assert not torch.allclose(trainer_of(tmp_path).training_logits_with({}, batch), own, atol=1e-3)


def test_a_layer_that_the_network_does_not_use_stays(tmp_path):
    model = trained(tiny_resnet)
    model.unused = nn.BatchNorm2d(8)
    trainer = trainer_of(tmp_path, model=model)
    trainer.train()
    assert trainer.found["pruned"] and torch.equal(model.unused.weight, torch.ones(8))


def test_nothing_to_prune_is_an_error(tmp_path):
    trainer = trainer_of(tmp_path, learning_rate=1e-9, max_steps=1)
    with pytest.raises(RuntimeError, match=r"ANP found nothing to prune within max_validation_drop=0.3 \(lowest mask 1.00"):
        trainer.train()
    assert differing(trainer.model, trained(tiny_resnet)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(make=tiny_vit), "ANP masks the scales of BatchNorm channels, and ViTForImageClassification has no BatchNorm"),
        (dict(fp16=True), "fp16 needs a loss scaler"),
        (dict(activation_checkpointing=True), "activation checkpointing would recompute"),
        (dict(gradient_accumulation_steps=2), "leave gradient_accumulation_steps at 1"),
    ],
)
def test_refusals(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **options)


def test_resuming_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ANP writes no checkpoints to resume from"):
        trainer_of(tmp_path).train(resume_from_checkpoint="folder")
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match="ANP writes no checkpoints to resume from"):
        trainer_of(tmp_path).train(resume_from_checkpoint="true")


@pytest.mark.parametrize("asked", [None, False, "false", "true"])  # the last where there is nothing to go on from
def test_not_resuming_is_not_refused(tmp_path, asked):
    trainer = trainer_of(tmp_path)
    trainer.train(resume_from_checkpoint=asked)
    assert differing(trainer.model, trained(tiny_resnet))
