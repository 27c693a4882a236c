"""Base tuning: where it starts, what it pulls to, what is left of the victim, and what it refuses."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from every_defence import build
from tiny import tiny_dinov2, tiny_resnet, tiny_samples, tiny_timm_vit, tiny_vit
from tiny_trained import QUIET, base_of, differing, trained

from d3_hf.defenses.base_tuning import BaseTuningConfig, BaseTuningTrainer, add_pull_gradient
from d3_hf.defenses.fine_tuning import FineTuningConfig, FineTuningTrainer
from d3_hf.defenses.shared.base_start import between
from d3_hf.models.source import Source
from d3_hf.publishing.card import render_card

HEADS = {tiny_vit: "classifier", tiny_dinov2: "classifier", tiny_resnet: "classifier.1", tiny_timm_vit: "timm_model.head"}


def trainer_of(folder, make=tiny_vit, model=None, samples=None, **options):
    args = BaseTuningConfig(str(folder), **(QUIET | {"learning_rate": 0.02, "base_model": base_of(make)} | options))
    return BaseTuningTrainer(model or trained(make), args, samples or tiny_samples(40))


def draw(*shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


SHAPES = [(5, 7), (3, 4, 2, 2), (6,)]


def test_the_gradient_of_the_pull_equals_autograd():
    weights, base, gradients = (draw(*SHAPES, seed=seed) for seed in (0, 1, 2))
    leaves = [weight.clone().requires_grad_() for weight in weights]
    squares = sum(((leaf - origin) ** 2).sum() for leaf, origin in zip(leaves, base, strict=True))
    (0.3 / 2 * squares).backward()
    expected = [gradient + leaf.grad for gradient, leaf in zip(gradients, leaves, strict=True)]
    found = add_pull_gradient(gradients, weights, base, 0.3)
    torch.testing.assert_close(gradients, expected)
    torch.testing.assert_close(found, squares.detach())


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.8, 1.0])
def test_between_base_and_victim(keep):
    base, weights = draw(*SHAPES, seed=0), draw(*SHAPES, seed=1)
    found = between(base, weights, keep)
    for value, b, v in zip(found, base, weights, strict=True):
        torch.testing.assert_close(value, (b.double() + keep * (v.double() - b.double())).float())
    assert [torch.equal(*pair) for pair in zip(found, base, strict=True)] == [keep == 0] * 3
    assert [torch.equal(*pair) for pair in zip(found, weights, strict=True)] == [keep == 1] * 3


@pytest.mark.parametrize("make", HEADS)
@pytest.mark.parametrize("keep", [0.0, 0.25])
def test_the_body_starts_between_base_and_victim_under_the_head_of_ft_init(make, keep, tmp_path):
    trainer = trainer_of(tmp_path, make, keep=keep, reinitialize_head=True)
    base, victim = make().state_dict(), trained(make).state_dict()
    assert differing(trainer.model, trained(make)) == []
    trainer.start()
    for name, found in trainer.model.state_dict().items():
        if name.startswith(HEADS[make]) or not found.is_floating_point():
            continue
        torch.testing.assert_close(found, base[name] + keep * (victim[name] - base[name]), rtol=1e-5, atol=1e-6)
    args = FineTuningConfig(str(tmp_path), reinitialize_head=True, **QUIET)
    ft_init = FineTuningTrainer(trained(make), args, tiny_samples(40))
    ft_init.start()
    apart = differing(trainer.model, ft_init.model)
    assert apart and not any(name.startswith(HEADS[make]) for name in apart)


@pytest.mark.parametrize(
    ("keep", "given", "drawn"), [(0.0, None, True), (0.25, None, False), (0.25, True, True), (0.0, False, False)]
)
def test_the_head_is_drawn_anew_where_nothing_of_the_body_is_kept_or_where_asked_for(keep, given, drawn, tmp_path):
    trainer = trainer_of(tmp_path, keep=keep, reinitialize_head=given)
    trainer.start()
    assert ("classifier.weight" in differing(trainer.model, trained(tiny_vit))) == drawn == trainer.args.reinitialize_head


class Watched(BaseTuningTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        self.before, self.batch = copy.deepcopy(self.model), dict(inputs)
        objective = super().training_step(model, inputs, num_items_in_batch)
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        return objective


@pytest.mark.parametrize("make", [tiny_resnet, tiny_dinov2])  # DINOv2 does not use its mask token
def test_the_pull_and_distillation_in_the_objective(make, tmp_path):
    options = QUIET | {"max_steps": 1, "logging_steps": 1, "learning_rate": 0.02, "cutmix": 0, "base_model": base_of(make)}
    args = BaseTuningConfig(str(tmp_path), keep=0.5, base_pull=0.7, distillation=0.4, **options)
    trainer = Watched(trained(make), args, tiny_samples(8))
    trainer.train()
    plain, base = trainer.before.train(), make().state_dict()
    pixels, labels = trainer.batch["pixel_values"], trainer.batch["labels"]
    with torch.no_grad():
        teacher = (trained(make)(pixel_values=pixels).logits / 2).log_softmax(1)
    logits = plain(pixel_values=pixels).logits
    clean = F.cross_entropy(logits, labels)
    divergence = (teacher.exp() * (teacher - (logits / 2).log_softmax(1))).sum(1).mean()
    body = {name: p for name, p in plain.named_parameters() if not name.startswith(HEADS[make]) and name in trainer.gradients}
    pull = sum(((parameter - base[name]) ** 2).sum() for name, parameter in body.items())
    objective = clean + 0.4 * 4 * divergence + 0.7 / 2 * pull
    objective.backward()
    unused = [name for name, _ in plain.named_parameters() if name not in trainer.gradients]
    assert unused == (["dinov2.embeddings.mask_token"] if make is tiny_dinov2 else [])
    for name, gradient in trainer.gradients.items():
        torch.testing.assert_close(gradient, plain.get_parameter(name).grad, rtol=1e-3, atol=1e-5)
    log = trainer.state.log_history[0]
    assert 0.7 / 2 * pull.item() > 0.01 and log["objective"] == pytest.approx(objective.item(), rel=1e-4)
    assert log["clean_loss"] == pytest.approx(clean.item(), rel=1e-4)


@pytest.mark.parametrize(("keep", "distillation", "equal"), [(0.0, 0.0, True), (0.1, 0.0, False), (0.0, 1.0, False)])
def test_nothing_of_the_victims_body_is_left_in_a_tuned_base(keep, distillation, equal, tmp_path):
    other = trained(tiny_vit)
    with torch.no_grad():
        for parameter in other.vit.parameters():
            parameter += 0.05
    options = dict(max_steps=3, keep=keep, distillation=distillation)
    runs = [trainer_of(tmp_path / str(i), model=model, **options) for i, model in enumerate((trained(tiny_vit), other))]
    for run in runs:
        run.train()
    assert (differing(runs[0].model, runs[1].model) == []) == equal


def test_a_strong_pull_holds_the_body_at_the_base(tmp_path):
    base = tiny_vit().state_dict()

    def distance(**options):
        trainer = trainer_of(tmp_path / str(options), num_train_epochs=2, keep=0.5, **options)
        trainer.train()
        state = trainer.model.state_dict()
        return sum(((state[name] - base[name]) ** 2).sum().item() for name in trainer.beginning.base.weights) ** 0.5

    assert distance(base_pull=10.0) < distance() / 2


def test_manifest_and_card_name_the_base_and_the_card_descends_from_the_suspicious_model(tmp_path):
    model = trained(tiny_vit)
    model.source = Source("hub", "them/suspicious", revision="0" * 40)
    trainer = trainer_of(tmp_path, model=model, keep=0.25)
    facts = trainer.facts()
    assert facts["base"].keys() == {"kind", "name", "revision", "sha256", "relative_distance", "keep"}
    assert facts["base"]["name"] == "base" == facts["arguments"]["base_model"] and facts["base"]["keep"] == 0.25
    assert 0 < facts["base"]["relative_distance"] < 1
    card = render_card(facts, None, "purified")
    assert card.data.base_model == "them/suspicious" and card.data.base_model_relation == "finetune"
    text = str(card)
    assert "| base, trusted by the publisher | folder `base` |" in text and facts["base"]["sha256"]["model.safetensors"] in text
    assert "its body was put back towards the base below" in text and base_of(tiny_vit) not in text


def test_a_checkpoint_of_another_start_is_refused(tmp_path):
    trainer_of(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1).train()
    moved = tiny_vit()
    with torch.no_grad():
        moved.vit.embeddings.cls_token += 0.01
    moved.save_pretrained(tmp_path / "moved")
    for options, message in (
        (
            {"base_model": str(tmp_path / "moved")},
            "checkpoint-1 belongs to a run from another base, or from none: resume with its base_model",
        ),
        ({"keep": 0.5}, "checkpoint-1 belongs to a run that began with keep 0.25: resume with it"),
    ):
        shutil.rmtree(tmp_path / "run" / "checkpoint-2", ignore_errors=True)
        with pytest.raises(ValueError, match=message):
            trainer_of(tmp_path / "run", max_steps=2, **options).train(resume_from_checkpoint=True)


def test_a_base_is_asked_for_and_checked_when_the_trainer_is_made(tmp_path):
    for none in ({}, {"base_model": "none"}):  # the word by which a command is told not to look for one
        with pytest.raises(ValueError, match="^base tuning needs base_model: the public model that"):
            BaseTuningConfig(str(tmp_path), **none)
    with pytest.raises(ValueError, match="was fine-tuned from: .* is 1.* above 1 for unrelated networks"):
        trainer_of(tmp_path, model=tiny_vit(seed=1))
    with pytest.raises(ValueError, match="is no base of this ResNetForImageClassification"):
        trainer_of(tmp_path, model=trained(tiny_resnet))


def test_it_is_a_defence_by_name(tmp_path):
    assert isinstance(build("base_tuning", tmp_path), BaseTuningTrainer)
