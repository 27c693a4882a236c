"""D3Trainer against the formulas: the gradient, the loop, the constraint, the log, resuming."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import SGD, tiny_resnet, tiny_samples, tiny_timm_vit, tiny_vit
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from d3_hf import load_classifier
from d3_hf.data.load import load_images, retain_split
from d3_hf.data.preprocessing import Preprocessing
from d3_hf.defenses.d3.trainer import D3Config, D3Trainer
from d3_hf.defenses.fine_tuning import FineTuningConfig, FineTuningTrainer
from d3_hf.defenses.shared import geometry
from d3_hf.models.architectures import processor_of


def config(folder, **options):
    defaults = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        epsilon=0.5,
        learning_rate=0.01,
        **SGD,
    )
    return D3Config(**({"warm_start": "random", "lambda_clean": 4.0, "sam_rho": 0.0} | defaults | options))


class Recorder(D3Trainer):
    """Records, at the overridable seams, what reaches the optimizer and what leaves the projection."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches, self.gradients, self.before, self.norms = [], [], [], []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches.append(dict(inputs))
        return super().training_step(model, inputs, num_items_in_batch)

    def finish_gradient(self, window_loss):
        objective = super().finish_gradient(window_loss)
        self.before.append(copy.deepcopy(self.model.state_dict()))
        self.gradients.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})
        return objective

    def optimizer_step(self):
        super().optimizer_step()
        self.norms.append(torch.stack(geometry.norms(self.weights())))


def objective(model, batch, args, references):
    """The paper's objective in the model's own precision, written out slowly."""
    dtype = next(model.parameters()).dtype
    losses = F.cross_entropy(model(pixel_values=batch["pixel_values"].to(dtype)).logits, batch["labels"], reduction="none")
    if args.hinge == "sample":
        hinge = sum(max(loss - args.epsilon, loss * 0) for loss in losses) / len(losses)
    else:
        hinge = max(losses.mean() - args.epsilon, losses.mean() * 0)
    parameters = dict(model.named_parameters())
    distance = sum(((parameters[name] - reference.to(dtype)) ** 2).sum().sqrt() for name, reference in references.items())
    scale = args.lambda_clean + 1 if args.scale_objective and args.lambda_clean > 1 else 1
    return (args.lambda_clean * hinge - distance) / scale


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hinge": "batch"},
        {"hinge": "batch", "epsilon": 50.0},
        {"hinge": "sample", "epsilon": 50.0},
        {"epsilon": 0.0},
        {"lambda_clean": 0.5},
        {"lambda_clean": 7.0, "scale_objective": False},
        {"target_modules": "all-linear"},
        {"warm_start": "near"},
        {"warm_start": "middle"},
        {"warm_start": "far"},
        {"warm_start": "noise", "projection": "ball"},
        {"projection": "none"},
    ],
    ids=str,
)
def test_gradient_equals_finite_differences(tmp_path, make, options):
    args = config(tmp_path, max_steps=1, batch_norm="eval", **options)
    model = make()
    initial = copy.deepcopy(model.state_dict())
    trainer = Recorder(model, args, tiny_samples())
    trainer.train()
    (batch,) = trainer.batches
    references = {segment.name: initial[segment.name].double() for segment in trainer.segments}
    double = make().double()
    double.load_state_dict(trainer.before[0])
    double.eval()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        directions = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in double.named_parameters()}
        slope = sum((trainer.gradients[0][n].double() * d).sum() for n, d in directions.items() if n in trainer.gradients[0])
        values, step = [], 1e-6
        for sign in (1, -1):
            shifted = copy.deepcopy(double)
            with torch.no_grad():
                for name, parameter in shifted.named_parameters():
                    parameter += sign * step * directions[name]
            values.append(objective(shifted, batch, args, references))
        difference = ((values[0] - values[1]) / (2 * step)).item()
        assert slope.item() == pytest.approx(difference, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("hinge", ["sample", "batch"])
@pytest.mark.parametrize("projection", ["sphere", "ball"])
def test_ten_steps_equal_a_plain_loop(tmp_path, hinge, projection):
    args = config(
        tmp_path, max_steps=10, hinge=hinge, projection=projection, lambda_clean=4.0, target_modules=["q_proj", "classifier"]
    )
    model = tiny_vit()
    trainer = Recorder(model, args, tiny_samples())
    trainer.train()
    plain = tiny_vit()
    references = {s.name: plain.state_dict()[s.name].clone() for s in trainer.segments}
    parameters = dict(plain.named_parameters())
    generator = torch.Generator().manual_seed(args.seed)
    with torch.no_grad():
        for name, reference in references.items():  # U(-1/2, 1/2), rescaled: the authors' start
            drawn = torch.rand(reference.shape, generator=generator) - 0.5
            parameters[name].copy_(drawn / drawn.norm() * reference.norm())
    optimizer = torch.optim.SGD(plain.parameters(), lr=args.learning_rate, momentum=0.9)
    plain.train()
    for k, batch in enumerate(trainer.batches):
        optimizer.param_groups[0]["lr"] = args.learning_rate * 0.5 * (1 + math.cos(math.pi * k / 10))
        optimizer.zero_grad()
        objective(plain, batch, args, references).backward()
        optimizer.step()
        with torch.no_grad():
            for name, reference in references.items():
                factor = reference.norm() / parameters[name].norm()
                parameters[name].mul_(factor if projection == "sphere" else min(factor, torch.ones(())))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, parameters[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_objective_and_parts_are_logged(tmp_path):
    args = config(tmp_path, max_steps=1)
    model = tiny_vit()
    initial = copy.deepcopy(model.state_dict())
    trainer = Recorder(model, args, tiny_samples())
    trainer.train()
    (batch,) = trainer.batches
    reference = {"classifier.weight": initial["classifier.weight"]}
    model.load_state_dict(trainer.before[0])
    losses = F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"], reduction="none")
    logged = trainer.state.log_history[0]
    assert logged["objective"] == pytest.approx(objective(model, batch, args, reference).item(), rel=1e-5)
    assert logged["clean_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert logged["active_fraction"] == (losses > args.epsilon).float().mean().item()
    assert 0 < logged["distance"] <= 2


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet, tiny_timm_vit])
def test_sphere_holds_after_every_step_save_and_reload(tmp_path, make):
    args = config(tmp_path, max_steps=4, learning_rate=0.3, target_modules="all-linear")
    trainer = Recorder(make(), args, tiny_samples())
    trainer.train()
    radii = torch.stack(trainer.radii)
    for norms in trainer.norms:
        torch.testing.assert_close(norms, radii, rtol=1e-5, atol=0)
    trainer.save_model()
    reloaded = type(trainer.model).from_pretrained(tmp_path)
    parameters = dict(reloaded.named_parameters())
    for segment, radius in zip(trainer.segments, trainer.radii, strict=True):
        name, _, part = segment.name.partition("[")
        assert segment.of(parameters[name]).norm().item() == pytest.approx(radius.item(), rel=1e-5)
    images = torch.stack([sample["pixel_values"] for sample in tiny_samples()])
    trainer.model.eval(), reloaded.eval()
    with torch.no_grad():
        assert torch.equal(trainer.model(pixel_values=images).logits, reloaded(pixel_values=images).logits)


def test_sphere_holds_after_loading_the_best_model(tmp_path):
    args = config(
        tmp_path, max_steps=6, learning_rate=0.5, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="accuracy",
    )  # fmt: skip
    trainer = D3Trainer(tiny_vit(), args, tiny_samples(), tiny_samples(12, seed=1))
    trainer.train()
    norms = torch.stack(geometry.norms(trainer.weights()))
    torch.testing.assert_close(norms, torch.stack(trainer.radii), rtol=1e-5, atol=0)
    best = tiny_vit(seed=9).from_pretrained(trainer.state.best_model_checkpoint)
    for (name, got), want in zip(trainer.model.state_dict().items(), best.state_dict().values(), strict=True):
        assert torch.equal(got, want), name


def test_far_starts_at_the_largest_distance(tmp_path):
    trainer = Recorder(tiny_vit(), config(tmp_path, warm_start="far", target_modules="all-linear"), tiny_samples())
    total = 2 * sum(trainer.radii)
    trainer.start()
    assert sum(geometry.distances(trainer.weights(), trainer.references)) == pytest.approx(total.item(), rel=1e-6)
    trainer.train()
    assert 0 <= sum(geometry.distances(trainer.weights(), trainer.references)) <= total * (1 + 1e-6)


@pytest.mark.parametrize("hinge", ["sample", "batch"])
def test_four_micro_batches_equal_one_window(tmp_path, hinge):
    weights = []
    for size, accumulation in ((8, 1), (2, 4)):
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, hinge=hinge, max_steps=5)
        trainer = D3Trainer(tiny_vit(), config(tmp_path, **options), tiny_samples(20))
        trainer.train()
        logs = [
            {k: log[k] for k in ("objective", "clean_loss", "active_fraction", "distance")}
            for log in trainer.state.log_history[:5]
        ]
        weights.append((trainer.model.state_dict(), logs))
    for name, value in weights[0][0].items():
        torch.testing.assert_close(weights[1][0][name], value, rtol=1e-5, atol=1e-5)
    for one, four in zip(weights[0][1], weights[1][1], strict=True):
        assert four == pytest.approx(one, rel=1e-4)


def test_optimizer_step_is_called_once_per_update_also_in_a_second_train(tmp_path):
    trainer = Recorder(tiny_vit(), config(tmp_path, max_steps=3), tiny_samples())
    trainer.train()
    trainer.train()
    assert len(trainer.norms) == 6


def test_nan_loss_raises_and_is_no_satisfied_constraint(tmp_path):
    samples = tiny_samples()
    for sample in samples:
        sample["pixel_values"] = sample["pixel_values"] * float("nan")
    for hinge in ("sample", "batch"):
        trainer = Recorder(tiny_vit(), config(tmp_path, hinge=hinge), samples)
        with pytest.raises(FloatingPointError, match="clean loss is nan at step 0"):
            trainer.train()
        assert trainer.norms == [] and not (tmp_path / "model.safetensors").exists()


def test_a_run_in_which_nothing_moved_raises(tmp_path):
    trainer = D3Trainer(tiny_vit(), config(tmp_path, learning_rate=0.0), tiny_samples())
    with pytest.raises(RuntimeError, match="no selected weight moved"):
        trainer.train()


@pytest.mark.parametrize("policy", ["train", "eval", "frozen"])
def test_batch_norm_policies(tmp_path, policy):
    model = tiny_resnet()
    before = copy.deepcopy(model.state_dict())
    D3Trainer(model, config(tmp_path, batch_norm=policy), tiny_samples()).train()
    after = model.state_dict()
    statistics = all(torch.equal(before[n], after[n]) for n in after if n.endswith("running_mean"))
    scales = all(torch.equal(before[n], after[n]) for n in after if n.endswith("normalization.weight"))
    assert statistics == (policy != "train") and scales == (policy == "frozen")


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet, tiny_timm_vit])
def test_resume_equals_the_uninterrupted_run(tmp_path, make):
    options = dict(max_steps=8, save_strategy="steps", save_steps=5, per_device_train_batch_size=4)
    whole = D3Trainer(make(), config(tmp_path / "whole", **options), tiny_samples(18))
    whole.train()
    resumed = D3Trainer(make(), config(tmp_path / "resumed", **options), tiny_samples(18))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    for (name, got), want in zip(resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(got, want), name
    assert resumed.relative_distances() == whole.relative_distances()


def ten_classes(names=None):
    model = tiny_vit()
    model.classifier = torch.nn.Linear(8, 10)
    model.config.id2label = dict(enumerate(names or [f"LABEL_{i}" for i in range(10)]))
    return model


def test_resume_in_the_middle_of_an_epoch_draws_the_same_crops(tmp_path):
    retain, _ = retain_split(load_images("digits")["train"], count=40)
    options = dict(max_steps=9, save_strategy="steps", save_steps=7, epsilon=0.0)  # four batches of ten an epoch
    runs = []
    for name, checkpoint in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-7"))):
        torch.manual_seed(0)
        args = config(tmp_path / name, per_device_train_batch_size=10, **options)
        trainer = D3Trainer(ten_classes(), args, retain)
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(trainer)
    for (name, got), want in zip(runs[1].model.state_dict().items(), runs[0].model.state_dict().values(), strict=True):
        assert torch.equal(got, want), name
    assert runs[0].train_dataset._draws()[0].tolist() == runs[1].train_dataset._draws()[0].tolist()
    assert int(runs[0].train_dataset._epoch) == 2


def test_other_column_names_point_to_load_images(tmp_path):
    digits = load_images("digits")["train"].select(range(20)).rename_column("image", "img")
    with pytest.raises(ValueError, match=r"no column image, only img, label: load_images\(dataset\)"):
        D3Trainer(ten_classes(), config(tmp_path), digits)
    assert len(load_images(digits)["train"]) == 20


def test_labels_that_are_not_the_models_are_refused(tmp_path):
    digits = load_images("digits")["train"].select(range(20))
    with pytest.raises(ValueError, match="classes"):
        D3Trainer(tiny_vit(), config(tmp_path), digits)


def test_resuming_with_another_reference_is_refused(tmp_path):
    options = dict(max_steps=2, save_strategy="steps", save_steps=1)
    D3Trainer(tiny_vit(), config(tmp_path, **options), tiny_samples()).train()
    other = D3Trainer(tiny_vit(seed=1), config(tmp_path, **options), tiny_samples())
    with pytest.raises(ValueError, match="checkpoint-1 belongs to a run from another model"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_saved_folder_holds_no_pickle(tmp_path):
    trainer = D3Trainer(tiny_vit(), config(tmp_path), tiny_samples())
    trainer.train()
    trainer.save_model()
    assert {p.name for p in Path(tmp_path).iterdir()} == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json", "purification.json",
        "purification_training.png",
    }  # fmt: skip


def test_timms_processor_is_part_of_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(TimmWrapperImageProcessor, "save_pretrained", lambda *arguments: pytest.fail("it would only warn"))
    model = tiny_timm_vit()
    model.image_processor = processor_of(model.config)
    trainer = D3Trainer(model, config(tmp_path), tiny_samples())
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "preprocessor_config.json").exists()
    assert Preprocessing.from_processor(load_classifier(tmp_path).image_processor) == trainer.preprocessing


def test_fine_tuning_controls(tmp_path):
    def run(**options):
        model = tiny_vit()
        args = FineTuningConfig(
            str(tmp_path), max_steps=2, learning_rate=0.01, disable_tqdm=True, use_cpu=True, **SGD, **options
        )
        trainer = FineTuningTrainer(model, args, tiny_samples())
        trainer.train()
        return trainer, model.classifier.weight.detach()

    start = tiny_vit().classifier.weight.detach()
    trainer, tuned = run()
    assert trainer.method == "FT" and 0 < (tuned - start).norm() < 0.2 * start.norm()
    trainer, drawn = run(reinitialize_head=True)
    assert trainer.method == "FT-init" and (drawn - start).norm() > 0.7 * start.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_clean": 0}, "lambda_clean must be > 0"),
        ({"lambda_clean": float("nan")}, "lambda_clean must be > 0"),
        ({"epsilon": -0.1}, "epsilon must be >= 0"),
        ({"hinge": "mean"}, "hinge must be one of sample, batch"),
        ({"warm_start": "close"}, "warm_start must be one of"),
        ({"projection": "cube"}, "projection must be one of"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"batch_norm": "off"}, "batch_norm must be one of"),
        ({"crop_padding": -1}, "crop_padding must be >= 0"),
        ({"hub_token": "hf_secret"}, "hub_token would end up in logs"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must stay 0"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        config(tmp_path, **options)
    assert "hf_secret" not in str(caught.value)


def without_processor():
    model = tiny_vit()
    del model.image_processor
    return model


@pytest.mark.parametrize(
    ("make", "samples", "message"),
    [
        (without_processor, tiny_samples(), "no image processor for ViTForImageClassification"),
        (lambda: torch.nn.Linear(2, 2), tiny_samples(), "Linear is no transformers model"),
        (tiny_vit, [{"pixel_values": s["pixel_values"]} for s in tiny_samples()], "needs a tensor column `labels`"),
    ],
)
def test_bad_models_and_data(tmp_path, make, samples, message):
    with pytest.raises(ValueError, match=message):
        D3Trainer(make(), config(tmp_path), samples).train()
