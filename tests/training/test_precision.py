"""Mixed precision, compilation and checkpointed activations change nothing of the method."""

import os
import shutil

import pytest
import torch
from tiny import SGD, tiny_samples, tiny_timm_vit, tiny_vit

from d3_hf.defenses.d3.trainer import D3Config, D3Trainer
from d3_hf.defenses.shared import geometry

STEPS = 4


def config(folder, **options):
    defaults = dict(
        per_device_train_batch_size=8, max_steps=STEPS, logging_steps=1, disable_tqdm=True, use_cpu=True, epsilon=0.5,
        learning_rate=0.01, target_modules="all-linear", warm_start="noise",
    )  # fmt: skip
    return D3Config(str(folder), **(defaults | SGD | options))


class Scaled(D3Trainer):
    """The loss scaler of fp16 on the CPU, where accelerate leaves it out; ``overflow``: steps with an inf gradient."""

    overflow: tuple[int, ...] = ()
    initial_scale = 1024.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.before, self.scales = [], []

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.initial_scale)

    def training_step(self, *args, **kwargs):
        objective = super().training_step(*args, **kwargs)
        if self.state.global_step in self.overflow:
            next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[0] = torch.inf
        return objective

    def finish_gradient(self, window_loss):
        self.before.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return super().finish_gradient(window_loss)

    def optimizer_step(self):
        super().optimizer_step()
        self.scales.append(self.accelerator.scaler.get_scale())


def trained(trainer):
    trainer.train()
    return trainer.model.state_dict()


@pytest.mark.parametrize("hinge", ["sample", "batch"])
@pytest.mark.parametrize("scale", [2.0, 1024.0])
def test_the_loss_scale_does_not_change_the_trajectory(tmp_path, hinge, scale, monkeypatch):
    monkeypatch.setattr(Scaled, "initial_scale", scale)
    plain = trained(D3Trainer(tiny_vit(), config(tmp_path / "plain", hinge=hinge), tiny_samples(32)))
    scaled = trained(Scaled(tiny_vit(), config(tmp_path / "scaled", hinge=hinge), tiny_samples(32)))
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch", "adamw_torch_fused"])
def test_an_infinite_gradient_leaves_the_weights_on_the_constraint(tmp_path, optim, monkeypatch):
    monkeypatch.setattr(Scaled, "overflow", (1,))
    options = {} if optim == "sgd" else {"optim_args": None}
    trainer = Scaled(tiny_vit(), config(tmp_path, optim=optim, **options), tiny_samples(32))
    trained(trainer)
    assert trainer.scales == [1024.0, 512.0, 512.0, 512.0]  # halved once, by the skipped step
    torch.testing.assert_close(trainer.before[2], trainer.before[1], rtol=1e-6, atol=1e-6)  # skipped; projected onto itself
    moved = max((trainer.before[3][name] - trainer.before[2][name]).abs().max() for name in trainer.before[2])
    assert moved > 1e-4
    torch.testing.assert_close(geometry.norms(trainer.weights()), trainer.radii, rtol=1e-5, atol=0)


def test_bf16_keeps_the_selected_weights_in_float32(tmp_path):
    plain = trained(D3Trainer(tiny_vit(), config(tmp_path / "plain"), tiny_samples(32)))
    trainer = D3Trainer(tiny_vit(), config(tmp_path / "bf16", bf16=True), tiny_samples(32))
    rounded = trained(trainer)
    assert {value.dtype for value in rounded.values()} == {torch.float32}
    assert any(not torch.equal(rounded[name], plain[name]) for name in plain)  # it did run in bf16
    torch.testing.assert_close(rounded, plain, rtol=0, atol=0.02)
    torch.testing.assert_close(geometry.norms(trainer.weights()), trainer.radii, rtol=1e-5, atol=0)


@pytest.mark.parametrize("make", [tiny_vit, tiny_timm_vit])
def test_checkpointed_activations_change_nothing(tmp_path, make):
    plain = trained(D3Trainer(make(), config(tmp_path / "plain"), tiny_samples(32)))
    trainer = D3Trainer(make(), config(tmp_path / "saved", activation_checkpointing=True), tiny_samples(32))
    forwards = []
    normalisation = next(m for m in trainer.model.modules() if isinstance(m, torch.nn.LayerNorm))
    normalisation.register_forward_hook(lambda *_: forwards.append(1))
    torch.testing.assert_close(trained(trainer), plain, rtol=1e-6, atol=1e-6)
    assert len(forwards) == 2 * STEPS  # the blocks ran a second time for their gradients


@pytest.mark.parametrize(
    ("hinge", "backend"),
    [("sample", "aot_eager"), ("batch", "aot_eager"), pytest.param("sample", "inductor", marks=pytest.mark.slow)],
)
def test_compiled_equals_eager(tmp_path, hinge, backend):
    if backend == "inductor" and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("inductor needs a C++ compiler")
    eager = trained(D3Trainer(tiny_vit(), config(tmp_path / "eager", hinge=hinge), tiny_samples(32)))
    trainer = D3Trainer(
        tiny_vit(),
        config(tmp_path / "compiled", hinge=hinge, torch_compile=True, torch_compile_backend=backend),
        tiny_samples(32),
    )
    compiled = trained(trainer)
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bf16", [True, False])
def test_attention_is_fused_except_in_bf16_on_a_cpu(tmp_path, bf16):
    trainer, fused = D3Trainer(tiny_vit(), config(tmp_path, bf16=bf16, max_steps=1), tiny_samples(16)), set()
    trainer.model.register_forward_hook(lambda *_: fused.add(torch.backends.cuda.flash_sdp_enabled()))
    trainer.train()
    assert fused == {not bf16}
    assert torch.backends.cuda.flash_sdp_enabled()
