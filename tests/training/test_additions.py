"""What can be added to D3 and its controls: cutout, SAM, dual ascent, epsilon from the victim; and all that is refused."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from raising import COMMON, D3, FT, build, raw_images, same_weights
from tiny import tiny_resnet, tiny_samples, tiny_vit

from d3_hf.data.augmentation import Augmentation
from d3_hf.data.images import RawImages
from d3_hf.data.training_images import TrainingImages
from d3_hf.defenses.d3.trainer import D3Config, D3Trainer
from d3_hf.defenses.fst import FSTConfig, FSTTrainer
from d3_hf.defenses.ft_sam import FTSAMConfig, FTSAMTrainer
from d3_hf.publishing import manifest
from d3_hf.training import trainer
from d3_hf.training.config import PurifyConfig
from d3_hf.training.trainer import PurifyTrainer

# Cutout ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 4, 5])
def test_cutout_equals_a_slow_reference_and_leaves_crops_and_flips(side):
    pixels, epoch, fill = raw_images(20).images[:, :, :, :11], 3, (1, 2, 3)
    plain, cut = (
        TrainingImages(pixels, torch.zeros(20, dtype=torch.int64), Augmentation(2, True, 5, cutout, fill))
        for cutout in (0, side)
    )
    plain.set_epoch(epoch), cut.set_epoch(epoch)
    rows = list(range(20))[::-1]
    expected = plain.__getitems__(rows)["pixel_values"]
    got = cut.__getitems__(rows)["pixel_values"]
    assert got.dtype == torch.uint8 and got.is_contiguous() and not torch.equal(got, expected)
    for image, row in zip(expected, rows, strict=True):
        y, x = (int(bits) >> 33 for bits in np.random.PCG64([5, epoch, 1]).random_raw(2 * (row + 1))[-2:])
        top, left = y % 16 - side // 2, x % 11 - side // 2
        for channel, level in enumerate(fill):
            for i in range(top, top + side):
                for j in range(left, left + side):
                    if 0 <= i < 16 and 0 <= j < 11:
                        image[channel, i, j] = level
    assert torch.equal(got, expected)
    assert len(Augmentation().draws(0, 3)) == 3
    assert torch.equal(cut.__getitems__([7])["pixel_values"][0], got[rows.index(7)])


def test_the_blanked_square_is_the_mean_color(tmp_path):
    black = RawImages(torch.zeros(12, 3, 16, 16, dtype=torch.uint8), torch.arange(12) % 3, raw_images().class_names)
    made = build(FT, tmp_path, tiny_vit(), black, cutout=6, crop_padding=0)
    (batch,) = [made._prepare_inputs(made.train_dataset.__getitems__(list(range(12))))]
    values = batch["pixel_values"]
    blanked = (values != -1).all(1).sum((1, 2))
    assert values[values != -1].abs().max() <= 0.5 / 255 / 0.5 + 1e-6
    assert 3 * 3 <= blanked.min() and blanked.max() <= 36
    made.train()


# Sharpness-aware minimisation --------------------------------------------------------------------------------------------


class Watched(D3Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        self.before, self.batch = copy.deepcopy(self.model), dict(inputs)
        objective = super().training_step(model, inputs, num_items_in_batch)
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        return objective


def test_sharpness_acts_on_the_clean_loss_and_not_on_the_distance(tmp_path):
    rho, epsilon, lambda_ = 0.7, 0.2, 3.0
    options = dict(sam_rho=rho, epsilon=epsilon, lambda_clean=lambda_, max_steps=1)
    made = build((D3Config, Watched), tmp_path, tiny_vit(), **options)
    (reference,) = made.references
    made.train()

    def gradients(model):
        logits = model(pixel_values=made.batch["pixel_values"]).logits
        hinge = torch.relu(F.cross_entropy(logits, made.batch["labels"], reduction="none") - epsilon).mean()
        return torch.autograd.grad(lambda_ / (lambda_ + 1) * hinge, list(model.parameters()))

    first, moved = gradients(made.before), copy.deepcopy(made.before)
    length = sum(((p * g) ** 2).sum() for p, g in zip(moved.parameters(), first, strict=True)).sqrt()
    with torch.no_grad():
        for parameter, gradient in zip(moved.parameters(), first, strict=True):
            parameter += rho * parameter**2 * gradient / length
    expected = dict(zip(made.gradients, gradients(moved), strict=True))
    offset = made.before.classifier.weight - reference
    expected["classifier.weight"] = expected["classifier.weight"] - offset / offset.norm() / (lambda_ + 1)
    for name, gradient in made.gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
def test_fine_tuning_by_sam_is_ft_sam(tmp_path, make):
    made = build(FT, tmp_path / "ft", make(), sam_rho=1.5)
    theirs = build((FTSAMConfig, FTSAMTrainer), tmp_path / "ft_sam", make(), rho=1.5, label_smoothing=0.0)
    made.train()
    theirs.train()
    same_weights(made.model, theirs.model)


# Dual ascent and epsilon -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.3, 3.0])  # lambda grows; lambda reaches 0 and stays
def test_dual_ascent_equals_a_plain_loop(tmp_path, epsilon):
    options = dict(dual_rate=0.7, lambda_clean=1.5, epsilon=epsilon, gradient_accumulation_steps=2, max_steps=8)
    made = build(D3, tmp_path, tiny_vit(), **options)
    batches = []
    collate = made.data_collator
    made.data_collator = lambda batch: batches.append(collate(batch)) or batches[-1]
    made.start()
    plain = copy.deepcopy(made.model).train()
    made.train()
    weight, reference = plain.get_parameter(made.segments[0].name), made.references[0]
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    multiplier, multipliers, objectives = 1.5, [], []
    for step in range(8):
        optimizer.param_groups[0]["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * step / 8))
        pixels, labels = (torch.cat([b[k] for b in batches[2 * step : 2 * step + 2]]) for k in ("pixel_values", "labels"))
        violation = F.cross_entropy(plain(pixel_values=pixels).logits, labels) - epsilon
        lagrangian = (multiplier * violation - (weight - reference).norm()) / (multiplier + 1)
        optimizer.zero_grad()
        lagrangian.backward()
        optimizer.step()
        weight.data *= reference.norm() / weight.data.norm()
        objectives.append(lagrangian.item())
        multiplier = max(0.0, multiplier + 0.7 * violation.item())
        multipliers.append(multiplier)
    logged = [log["lambda"] for log in made.state.log_history[:8]]
    assert logged == pytest.approx(multipliers, rel=1e-4, abs=1e-5)
    assert [log["objective"] for log in made.state.log_history[:8]] == pytest.approx(objectives, rel=1e-3, abs=1e-4)
    assert made.facts()["lambda"] == logged[-1]
    assert (multipliers[-1] > 2) if epsilon == 0.3 else (multipliers[-1] == 0)
    same_weights(made.model, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
@pytest.mark.parametrize(
    ("defence", "options"),
    [(D3, dict(dual_rate=0.3, epsilon=None, distillation=0.5)), (FT, dict(distillation=0.5, reinitialize_head=True))],
)
def test_resume_equals_the_uninterrupted_run(tmp_path, make, defence, options):
    options = dict(max_steps=8, save_strategy="steps", save_steps=5) | options
    whole = build(defence, tmp_path / "whole", make(), tiny_samples(18), **options)
    whole.train()
    resumed = build(defence, tmp_path / "resumed", make(), tiny_samples(18), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    same_weights(resumed.model, whole.model)
    facts = [{n: run.facts().get(n) for n in ("lambda", "epsilon", "teacher_sha256")} for run in (whole, resumed)]
    assert facts[0] == facts[1] and facts[0]["teacher_sha256"]


def test_epsilon_of_the_victim(tmp_path):
    images = raw_images()
    victim = tiny_resnet().eval()
    pixels = (images.images / 255 - 0.5) / 0.5
    with torch.no_grad():
        expected = F.cross_entropy(victim(pixel_values=pixels).logits, images.labels).item()
    made = build(D3, tmp_path, tiny_resnet(), images, epsilon=None, per_device_train_batch_size=5)
    made.train()
    assert made.facts()["epsilon"] == pytest.approx(expected, rel=1e-5)
    given = build(D3, tmp_path, tiny_resnet(), images, epsilon=made.epsilon, per_device_train_batch_size=5)
    given.train()
    same_weights(given.model, made.model)
    assert "epsilon" not in given.facts()


# Off, and refused ------------------------------------------------------------------------------------------------------


def test_off_nothing_is_built_and_nothing_is_recorded(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("built although it is off")

    monkeypatch.setattr(trainer, "Teacher", refuse)
    monkeypatch.setattr(trainer, "WeightAverage", refuse)
    monkeypatch.setattr(D3Trainer, "_mean_loss", refuse)
    monkeypatch.setattr(D3Trainer, "_ascend", refuse)
    for defence in (D3, FT):
        made = build(defence, tmp_path, tiny_vit(), distillation=0.0, average_last=0.0, cutout=0)
        made.train()
        assert [made.facts()["arguments"][name] for name in ("cutout", "distillation", "average_last")] == [0, 0.0, 0.0]
        assert {"lambda", "epsilon", "averaged_epochs", "teacher_sha256"}.isdisjoint(made.facts())
        assert "distillation_loss" not in made.state.log_history[0] and "lambda" not in made.state.log_history[0]
    assert manifest.arguments_of(PurifyConfig(str(tmp_path), cutout=3, use_cpu=True))["cutout"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cutout": -1}, "cutout must be >= 0 and finite"),
        ({"distillation": -0.1}, "distillation must be >= 0 and finite"),
        ({"distillation": math.inf}, "distillation must be >= 0 and finite"),
        ({"average_last": 1.0}, r"average_last must be in \[0, 1\)"),
        ({"average_last": math.nan}, r"average_last must be in \[0, 1\)"),
        ({"average_last": 0.5, "save_strategy": "epoch"}, "average_last with checkpoints"),
        ({"dual_rate": -1.0}, "dual_rate must be >= 0 and finite"),
        ({"dual_rate": 0.1, "scale_objective": False}, "dual_rate needs scale_objective"),
        ({"dual_rate": 0.1, "hinge": "batch"}, "leave hinge at its default"),
        ({"dual_rate": 0.1, "sam_rho": 1.0}, "dual_rate does not go with sam_rho"),
        ({"sam_rho": -1.0}, "sam_rho must be >= 0 and finite"),
        ({"sam_rho": 1.0, "gradient_accumulation_steps": 2}, "sam_rho needs whole, unscaled gradients"),
        ({"distillation": 0.1, "hinge": "batch"}, "with distillation or features use hinge='sample'"),
        ({"epsilon": -0.1}, "epsilon must be >= 0"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        D3Config(str(tmp_path), **(COMMON | options))


@pytest.mark.parametrize(
    ("defence", "images", "options", "message"),
    [
        ((FSTConfig, FSTTrainer), None, {"distillation": 0.1}, "FSTTrainer does not take distillation"),
        ((FTSAMConfig, FTSAMTrainer), None, {"sam_rho": 1.0}, "FTSAMTrainer does not take sam_rho"),
        ((PurifyConfig, PurifyTrainer), None, {"average_last": 0.5}, "PurifyTrainer does not take average_last"),
        (FT, None, {"cutout": 4}, "cutout is for images that the trainer augments"),
        (FT, raw_images(), {"cutout": 16}, "cutout=16 would blank whole images of 16x16"),
        (FT, None, {"average_last": 0.4, "max_steps": 8}, "average_last=0.4 of 2 epochs is one snapshot"),
    ],
)
def test_trainings_that_are_refused(tmp_path, defence, images, options, message):
    with pytest.raises(ValueError, match=message):
        build(defence, tmp_path, tiny_vit(), images, **options).train()


def test_augmentation_that_is_refused():
    with pytest.raises(ValueError, match="cutout must be at least 0 pixels"):
        Augmentation(cutout=-1)


@pytest.mark.parametrize(
    ("defence", "wrote", "options", "make", "message"),
    [
        (FT, {}, {"distillation": 0.5}, tiny_vit, "belongs to a run with another distillation"),
        (FT, {"distillation": 0.5}, {"distillation": 0.5}, lambda: tiny_vit(seed=1), "belongs to a run from another model"),
        (D3, {}, {"dual_rate": 0.1}, tiny_vit, "was written with dual_rate 0.0: resume with it"),
        (D3, {}, {"epsilon": None}, tiny_vit, "was written with epsilon given where now it is measured"),
        (D3, {}, {"target_modules": "all-linear"}, tiny_vit, "belongs to a run that moves classifier.weight"),
        (FT, {}, {"average_last": 0.9, "save_strategy": "no"}, tiny_vit, "does not hold the mean of average_last"),
    ],
)
def test_checkpoints_that_are_refused(tmp_path, defence, wrote, options, make, message):
    saving = dict(max_steps=2, save_strategy="steps", save_steps=1)
    build(defence, tmp_path, tiny_vit(), **(saving | wrote)).train()
    with pytest.raises(ValueError, match=f"checkpoint-1 {message}"):
        build(defence, tmp_path, make(), **(saving | options)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# Options that fit together --------------------------------------------------------------------------------------------


def test_arguments_of_the_optimizer(tmp_path):
    folder = str(tmp_path)
    assert D3Config(folder, optim="adamw_torch", optim_args="eps=1e-7").optim_args == "eps=1e-7"
    for wrong in ("null", "betas=(0.8, 0.9)"):
        with pytest.raises(ValueError, match="optim_args must be name=value"):
            D3Config(folder, optim="adamw_torch", optim_args=wrong)


def test_a_strategy_that_needs_evaluation_images_is_refused_before_the_training(tmp_path):
    with pytest.raises(ValueError, match="eval_dataset"):
        build(D3, tmp_path, tiny_vit(), eval_strategy="epoch")
