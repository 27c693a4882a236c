"""SAU against its formulas: divergence, inner problem, examples inside their ball, outer gradient, BatchNorm policies."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon
from tiny import tiny_resnet, tiny_samples, tiny_timm_vit, tiny_vit

from d3_hf.defenses.sau import SAUConfig, SAUTrainer, inner_losses, js_divergence, shared_perturbation, unlearning_losses


def config(folder, **options):
    defaults = dict(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=2, logging_steps=1, disable_tqdm=True, use_cpu=True
    )
    return SAUConfig(**(defaults | options))


class Recorder(SAUTrainer):
    def prepare(self):
        super().prepare()
        self.images, self.batches, self.before, self.gradients = [], [], [], []

    def _with_examples(self, pixel_values, labels):
        self.images.append(super()._with_examples(pixel_values, labels))
        assert all(p.grad is None for p in self.model.parameters())  # the inner problem leaves no gradient behind
        self.batches.append(labels)
        return self.images[-1]

    def finish_gradient(self, window_loss):
        self.before.append(copy.deepcopy(self.model.state_dict()))
        self.gradients.append({name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})
        return super().finish_gradient(window_loss)


def test_js_divergence():
    a, b = (3 * torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    expected = [jensenshannon(p, q) ** 2 for p, q in zip(a.softmax(1).double(), b.softmax(1).double(), strict=True)]
    assert js_divergence(a, b).tolist() == pytest.approx(expected, rel=1e-4)
    assert (
        js_divergence(torch.tensor([[900.0, 0.0]]), torch.tensor([[0.0, 900.0]])).item() == pytest.approx(math.log(2))
        and js_divergence(a, a).abs().max() < 1e-6
    )


def test_unlearning_losses():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    classes = torch.tensor([0, 1, 2, 3, 0, 1])
    expected = [-math.log(1 - row.softmax(0)[k]) for row, k in zip(logits, classes, strict=True)]
    assert unlearning_losses(logits, classes).tolist() == pytest.approx(expected, rel=1e-9)
    certain = torch.tensor([[1000.0, 0.0, 0.0]], requires_grad=True)  # p rounds to 1
    loss = unlearning_losses(certain, torch.tensor([0])).sum()
    assert loss.item() == pytest.approx(1000 - math.log(2))
    assert torch.autograd.grad(loss, certain)[0].tolist() == [pytest.approx([1.0, -0.5, -0.5])]


def test_inner_losses_by_cases():
    # label 0 and prediction 0 in both models: shared, flipped apart, one flipped, none flipped; last: flipped to the label.
    tops = ([1, 1, 0, 0, 0], [1, 2, 2, 0, 0])
    labels, own = torch.zeros(5, dtype=torch.int64), torch.tensor([0, 0, 0, 0, 1])
    logits = tuple(2.0 * F.one_hot(torch.tensor(top), 3) + 0.1 * torch.arange(3) for top in tops)
    losses, shared = inner_losses(logits, (own, own), labels, (0.3, 0.7))
    assert shared.tolist() == [True] + 4 * [False]
    js, ce = js_divergence(*logits), [F.cross_entropy(z, labels, reduction="none") for z in logits]
    expected = [0.0, 0.7 * js[1], 0.7 * js[2] - 0.15 * ce[0][2], 0.7 * js[3] - 0.15 * (ce[0][3] + ce[1][3]), 0.7 * js[4]]
    assert losses.tolist() == pytest.approx(list(map(float, expected)), abs=1e-6)


def test_perturbation_equals_a_slow_loop_in_pixels(tmp_path):
    generator = torch.Generator().manual_seed(3)
    images, labels = torch.randn(6, 3, 4, 4, generator=generator).double(), torch.arange(6) % 3
    matrix, other = (torch.randn(48, 3, generator=generator).double() for _ in range(2))
    matrices = (0.3 * matrix, 0.3 * matrix + 0.1 * other)
    models = tuple(lambda x, m=m: torch.tanh(x.flatten(1)) @ m for m in matrices)
    args = config(tmp_path, pgd_bound=0.2, pgd_step=0.15, pgd_steps=4, beta_adversarial=0.8)
    std = torch.tensor([0.2, 0.5, 0.4]).double()[None, :, None, None]
    predictions = tuple(model(images).argmax(1) for model in models)
    found = shared_perturbation(models, images, labels, predictions, std, args)
    for i in range(6):
        delta = torch.full((1, 3, 4, 4), 0.2).double()
        for _ in range(4):
            delta = delta.detach().requires_grad_()
            z = [model(images[i : i + 1] + delta / std) for model in models]
            done = [bool(a.argmax() != own[i]) for a, own in zip(z, predictions, strict=True)]
            p = [a.softmax(1) for a in z]
            kl = [(q * (q / ((p[0] + p[1]) / 2)).log()).sum() for q in p]
            if all(done) and z[0].argmax() == z[1].argmax() != labels[i]:
                break
            loss = (kl[0] + kl[1]) / 2
            for a, flipped in zip(z, done, strict=True):
                loss = loss if flipped else loss - 0.8 / 2 * F.cross_entropy(a, labels[i : i + 1])
            (gradient,) = torch.autograd.grad(loss, delta)
            delta = (delta - 0.15 * gradient.sign()).clamp(-0.2, 0.2)
        torch.testing.assert_close(found[i : i + 1], delta.detach())
    assert found.abs().max() <= 0.2 and found.min() < 0
    assert all((m(images + found / std).argmax(1) != own).any() for m, own in zip(models, predictions, strict=True))


def test_inner_problem_stops_when_every_image_is_shared(tmp_path):
    calls = []

    def model(x):
        calls.append(1)
        return torch.stack([0 * x.sum((1, 2, 3)), x.sum((1, 2, 3)) - 0.1], 1)

    zeros = torch.zeros(2, dtype=torch.int64)
    std = torch.ones(1, 3, 1, 1)
    found = shared_perturbation((model, model), torch.zeros(2, 3, 2, 2), zeros, (zeros, zeros), std, config(tmp_path))
    assert len(calls) == 2 and torch.equal(found, torch.full_like(found, 0.2))


@pytest.mark.parametrize(
    ("make", "policy"), [(tiny_resnet, "eval"), (tiny_resnet, "train"), (tiny_vit, "eval"), (tiny_timm_vit, "eval")]
)
def test_outer_gradient_and_log(tmp_path, make, policy):
    args = config(tmp_path, batch_norm=policy, lambda_clean=0.8, lambda_adversarial=0.5, lambda_shared=2.0, max_steps=3)
    trainer = Recorder(make(), args, tiny_samples())
    trainer.train()
    suspicious = make().eval()
    logs = trainer.state.log_history[:3]
    steps = zip(trainer.images, trainer.batches, trainer.before, trainer.gradients, logs, strict=True)
    for both, labels, before, gradients, log in steps:
        images, examples = both.chunk(2)
        assert ((examples - images) * 0.5).abs().max() <= 0.2 + 1e-6  # the tiny processor's std is 0.5
        model = make().train(policy == "train")
        model.load_state_dict(before)
        with torch.no_grad():
            own, classes = (suspicious(pixel_values=x).logits.argmax(1) for x in (images, examples))
        z, adversarial = model(pixel_values=both).logits.chunk(2)
        loss, fooled, shared = 0.8 * F.cross_entropy(z, labels) + 0.5 * F.cross_entropy(adversarial, labels), 0, 0
        for row, k_i, y, o in zip(adversarial, classes, labels, own, strict=True):
            if k_i != y and k_i != o:
                loss = loss - 2.0 / len(labels) * torch.log(1 - row.softmax(0)[k_i])
                fooled, shared = fooled + 1, shared + int(row.argmax() == k_i)
        loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)
        assert log["objective"] == pytest.approx(loss.item(), rel=1e-4) and log["learning_rate"] == 1e-4
        assert log["clean_loss"] == pytest.approx(F.cross_entropy(z, labels).item(), rel=1e-4)
        assert (log["fooled_fraction"], log["shared_fraction"]) == (fooled / 4, shared / 4)
    assert any(log["fooled_fraction"] > 0 for log in logs)
    groups = trainer.optimizer.param_groups
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW and all(g["amsgrad"] for g in groups)


@pytest.mark.parametrize("policy", ["train", "eval", "frozen"])
def test_batch_norm_policies_and_the_suspicious_model_stays(tmp_path, policy):
    trainer = SAUTrainer(tiny_resnet(), config(tmp_path, batch_norm=policy, bf16=policy == "train"), tiny_samples())
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    after = trainer.model.state_dict()
    statistics = all(torch.equal(before[n], after[n]) for n in after if n.endswith("running_mean"))
    scales = all(torch.equal(before[n], after[n]) for n in after if n.endswith("normalization.weight"))
    assert statistics == (policy != "train") and scales == (policy == "frozen")
    assert all(torch.equal(value, before[name]) for name, value in trainer.suspicious.state_dict().items())


def test_missing_labels_are_named(tmp_path):
    with pytest.raises(ValueError, match="needs a tensor column `labels`"):
        SAUTrainer(tiny_vit(), config(tmp_path), [{"pixel_values": s["pixel_values"]} for s in tiny_samples()]).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_adversarial": 0.0, "beta_shared": 0.0}, "are both 0"),
        ({"fp16": True}, "use bf16 or float32"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)
