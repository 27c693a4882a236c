"""TSBD: neuron weight changes, sub-weights, the choice of n, the gradient of the second stage."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import SGD, tiny_resnet, tiny_samples, tiny_timm_vit, tiny_vit
from tiny_trained import QUIET, assert_reloads, differing, right, trained

from d3_hf.defenses.tsbd import TSBDConfig, TSBDTrainer, ascend, neuron_weight_changes, neuron_weights, subweights
from d3_hf.models import new_model

SAMPLES = tiny_samples(40)


def trainer_of(folder, make=tiny_resnet, kind=TSBDTrainer, **options):
    defaults = dict(max_steps=3, unlearn_learning_rate=0.02, unlearn_epochs=60, unlearn_accuracy=0.3, max_validation_drop=0.5)
    return kind(trained(make), TSBDConfig(str(folder), **(defaults | QUIET | options)), SAMPLES)


def test_subweights_against_loops():
    generator = torch.Generator().manual_seed(0)
    changes = [torch.randn(6, 3, 2, 2, generator=generator), 2 * torch.randn(5, 7, generator=generator)]
    rows = [(layer, row) for layer, change in enumerate(changes) for row in range(len(change))]
    scores = [sum(abs(v) for v in changes[layer][row].flatten().tolist()) for layer, row in rows]
    assert neuron_weight_changes(changes).tolist() == pytest.approx(scores, rel=1e-5)
    for n, m in ((0.01, 1.0), (0.4, 0.7), (1.0, 0.3), (0.3, 0.01)):
        best = sorted(range(len(rows)), key=lambda i: -scores[i])[: max(1, round(n * len(rows)))]
        pool = [(abs(v), *rows[i], at) for i in best for at, v in enumerate(changes[rows[i][0]][rows[i][1]].flatten().tolist())]
        kept = {entry[1:] for entry in sorted(pool, reverse=True)[: max(1, round(m * len(pool)))]}
        found = set()
        for layer, mask in enumerate(subweights(changes, n, m)):
            found |= {(layer, row, at) for row, at in mask.flatten(1).nonzero().tolist()}
        assert found == kept


def test_neurons_by_architecture():
    resnet, vit, timm_vit = (list(neuron_weights(make(), (16, 16))) for make in (tiny_resnet, tiny_vit, tiny_timm_vit))
    assert "resnet.embedder.embedder.convolution.weight" in resnet and not any("shortcut" in name for name in resnet)
    assert all(tiny_resnet().get_parameter(name).ndim == 4 for name in resnet)
    wide = neuron_weights(
        new_model(["a", "b"], "wrn16_1_cifar", [0.5] * 3, [0.5] * 3), (32, 32)
    )  # the names are NAD's: convShortcut
    assert len(wide) == 13 and not any("shortcut" in name.lower() for name in wide)
    parts = ("attention.o_proj", "mlp.fc1", "mlp.fc2")
    assert vit == [f"vit.layers.{block}.{part}.weight" for block in (0, 1) for part in parts]
    parts = ("attn.proj", "mlp.fc1", "mlp.fc2")
    assert timm_vit == [f"timm_model.blocks.{block}.{part}.weight" for block in (0, 1) for part in parts]


def test_ascent_has_length_r_in_each_tensor():
    weights = {"a": torch.ones(3, 2), "b": torch.ones(4)}
    moved = ascend(weights, {"a": torch.full((3, 2), 5.0), "b": torch.zeros(4)}, 0.05)
    assert (moved["a"] - 1).norm().item() == pytest.approx(0.05, rel=1e-4) and torch.equal(moved["b"], torch.ones(4))


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
def test_n_is_the_largest_that_accuracy_allows_and_subweights_are_zero(tmp_path, make):
    trainer, victim = trainer_of(tmp_path, make, max_validation_drop=0.2), trained(make)
    changes, _ = trainer.weight_changes()
    assert differing(trainer.model, victim) == []
    names, best = list(trainer.neurons), None

    def zeroed(ratio):
        model = copy.deepcopy(victim)
        with torch.no_grad():
            for name, zero in zip(names, subweights(changes, ratio, 0.7), strict=True):
                model.get_parameter(name)[zero] = 0
        return model

    before = right(victim, trainer.validate)
    for ratio in trainer.args.neuron_ratios:
        if right(zeroed(ratio), trainer.validate) < 0.8 * before:
            break
        best = ratio
    state = torch.get_rng_state()
    trainer.start()
    assert torch.equal(torch.get_rng_state(), state)
    facts = trainer.facts()["reinitialised"]
    assert facts["neuron_ratio"] == best is not None
    assert differing(trainer.model, zeroed(best)) == []
    assert set(differing(trainer.model, victim)) <= set(names)
    assert facts["validation_accuracy_after"] == right(trainer.model, trainer.validate)
    assert 0 < facts["share_of_weights_zeroed"] <= 0.7 and facts["unlearning"]["accuracy"] <= facts["unlearning"]["level"] < 0.5


class Recorder(TSBDTrainer):
    """Keeps the start and the batches of the second stage, without the first."""

    def start(self):
        self.batches, self.began = [], copy.deepcopy(self.model)

    def announce(self, resumed):
        pass

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches.append(dict(inputs))
        return super().training_step(model, inputs, num_items_in_batch)


@pytest.mark.parametrize(("make", "accumulation"), [(tiny_resnet, 1), (tiny_vit, 1), (tiny_vit, 2)])
def test_step_mixes_the_gradients_here_and_uphill(tmp_path, make, accumulation):
    options = dict(max_steps=1, gradient_accumulation_steps=accumulation, gradient_radius=0.3, learning_rate=0.1) | SGD
    trainer = trainer_of(tmp_path, make, Recorder, **options)
    trainer.train()
    pixels, labels = (torch.cat([torch.as_tensor(b[k]) for b in trainer.batches]) for k in ("pixel_values", "labels"))
    assert len(labels) == 8 * accumulation

    def gradient(model):
        model.zero_grad()
        F.cross_entropy(model.train()(pixel_values=pixels).logits, labels).backward()
        return [p.grad.clone() for p in model.parameters()]

    here, uphill, expected = (copy.deepcopy(trainer.began) for _ in range(3))
    first = gradient(here)
    with torch.no_grad():
        for p, g in zip(uphill.parameters(), first, strict=True):
            if g.norm() > 0:
                p += 0.3 * g / g.norm()
    second = gradient(uphill)
    with torch.no_grad():
        for p, one, two in zip(expected.parameters(), first, second, strict=True):
            p -= 0.1 * (0.3 * one + 0.7 * two)
    for (name, got), want in zip(trainer.model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for (name, got), want in zip(trainer.model.named_buffers(), here.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")  # one pass, not two


def test_a_whole_run_saves_and_a_resumed_one_says_the_same(tmp_path):
    whole = trainer_of(tmp_path, tiny_timm_vit, max_steps=6, save_strategy="steps", save_steps=4)
    whole.train()
    assert_reloads(whole, tmp_path)
    resumed = trainer_of(tmp_path / "resumed", tiny_timm_vit, max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.facts()["reinitialised"] == whole.facts()["reinitialised"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            dict(unlearn_learning_rate=1e-9, unlearn_epochs=2),
            RuntimeError,
            "TSBD could not unlearn the clean task: .* after 2 epochs",
        ),
        (dict(max_validation_drop=0.0, neuron_ratios=[1.0], weight_ratio=1.0), RuntimeError, "TSBD: n = 1.0 already lowers"),
        (dict(fp16=True), ValueError, "fp16 needs a loss scaler"),
    ],
)
def test_refusals(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        trainer_of(tmp_path, **options).train()
