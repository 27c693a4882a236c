"""TSC for encoders: permuted encoders return the same, a curve's gradient against autograd, stages, small sets, refusals."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import colours, tiny_clip, tiny_dinov2, tiny_module, tiny_resnet, tiny_timm, tiny_vit
from torch.func import functional_call
from transformers import AutoModel, TimmWrapperConfig, TimmWrapperModel

from d3_hf.data.views import view
from d3_hf.defenses import defence
from d3_hf.defenses.encoders.encoder_tsc import EncoderTSCConfig, EncoderTSCTrainer
from d3_hf.defenses.tsc.permutation import find_structure, permute, random_orders
from d3_hf.defenses.tsc.trainer import TSCTrainer
from d3_hf.models.batch_norm import batch_norms
from d3_hf.models.kinds import encode

QUICK = dict(rounds=2, curve_epochs=2, finetune_epochs=1, per_device_train_batch_size=10, learning_rate=1e-3)
QUIET = dict(disable_tqdm=True, use_cpu=True, logging_steps=1)


def build(folder, make=tiny_dinov2, images=20, kind=EncoderTSCTrainer, **options):
    args = EncoderTSCConfig(str(folder), **(QUICK | QUIET | options))
    return kind(make(), args, colours(images))


class Recorder(EncoderTSCTrainer):
    """Records the curves as they begin, what was trained on, what reaches the optimizer, and the last control point."""

    def begin(self, resumed):
        self.curves, self.batches, self.updates = [], [], []
        super().begin(resumed)

    def enter_stage(self, epoch):
        before = self.stage
        super().enter_stage(epoch)
        if self.stage != before and self.curve is not None:
            self.curves.append((self.curve.start, self.curve.end))

    def training_batch(self, inputs):
        inputs = super().training_batch(inputs)
        self.batches.append(inputs["pixel_values"])
        return inputs

    def finish_gradient(self, window_loss):
        objective = super().finish_gradient(window_loss)
        parameters = self.model.named_parameters()
        values = {name: (p.detach().clone(), None if p.grad is None else p.grad.clone()) for name, p in parameters}
        self.updates.append((self.state.global_step, values))
        return objective

    def finish(self):
        self.last = copy.deepcopy(self.model.state_dict())
        super().finish()


def resnet18(seed=0):
    torch.manual_seed(seed)
    config = TimmWrapperConfig(architecture="resnet18", num_labels=0)
    return TimmWrapperModel(config)


def randomised(make):
    """Weights that make every exchange visible: new BatchNorms and biases are all alike."""
    model, generator = make().eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim <= 1:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model


def outputs(model, state, pixels):
    with torch.no_grad():
        return functional_call(model, state, kwargs={"pixel_values": pixels}).to_tuple()


def slow_nt_xent(features, temperature):
    views, count = F.normalize(features, dim=1), len(features)
    losses = []
    for i in range(count):
        scores = torch.stack([views[i] @ views[j] / temperature for j in range(count) if j != i])
        losses.append(scores.logsumexp(0) - views[i] @ views[(i + count // 2) % count] / temperature)
    return torch.stack(losses)


# Permutations ----------------------------------------------------------------------------------------------------------


def block(units):
    """Two heads of eight query and key and eight value dimensions, and the neurons of an MLP."""
    return [[(2, 8), (2, 8)], [(1, units)]]


ENCODERS = {
    "dinov2": (tiny_dinov2, 16, block(64) * 2),
    "vit": (tiny_vit, 16, block(32) * 2),
    "clip": (tiny_clip, 16, block(32) * 2),
    "timm": (tiny_timm, 16, block(64)),
    "resnet": (tiny_resnet, 16, [[(1, 8)], [(1, 8)], [(1, 16)]]),
    # Three streams and eight inner groups: the fourth stream is what the encoder returns.
    "resnet18": (resnet18, 32, [[(1, c)] for c in (64, 64, 64, 128, 128, 128, 256, 256, 256, 512, 512)]),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_permuted_encoder_returns_the_same(name):
    make, size, expected = ENCODERS[name]
    model = randomised(make)
    structure = find_structure(model, (size, size))
    assert [[part.shape for part in group.parts] for group in structure.groups] == expected and not structure.fixed
    state = model.state_dict()
    permuted = permute(state, structure, random_orders(structure, torch.Generator().manual_seed(3)))
    places = {place for group in structure.groups for part in group.parts for place in part.indices}
    assert places and all(not torch.equal(permuted[name], state[name]) for name, _ in places)
    pixels = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(2))
    for before, after in zip(outputs(model, state, pixels), outputs(model, permuted, pixels), strict=True):
        assert (after - before).abs().max() < 1e-4 * max(1, before.abs().max())


def test_the_last_stream_of_a_cnn_stays_and_with_it_what_a_head_reads():
    structure = find_structure(tiny_resnet(), (16, 16))
    places = {place for group in structure.groups for part in group.parts for place in part.indices}
    last = "encoder.stages.1.layers.0.layer.1.convolution.weight"
    assert (last, 1) in places and (last, 0) not in places


def test_an_encoder_whose_units_are_all_returned_is_refused(tmp_path):
    with pytest.raises(ValueError, match="WrappedEncoder: no hidden units may be exchanged .all are what it returns"):
        build(tmp_path, tiny_module)


# Curves ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradient_of_the_control_point_equals_autograd_with_both_views_at_one_t(tmp_path, accumulation):
    options = dict(rounds=1, curve_epochs=1, curve_decay=0.1, temperature=0.3, per_device_train_batch_size=4)
    run = build(tmp_path, images=8, kind=Recorder, gradient_accumulation_steps=accumulation, **options)
    run.train()
    per_curve = 2 // accumulation
    assert len(run.updates) == 2 * per_curve and all(len(batch) == 8 for batch in run.batches)
    for i, (step, values) in enumerate(run.updates):
        t = np.random.default_rng([run.args.seed, step]).random()
        start, end = run.curves[i // per_curve]
        control = {name: value.clone().requires_grad_() for name, (value, _) in values.items()}
        if i % per_curve == 0:
            assert all(torch.allclose(control[name], (start[name] + end[name]) / 2, atol=1e-7) for name in control)
        point = {n: (1 - t) ** 2 * start[n] + 2 * t * (1 - t) * control[n] + t**2 * end[n] for n in control}
        batches = run.batches[i * accumulation : (i + 1) * accumulation]
        features = [functional_call(run.model.train(), point, kwargs={"pixel_values": b}).pooler_output for b in batches]
        loss = torch.cat([slow_nt_xent(f, 0.3) for f in features]).mean()
        objective = loss + 0.05 * sum(p.square().sum() for p in point.values())
        objective.backward()
        assert run.state.log_history[i]["objective"] == pytest.approx(objective.item(), rel=1e-3)
        for name, (_, gradient) in values.items():
            if gradient is not None:
                torch.testing.assert_close(gradient, control[name].grad, rtol=1e-3, atol=1e-5)
    assert sum(gradient is None for _, gradient in values.values()) == 1  # of the token that stands for masked patches


def test_stages_and_the_encoder_that_is_saved(tmp_path):
    run = build(tmp_path, kind=Recorder)
    suspicious = copy.deepcopy(run.model.state_dict())
    run.train()
    assert [stage["stage"] for stage in run.history] == ["amplify", "recover"] * 2
    (start, far), (aligned, first), (second, _), (_, _) = run.curves
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    model, expected = run.model.eval(), outputs(run.model.eval(), suspicious, pixels)
    assert all(torch.equal(start[name], tensor) for name, tensor in suspicious.items())
    for copied in (far, aligned):  # other weights, the same features
        assert not all(torch.equal(copied[name], suspicious[name]) for name in suspicious)
        for found, wanted in zip(outputs(model, copied, pixels), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    low, high = (stage["correlation"] for stage in run.history[:2])
    assert low < 0 < high
    for state, other in ((first, suspicious), (second, first)):
        assert not torch.allclose(outputs(model, state, pixels)[1], outputs(model, other, pixels)[1], atol=1e-3)
    start, end = run.curves[-1]
    for name, weight in run.model.named_parameters():
        expected = 0.75**2 * start[name] + 2 * 0.25 * 0.75 * run.last[name] + 0.25**2 * end[name]
        torch.testing.assert_close(weight.data, expected)
    run.save_model()
    reloaded = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(reloaded.state_dict()[name], tensor) for name, tensor in run.model.state_dict().items())
    torch.testing.assert_close(encode(reloaded, pixels), encode(run.model, pixels))
    facts = run.facts()
    assert facts["kind"] == "encoder" and facts["unit_groups"] == 4 and facts["stages"] == run.history
    assert facts["arguments"]["num_train_epochs"] == 9 and {"pretraining_loss", "objective"} <= run.state.log_history[0].keys()


@pytest.mark.parametrize("make", [tiny_vit, tiny_clip, tiny_timm])
def test_other_encoders_train(make, tmp_path):
    run = build(tmp_path, make, rounds=1, curve_epochs=1)
    run.train()
    weights = run.model.state_dict()
    assert all(weight.isfinite().all() for weight in weights.values())
    assert not torch.equal(encode(run.model, torch.ones(1, 3, 16, 16)), encode(make().eval(), torch.ones(1, 3, 16, 16)))


def test_batch_norm_is_estimated_again_on_views(tmp_path):
    run = build(tmp_path, tiny_resnet, rounds=1, curve_epochs=1)
    run.train()
    norm, inputs = batch_norms(run.model)[0], []
    hook = norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    generator = torch.Generator().manual_seed(run.args.seed)
    with torch.no_grad():
        for images in run.train_dataset.images.split(10):
            encode(run.model.eval(), run.preprocessing.normalize(view(images, generator)))
    hook.remove()
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0))


@pytest.mark.parametrize("make", [tiny_dinov2, tiny_resnet])
def test_a_curve_steps_on_a_set_smaller_than_a_batch(make, tmp_path):
    run = build(tmp_path, make, images=5, kind=Recorder, rounds=1, curve_epochs=2, gradient_accumulation_steps=4)
    run.train()
    assert run.state.global_step == 4  # once an epoch
    for first, second in (run.updates[:2], run.updates[2:]):
        moved = [name for name, (value, gradient) in first[1].items() if not torch.equal(value, second[1][name][0])]
        assert len(moved) > len(first[1]) / 2


def test_a_run_resumed_in_a_curve_or_between_rounds_ends_as_the_uninterrupted_one(tmp_path):
    whole = build(tmp_path, tiny_resnet, save_strategy="steps", save_steps=3)
    whole.train()
    for step in (3, 9):  # 2 steps an epoch: curves end at 4 and 8, fine-tuning at 10
        resumed = build(tmp_path, tiny_resnet)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        for name, tensor in whole.model.state_dict().items():
            torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


# Options and refusals --------------------------------------------------------------------------------------------------


def test_the_rate_of_a_curve_follows_from_the_network(tmp_path):
    settled = [build(tmp_path, make, learning_rate=None).args for make in (tiny_resnet, tiny_dinov2)]
    assert [args.learning_rate for args in settled] == [2e-3, pytest.approx(1e-4 * 384 / 16)]
    assert all(args.optim == "adamw_torch" and args.optim_args is None and args.warmup_steps == 0 for args in settled)
    run = build(tmp_path, tiny_resnet, learning_rate=None)
    assert run.rate(0) == 1 and run.rate(4) * 2e-3 == pytest.approx(5e-5)  # 2 epochs each of two curves


def test_one_name_has_a_form_for_each_kind_of_model():
    assert defence("tsc")[1] is TSCTrainer and defence("tsc", of_encoders=True)[1] is EncoderTSCTrainer
    assert defence("par") == defence("par", of_encoders=True) and defence("nad") == defence("nad", of_encoders=True)


def test_refusals(tmp_path):
    for options, message in (
        ({"max_steps": 3}, "max_steps must be left alone"),
        ({"cutout": 2}, "cutout is for classifiers"),
        ({"batch_norm": "eval"}, "batch_norm must be one of train"),
    ):
        with pytest.raises(ValueError, match=message):
            build(tmp_path, **options)
    frozen = tiny_dinov2()
    frozen.layernorm.requires_grad_(False)
    with pytest.raises(ValueError, match="layernorm.weight is torch.float32 and frozen"):
        build(tmp_path, lambda: frozen)
