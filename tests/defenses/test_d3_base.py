"""D3 towards a public base: where the selected weights start, the balls that they stay in, what is refused."""

import pytest
import torch
from tiny import SGD, tiny_samples, tiny_timm_vit, tiny_vit
from tiny_trained import QUIET, base_of, trained

from d3_hf.defenses.d3 import D3Config, D3Trainer


def build(folder, make=tiny_vit, base=None, **options):
    options = {"target_modules": "all-linear", "learning_rate": 0.05, "num_train_epochs": 2} | SGD | options
    args = D3Config(str(folder), base_model=base or base_of(make), **({"warm_start": "random"} | QUIET | options))
    return D3Trainer(trained(make), args, tiny_samples(40))


class Watched(D3Trainer):
    def optimizer_step(self):
        super().optimizer_step()
        self.reached = [*getattr(self, "reached", []), [w.clone() for w in self.weights()]]


@pytest.mark.parametrize("make", [tiny_vit, tiny_timm_vit])
def test_weights_of_the_body_start_at_the_base_and_stay_in_its_balls(tmp_path, make):
    base, victim = dict(make().named_parameters()), dict(trained(make).named_parameters())
    made = build(tmp_path, make)
    made.__class__ = Watched
    made.start()
    for k, (segment, weight) in enumerate(zip(made.segments, made.weights(), strict=True)):
        name = segment.name.split("[")[0]
        start, suspicious = segment.of(base[name].detach()), segment.of(victim[name].detach())
        if k in made.anchor.centres:
            assert torch.equal(weight, start)
        else:
            assert name.startswith("classifier") or ".head." in name
            assert weight.norm().item() == pytest.approx(suspicious.norm().item(), rel=1e-5)
    made.train()
    assert made.reached
    for weights in made.reached:
        for k, segment in enumerate(made.segments):
            name = segment.name.split("[")[0]
            start, suspicious = segment.of(base[name].detach()), segment.of(victim[name].detach())
            if k in made.anchor.centres:
                assert (weights[k] - start).norm() <= (suspicious - start).norm() * (1 + 1e-5)
            else:
                assert weights[k].norm().item() == pytest.approx(suspicious.norm().item(), rel=1e-5)
    facts = made.facts()["base"]
    assert facts["name"] == "base" and 0 < facts["relative_distance"] < 1


def test_the_head_alone_needs_no_base(tmp_path):
    with pytest.raises(ValueError, match="has none of the selected weights .*select weights of the body"):
        build(tmp_path, target_modules="head")


def test_a_base_of_another_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no base of this ViTForImageClassification"):
        build(tmp_path, base=base_of(tiny_timm_vit))


def test_a_checkpoint_of_a_run_without_the_base_is_refused(tmp_path):
    build(tmp_path, save_strategy="steps", save_steps=2).train()
    args = D3Config(
        str(tmp_path), target_modules="all-linear", **(QUIET | SGD | {"learning_rate": 0.05, "num_train_epochs": 2})
    )
    with pytest.raises(ValueError, match="belongs to a run with another base_model, or none"):
        D3Trainer(trained(tiny_vit), args, tiny_samples(40)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
