"""FST against its formula: the start, the gradient, the sphere, its relation to D3."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import SGD, tiny_resnet, tiny_samples, tiny_timm_vit, tiny_vit

from d3_hf.defenses.fst import FSTConfig, FSTTrainer, draw_uniform, inner_product
from d3_hf.defenses.shared import geometry


def config(folder, **options):
    defaults = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        logging_steps=1,
        disable_tqdm=True,
        learning_rate=0.01,
        use_cpu=True,
        **SGD,
    )
    return FSTConfig(**(defaults | options))


class Recorder(FSTTrainer):
    def prepare(self):
        super().prepare()
        self.batches, self.norms = [], []

    def start(self):
        super().start()
        self.drawn = copy.deepcopy(self.model.state_dict())

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches.append(dict(inputs))
        return super().training_step(model, inputs, num_items_in_batch)

    def optimizer_step(self):
        super().optimizer_step()
        self.norms.append(self.weight().norm())


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_steps_and_log_equal_a_plain_loop(tmp_path, alpha):
    model = tiny_vit()
    original = model.classifier.weight.detach().clone()
    trainer = Recorder(model, config(tmp_path, alpha=alpha, learning_rate=0.05), tiny_samples())
    trainer.train()
    plain = tiny_vit()
    plain.load_state_dict(trainer.drawn)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for k, batch in enumerate(trainer.batches):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * k / 4))
        loss = F.cross_entropy(plain(pixel_values=batch["pixel_values"]).logits, batch["labels"])
        loss = loss + alpha * sum((w * o).sum() for w, o in zip(plain.classifier.weight, original, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            plain.classifier.weight *= original.norm() / plain.classifier.weight.norm()
        assert trainer.state.log_history[k]["objective"] == pytest.approx(loss.item(), rel=1e-4)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], parameter, rtol=1e-4, atol=1e-5)
    distance = ((plain.classifier.weight - original).norm() / original.norm()).item()
    assert trainer.state.log_history[3]["distance"] == pytest.approx(distance, rel=1e-4)


def test_head_and_bias_start_uniform_and_nothing_else_changes(tmp_path):
    model = tiny_vit()
    before = copy.deepcopy(model.state_dict())
    trainer = FSTTrainer(model, config(tmp_path), tiny_samples())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    trainer.start()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    generator = torch.Generator().manual_seed(trainer.args.seed)
    for value in (model.classifier.weight, model.classifier.bias):
        assert torch.equal(value, draw_uniform(value.shape, 8, generator))
    drawn = draw_uniform(torch.Size([400, 400]), 400, torch.Generator().manual_seed(0))
    assert drawn.abs().max() <= 1 / 20 and drawn.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.01)


def test_on_the_sphere_the_shift_is_d3s_distance():
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    weight = geometry.warm_start(original, "random", generator).requires_grad_()
    distance = (weight - original).norm()
    radius = original.norm()
    assert distance.item() ** 2 == pytest.approx((2 * radius**2 - 2 * inner_product(weight, original)).item())
    (shift,) = torch.autograd.grad(inner_product(weight, original), weight)
    (push,) = torch.autograd.grad(-distance, weight)
    outward = weight.detach() / radius
    tangential = [g - (g * outward).sum() * outward for g in (shift, push)]
    torch.testing.assert_close(tangential[0] / distance, tangential[1])  # alpha = 1 / (lambda D)


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet, tiny_timm_vit])
def test_the_head_is_on_the_sphere_after_each_step(tmp_path, make):
    trainer = Recorder(make(), config(tmp_path), tiny_samples())
    trainer.train()
    torch.testing.assert_close(torch.stack(trainer.norms), trainer.radius.expand(4), rtol=1e-5, atol=0)
    (selected,) = trainer.facts()["selected_weights"]
    assert selected["initial_norm"] == trainer.radius.item() and 0 < selected["relative_distance"] <= 2


def test_four_micro_batches_equal_one_window(tmp_path):
    runs = []
    for size, accumulation in ((8, 1), (2, 4)):
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
        runs.append(FSTTrainer(tiny_vit(), config(tmp_path, **options), tiny_samples()))
        runs[-1].train()
    for one, four in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(four, one, rtol=1e-4, atol=1e-5)


def test_a_head_that_only_was_drawn_raises(tmp_path):
    trainer = FSTTrainer(tiny_vit(), config(tmp_path, learning_rate=0.0), tiny_samples())
    with pytest.raises(RuntimeError, match="head has not moved"):
        trainer.train()
