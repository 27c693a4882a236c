"""D3's distance of features: the distance against its definition, its cut-off, and its place in the objective."""

import copy

import pytest
import torch
import torch.nn.functional as F
from raising import D3, build, same_weights
from tiny import tiny_resnet, tiny_samples, tiny_timm_vit, tiny_vit
from transformers import TrainerCallback

from d3_hf.defenses.d3.config import BY_NETWORK, rate_on_cnns
from d3_hf.models.features import recorded_input
from d3_hf.models.head import find_head
from d3_hf.training.features import cut_off, feature_distances

FEATURES = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))


def slow_distances(features, others):
    """The squared distance of unit vectors, image by image and entry by entry."""
    found = []
    for f, g in zip(features.double().flatten(1), others.double().flatten(1), strict=True):
        f_length, g_length = sum(x * x for x in f) ** 0.5, sum(x * x for x in g) ** 0.5
        found.append(sum((x / f_length - y / g_length) ** 2 for x, y in zip(f, g, strict=True)))
    return torch.stack(found).float()


def test_feature_distances_equal_the_definition():
    features, others = FEATURES
    torch.testing.assert_close(feature_distances(features, others), slow_distances(features, others))
    torch.testing.assert_close(feature_distances(3 * features, features), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(feature_distances(-features, features), torch.full((5,), 4.0))
    maps = features.reshape(5, 7, 1, 1)
    torch.testing.assert_close(feature_distances(maps, others.reshape(5, 7, 1, 1)), slow_distances(features, others))


def test_their_gradient_equals_finite_differences():
    features, others = FEATURES[0].clone().requires_grad_(), FEATURES[1]
    (gradient,) = torch.autograd.grad(feature_distances(features, others).sum(), features)
    step = 1e-4
    for row, column in ((0, 0), (3, 2), (4, 6)):
        moved = torch.zeros_like(others)
        moved[row, column] = step
        there, here = (slow_double((FEATURES[0].double() + s * moved.double()), others) for s in (1, -1))
        assert gradient[row, column].item() == pytest.approx(((there - here) / (2 * step)).item(), rel=1e-3, abs=1e-5)


def slow_double(features, others):
    pairs = (f / f.norm(dim=1, keepdim=True) for f in (features, others.double()))
    one, two = pairs
    return ((one - two) ** 2).sum()


def test_an_image_that_is_far_enough_adds_nothing():
    distances = torch.tensor([0.5, 2.0, 2.1], requires_grad=True)
    kept = cut_off(distances, 2.0)
    assert kept.tolist() == [0.5, 2.0, 0.0]
    assert torch.autograd.grad(kept.sum(), distances)[0].tolist() == [1, 1, 0]


class Recorder(TrainerCallback):
    """The gradients before each step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def features_of(model, pixels):
    with recorded_input(model.get_submodule(find_head(model, pixels.shape[-2:]))) as found:
        logits = model(pixel_values=pixels).logits
    return logits, found[0].flatten(1)


@pytest.mark.parametrize("distance", ["features", "both"])
@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet, tiny_timm_vit])
def test_the_objective(tmp_path, make, distance):
    suspicious, samples = make(), tiny_samples(8)
    options = dict(per_device_train_batch_size=8, max_steps=1, distance=distance, feature_weight=0.7)
    options |= dict(lambda_clean=4.0, sam_rho=0.0)
    made = build(D3, tmp_path, make(), samples, feature_threshold=0.05, **options)
    recorder = Recorder()
    made.add_callback(recorder)
    made.start()
    plain = copy.deepcopy(made.model).train()
    made.train()
    pixels = torch.stack([s["pixel_values"] for s in samples])
    labels = torch.tensor([s["labels"] for s in samples])
    with torch.no_grad():
        _, before = features_of(suspicious.eval(), pixels)
    logits, after = features_of(plain, pixels)
    hinges = F.relu(F.cross_entropy(logits, labels, reduction="none") - 0.1)
    directions = F.normalize(after, dim=1) - F.normalize(before, dim=1)
    distances = (directions**2).sum(1)
    kept = torch.where(distances <= 0.05, distances, torch.zeros(()))
    moved = (plain.get_parameter(made.segments[0].name) - made.references[0]).norm() if distance == "both" else 0
    objective = (4 * (hinges.mean() - 0.7 * kept.mean()) - moved) / 5
    objective.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(recorder.gradients[0][name], parameter.grad, rtol=1e-3, atol=1e-5)
    log = made.state.log_history[0]
    assert log["objective"] == pytest.approx(objective.item(), rel=1e-4, abs=1e-6)
    assert log["feature_distance"] == pytest.approx(distances.mean().item(), rel=1e-3, abs=1e-6)
    same_weights(made.suspect.model, make())


def test_two_micro_batches_equal_one(tmp_path):
    runs = []
    for size, steps in ((8, 1), (4, 2)):
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps, distance="both", max_steps=4)
        runs.append(build(D3, tmp_path, tiny_vit(), tiny_samples(20), **options))
        runs[-1].train()
    same_weights(runs[1].model, runs[0].model, rtol=0, atol=1e-6)
    for one, two in zip(*(run.state.log_history[:4] for run in runs), strict=True):
        assert two["feature_distance"] == pytest.approx(one["feature_distance"], rel=1e-3, abs=1e-6)


def test_one_more_forward_pass_also_with_distillation(tmp_path):
    made, passes = build(D3, tmp_path, tiny_vit(), distance="both", distillation=1.0), []
    made.suspect.model.register_forward_hook(lambda *passed: passes.append(None))
    made.train()
    assert len(passes) == made.state.global_step == 3


def test_features_move_away(tmp_path):
    moved = {}
    for distance in ("weights", "both"):
        options = dict(max_steps=30, feature_weight=5.0, warm_start="near")
        made = build(D3, tmp_path, tiny_vit(), distance=distance, **options)
        made.train()
        pixels = torch.stack([s["pixel_values"] for s in tiny_samples()])
        with torch.no_grad():
            pairs = [features_of(model.eval(), pixels)[1] for model in (made.model, tiny_vit())]
        moved[distance] = feature_distances(*pairs).mean()
    assert moved["both"] > moved["weights"] + 0.3


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the batch hinge gates the gradient as a whole"):
        build(D3, tmp_path, tiny_vit(), distance="features", hinge="batch")
    with pytest.raises(ValueError, match="active_set does not fit: distillation and the distance of features"):
        build(D3, tmp_path, tiny_vit(), distance="both", active_set=True)
    with pytest.raises(ValueError, match="feature_threshold must be in"):
        build(D3, tmp_path, tiny_vit(), distance="both", feature_threshold=5)


@pytest.mark.parametrize(("make", "network"), [(tiny_vit, "LayerNorm"), (tiny_resnet, "BatchNorm")])
def test_what_is_left_open_follows_the_network_and_a_rate_of_zero_moves_nothing(tmp_path, make, network):
    config_class, trainer_class = D3
    args = config_class(str(tmp_path), max_steps=2, use_cpu=True, disable_tqdm=True, learning_rate=0.0)
    made = trainer_class(make(), args, tiny_samples())
    said = BY_NETWORK[network] | {"learning_rate": 0.0}  # what is given wins
    assert {name: getattr(made.args, name) for name in said} == said and made.args.warm_start == "near"
    assert args.lambda_clean is args.sam_rho is None
    rates = [rate_on_cnns(count) for count in (300, 500, 2500, 50_000, None)]
    assert rates == [0.035, 0.045, 0.1, 0.1, 0.1]
    free = trainer_class(make(), config_class(str(tmp_path), use_cpu=True), tiny_samples(25))
    assert free.args.learning_rate == rate_on_cnns(25) == 0.01 or network == "LayerNorm"
    with pytest.raises(RuntimeError, match="no selected weight moved"):
        made.train()


def test_steps_that_the_rule_brings_need_whole_gradients_and_do_not_join_dual_ascent(tmp_path):
    config_class, trainer_class = D3
    accumulating = config_class(str(tmp_path), use_cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="leave gradient_accumulation_steps at 1 and fp16 off, or set sam_rho to 0"):
        trainer_class(tiny_resnet(), accumulating, tiny_samples())
    assert trainer_class(tiny_vit(), accumulating, tiny_samples()).args.sam_rho == 0
    assert trainer_class(tiny_resnet(), config_class(str(tmp_path), use_cpu=True, dual_rate=0.1), tiny_samples()).sam_rho == 0
