"""Permuted networks give the same logits, matching finds a permutation that was hidden, what has no structure is refused."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from timm.models.vgg import VGG
from tiny import tiny_resnet, tiny_timm_vit, tiny_vit
from torch import nn
from torch.func import functional_call

from d3_hf.defenses.tsc import hidden_units
from d3_hf.defenses.tsc.matching import Correlation, correlate, match, matched
from d3_hf.defenses.tsc.permutation import Group, Part, Structure, find_structure, permute, random_orders
from d3_hf.models import new_classifier
from d3_hf.models.wrapper import WrappedClassifier, WrappedClassifierConfig


def eager_vit():
    model = tiny_vit()
    model.set_attn_implementation("eager")
    return model


def wrapped(module):
    return WrappedClassifier(WrappedClassifierConfig(num_labels=3), module)


def timm_model(name):
    return lambda: new_classifier(name, label_names=list("abc"), image_mean=[0.5] * 3, image_std=[0.5] * 3, image_size=32)


def vgg_bn():  # timm's own class, thinner than vgg11_bn
    return wrapped(VGG([8, "M", 12, 12, "M"], num_classes=3, mlp_ratio=1 / 256, norm_layer=nn.BatchNorm2d))


class Net(nn.Module):
    """3x3 convolution to 8 channels, then ``body`` on them (B, 8, h, w), ``end`` to (B, features) and a head."""

    def __init__(self, body, features=8, end=None):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 3, padding=1), body, nn.Linear(features, 3)
        self.end = end or nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x):
        return self.head(self.end(self.body(F.relu(self.stem(x)))))


class Do(nn.Module):
    """A function as a module, with its submodules and parameters."""

    def __init__(self, function, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x):
        return self.function(self, x)


def head_bias_attention(m, x):
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = m.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
    out = (q @ k.transpose(-1, -2) / 2 + m.bias).softmax(-1) @ v
    return tokens.add(m.proj(out.transpose(1, 2).flatten(2))).transpose(1, 2).unflatten(2, x.shape[2:])


def attention_with_head_scale():
    members = dict(qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8), bias=nn.Parameter(torch.randn(2, 1, 1)))
    return wrapped(Net(Do(head_bias_attention, **members)))


def random_model(make):
    """Weights that make every exchange visible: new BatchNorms and biases are all alike."""
    model = make().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim <= 3:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model


def shapes(structure):
    return [[part.shape for part in group.parts] for group in structure.groups]


STREAM = [(1, 8)], [(2, 4), (2, 4)], [(1, 16)], [(2, 4), (2, 4)], [(1, 16)]
NETWORKS = {
    "vit": (tiny_vit, 16, list(STREAM)),
    "vit_eager": (eager_vit, 16, list(STREAM)),
    "timm_vit": (tiny_timm_vit, 16, [[(1, 12)], *[[(2, 6), (2, 6)], [(1, 48)]] * 2]),
    "resnet": (tiny_resnet, 16, [[(1, 8)]] * 4),
    "resnet18": (timm_model("resnet18"), 32, [[(1, c)] for c in (64, 64, 64, 128, 128, 128, 256, 256, 256, 512, 512, 512)]),
    "resnet20": (
        timm_model("resnet20_cifar"),
        32,
        [[(1, c)] for c in (16, 16, 16, 16, 32, 16, 32, 32, 64, 32, 64, 64)],  # 16 + 16 + 32 channels of one stream
    ),
    "preact": (
        timm_model("preact_resnet18_cifar"),
        32,
        [[(1, c)] for c in (64, 64, 64, 128, 128, 128, 256, 256, 256, 512, 512, 512)],  # METHODS: 4 streams, 8 inner
    ),
    "wrn": (timm_model("wrn16_1_cifar"), 32, [[(1, c)] for c in (16, 16, 16, 32, 32, 32, 64, 64, 64)]),
    "vgg_bn": (vgg_bn, 32, [[(1, 8)], [(1, 12)], [(1, 12)], [(1, 16)], [(1, 4096)]]),
    "head_bias": (attention_with_head_scale, 8, [[(1, 8)], [(2, 1), (2, 4), (2, 4)]]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_permuted_network_gives_the_same_logits(name):
    make, size, expected = NETWORKS[name]
    model = random_model(make)
    structure = find_structure(model, (size, size))
    assert shapes(structure) == expected and not structure.fixed
    state = model.state_dict()
    permuted = permute(state, structure, random_orders(structure, torch.Generator().manual_seed(3)))
    assert permuted.keys() == state.keys()
    for name, _ in {place for group in structure.groups for part in group.parts for place in part.indices}:
        assert not torch.equal(permuted[name], state[name]), name
    pixels = torch.randn(4, 3, size, size)
    with torch.no_grad():
        before, after = (functional_call(model, s, kwargs={"pixel_values": pixels}).logits for s in (state, permuted))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * before.abs().max().item())


def test_option_a_shortcuts_share_one_stream_across_stages():
    structure = find_structure(random_model(NETWORKS["resnet20"][0]), (32, 32))
    places = structure.groups[0].parts[0].indices  # the 16 channels of the first stage
    prefix = "timm_model."
    assert places[prefix + "layer1.2.conv2.weight", 0].flatten().tolist() == list(range(16))
    assert places[prefix + "layer2.2.conv2.weight", 0].flatten().tolist() == list(range(8, 24))
    assert places[prefix + "layer3.2.bn2.running_var", 0].flatten().tolist() == list(range(24, 40))
    assert places[prefix + "linear.weight", 1].flatten().tolist() == list(range(24, 40))


def test_flattened_maps_and_gated_units_move_together():
    body = Do(lambda m, x: torch.mul(*m.up(x).chunk(2, 1)), up=nn.Conv2d(8, 12, 1))
    places = find_structure(wrapped(Net(body, 6 * 16, nn.Flatten())), (4, 4)).groups[1].parts[0].indices
    assert places["network.body.up.weight", 0].tolist() == [[[i, i + 6] for i in range(6)]]
    assert places["network.head.weight", 1].tolist() == [[list(range(16 * i, 16 * i + 16)) for i in range(6)]]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (nn.Conv2d(8, 8, 1, groups=2), "body.0.weight: 8 of 8 outputs grouped convolution"),
        (nn.GroupNorm(2, 8), "stem.weight: 8 of 8 outputs group normalisation"),
        (Do(lambda m, x: m.inner(x) + torch.arange(8.0).view(8, 1, 1).to(x), inner=nn.Conv2d(8, 8, 1)), "tied to a constant"),
        (Do(lambda m, x: m.mix(m.mix(x)) + x, mix=nn.Linear(4, 4)), "body.0.mix.weight: 4 of 4 outputs tied to each other"),
    ],
)
def test_units_that_cannot_move_are_named(body, reason):
    structure = find_structure(wrapped(Net(nn.Sequential(body, nn.Conv2d(8, 8, 1)))), (4, 4))
    assert any(reason in line for line in structure.fixed), structure.fixed
    assert structure.groups[-1].name == "network.body.1.weight"  # whose channels can


def tied():
    module = Net(nn.Conv2d(8, 8, 1))
    module.again = module.body
    return module


def masked(m, x):
    tokens = m.qkv(x.flatten(2).transpose(1, 2)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(*tokens, attn_mask=torch.zeros(16, 16).to(x)).transpose(1, 2).flatten(2)[..., None]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (tied(), "two names"),
        (Net(Do(lambda m, x: x - x.mean())), "averages over all hidden units"),
        (Net(Do(lambda m, x: x.cumsum(1))), "no rule for cumsum"),
        (Net(Do(lambda m, x: F.conv2d(x, m.w * 2), w=nn.Parameter(torch.ones(8, 8, 1, 1)))), "computes a weight"),
        (Net(Do(lambda m, x: torch.cat([x, torch.ones(1, 1, 4, 4).to(x)], 1)), 9), "puts constants beside hidden units"),
        (Net(Do(lambda m, x: F.pad(x, (1, 1), value=1.0))), "pads with something else"),
        (Net(Do(lambda m, x: F.pad(x, (1, 1, 1, 1), mode="reflect"))), "pads with something else"),
        (Net(Do(lambda m, x: (x.flatten(2) @ m.w)[..., None], w=nn.Parameter(torch.ones(16, 2)))), "outside attention"),
        (Net(Do(masked, qkv=nn.Linear(8, 24)), 16), "masks its attention"),
        (Net(nn.Sequential(nn.LayerNorm([8, 4, 4]))), "normalises over several axes"),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), "no hidden units may be exchanged"),
    ],
)
def test_refusals(module, reason):
    with pytest.raises(ValueError, match=reason):
        find_structure(wrapped(module), (4, 4))


def test_a_wrong_rule_is_found_out(monkeypatch):
    model = wrapped(Net(Do(lambda m, x: x.cumsum(1))))
    monkeypatch.setattr(hidden_units, "POINTWISE", hidden_units.POINTWISE | {"cumsum"})
    with pytest.raises(ValueError, match="changes the logits by"):
        find_structure(model, (4, 4))


def test_correlation_is_that_of_all_samples_together():
    x, y = np.random.default_rng(0).normal(5, 2, (2, 30, 4)).astype(np.float32)
    correlation = Correlation()
    for rows in (slice(0, 7), slice(7, 30)):
        correlation.add(torch.tensor(x[rows]), torch.tensor(y[rows]))
    np.testing.assert_allclose(correlation.value(), np.corrcoef(x.T, y.T)[:4, 4:], atol=1e-3)


@pytest.mark.parametrize("name", ["vit", "timm_vit", "resnet", "resnet20", "head_bias"])
def test_matching_undoes_a_hidden_permutation(name):
    make, size, _ = NETWORKS[name]
    model = random_model(make)
    structure = find_structure(model, (size, size))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    hidden = permute(state, structure, random_orders(structure, torch.Generator().manual_seed(4)))
    batches = [torch.randn(6, 3, size, size), torch.randn(2, 3, size, size)]
    correlations = correlate(model, structure, hidden, state, batches)
    orders = match(structure, correlations, maximize=True)
    for key, tensor in permute(state, structure, orders).items():
        torch.testing.assert_close(tensor, hidden[key], rtol=0, atol=0)
    worst = match(structure, correlations, maximize=False)
    assert matched(correlations, worst) < matched(correlations, orders)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("maximize", [True, False])
def test_heads_are_matched_as_blocks(maximize):
    """Against all 3! * (2!)^3 * (2!)^3 exchanges of three heads with two parts of two units."""
    parts = tuple(Part({(name, 0): torch.arange(6).view(3, 2, 1)}) for name in ("a", "b"))
    correlations = list(torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(5)))
    structure = Structure((Group("a", parts),), ("a", "b"), ())
    orders = match(structure, [correlations], maximize)[0]

    def total(order, correlation):
        return sum(correlation[i, j].item() for i, j in enumerate(order))

    pick = max if maximize else min
    swaps = list(itertools.product([(0, 1), (1, 0)], repeat=3))
    values = []
    for heads in itertools.permutations(range(3)):
        exchanges = [[2 * head + u for head, swap in zip(heads, s, strict=True) for u in swap] for s in swaps]
        values.append(sum(pick(total(order, c) for order in exchanges) for c in correlations))
    best = pick(values)
    assert sum(total(o.tolist(), c) for o, c in zip(orders, correlations, strict=True)) == pytest.approx(best)
    assert all(len({i // 2 for i in o[2 * b : 2 * b + 2].tolist()}) == 1 for o in orders for b in range(3))
    unrestricted = sum(c[linear_sum_assignment(c, maximize)].sum().item() for c in correlations)
    assert unrestricted != pytest.approx(best)  # the blocks cost something here
