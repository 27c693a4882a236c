"""A model is left as it was by everything that runs it, also where it fails: modes, device, hooks, buffers, random numbers."""

import pytest
import torch
from tiny import SIZE, tiny_resnet, tiny_vit
from torch import nn

from d3_hf.attacks.differentiable import pixels_to_logits
from d3_hf.defenses.d3.active_set import Inexact, trained_apart
from d3_hf.defenses.nad.stages import find_stages
from d3_hf.models import load_classifier
from d3_hf.models.batch_norm import batch_norms, reestimate_batch_norm
from d3_hf.models.evaluating import evaluating
from d3_hf.models.head import find_head

IMAGES = torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def half_frozen(model):
    """In training mode but for one layer: what one flag of the whole model would not bring back."""
    model.train()
    next(module for module in model.modules() if not list(module.children())).eval()
    next(model.parameters()).requires_grad_(False)
    return model


def break_head(model):
    """Let the last linear layer draw a random number and fail."""

    def fail(module, inputs):
        torch.rand(())
        raise KeyError("broken")

    [module for module in model.modules() if isinstance(module, nn.Linear)][-1].register_forward_pre_hook(fail)


def state_of(model):
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    needs = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return modes, hooks, needs, {name: buffer.tolist() for name, buffer in model.named_buffers()}


def in_evaluation_mode(model):
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        model(pixel_values=IMAGES)


def as_function_of_pixels(model):
    with pixels_to_logits(model) as logits:
        assert not any(parameter.requires_grad for parameter in model.parameters())
        logits(IMAGES)


RUNS = [
    in_evaluation_mode,
    as_function_of_pixels,
    lambda model: find_head(model, (SIZE, SIZE)),
    lambda model: find_stages(model, (SIZE, SIZE)),
    lambda model: trained_apart(model, batch_norms(model), (SIZE, SIZE)),
    lambda model: trained_apart(model, [], (SIZE, SIZE)),
]


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
@pytest.mark.parametrize("run", RUNS, ids=["evaluating", "pixels", "head", "stages", "apart", "coupled"])
def test_left_as_it_was(make, run):
    model = half_frozen(make())
    before, random = state_of(model), torch.get_rng_state()
    try:
        run(model)
    except Inexact:  # BatchNorm in training mode couples the images
        assert make is tiny_resnet
    assert state_of(model) == before and torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
@pytest.mark.parametrize("run", RUNS, ids=["evaluating", "pixels", "head", "stages", "apart", "coupled"])
def test_left_as_it_was_by_a_failure(make, run):
    model = half_frozen(make())
    break_head(model)
    before = state_of(model)
    with pytest.raises((KeyError, ValueError), match="broken"):  # as it is, or told by `probe.run`
        run(model)
    assert state_of(model) == before


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
def test_a_failure_inside_an_active_set_s_probe_costs_no_random_numbers(make):
    model = make()
    break_head(model)
    random = torch.get_rng_state()
    with pytest.raises(KeyError, match="broken"):
        trained_apart(model, [], (SIZE, SIZE))
    assert torch.equal(torch.get_rng_state(), random)


class Moving(nn.Linear):
    """Notes where it is sent; the first move of a broken one fails halfway."""

    def __init__(self, broken):
        super().__init__(2, 2)
        self.moves, self.broken = [], broken

    def to(self, device):
        self.moves.append(device)
        if self.broken and len(self.moves) == 1:
            raise MemoryError("no room")
        return self


@pytest.mark.parametrize("broken", [False, True])
def test_the_device_is_restored_also_where_the_model_does_not_fit(broken):
    model, there = Moving(broken), torch.device("meta")
    try:
        with evaluating(model, there):
            assert not broken and not model.training
    except MemoryError:
        assert broken
    assert model.moves == [there, torch.device("cpu")] and model.training


def test_without_a_device_the_model_stays_where_it_is():
    model = Moving(broken=False)
    with evaluating(model):
        assert not model.training
    assert model.moves == [] and model.training


def test_reestimation_that_fails_leaves_momenta_and_evaluation_mode():
    model = tiny_resnet()
    momenta = [module.momentum for module in batch_norms(model)]

    def batches():
        yield IMAGES
        raise KeyError("broken")

    with pytest.raises(KeyError):
        reestimate_batch_norm(model, batches())
    assert [module.momentum for module in batch_norms(model)] == momenta
    assert not any(module.training for module in model.modules())


def test_batch_norms_are_all_of_them_and_nothing_else():
    kinds = [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2)]
    model = nn.Sequential(nn.GroupNorm(1, 2), kinds[0], nn.Sequential(kinds[1], nn.InstanceNorm2d(2)), *kinds[2:])
    assert batch_norms(model) == kinds


def test_a_module_that_cannot_be_wrapped_is_left_as_it_was():
    net = half_frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    before = state_of(net)
    with pytest.raises(ValueError, match="must map images"):
        load_classifier(net, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    assert state_of(net) == before
