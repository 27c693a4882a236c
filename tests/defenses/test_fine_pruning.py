"""Fine-Pruning: the least active units go, as many as accuracy allows, and stay gone."""

import copy

import pytest
import torch
from tiny import PROCESSOR, tiny_resnet, tiny_samples, tiny_timm_vit, tiny_vit
from tiny_trained import QUIET, assert_reloads, differing, right, trained
from torch import nn

from d3_hf.data.images import RawImages
from d3_hf.defenses.fine_pruning import FinePruningConfig, FinePruningTrainer, last_units
from d3_hf.defenses.shared.staged import tune_and_validate

SAMPLES = tiny_samples(40)
# Parameters that are zero for a pruned unit, with the dimension that counts the units.
PARTS = {
    tiny_resnet: {"classifier.1.weight": 1},
    tiny_vit: {"vit.layers.1.mlp.fc1.weight": 0, "vit.layers.1.mlp.fc1.bias": 0, "vit.layers.1.mlp.fc2.weight": 1},
    tiny_timm_vit: {
        "timm_model.blocks.1.mlp.fc1.weight": 0,
        "timm_model.blocks.1.mlp.fc1.bias": 0,
        "timm_model.blocks.1.mlp.fc2.weight": 1,
    },
}


def trainer_of(folder, make, samples=SAMPLES, **options):
    args = FinePruningConfig(str(folder), **(dict(max_steps=3, learning_rate=0.05) | QUIET | options))
    return FinePruningTrainer(trained(make), args, samples)


def units_of(model, make, dims):
    """Zero the parts of the units in ``dims`` in a copy, slowly."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, dim in PARTS[make].items():
            for unit in dims:
                model.get_parameter(name).select(dim, unit).zero_()
    return model


@pytest.mark.parametrize("make", PARTS)
def test_least_active_units_are_pruned_as_far_as_accuracy_allows_and_stay_zero(tmp_path, make):
    trainer = trainer_of(tmp_path, make)
    victim = trained(make)
    reader = next(reversed(PARTS[make])).removesuffix(".weight")
    seen = []
    hook = victim.get_submodule(reader).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    right(victim, trainer.tune)
    hook.remove()
    size = seen[0].shape[-1]
    means = torch.tensor([sum(x[..., unit].abs().double().mean().item() for x in seen) / len(seen) for unit in range(size)])
    torch.testing.assert_close(trainer.activations(), means.double(), rtol=1e-4, atol=1e-6)

    order, before = means.argsort().tolist(), right(victim, trainer.validate)
    count = 0
    while count + 1 < size and right(units_of(victim, make, order[: count + 1]), trainer.validate) >= 0.9 * before:
        count += 1
    trainer.train()
    facts = trainer.facts()["pruning"]
    assert before > 0.6 and count > 0 and facts["pruned"] == sorted(order[:count])
    assert facts["validation_accuracy_before"] == before and facts["validation_images"] == 8
    assert facts["validation_accuracy_after"] == right(units_of(victim, make, order[:count]), trainer.validate)
    for name, dim in PARTS[make].items():
        rows = trainer.model.get_parameter(name).detach().movedim(dim, 0).reshape(size, -1)
        assert [unit for unit in range(size) if not rows[unit].any()] == facts["pruned"]
    assert len(differing(trainer.model, victim)) > len(PARTS[make])  # fine-tuning moved the rest too
    assert_reloads(trainer, tmp_path)


def test_what_was_pruned_stays_so_in_a_resumed_run(tmp_path):
    whole = trainer_of(tmp_path, tiny_resnet, max_steps=6, save_strategy="steps", save_steps=4)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", tiny_resnet, max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.facts()["pruning"] == whole.facts()["pruning"]
    assert differing(resumed.model, units_of(resumed.model, tiny_resnet, whole.found["pruned"])) == []


def test_raw_images_are_measured_without_augmentation(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 3, 16, 16), generator=generator, dtype=torch.uint8)
    model = trained(tiny_resnet)
    raw = RawImages(images, torch.arange(20) % 3, list(model.config.id2label.values()))
    trainer = FinePruningTrainer(model, FinePruningConfig(str(tmp_path), **QUIET), raw)
    before = torch.get_rng_state()
    (batch,) = trainer.images_at(list(range(20)))
    pixels = PROCESSOR(images=list(raw.images), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], pixels, rtol=0, atol=1e-5)
    augmented = [torch.cat([b["pixel_values"] for b in trainer.tune_batches(epoch)]) for epoch in (0, 0, 1)]
    assert torch.equal(augmented[0], augmented[1]) and not torch.equal(augmented[0], augmented[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_split_is_seeded_disjoint_and_80_20():
    tune, validate = tune_and_validate(40, 0)
    assert sorted(tune + validate) == list(range(40)) and len(validate) == 8
    assert (tune, validate) == tune_and_validate(40, 0) != tune_and_validate(40, 1)


def test_first_step_too_costly_raises(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, tiny_resnet)
    found = iter([1.0, 1.0, 0.5])  # on the tuning images for the activations, the victim's, after the first step
    monkeypatch.setattr(FinePruningTrainer, "activations", lambda self: (next(found), torch.arange(8.0))[1])
    monkeypatch.setattr(FinePruningTrainer, "accuracy", lambda self, rows: next(found))
    with pytest.raises(RuntimeError, match="1 least active of 8 inputs of classifier.1 already cost more"):
        trainer.train()


def test_the_step_that_breaks_the_tolerance_is_taken_back(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, tiny_resnet)
    found = iter([1.0, 0.95, 0.9, 0.89])  # the victim's, then after one, two and three units; a later rise is not looked at
    monkeypatch.setattr(FinePruningTrainer, "activations", lambda self: torch.tensor([3.0, 1, 2, 0, 7, 6, 5, 4]))
    monkeypatch.setattr(FinePruningTrainer, "accuracy", lambda self, rows: next(found))
    trainer.start()
    assert trainer.found["pruned"] == [1, 3] and trainer.found["validation_accuracy_after"] == 0.9
    assert differing(trainer.model, units_of(trained(tiny_resnet), tiny_resnet, [1, 3])) == []


class Gated(nn.Module):
    """Linear layers in excess, none of them an MLP that widens and narrows back."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(768, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, pixel_values):
        return type("Output", (), {"logits": self.head(self.two(self.one(pixel_values.flatten(1))))})


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda f: trainer_of(f, tiny_resnet, samples=None), "Fine-Pruning chooses on retain accuracy"),
        (lambda f: trainer_of(f, tiny_resnet, samples=SAMPLES[:4]), "the retain set has 4 images; at least 5"),
        (lambda f: last_units(Gated(), (16, 16)), "Gated has no linear layer that widens followed by one that narrows"),
    ],
)
def test_refusals(tmp_path, action, message):
    with pytest.raises(ValueError, match=message):
        action(tmp_path)
