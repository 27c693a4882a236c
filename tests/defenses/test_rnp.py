"""RNP: unlearning by ascent, recovery by masks on the unlearned network, pruning of the victim."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_resnet, tiny_samples, tiny_timm_vit
from tiny_trained import QUIET, assert_reloads, differing, right, trained

from d3_hf.defenses.rnp import RNPConfig, RNPTrainer
from d3_hf.defenses.shared.unlearning import unlearned_level, unlearning

SAMPLES = tiny_samples(40)


def trainer_of(folder, make=tiny_resnet, model=None, **options):
    defaults = dict(num_train_epochs=4, learning_rate=0.2, unlearn_learning_rate=0.05, max_validation_drop=0.5)
    return RNPTrainer(model or trained(make), RNPConfig(str(folder), **(defaults | QUIET | options)), SAMPLES)


def test_unlearning_ascends_the_loss_of_a_copy(tmp_path):
    trainer, slow = trainer_of(tmp_path, unlearn_epochs=2), trained(tiny_resnet)
    optimizer = torch.optim.SGD(slow.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, maximize=True)
    for epoch, (accuracy, tensors) in enumerate(unlearning(trainer, 5e-4)):
        correct = 0
        for batch in trainer.tune_batches(epoch):
            found = slow.train()(pixel_values=batch["pixel_values"]).logits
            correct += int((found.argmax(1) == batch["labels"]).sum())
            optimizer.zero_grad()
            F.cross_entropy(found, batch["labels"]).backward()
            optimizer.step()
        assert accuracy == correct / 32
        for name, value in slow.state_dict().items():
            torch.testing.assert_close(tensors[name].detach(), value, rtol=1e-4, atol=1e-5)
    assert differing(trainer.model, trained(tiny_resnet)) == []


def test_recovery_masks_the_unlearned_scales(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.start()
    labels = [SAMPLES[row]["labels"] for row in trainer.tune]
    assert trainer.unlearned_facts["level"] == max(labels.count(c) for c in range(3)) / 32 > 0.2
    assert unlearned_level(trainer_of(tmp_path, unlearn_accuracy=0.5)) == 0.5
    slow = trained(tiny_resnet)
    slow.load_state_dict(trainer.unlearned)
    batch = next(trainer.tune_batches(0))
    masks = {name: torch.rand(8, generator=torch.Generator().manual_seed(1)) for name in trainer.scales}
    loss = trainer.mask_loss(masks, batch)
    with torch.no_grad():
        for name, mask in masks.items():
            for channel in range(8):
                slow.get_submodule(name).weight[channel] *= mask[channel]
        expected = F.cross_entropy(slow.train()(pixel_values=batch["pixel_values"]).logits, batch["labels"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_victim_is_pruned_and_nothing_else_of_it_changes(tmp_path):
    trainer, victim = trainer_of(tmp_path), trained(tiny_resnet)
    state = torch.get_rng_state()
    output = trainer.train()
    assert torch.equal(torch.get_rng_state(), state) and output.global_step == 4 * 4
    facts = trainer.facts()["pruning"]
    pruned, expected = 0, copy.deepcopy(victim)
    for name, module in trainer.model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            gone = module.weight == 0
            pruned += int(gone.sum())
            expected.get_submodule(name).weight.data[gone] = 0
    assert differing(trainer.model, expected) == [] and differing(trainer.model, victim)
    assert pruned == facts["pruned"] > 0
    assert facts["unlearning"]["accuracy"] <= facts["unlearning"]["level"] < 0.5 and facts["unlearning"]["epochs"] >= 1
    assert facts["validation_accuracy_after"] == right(trainer.model, trainer.validate)
    assert facts["validation_accuracy_after"] >= 0.5 * facts["validation_accuracy_before"]
    assert all(p.grad is None for p in trainer.model.parameters())
    assert_reloads(trainer, tmp_path)


def test_a_layer_that_the_network_does_not_use_stays(tmp_path):
    model = trained(tiny_resnet)
    model.unused = torch.nn.BatchNorm2d(8)
    trainer = trainer_of(tmp_path, model=model)
    trainer.train()
    assert trainer.found["pruned"] and torch.equal(model.unused.weight, torch.ones(8))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            dict(unlearn_learning_rate=1e-9, unlearn_epochs=2),
            RuntimeError,
            "RNP could not unlearn the clean task: .* after 2 epochs",
        ),
        (dict(unlearn_learning_rate=1e30), FloatingPointError, "unlearning diverged in epoch 0"),
        (dict(learning_rate=1e-9, max_steps=1), RuntimeError, "RNP found nothing to prune"),
    ],
)
def test_failures_leave_the_victim_as_it_was(tmp_path, options, error, message):
    trainer = trainer_of(tmp_path, **options)
    with pytest.raises(error, match=message):
        trainer.train()
    assert differing(trainer.model, trained(tiny_resnet)) == []


def test_a_network_without_batch_norm_is_refused(tmp_path):
    with pytest.raises(ValueError, match="RNP masks the scales of BatchNorm channels"):
        trainer_of(tmp_path, tiny_timm_vit)
