"""FT-SAM's two passes against a plain loop, and linear probing."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import SGD, tiny_resnet, tiny_samples, tiny_timm_vit, tiny_vit

from d3_hf.defenses.ft_sam import FTSAMConfig, FTSAMTrainer
from d3_hf.defenses.linear_probing import LinearProbingConfig, LinearProbingTrainer
from d3_hf.training.sam import running_statistics_kept


def config(folder, kind=FTSAMConfig, **options):
    defaults = dict(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=3, logging_steps=1, disable_tqdm=True, use_cpu=True,
        learning_rate=0.05,
    )  # fmt: skip
    return kind(**(defaults | SGD | options))


class Recorder(FTSAMTrainer):
    def prepare(self):
        super().prepare()
        self.batches = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches.append(dict(inputs))
        return super().training_step(model, inputs, num_items_in_batch)


def assert_reloads(trainer, folder, keys):
    trainer.save_model()
    assert trainer.model.state_dict().keys() == keys
    reloaded = type(trainer.model).from_pretrained(folder)
    images = torch.stack([sample["pixel_values"] for sample in tiny_samples()])
    trainer.model.eval(), reloaded.eval()
    with torch.no_grad():
        assert torch.equal(trainer.model(pixel_values=images).logits, reloaded(pixel_values=images).logits)


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_steps_weights_statistics_and_log_equal_a_plain_loop(tmp_path, make, smoothing):
    args = config(tmp_path, rho=0.5, label_smoothing=smoothing)
    trainer = Recorder(make(), args, tiny_samples())
    trainer.train()
    plain = make().train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)

    def passed(batch):
        logits = plain(pixel_values=batch["pixel_values"]).logits
        target = (1 - smoothing) * F.one_hot(batch["labels"], 3) + smoothing / 3
        loss = -(target * logits.log_softmax(1)).sum(1).mean()
        plain.zero_grad()
        loss.backward()
        return loss.item(), F.cross_entropy(logits, batch["labels"]).item()

    for k, batch in enumerate(trainer.batches):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * k / 3))
        _, clean = passed(batch)
        start = copy.deepcopy(plain.state_dict())  # of the statistics: after one pass
        with torch.no_grad():
            norm = sum(((p.abs() * p.grad) ** 2).sum() for p in plain.parameters()).sqrt()
            for p in plain.parameters():
                p += 0.5 * p**2 * p.grad / norm
        worst, _ = passed(batch)
        plain.load_state_dict(start)
        optimizer.step()
        assert trainer.state.log_history[k]["objective"] == pytest.approx(worst, rel=1e-4)
        assert trainer.state.log_history[k]["clean_loss"] == pytest.approx(clean, rel=1e-4)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)
    assert trainer.facts()["arguments"]["rho"] == 0.5


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_kept_and_batch_statistics_used(momentum):
    module, images = torch.nn.BatchNorm2d(3, momentum=momentum).train(), torch.randn(4, 3, 5, 5)
    expected, before = module(images), copy.deepcopy(module.state_dict())
    with running_statistics_kept([module]):
        assert torch.equal(module(images), expected)
        module.eval()
        torch.testing.assert_close(module(images), copy.deepcopy(module).requires_grad_(False)(images))
    assert module.track_running_stats
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet, tiny_timm_vit])
def test_linear_probing_changes_the_head_and_nothing_else(tmp_path, make):
    model = make()
    before = copy.deepcopy(model.state_dict())
    trainer = LinearProbingTrainer(model, config(tmp_path, LinearProbingConfig), tiny_samples())
    trainer.train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(trainer.facts()["trained"])
    assert {name.rpartition(".")[2] for name in changed} == {"weight", "bias"} and len(changed) == 2
    assert_reloads(trainer, tmp_path, before.keys())


def test_linear_probing_equals_a_plain_loop_on_fixed_features(tmp_path):
    trainer = LinearProbingTrainer(tiny_resnet(), config(tmp_path, LinearProbingConfig, max_steps=1), tiny_samples(4))
    trainer.train()
    plain = tiny_resnet().eval()
    (batch,) = trainer.get_train_dataloader()
    F.cross_entropy(plain(pixel_values=batch["pixel_values"]).logits, batch["labels"]).backward()
    for p, q in zip(plain.classifier.parameters(), trainer.model.classifier.parameters(), strict=True):
        torch.testing.assert_close(q.detach(), p.detach() - 0.05 * p.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {"fp16": True}])
def test_gradients_that_are_not_whole_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="FT-SAM needs whole, unscaled gradients"):
        config(tmp_path, **options)
