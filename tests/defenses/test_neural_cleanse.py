"""Neural Cleanse: its index against a reference; a planted shortcut is found and unlearned."""

import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import CLASSES, SIZE, tiny_resnet, tiny_samples, tiny_timm_vit, tiny_vit
from torch import nn

from d3_hf.data.images import RawImages
from d3_hf.defenses.neural_cleanse import NeuralCleanseConfig, NeuralCleanseTrainer
from d3_hf.defenses.neural_cleanse.flags import Findings, anomaly_indices, flagged_classes
from d3_hf.defenses.neural_cleanse.trainer import TRIGGERS
from d3_hf.models.load import load_classifier
from d3_hf.publishing.manifest import MANIFEST

NAMES = [f"LABEL_{i}" for i in range(CLASSES)]


def config(folder, **options):
    defaults = dict(per_device_train_batch_size=8, max_steps=3, learning_rate=0.01, logging_steps=1, inversion_epochs=2)
    return NeuralCleanseConfig(str(folder), disable_tqdm=True, use_cpu=True, **(defaults | options))


class Flagging(NeuralCleanseTrainer):
    """Flags class 1 whatever was found, so that the unlearning has something to do."""

    def find_triggers(self):
        found = super().find_triggers()
        generator = torch.Generator().manual_seed(3)
        mask, pattern = (torch.rand((1, c, SIZE, SIZE), generator=generator) for c in (1, 3))
        return Findings(found.norms, found.reached, torch.tensor([1]), mask, pattern)


def trained(folder, make=tiny_vit, kind=Flagging, data=None, resume=None, **options):
    trainer = kind(make(), config(folder, **options), data or tiny_samples())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# The index -------------------------------------------------------------------------------------------------------


def test_anomaly_index_and_flags():
    norms = [30.0, 28.0, 35.0, 5.0, 31.0, 60.0]
    deviations = np.abs(np.array(norms) - np.median(norms))
    wanted = deviations / (1.4826 * np.median(deviations))
    assert anomaly_indices(torch.tensor(norms)).tolist() == pytest.approx(wanted.tolist())
    assert (wanted > 2).tolist() == [False, False, False, True, False, True]  # the large one is no small trigger
    everyone = torch.ones(6, dtype=torch.bool)
    assert flagged_classes(torch.tensor(norms), everyone, 2.0).tolist() == [3]
    assert flagged_classes(torch.tensor(norms), torch.arange(6) != 3, 2.0).tolist() == []
    assert anomaly_indices(torch.tensor([4.0, 4.0, 4.0, 1.0])).tolist() == [0, 0, 0, float("inf")]


# The trainer -----------------------------------------------------------------------------------------------------------


class Shortcut(nn.Module):
    """Three classes by mean colour; a white corner of 2x2 pixels gives class 2."""

    def __init__(self):
        super().__init__()
        self.colour, self.corner = nn.Linear(3, 3), nn.Linear(12, 3)
        with torch.no_grad():
            self.colour.weight.copy_(15 * torch.eye(3))
            self.corner.weight.zero_()
            self.corner.weight[2] = 2.0
            for layer in (self.colour, self.corner):
                layer.bias.zero_()

    def forward(self, x):
        return self.colour(x.mean((2, 3))) + self.corner(x[:, :, :2, :2].flatten(1).clamp(min=-0.5))


def coloured(count=30):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 60, (count, 3, 10, 10), generator=generator)
    images[torch.arange(count), labels] += 120
    return RawImages(images.to(torch.uint8), labels, NAMES)


def test_a_planted_shortcut_is_found_and_unlearned(tmp_path):
    model = load_classifier(Shortcut(), num_labels=3, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_size=10)
    args = config(tmp_path, inversion_epochs=60, cost_patience=2, max_steps=40, unlearning_ratio=0.5, learning_rate=0.05)
    data = coloured()
    trainer = NeuralCleanseTrainer(model, args, data)

    def rate(wanted):
        triggered = data.images.clone()
        triggered[:, :, :2, :2] = 255
        with torch.no_grad():
            classes = model.eval()(pixel_values=trainer.preprocessing(triggered)).logits.argmax(1)
        return (classes == wanted)[data.labels != 2].float().mean().item()

    assert rate(2) == 1.0
    trainer.train()
    assert trainer.findings.flagged.tolist() == [2] and trainer.findings.reached.tolist() == [True] * 3
    mask = trainer.findings.masks[0, 0]
    assert mask[:2, :2].sum() > 0.5 * mask.sum()
    assert rate(2) < 0.2 and rate(data.labels) > 0.8
    facts = trainer.facts()
    assert facts["flagged_classes"] == [2] and facts["outcome"] == "reversed triggers unlearned"
    assert facts["anomaly_index"][2] > 2


def test_no_flag_is_plain_fine_tuning_and_says_so(tmp_path, caplog):
    options = dict(anomaly_threshold=1e9, save_strategy="steps", save_steps=2)
    with caplog.at_level(logging.WARNING, "d3_hf"):
        trainer = trained(tmp_path / "whole", kind=NeuralCleanseTrainer, **options)
    assert "flags no class" in caplog.text and "plain fine-tuning" in trainer.facts()["method"]
    assert trainer.facts()["outcome"] == "no class flagged: plain fine-tuning"
    resumed = trained(tmp_path / "two", kind=NeuralCleanseTrainer, resume=str(tmp_path / "whole" / "checkpoint-2"), **options)
    assert "plain fine-tuning" in resumed.method and torch.equal(resumed.findings.norms, trainer.findings.norms)


def test_images_carry_the_trigger_in_pixels_by_the_ratio(tmp_path):
    trainer = Flagging(tiny_vit(), config(tmp_path, unlearning_ratio=0.3), tiny_samples())
    trainer.start()
    pixels = torch.randint(0, 256, (400, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normalised = trainer.preprocessing.normalize(pixels)
    found = trainer._with_triggers(normalised)
    mask, pattern = trainer.findings.masks[0], trainer.findings.patterns[0]
    stamped = ((1 - mask) * pixels / 255 + mask * pattern - 0.5) / 0.5
    carries = (found != normalised).flatten(1).any(1)
    torch.testing.assert_close(found[carries], stamped[carries], rtol=1e-5, atol=1e-5)
    assert 0.2 < carries.float().mean() < 0.4


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet, tiny_timm_vit])
def test_triggers_are_trained_on_published_and_in_a_checkpoint_only_remembered(tmp_path, make):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (16, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    data = RawImages(pixels, torch.arange(16) % CLASSES, NAMES)
    options = dict(save_strategy="steps", save_steps=2)
    trainer = trained(tmp_path / "one", make, data=data, unlearning_ratio=1.0, **options)
    plain = trained(tmp_path / "plain", make, NeuralCleanseTrainer, data, anomaly_threshold=1e9)
    state, other = trainer.model.state_dict(), plain.model.state_dict()
    assert state.keys() == other.keys() and not all(torch.equal(state[name], other[name]) for name in state)
    trainer.save_model()
    assert torch.equal(load_file(tmp_path / "one" / trainer.facts()["triggers_file"])["masks"], trainer.findings.masks)
    checkpoint = tmp_path / "one" / "checkpoint-2"
    assert not (checkpoint / TRIGGERS).exists() and TRIGGERS not in (checkpoint / MANIFEST).read_text()
    resumed = trained(tmp_path / "two", make, data=data, resume=str(checkpoint), unlearning_ratio=1.0, **options)
    for name, value in vars(trainer.findings).items():
        assert torch.equal(vars(resumed.findings)[name], value), name


def test_finding_triggers_leaves_weights_and_global_generator_alone(tmp_path):
    trainer = NeuralCleanseTrainer(tiny_resnet(), config(tmp_path), tiny_samples())
    before, state = {n: v.clone() for n, v in trainer.model.state_dict().items()}, torch.get_rng_state()
    found = trainer.find_triggers()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(p.grad is None for p in trainer.model.parameters())
    assert torch.equal(found.norms, trainer.find_triggers().norms)


def two_classes():
    model = tiny_vit()
    model.config.num_labels = 2
    return model


@pytest.mark.parametrize(
    ("options", "make", "count", "message"),
    [
        ({"fp16": True}, tiny_vit, 16, "fp16 rounds the gradient"),
        ({}, two_classes, 16, "of 2 norms none can be anomalous"),
        ({}, tiny_vit, 4, "needs 5 images"),
    ],
)
def test_refusals(tmp_path, options, make, count, message):
    with pytest.raises(ValueError, match=message):
        NeuralCleanseTrainer(make(), config(tmp_path, **options), tiny_samples(count))
