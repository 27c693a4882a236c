"""TSC: the curve and its gradient against autograd, each stage, the schedule, resuming, refusals."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_resnet, tiny_samples, tiny_timm_vit, tiny_vit
from torch.func import functional_call
from transformers import TrainerCallback

from d3_hf.defenses.tsc import trainer as tsc
from d3_hf.defenses.tsc.curve import bezier, control_share
from d3_hf.defenses.tsc.trainer import TSCConfig, TSCTrainer

MODELS = [tiny_vit, tiny_resnet, tiny_timm_vit]


def config(folder, **options):
    defaults = dict(rounds=2, curve_epochs=2, finetune_epochs=1, per_device_train_batch_size=4, learning_rate=0.05)
    quiet = dict(output_dir=str(folder), disable_tqdm=True, use_cpu=True, logging_steps=1)
    return TSCConfig(**(defaults | quiet | options))


class Recorder(TSCTrainer):
    """Records the curves as they begin, and what reaches the optimizer."""

    def announce(self, resumed):
        super().announce(resumed)
        self.curves, self.updates, self.batches = [], [], []

    def finish(self):
        self.last = copy.deepcopy(self.model.state_dict())
        super().finish()

    def enter_stage(self, epoch):
        before = self.stage
        super().enter_stage(epoch)
        if self.stage != before and self.curve is not None:
            self.curves.append((self.curve.start, self.curve.end))

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches.append(dict(inputs))
        return super().training_step(model, inputs, num_items_in_batch)

    def finish_gradient(self, window_loss):
        objective = super().finish_gradient(window_loss)
        values = {n: (p.detach().clone(), p.grad.clone()) for n, p in self.model.named_parameters()}
        self.updates.append((self.state.global_step, values))
        return objective


def logits(model, state):
    with torch.no_grad():
        pixels = torch.stack([sample["pixel_values"] for sample in tiny_samples(8, seed=9)])
        return functional_call(model.eval(), state, kwargs={"pixel_values": pixels}).logits


def test_bezier_is_the_sum_of_bernstein_polynomials():
    a, m, b = (list(torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(s))) for s in range(3))
    for t in (0.0, 0.3, 1.0):
        for found, *points in zip(bezier(t, a, m, b), a, m, b, strict=True):
            terms = [c * t**i * (1 - t) ** (2 - i) for i, c in enumerate((1, 2, 1))]
            expected = sum(c * point for c, point in zip(terms, points, strict=True))
            torch.testing.assert_close(found, expected)
    m = torch.ones(1, requires_grad=True)
    (0.49 * a[0].sum() + 0.42 * m).backward()
    assert control_share(0.3) == pytest.approx(m.grad.item())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradient_of_the_control_point_equals_autograd(tmp_path, accumulation):
    args = config(tmp_path, rounds=1, curve_decay=0.1, gradient_accumulation_steps=accumulation, curve_epochs=1)
    model = tiny_vit()
    trainer = Recorder(model, args, tiny_samples(8))
    trainer.train()
    per_curve = 2 // accumulation
    for i, (step, values) in enumerate(trainer.updates):
        t = np.random.default_rng([args.seed, step]).random()
        start, end = trainer.curves[i // per_curve]
        control = {n: value.clone().requires_grad_() for n, (value, _) in values.items()}
        if i % per_curve == 0:
            assert all(torch.allclose(control[n], (start[n] + end[n]) / 2, atol=1e-7) for n in control)
        point = {n: (1 - t) ** 2 * start[n] + 2 * t * (1 - t) * control[n] + t**2 * end[n] for n in control}
        batches = trainer.batches[i * accumulation : (i + 1) * accumulation]
        pixels, labels = (torch.cat([batch[key] for batch in batches]) for key in ("pixel_values", "labels"))
        loss = F.cross_entropy(functional_call(model, point, kwargs={"pixel_values": pixels}).logits, labels)
        objective = loss + 0.05 * sum(p.square().sum() for p in point.values())
        objective.backward()
        assert trainer.state.log_history[i]["objective"] == pytest.approx(objective.item(), rel=1e-3)
        for name, (_, gradient) in values.items():
            torch.testing.assert_close(gradient, control[name].grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("make", MODELS)
def test_stages(tmp_path, make):
    model = make()
    trainer = Recorder(model, config(tmp_path), tiny_samples())
    victim, keys = copy.deepcopy(model.state_dict()), model.state_dict().keys()
    trainer.train()
    assert [stage["stage"] for stage in trainer.history] == ["amplify", "recover"] * 2
    (start, far), (aligned, amplified), (second, _), _ = trainer.curves
    for name, tensor in victim.items():
        torch.testing.assert_close(start[name], tensor, rtol=0, atol=0)
    expected = logits(model, victim)
    for copied in (far, aligned):  # other weights, the same function
        assert not all(torch.equal(copied[n], victim[n]) for n in victim)
        torch.testing.assert_close(logits(model, copied), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(model, amplified), expected, atol=1e-3)
    assert not torch.allclose(logits(model, second), logits(model, amplified), atol=1e-3)
    low, high = (stage["correlation"] for stage in trainer.history[:2])
    assert low < 0 < high
    trainer.save_model()
    reloaded = type(model).from_pretrained(tmp_path)
    assert reloaded.state_dict().keys() == keys
    torch.testing.assert_close(logits(reloaded, reloaded.state_dict()), logits(model, model.state_dict()))
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert not any(m._forward_hooks for m in model.modules())
    facts = trainer.facts()
    assert facts["arguments"]["num_train_epochs"] == 9 and facts["unit_groups"] and facts["stages"] == trainer.history


def test_the_point_and_its_batch_norm_statistics(tmp_path):
    """The final weights are gamma(t*) of the last curve; the statistics are means over images at these very weights."""
    model = tiny_resnet()
    trainer = Recorder(model, config(tmp_path, rounds=1, curve_position=0.3), tiny_samples(10))
    trainer.train()
    start, end = trainer.curves[-1]
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.data, 0.49 * start[name] + 0.42 * trainer.last[name] + 0.09 * end[name])
    bn = model.resnet.embedder.embedder.normalization
    inputs = []
    hook = bn.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    pixels = torch.stack([sample["pixel_values"] for sample in tiny_samples(10)])
    with torch.no_grad():
        for batch in pixels.split(4):
            model.eval()(pixel_values=batch)
    hook.remove()
    weighed = [len(x) / 10 for x in inputs]  # 4, 4 and 2 of ten images
    torch.testing.assert_close(bn.running_mean, sum(w * x.mean((0, 2, 3)) for w, x in zip(weighed, inputs, strict=True)))
    torch.testing.assert_close(bn.running_var, sum(w * x.var((0, 2, 3)) for w, x in zip(weighed, inputs, strict=True)))
    assert bn.momentum == 0.1


def test_schedule(tmp_path):
    def reference(length, period, rate):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, period)
        for _ in range(length):
            yield scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()

    for period in (None, 5):
        args = config(tmp_path, curve_epochs=10, finetune_epochs=3, curve_period=period)
        trainer = TSCTrainer(tiny_vit(), args, tiny_samples())
        curves = list(reference(10, period or 10, 0.05)) * 2
        expected = curves + list(reference(3, 3, 1e-4)) + curves
        assert [0.05 * trainer.rate(epoch) for epoch in range(43)] == pytest.approx(expected, abs=1e-9)
    default = TSCConfig(output_dir=str(tmp_path), use_cpu=True)
    assert default.num_train_epochs == 3 * 2 * 200 + 2 * 10
    assert [kind for kind, _ in default.stages()] == (["amplify", "recover", "fine-tune"] * 3)[:-1]


def test_resuming_gives_the_same_weights(tmp_path):
    """From the middle and the last step of a curve, from fine-tuning, and after the last step of all."""
    whole = tiny_resnet()
    TSCTrainer(whole, config(tmp_path, save_strategy="steps", save_steps=2), tiny_samples()).train()
    for step in (8, 14, 18, 36):  # 4 steps an epoch: curves end at 8 and 16, fine-tuning at 20
        model = tiny_resnet()
        TSCTrainer(model, config(tmp_path), tiny_samples()).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        for name, tensor in whole.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 3}, "max_steps must be left alone"),
        ({"warmup_steps": 3}, "warmup_steps must be 0"),
        ({"eval_strategy": "epoch"}, "eval_strategy must be no"),
        ({"num_train_epochs": 15}, "num_train_epochs follows from"),
    ],
)
def test_refused_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_refused_models(tmp_path):
    frozen = tiny_vit()
    frozen.vit.embeddings.requires_grad_(False)
    with pytest.raises(ValueError, match="and frozen"):
        TSCTrainer(frozen, config(tmp_path), tiny_samples())
    with pytest.raises(ValueError, match="in float32: .* is torch.bfloat16;"):
        TSCTrainer(tiny_vit().bfloat16(), config(tmp_path), tiny_samples())


def test_a_run_cut_short_or_without_effect_raises(tmp_path, monkeypatch):
    class Stop(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    with pytest.raises(RuntimeError, match="stopped in stage 1 of 5: the model is not purified"):
        TSCTrainer(tiny_vit(), config(tmp_path), tiny_samples(), callbacks=[Stop()]).train()
    stay = lambda structure, *_, **__: [[torch.arange(p.shape[0] * p.shape[1]) for p in g.parts] for g in structure.groups]  # noqa: E731
    monkeypatch.setattr(tsc, "match", stay)
    with pytest.raises(RuntimeError, match="the model is not purified"):
        TSCTrainer(tiny_vit(), config(tmp_path, learning_rate=1e-20, finetune_learning_rate=1e-20), tiny_samples()).train()
