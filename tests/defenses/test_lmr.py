"""LMR: the votes of the ascent, the loss of the repulsion, the cut and what stays of it, refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import SGD, tiny_resnet, tiny_samples, tiny_timm_vit, tiny_vit
from tiny_trained import QUIET, assert_reloads, differing, right, trained
from torch import nn

from d3_hf.defenses.lmr import LMRConfig, LMRTrainer, Repulsion, most_changed, most_voted, repelled
from d3_hf.models import load_classifier

SAMPLES = tiny_samples(40)
ADAMW = {"optim": "adamw_torch", "optim_args": None}


def trainer_of(folder, make=tiny_vit, model=None, kind=LMRTrainer, samples=SAMPLES, **options):
    defaults = dict(num_train_epochs=1, learning_rate=0.02, unlearn_learning_rate=0.02, repulsion_epochs=2, prune_share=0.3)
    return kind(model or trained(make), LMRConfig(str(folder), **(defaults | SGD | QUIET | options)), samples)


def head_of(model):
    (head,) = (module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 3)
    return head


# Step 1 ----------------------------------------------------------------------------------------------------------------


def test_the_class_that_leads_most_steps_is_voted_for():
    quiet, loud = [-1.0, -2.0, -3.0], [-100.0, -80.0, 0.0]
    assert most_voted(torch.tensor([quiet, quiet, loud])) == 0  # not the class of the last step, nor of the largest sum
    assert most_voted(torch.tensor([quiet, loud])) == 2  # one vote each, and -101 against -3
    assert most_voted(torch.tensor([[-5.0, -1.0, -9.0], [-1.0, -2.0, -9.0], [-9.0, -2.0, -1.0]])) == 1  # one each: -15, -5, -19
    assert most_voted(torch.tensor([[-3.0, -1.0, -2.0]])) == 1


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
def test_the_ascent_is_followed_to_the_level(tmp_path, make):
    trainer, slow = trainer_of(tmp_path, make), trained(make)
    target, how = trainer.locate()
    optimizer = torch.optim.SGD(slow.parameters(), lr=0.02, momentum=0.9, maximize=True)
    leaders, epoch, accuracy = [], 0, 1.0
    while accuracy > how["level"]:
        for batch in trainer.tune_batches(epoch):
            found = slow.train()(pixel_values=batch["pixel_values"]).logits
            means = [sum(row[c].item() for row in found.log_softmax(1)) / len(found) for c in range(3)]
            leaders.append(means.index(max(means)))
            accuracy = (found.argmax(1) == batch["labels"]).float().mean().item()
            if accuracy <= how["level"]:
                break
            optimizer.zero_grad()
            F.cross_entropy(found, batch["labels"]).backward()
            optimizer.step()
        epoch += 1
    assert [leader for leader, steps in how["leaders"] for _ in range(steps)] == leaders
    assert leaders.count(target) == max(map(leaders.count, leaders)) and how["steps"] == len(leaders) > 1
    assert how["accuracy"] == accuracy <= how["level"] < 0.5
    assert differing(trainer.model, trained(make)) == []


@pytest.mark.parametrize("target", [0, 1, 2])
@pytest.mark.parametrize("schedule", [SGD | {"learning_rate": 0.2}, ADAMW | {"learning_rate": 0.01}])
def test_a_class_that_clean_images_lean_towards_is_located(tmp_path, schedule, target):
    model = trained(tiny_vit)
    head_of(model).bias.data[target] += 4  # not enough to win where the features speak for another class
    found, how = trainer_of(tmp_path, model=model, **schedule, unlearn_learning_rate=None).locate()
    assert found == target and sum(steps for _, steps in how["leaders"]) == how["steps"]


# Step 2 ----------------------------------------------------------------------------------------------------------------


def test_the_loss_against_loops():
    generator = torch.Generator().manual_seed(0)
    logits, labels = 3 * torch.randn(12, 4, generator=generator), torch.arange(12) % 4
    for target, margin in ((0, 3.0), (3, 0.0), (2, 10.0)):
        expected = []
        for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
            others = [value for j, value in enumerate(z) if j != target]
            wrong = [value for j, value in enumerate(z) if j != y]
            cross_entropy = torch.tensor(z).logsumexp(0).item() - z[y]
            loss = cross_entropy + max(0.0, z[target] - max(others) + margin) + 0.25 * max(0.0, max(wrong) - z[y] + 0.5)
            expected.append(0.0 if y == target else loss)
        cross_entropy = F.cross_entropy(logits, labels, reduction="none")
        assert repelled(cross_entropy, logits, labels, target, margin).tolist() == pytest.approx(expected, rel=1e-4)


def test_the_repulsion_minimises_that_loss(tmp_path):
    trainer = trainer_of(tmp_path, model=trained(tiny_vit), kind=Repulsion, max_steps=1, per_device_train_batch_size=40)
    trainer.target, slow = 1, trained(tiny_vit).train()
    trainer.train()
    pixels, labels = torch.stack([s["pixel_values"] for s in SAMPLES]), torch.tensor([s["labels"] for s in SAMPLES])
    logits = slow(pixel_values=pixels).logits
    repelled(F.cross_entropy(logits, labels, reduction="none"), logits, labels, 1, 3.0).mean().backward()
    with torch.no_grad():
        for p in slow.parameters():
            p -= 0.02 * p.grad
    for (name, got), want in zip(trainer.model.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("epochs", [1, 30])
def test_the_class_is_forgotten_or_the_passes_end(tmp_path, epochs):
    options = dict(repulsion_epochs=epochs, learning_rate=0.1 if epochs > 1 else 1e-6, repulsion_margin=50.0)
    trainer = trainer_of(tmp_path, **options)
    found = trainer.repel(2)
    rows = [row for row, sample in enumerate(SAMPLES) if sample["labels"] == 2]
    assert found["class_accuracy_before"] == right(trained(tiny_vit), rows) > 1 / 3
    assert found["class_accuracy_repelled"] == right(trainer.model, rows)
    if epochs == 1:
        assert found["repulsion_epochs"] == 1 and found["class_accuracy_repelled"] > 1 / 3
    else:
        assert found["repulsion_epochs"] < 30 and found["class_accuracy_repelled"] <= 1 / 3


# Step 3 ----------------------------------------------------------------------------------------------------------------


def test_the_columns_that_changed_most():
    before, after = torch.tensor([1.0, 0.0, -2.0, 4.0, 0.5]), torch.tensor([0.5, 0.1, 2.0, 5.0, 0.5])
    assert most_changed(before, after, 0.5).tolist() == [2, 3]
    assert most_changed(before, after, 0.79).tolist() == [0, 2, 3]
    assert most_changed(before, after, 0.01).tolist() == [2]


class Recorder(LMRTrainer):
    """Keeps the copy as step 2 left it, and how many columns are zero after each step of step 3."""

    def announce(self, resumed):
        self.began, self.zeros, self.steps = copy.deepcopy(self.model), [], 0

    def optimizer_step(self):
        super().optimizer_step()
        if hasattr(self, "zeros"):
            self.zeros.append((head_of(self.model).weight == 0).all(0).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet, tiny_timm_vit])
def test_what_changed_most_is_cut_and_stays_zero(tmp_path, make):
    options = dict(target_label=1, learning_rate=0.005, num_train_epochs=2, weight_decay=0.1, repulsion_epochs=None) | ADAMW
    trainer, victim = trainer_of(tmp_path, make, kind=Recorder, **options), trained(make)
    trainer.train()
    found, before, after = trainer.facts()["repulsion"], head_of(victim).weight, head_of(trainer.repelling).weight
    scores = (after - before)[1].abs().tolist()
    count = int(0.3 * len(scores))
    columns = sorted(sorted(range(len(scores)), key=lambda j: -scores[j])[:count])
    assert found["pruned"] == columns and found["inputs"] == len(scores) and count > 1
    expected = copy.deepcopy(trainer.repelling)
    head_of(expected).weight.data[:, columns] = 0
    assert differing(trainer.began, expected) == []
    assert trainer.zeros == [columns] * trainer.state.global_step and trainer.state.global_step == 10
    assert len(differing(trainer.model, trainer.began)) > 2
    rows = list(range(40))
    assert found["retain_accuracy_before"] == right(victim, rows)
    assert found["retain_accuracy_after"] == right(trainer.began, rows)
    assert (found["class"], found["class_name"], found["located"]) == (1, "LABEL_1", {}) and found["repulsion_epochs"] <= 2
    assert_reloads(trainer, tmp_path)


def test_a_whole_run_locates_forgets_and_restores(tmp_path):
    model = trained(tiny_vit)
    head_of(model).bias.data[1] += 4
    options = dict(repulsion_epochs=30, learning_rate=0.05, repulsion_margin=50.0, num_train_epochs=15)
    trainer, rows = trainer_of(tmp_path, model=model, **options), [r for r in range(40) if r % 3 == 1]
    before = right(model, rows)
    trainer.train()
    found = trainer.facts()["repulsion"]
    assert found["class"] == 1 and found["located"]["leaders"]
    assert found["class_accuracy_repelled"] < min(before, right(trainer.model, rows))
    assert (head_of(trainer.model).weight[:, found["pruned"]] == 0).all()


def test_a_resumed_run_keeps_the_cut_and_what_was_found(tmp_path):
    whole = trainer_of(tmp_path, max_steps=6, save_strategy="steps", save_steps=4)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", max_steps=6, unlearn_learning_rate=1e30)  # no ascent would survive
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.facts()["repulsion"] == whole.facts()["repulsion"]
    assert differing(resumed.model, whole.model) == []


# What cannot work ------------------------------------------------------------------------------------------------------


class ConvHead(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 3, 1), nn.Flatten())


class Two(nn.Module):
    """The mean of two heads."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return (self.one(x.mean((2, 3))) + self.two(x.mean((2, 3)))) / 2


@pytest.mark.parametrize(
    ("network", "message"), [(ConvHead, "a linear head; that of .* is a Conv2d"), (Two, "has no single head")]
)
def test_a_network_without_a_linear_head_is_refused(tmp_path, network, message):
    model = load_classifier(network(), num_labels=3, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_size=16)
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, model=model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(unlearn_learning_rate=1e-9, unlearn_epochs=2), RuntimeError, "LMR could not unlearn .* or give target_label"),
        (dict(unlearn_learning_rate=1e30), FloatingPointError, "unlearning diverged in epoch 0"),
        (dict(target_label=0, learning_rate=1e30), FloatingPointError, "the run diverged"),
        (dict(target_label=2, samples=[s for s in SAMPLES if s["labels"] != 2]), RuntimeError, "no retain image is of class 2"),
        (dict(target_label=3), ValueError, "target_label must be a class of the model, 0 to 2; got 3"),
        (dict(fp16=True), ValueError, "fp16 needs a loss scaler"),
    ],
)
def test_failures_leave_the_victim_as_it_was(tmp_path, options, error, message):
    model = trained(tiny_vit)
    with pytest.raises(error, match=message):
        trainer_of(tmp_path, model=model, **options).train()
    assert differing(model, trained(tiny_vit)) == []
