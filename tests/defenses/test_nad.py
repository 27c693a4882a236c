"""NAD: its distance against loops, the stages that it finds, teacher and student, resuming, refusals."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import PROCESSOR, SIZE, tiny_resnet, tiny_samples, tiny_timm_vit, tiny_vit
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from d3_hf.defenses.nad import trainer as nad
from d3_hf.defenses.nad.stages import find_stages
from d3_hf.defenses.nad.trainer import NADConfig, NADTrainer, attention_distance
from d3_hf.models.architectures import new_classifier
from d3_hf.models.load import load_classifier

WEIGHTS = {"tiny_vit": [500.0], "tiny_timm_vit": [500.0], "tiny_resnet": [500.0, 1000.0]}


def config(folder, **options):
    defaults = dict(per_device_train_batch_size=16, max_steps=3, teacher_epochs=1, learning_rate=0.01, logging_steps=1)
    return NADConfig(str(folder), disable_tqdm=True, use_cpu=True, **(defaults | options))


def trained(folder, make=tiny_vit, resume=None, **options):
    args = config(folder, **(dict(attention_weights=WEIGHTS[make.__name__]) | options))
    trainer = NADTrainer(make(), args, tiny_samples())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def slow_distance(student, teacher, power):
    total = 0.0
    maps = []
    for features in (student, teacher):
        found = [sum(abs(v) ** power for v in features[:, i].tolist()) for i in range(features.shape[1])]
        length = sum(v**2 for v in found) ** 0.5
        maps.append([v / length for v in found])
    for s, t in zip(*maps, strict=True):
        total += (s - t) ** 2
    return total / len(maps[0])


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_distance_equals_loops(power):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, 7, generator=generator) for _ in range(2))
    found = attention_distance(student, teacher, power).tolist()
    assert found == pytest.approx([slow_distance(s, t, power) for s, t in zip(student, teacher, strict=True)], rel=1e-4)
    assert attention_distance(student, 3 * student, power).abs().max() < 1e-12


def bottleneck():
    options = dict(embedding_size=8, hidden_sizes=[8, 16, 16], depths=[1, 2, 1], layer_type="bottleneck", num_labels=3)
    return ResNetForImageClassification(ResNetConfig(**options))


def convnext():
    config = ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, num_labels=3)
    return ConvNextForImageClassification(config)


def vit(depth):
    sizes = dict(image_size=32, patch_size=8, hidden_size=8, num_attention_heads=2, intermediate_size=8)
    return ViTForImageClassification(ViTConfig(num_hidden_layers=depth, num_labels=3, **sizes))


def timm_network(name, **options):
    return new_classifier(name, num_labels=3, image_mean=[0.5] * 3, image_std=[0.5] * 3, **options)


def swin():
    return SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4)
    )


@pytest.mark.parametrize(
    ("make", "size", "names"),
    [
        (tiny_resnet, SIZE, ["resnet.encoder.stages.0", "resnet.encoder.stages.1"]),
        (bottleneck, 64, ["resnet.encoder.stages.0", "resnet.encoder.stages.1", "resnet.encoder.stages.2"]),
        (convnext, 64, [f"convnext.encoder.stages.{i}" for i in range(4)]),
        (lambda: timm_network("resnet20_cifar"), 32, [f"timm_model.layer{i}" for i in (1, 2, 3)]),
        (lambda: timm_network("wrn16_1_cifar"), 32, [f"timm_model.block{i}" for i in (1, 2, 3)]),
        (lambda: timm_network("resnet10t", image_size=64), 64, [f"timm_model.layer{i}" for i in (1, 2, 3, 4)]),
        (tiny_vit, SIZE, ["vit.layers.0"]),
        (tiny_timm_vit, SIZE, ["timm_model.blocks.0"]),
        (lambda: vit(12), 32, [f"vit.layers.{i}" for i in (2, 5, 8, 10)]),
    ],
)
def test_stages_are_found_from_the_structure(make, size, names):
    model = make().train()
    found = find_stages(model, (size, size))
    assert [stage.name for stage in found][-len(names) :] == names
    assert all(dict(model.named_modules())[stage.name] is stage.module for stage in found)
    assert all(module.training and not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet, tiny_timm_vit])
def test_loss_is_cross_entropy_plus_weighted_distances(tmp_path, make):
    trainer = trained(tmp_path, make, max_steps=1)
    logged = trainer.state.log_history[0]
    victim = make().train()
    images = torch.stack([sample["pixel_values"] for sample in tiny_samples()])
    labels = torch.tensor([sample["labels"] for sample in tiny_samples()])
    with torch.no_grad():
        student, teacher = (model(pixel_values=images, output_hidden_states=True) for model in (victim, trainer.teacher))
    tokens, total = make is not tiny_resnet, 0.0
    indices = {tiny_vit: [1], tiny_resnet: [1, 2], tiny_timm_vit: [0]}[make]
    for weight, index in zip(WEIGHTS[make.__name__], indices, strict=True):
        pair = [output.hidden_states[index] for output in (student, teacher)]
        if make is tiny_vit:
            pair = [hidden[:, 1:].transpose(1, 2) for hidden in pair]
        pair = [hidden.flatten(2) for hidden in pair]
        total += weight * sum(slow_distance(s, t, 2) for s, t in zip(*pair, strict=True)) / len(images)
    assert total > 0 and [stage.tokens for stage in trainer.stages] == [tokens] * len(trainer.stages)
    assert logged["attention_loss"] == pytest.approx(total, rel=1e-3)
    assert logged["clean_loss"] == pytest.approx(F.cross_entropy(student.logits, labels).item(), rel=1e-4)
    assert logged["objective"] == pytest.approx(logged["clean_loss"] + logged["attention_loss"], rel=1e-4)


def test_teacher_and_stages_are_what_facts_and_weights_say(tmp_path):
    trainer, victim = trained(tmp_path, tiny_resnet), tiny_resnet().state_dict()
    assert not all(torch.equal(value, trainer.teacher.state_dict()[name]) for name, value in victim.items())
    assert not any(p.requires_grad for p in trainer.teacher.parameters()) and not trainer.teacher.training
    assert [stage["name"] for stage in trainer.facts()["attention_stages"]] == [stage.name for stage in trainer.stages]
    assert not any(module._forward_hooks for model in (trainer.model, trainer.teacher) for module in model.modules())


def test_the_teacher_shares_neither_folder_nor_trackers_nor_checkpoints(tmp_path, monkeypatch):
    seen = []

    class Teaching(nad.PurifyTrainer):
        def train(self, *args, **kwargs):
            seen.append(self.args)
            return super().train(*args, **kwargs)

    monkeypatch.setattr(nad, "PurifyTrainer", Teaching)
    options = dict(teacher_epochs=2, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
    args = config(tmp_path / "run", attention_weights=[1.0], **options)
    trainer = NADTrainer(tiny_vit(), args, tiny_samples(), tiny_samples())
    trainer.args.report_to = ["wandb"]
    trainer.train()
    (theirs,) = seen
    assert (theirs.num_train_epochs, theirs.max_steps, theirs.report_to) == (2, -1, [])
    assert (theirs.save_strategy, theirs.eval_strategy) == ("no", "no")
    assert not Path(theirs.output_dir).exists() and not Path(theirs.output_dir).is_relative_to(tmp_path)
    args = trainer.args
    assert (args.max_steps, args.report_to, args.output_dir) == (3, ["wandb"], str(tmp_path / "run"))
    assert (args.save_strategy, args.eval_strategy) == ("steps", "steps")


class Interrupting(list):
    """Samples of which the one that is read after so many others presses Ctrl-C."""

    left = -1

    def __getitem__(self, row):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().__getitem__(row)


@pytest.mark.parametrize("overwrite", [False, True])
def test_resumed_in_its_own_folder_equals_uninterrupted(tmp_path, overwrite):
    options = dict(max_steps=5, per_device_train_batch_size=4, save_strategy="steps", save_steps=3)
    whole = trained(tmp_path / "whole", **options)
    options |= dict(attention_weights=WEIGHTS["tiny_vit"], overwrite_output_dir=overwrite)

    def begun(read):
        made = NADTrainer(tiny_vit(), config(tmp_path / "run", **options), Interrupting(tiny_samples()))
        made.train_dataset.left = read
        return made

    with pytest.raises(KeyboardInterrupt, match="the last whole checkpoint is .*checkpoint-3"):
        begun(2 + 16 + 16 + 1).train()  # after looking at the first twice, one epoch of the teacher and one of the student
    resumed = begun(13)
    with pytest.raises(KeyboardInterrupt, match="at step 3: the last whole checkpoint is .*checkpoint-3"):
        resumed.train(resume_from_checkpoint=True)  # while the teacher is made again
    resumed.train_dataset.left = -1
    resumed.train(resume_from_checkpoint=True)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name
    for name, value in resumed.teacher.state_dict().items():
        assert torch.equal(value, whole.teacher.state_dict()[name]), name


def test_a_run_that_fails_leaves_no_hook(tmp_path):
    trainer = NADTrainer(tiny_vit(), config(tmp_path, attention_weights=[1.0], learning_rate=1e30), tiny_samples())
    with pytest.raises(FloatingPointError, match="diverged"):
        trainer.train()
    assert not any(module._forward_hooks for module in trainer.model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_weights": [1.0, 1.0]}, r"2 values and ViTForImageClassification 1 stages \(vit.layers.0\)"),
        ({"activation_checkpointing": True}, "leave activation_checkpointing off"),
    ],
)
def test_refusals(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        NADTrainer(tiny_vit(), config(tmp_path, **options), tiny_samples())


class Flat(torch.nn.Sequential):
    """Convolutions that keep the image's size."""

    def __init__(self):
        super().__init__(*[torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)])

    def forward(self, x):
        return super().forward(x).mean((2, 3))


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (swin, 32),
        (lambda: timm_network("swin_tiny_patch4_window7_224", model_args=dict(embed_dim=12, depths=(1, 1, 2, 1))), 224),
        (lambda: load_classifier(Flat(), num_labels=3, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_size=16), 16),
    ],
)
def test_unknown_structures_are_refused_at_construction(tmp_path, make, size):
    model = make()
    model.image_processor = type(PROCESSOR)(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    with pytest.raises(ValueError, match="NAD finds no stages in"):
        NADTrainer(model, config(tmp_path), tiny_samples())
