"""The active set: the dense step's weights and log, from the images above epsilon alone."""

import pytest
import torch
import torch.nn.functional as F
from tiny import SGD, tiny_resnet, tiny_samples, tiny_timm_vit, tiny_vit

from d3_hf.benchmark.meters import PassMeter
from d3_hf.defenses.d3.active_set import forward_active
from d3_hf.defenses.d3.trainer import D3Config, D3Trainer
from d3_hf.training.state import read_state

LOGGED = ("objective", "clean_loss", "active_fraction", "distance")


class Watched(D3Trainer):
    """Notes each micro-batch's active images, each pass's (images, with graph), and the gradients of each step."""

    def __init__(self, model, *arguments):
        super().__init__(model, *arguments)
        self.active, self.passes, self.gradients = [], [], []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, arguments, options):
        self.passes.append((len(options["pixel_values"]), torch.is_grad_enabled()))

    def sample_loss(self, cross_entropy):
        self.active.append((cross_entropy > self.epsilon).sum().item())
        return super().sample_loss(cross_entropy)

    def optimizer_step(self):
        self.gradients.append({name: p.grad is not None for name, p in self.model.named_parameters()})
        super().optimizer_step()


def build(folder, model, count=22, **options):
    common = dict(
        per_device_train_batch_size=4, max_steps=12, logging_steps=1, disable_tqdm=True, use_cpu=True, epsilon=1.1,
        learning_rate=0.01, weight_decay=0.1, target_modules="all-linear", warm_start="near", overwrite_output_dir=True,
        lambda_clean=4.0, sam_rho=0.0,
    )  # fmt: skip
    return Watched(model, D3Config(str(folder), **(common | SGD | options)), tiny_samples(count))


def trained(*arguments, **options):
    trainer = build(*arguments, **options)
    trainer.train()
    return trainer


def assert_same(one, other, tolerance=0.0):
    for (name, got), want in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def padded(model):
    """A parameter that the network does not use: its gradient stays None, and no weight decay touches it."""
    model.unused = torch.nn.Parameter(torch.ones(3))
    return model


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny_vit, {}),
        (tiny_timm_vit, {}),
        (tiny_vit, {"epsilon": 50.0}),  # no image is active
        (lambda: padded(tiny_vit()), {"epsilon": 50.0}),
        (tiny_vit, {"warm_start": "random", "target_modules": "head"}),
    ],
    ids=["vit", "timm", "inactive", "unused", "head"],
)
def test_equals_the_dense_run(tmp_path, make, accumulation, options):
    options = dict(gradient_accumulation_steps=accumulation, max_steps=8) | options
    active, dense = (trained(tmp_path, make(), active_set=on, **options) for on in (None, False))
    assert {graph for _, graph in active.passes} == {True, False} and all(graph for _, graph in dense.passes)
    assert_same(active, dense, 1e-5)
    assert active.gradients == dense.gradients
    for ours, theirs in zip(active.state.log_history[:8], dense.state.log_history[:8], strict=True):
        assert [ours[key] for key in LOGGED] == pytest.approx([theirs[key] for key in LOGGED], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("make", "epsilon"), [(tiny_vit, 1.1), (tiny_timm_vit, 1.1), (tiny_vit, 50.0)])
def test_only_active_images_have_a_graph(tmp_path, make, epsilon):
    trainer = build(tmp_path, make(), epsilon=epsilon)
    meter = PassMeter()
    with meter.counting(trainer.model):
        trainer.train()
    passes, window, share, sparse = iter(trainer.passes), iter(trainer.active), 1.0, 0
    for step in range(12):
        images = 2 if step % 6 == 5 else 4  # the epoch's last micro-batch
        active = next(window)
        if share < 2 / 3:
            assert next(passes) == (images, False)
            assert not active or next(passes) == (active, True)
            sparse += 1
        else:
            assert next(passes) == (images, True)
        share = active / images
    assert next(passes, None) is None and sparse > 3 and trainer.active_set.share == share
    assert (sum(trainer.active) > 0) == (epsilon < 50)
    assert meter.forward == sum(count for count, _ in trainer.passes)
    assert meter.backward == sum(count for count, graph in trainer.passes if graph)


def test_forward_active_has_the_gradient_of_the_hinge():
    model, other = tiny_vit(), tiny_vit()
    pixels = torch.stack([sample["pixel_values"] for sample in tiny_samples(6)])
    labels = torch.tensor([sample["labels"] for sample in tiny_samples(6)])
    losses = F.cross_entropy(other(pixel_values=pixels).logits, labels, reduction="none")
    epsilon = losses.sort().values[2:4].mean().item()
    sum(max(loss - epsilon, loss * 0) for loss in losses).backward()
    logits = forward_active(model, model, labels, epsilon, pixel_values=pixels).logits
    F.relu(F.cross_entropy(logits, labels, reduction="none") - epsilon).sum().backward()
    for got, want in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-6)


def test_a_wrapper_is_run_also_without_active_images():
    plain = tiny_vit()
    pixels, labels = torch.stack([sample["pixel_values"] for sample in tiny_samples(3)]), torch.tensor([0, 1, 2])
    logits = forward_active(lambda **inputs: plain(**inputs), plain, labels, 50.0, pixel_values=pixels).logits
    F.relu(F.cross_entropy(logits, labels, reduction="none") - 50).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in plain.parameters())


def test_bf16(tmp_path):
    active, dense = (trained(tmp_path, tiny_vit(), active_set=on, bf16=True) for on in (True, False))
    assert (2, True) in active.passes[3:] or (1, True) in active.passes[3:]
    start = build(tmp_path, tiny_vit(), bf16=True).model.state_dict()
    for (name, got), want in zip(active.model.state_dict().items(), dense.model.state_dict().values(), strict=True):
        assert (got - want).norm() <= 0.05 * (want - start[name]).norm(), name


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_takes_the_same_kind_of_step(tmp_path, accumulation):
    options = dict(save_strategy="steps", save_steps=4, gradient_accumulation_steps=accumulation, epsilon=0.9)
    whole = trained(tmp_path / "whole", tiny_vit(), **options)
    for step in (4, 8):
        resumed = build(tmp_path / "resumed", tiny_vit(), **options)
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert_same(resumed, whole)
        assert whole.passes[-len(resumed.passes) :] == resumed.passes
        assert read_state(checkpoint)["active_share"] <= 1


def test_a_second_training_decides_anew(tmp_path):
    trainer = trained(tmp_path, tiny_vit(), max_steps=3, epsilon=50.0)
    trainer.passes.clear()
    trainer.train()
    assert trainer.passes == [(4, True), (4, False), (4, False)]


def with_dropout(rate=0.1):
    model = tiny_vit()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate
    return model


def with_drawn_attention():
    model = tiny_vit()  # its attention drops out by a function, no module
    for layer in model.vit.layers:
        layer.attention.dropout_prob = layer.attention.attention_dropout = 0.1
    return model


def with_coupling():
    model = tiny_vit()
    model.vit.layernorm.register_forward_hook(lambda module, inputs, output: output - output.mean(0))
    return model


def with_statistics():
    model = tiny_vit()
    model.vit.layernorm.register_buffer("seen", torch.zeros(()))
    model.vit.layernorm.register_forward_hook(lambda module, inputs, output: module.seen.add_(1) and None)
    return model


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (tiny_vit, {"hinge": "batch"}, "the batch hinge"),
        (tiny_vit, {"dual_rate": 0.1}, "the Lagrangian"),
        (tiny_vit, {"distillation": 0.1}, "distillation and the distance of features have a gradient for every image"),
        (tiny_vit, {"activation_checkpointing": True}, "activation checkpointing"),
        (tiny_vit, {"torch_compile": True}, "torch.compile would compile anew"),
        (tiny_vit, {"sam_rho": 1.0}, "SAM looks for the highest loss of all images"),
        (tiny_resnet, {}, "BatchNorm couples the images of a batch: set batch_norm to eval or frozen"),
        (with_dropout, {}, "draws random numbers"),
        (with_drawn_attention, {}, "draws random numbers"),
        (with_coupling, {}, "couple the images of a batch or keep statistics"),
        (with_statistics, {}, "couple the images of a batch or keep statistics"),
    ],
)
def test_what_is_not_exact_is_refused_or_dense(tmp_path, monkeypatch, make, options, reason):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # TrainingArguments would leave it set
    with pytest.raises(ValueError, match=f"active_set does not fit: .*{reason}"):
        build(tmp_path, make(), active_set=True, **options)
    states = []
    for on in (None, False):
        trainer = build(tmp_path, make(), active_set=on, **options)
        assert trainer.active_set is None
        modes = [module.training for module in trainer.model.modules()]
        states.append([torch.get_rng_state().tolist(), modes, [buffer.tolist() for buffer in trainer.model.buffers()]])
    assert states[0] == states[1]


@pytest.mark.parametrize("make", [tiny_resnet, with_dropout, with_statistics])
def test_where_it_is_not_exact_the_run_is_the_dense_one(tmp_path, make):
    silent, dense = (trained(tmp_path, make(), active_set=on) for on in (None, False))
    assert_same(silent, dense)
    assert silent.passes == dense.passes and all(graph for _, graph in silent.passes)


@pytest.mark.parametrize("policy", ["eval", "frozen"])
def test_batch_norm_that_keeps_its_statistics_is_exact(tmp_path, policy):
    active, dense = (trained(tmp_path, tiny_resnet(), active_set=on, batch_norm=policy, epsilon=1.05) for on in (True, False))
    assert_same(active, dense, 1e-5)
    assert any(not graph for _, graph in active.passes) and any(count in (1, 2, 3) and graph for count, graph in active.passes)
