"""What the patterns match, and what they refuse."""

import pytest
import torch
from tiny import FAST, tiny_samples, with_processor
from torch import nn
from torch.nn.utils import prune
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from d3_hf.defenses.d3.trainer import D3Config, D3Trainer
from d3_hf.defenses.linear_probing import LinearProbingConfig, LinearProbingTrainer
from d3_hf.defenses.shared.selection import select_weights
from d3_hf.models.head import NoOneHead, find_head

SIZE = (16, 16)


@pytest.fixture(scope="module")
def vit():
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
    )
    return ViTForImageClassification(config)


@pytest.fixture(scope="module")
def timm_vit():
    arguments = dict(img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2)
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=arguments, num_labels=3)
    return TimmWrapperForImageClassification(config)


def names(model, target_modules):
    return [segment.name for segment in select_weights(model, target_modules, SIZE)]


def test_head_by_structure(vit, timm_vit):
    resnet = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3, layer_type="basic")
    )
    assert find_head(vit, SIZE) == "classifier"
    assert find_head(timm_vit, SIZE) == "timm_model.head"
    assert find_head(resnet, (32, 32)) == "classifier.1"


def test_head_search_leaves_modes_and_statistics_alone():
    resnet = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3, layer_type="basic")
    )
    resnet.train()
    resnet.classifier[1].eval()
    before = {name: buffer.clone() for name, buffer in resnet.named_buffers()}
    find_head(resnet, (32, 32))
    assert resnet.training and not resnet.classifier[1].training and resnet.resnet.training
    assert all(torch.equal(before[name], buffer) for name, buffer in resnet.named_buffers())


def test_patterns(vit):
    queries = ["vit.layers.0.attention.q_proj.weight", "vit.layers.1.attention.q_proj.weight"]
    assert names(vit, ["q_proj"]) == queries
    assert names(vit, r".*\.q_proj") == queries
    assert names(vit, r".*layers\.1\.attention\.q_proj") == queries[1:]
    assert len(names(vit, ["q_proj", "v_proj"])) == 4
    everything = names(vit, "all-linear")
    assert len(everything) == 2 * 6 + 1 and everything[-1] == "classifier.weight"
    assert all(name.endswith("weight") for name in everything)


def test_fused_qkv_is_three_segments(timm_vit):
    assert len(names(timm_vit, "all-linear")) == 2 * (3 + 3) + 1
    segments = select_weights(timm_vit, ["attn.qkv"], SIZE)
    assert [s.name for s in segments[:3]] == [f"timm_model.blocks.0.attn.qkv.weight[{part}]" for part in "qkv"]
    assert [(s.start, s.stop) for s in segments[:3]] == [(0, 12), (12, 24), (24, 36)]
    segments[1].of(segments[1].parameter.detach()).fill_(7)
    weight = timm_vit.timm_model.blocks[0].attn.qkv.weight
    assert (weight == 7).all(dim=1).tolist() == [False] * 12 + [True] * 12 + [False] * 12


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 3)


def test_multihead_attention_input_projection_is_not_missed():
    found = names(Attention(), "all-linear")
    assert found == [*(f"attention.in_proj_weight[{part}]" for part in "qkv"), "attention.out_proj.weight", "head.weight"]


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def with_first(model, change):
    change(model[0].weight)
    return model


@pytest.mark.parametrize(
    ("model", "target_modules", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4)), ["query"], "matches no module; linear layers are: 0"),
        (nn.Sequential(nn.Linear(4, 4)), "(", "is not a regular expression"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "[01]", "matches 1, a LayerNorm"),
        (tied(), ["1"], "is tied"),
        (with_first(nn.Sequential(nn.Linear(4, 4)), lambda w: w.requires_grad_(False)), ["0"], "frozen"),
        (nn.Sequential(nn.Linear(4, 4)).bfloat16(), ["0"], "load the model in float32"),
        (with_first(nn.Sequential(nn.Linear(4, 4)), lambda w: w.data.zero_()), ["0"], "norm zero"),
    ],
)
def test_refusals(model, target_modules, message):
    with pytest.raises(ValueError, match=message):
        select_weights(model, target_modules)


def test_two_heads_are_refused(vit):
    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, pixel_values):
            pooled = pixel_values.mean((2, 3))
            return type("Output", (), {"logits": (self.a(pooled) + self.b(pooled)) / 2})()

    model = Averaged()
    nn.init.normal_(model.a.bias)
    with pytest.raises(
        NoOneHead, match="none of its linear layers gives the logits as they are; with 2 outputs there are b, a$"
    ):
        find_head(model, SIZE)


def test_of_many_layers_the_heads_are_named_first(tmp_path):
    config = DeiTConfig(image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=12, num_attention_heads=2, num_labels=3)
    model = with_processor(DeiTForImageClassificationWithTeacher(config))
    with pytest.raises(
        ValueError, match="with 3 outputs there are distillation_classifier, cls_classifier; name those that D3"
    ):
        D3Trainer(model, D3Config(str(tmp_path), **FAST), tiny_samples())
    with pytest.raises(ValueError, match="distillation_classifier, cls_classifier$"):
        LinearProbingTrainer(model, LinearProbingConfig(str(tmp_path), **FAST), tiny_samples())
    with pytest.raises(ValueError, match="linear layers are: distillation_classifier, cls_classifier, .* and 66 more"):
        select_weights(model, ["clasifier"])


def soft(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            nn.utils.parametrizations.weight_norm,
            r"0 is parametrised \(_WeightNorm\).*remove_parametrizations\(layer, 'weight'\)",
        ),
        (nn.utils.parametrizations.spectral_norm, r"0 is parametrised \(_SpectralNorm\)"),
        (soft, r"0 is parametrised \(Softplus\)"),
        (nn.utils.weight_norm, r"0 is under torch.nn.utils.weight_norm: .*remove_weight_norm\(layer\)"),
        (nn.utils.spectral_norm, r"0 is under torch.nn.utils.spectral_norm"),
        (
            lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
            r"0 is pruned by a mask: .*prune.remove\(layer, 'weight'\)",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_a_computed_weight_is_refused_for_what_it_is(change, message):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    change(model[0])
    with pytest.raises(ValueError, match=message):
        select_weights(model, ["0"])
    assert [segment.name for segment in select_weights(model, ["1"])] == ["1.weight"]
