"""D3 with a public base: where the body starts, what moves from there, what is refused."""

import pytest
import torch
from tiny import SGD, tiny_samples, tiny_timm_vit, tiny_vit
from tiny_trained import QUIET, base_of, differing, trained

from d3_hf.defenses.d3 import D3Config, D3Trainer


def build(folder, make=tiny_vit, base=None, **options):
    options = {"learning_rate": 0.05, "num_train_epochs": 2} | SGD | options
    args = D3Config(str(folder), base_model=base or base_of(make), **({"warm_start": "random"} | QUIET | options))
    return D3Trainer(trained(make), args, tiny_samples(40))


@pytest.mark.parametrize("target_modules", ["head", "all-linear"])
@pytest.mark.parametrize("make", [tiny_vit, tiny_timm_vit])
def test_the_body_starts_between_base_and_suspicious_model_and_the_head_as_without_a_base(tmp_path, make, target_modules):
    base, suspicious = make().state_dict(), trained(make).state_dict()
    trainer = build(tmp_path, make, keep=0.4, target_modules=target_modules)
    trainer.start()
    body = trainer.beginning.base.weights
    assert 0 < len(body) < len(suspicious)
    for name, found in trainer.model.state_dict().items():
        if name in body:
            torch.testing.assert_close(found, base[name] + 0.4 * (suspicious[name] - base[name]), rtol=1e-5, atol=1e-6)
    args = D3Config(str(tmp_path / "plain"), warm_start="random", learning_rate=0.05, **(QUIET | SGD))
    plain = D3Trainer(trained(make), args, tiny_samples(40))
    plain.start()
    if target_modules == "head":
        assert all(name in body for name in differing(trainer.model, plain.model))
    # The distance is that from the suspicious model, the sphere too.
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    for segment, reference, radius in zip(trainer.segments, trainer.references, trainer.radii, strict=True):
        assert torch.equal(reference, segment.of(suspicious[names[id(segment.parameter)]]))
        assert radius.item() == pytest.approx(reference.norm().item())


def test_it_trains_from_there_and_says_so(tmp_path, capsys):
    trainer = build(tmp_path, target_modules="all-linear")
    trainer.train()
    for weight, radius in zip(trainer.weights(), trainer.radii, strict=True):
        assert weight.norm().item() == pytest.approx(radius.item(), rel=1e-5)
    facts = trainer.facts()["base"]
    assert facts["name"] == "base" and 0 < facts["relative_distance"] < 1 and facts["keep"] == 0.25
    assert "of which the start keeps 0.25" in capsys.readouterr().out


def test_with_all_kept_a_base_changes_nothing(tmp_path):
    with_base = build(tmp_path / "base", keep=1.0)
    args = D3Config(str(tmp_path / "plain"), warm_start="random", learning_rate=0.05, num_train_epochs=2, **(QUIET | SGD))
    plain = D3Trainer(trained(tiny_vit), args, tiny_samples(40))
    for trainer in (with_base, plain):
        trainer.train()
    assert differing(with_base.model, plain.model) == []


def test_a_base_of_another_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no base of this ViTForImageClassification"):
        build(tmp_path, base=base_of(tiny_timm_vit))


def test_a_share_outside_of_zero_and_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep"):
        build(tmp_path, keep=1.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "belongs to a run from a base: resume with its base_model"),
        ({"base_model": True, "keep": 0.5}, "belongs to a run that began with keep 0.25"),
    ],
)
def test_a_checkpoint_of_another_start_is_refused(tmp_path, options, said):
    build(tmp_path, save_strategy="steps", save_steps=2).train()
    options = options | ({"base_model": base_of(tiny_vit)} if "base_model" in options else {})
    args = D3Config(str(tmp_path), **(QUIET | SGD | {"learning_rate": 0.05, "num_train_epochs": 2} | options))
    with pytest.raises(ValueError, match=said):
        D3Trainer(trained(tiny_vit), args, tiny_samples(40)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_of_a_run_without_a_base_is_refused(tmp_path):
    args = D3Config(str(tmp_path), save_strategy="steps", save_steps=2, **(QUIET | SGD | {"learning_rate": 0.05}))
    D3Trainer(trained(tiny_vit), args, tiny_samples(40)).train()
    with pytest.raises(ValueError, match="belongs to a run from another base, or from none"):
        build(tmp_path, save_strategy="steps", save_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
