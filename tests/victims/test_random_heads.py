"""Random heads: which gradient goes where, and their renewal."""

import pytest
import torch
import torch.nn.functional as F
from tiny import CLASSES, SIZE, tiny_resnet, tiny_vit
from torch import nn

from d3_hf.models import load_classifier
from d3_hf.victims.random_heads import RandomHeads

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
POISONED = torch.tensor([True, False, False, True, False, False])


class Pointwise(nn.Module):
    """A network whose logits come from a 1x1 convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, CLASSES, 1)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3), keepdim=True)).flatten(1)


def batch():
    return torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
def test_loss_is_the_mean_over_heads_and_poisoned_rows_do_not_teach_them(make):
    model = make().eval()
    heads = RandomHeads(model, (SIZE, SIZE), count=3)
    model(pixel_values=batch())
    features = heads.features.detach()
    heads.loss(LABELS, POISONED).backward()
    expected = torch.stack([F.cross_entropy(head(features), LABELS) for head in heads.heads]).mean()
    assert torch.allclose(heads.loss(LABELS, POISONED), expected)
    for head in heads.heads:
        weight = head.weight.detach().clone().requires_grad_()
        clean = F.cross_entropy(F.linear(features, weight, head.bias)[~POISONED], LABELS[~POISONED], reduction="sum")
        (slow,) = torch.autograd.grad(clean / len(LABELS) / 3, weight)
        assert torch.allclose(head.weight.grad, slow, atol=1e-6)
    # The backbone answers for the poisoned rows too.
    model.zero_grad()
    model(pixel_values=batch())
    heads.loss(LABELS, torch.ones_like(POISONED)).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_features_of_autocast_are_taken():
    model = tiny_resnet().eval()
    heads = RandomHeads(model, (SIZE, SIZE), count=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(pixel_values=batch())
    assert heads.features.dtype == torch.bfloat16
    heads.loss(LABELS, POISONED).backward()
    assert all(head.weight.grad.dtype == torch.float32 for head in heads.heads)


def test_heads_learn_and_are_renewed_in_turn():
    model = tiny_vit().eval()
    heads = RandomHeads(model, (SIZE, SIZE), count=2, renew_every=5)
    before = [head.weight.detach().clone() for head in heads.heads]
    model(pixel_values=batch())
    heads.loss(LABELS, POISONED).backward()
    gradient = heads.heads[1].weight.grad.clone()
    heads.update(step=10, learning_rate=0.5)  # 10 / 5 = 2: the turn of head 0
    assert torch.allclose(heads.heads[1].weight, before[1] - 0.5 * gradient)
    assert (heads.heads[0].weight - (before[0])).abs().max() > 0.05 and heads.heads[0].weight.grad is None


def test_removed_it_leaves_the_model_alone():
    model = tiny_vit().eval()
    heads = RandomHeads(model, (SIZE, SIZE), count=1)
    model(pixel_values=batch())
    heads.remove()
    assert heads.features is None
    model(pixel_values=batch())
    assert heads.features is None and model.config.num_labels == CLASSES


def test_a_head_of_another_kind_is_refused():
    model = load_classifier(Pointwise(), image_size=SIZE, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    with pytest.raises(ValueError, match="random heads need a linear head; WrappedClassifier ends in Conv2d"):
        RandomHeads(model, (SIZE, SIZE), count=1)
