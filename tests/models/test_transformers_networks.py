"""Every image classifier of transformers, tiny: loaded, saved, loaded again, the same. What is refused stands in `REFUSED`."""

import pytest
import torch
from reloading import assert_reloads
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, ViTImageProcessor

from d3_hf.models import load_classifier
from d3_hf.models.wrapper import WrappedClassifier

pytestmark = pytest.mark.slow

SIZE = 64
TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VIT = TRANSFORMER | {"image_size": SIZE, "patch_size": 8}
TEXT = TRANSFORMER | {"vocab_size": 99}
TWO_TOWERS = {"vision_config": VIT, "text_config": TEXT}
SWIN = {"image_size": SIZE, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
STAGES = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
ATTENTION = STAGES | {"num_attention_heads": [1, 1, 2, 2]}
# What makes each small.
CONFIGURATIONS = {
    "beit": VIT,
    "bit": {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 4},
    "clip": TWO_TOWERS,
    "convnext": STAGES,
    "convnextv2": STAGES,
    "cvt": {"embed_dim": [8, 16, 16], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
    "data2vec-vision": VIT,
    "deit": VIT,
    "dinat": {},
    "dinov2": VIT,
    "dinov2_with_registers": VIT,
    "donut-swin": SWIN,
    "efficientnet": {"image_size": SIZE, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128},
    "focalnet": {"image_size": SIZE, "embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32]},
    "hgnet_v2": {},
    "hiera": {"image_size": [SIZE, SIZE], "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    "ijepa": VIT,
    "imagegpt": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "levit": {
        "image_size": SIZE,
        "hidden_sizes": [16, 32, 32],
        "num_attention_heads": [2, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    },
    "metaclip_2": TWO_TOWERS,
    "mobilenet_v1": {"image_size": SIZE, "depth_multiplier": 0.25},
    "mobilenet_v2": {"image_size": SIZE, "depth_multiplier": 0.25},
    "mobilevit": {
        "image_size": SIZE,
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
        "num_attention_heads": 2,
    },
    "mobilevitv2": {"image_size": SIZE, "width_multiplier": 0.25},
    "perceiver": {
        "image_size": SIZE,
        "num_latents": 8,
        "d_latents": 16,
        "num_blocks": 1,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 1,
        "num_cross_attention_heads": 1,
    },
    "poolformer": STAGES,
    "pp_lcnet": {"scale": 0.25},
    "pvt": ATTENTION | {"image_size": SIZE},
    "pvt_v2": ATTENTION | {"image_size": SIZE},
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "segformer": ATTENTION | {"decoder_hidden_size": 16},
    "shieldgemma2": TWO_TOWERS,
    "siglip": TWO_TOWERS,
    "siglip2": {"vision_config": TRANSFORMER | {"patch_size": 8, "num_patches": 64}, "text_config": TEXT},
    "swiftformer": {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "swin": SWIN,
    "swinv2": SWIN,
    "textnet": {"stem_out_channels": 8, "hidden_sizes": [8, 8, 8, 8, 8]},
    "vit": VIT,
    "vit_msn": VIT,
}
ELSEWHERE = ("timm_wrapper", "d3_hf_module")  # `test_timm_networks.py`; a wrapped module needs its module
REFUSED = {
    "dinat": "requires the natten library",
    "imagegpt": "You have to specify either input_ids",  # clusters of colours, not pixels
    "pp_lcnet": "returns a .* without logits: it is no classifier|has no attribute 'logits'",
    "shieldgemma2": "You must specify",  # a language model that answers yes or no
    "siglip2": "only networks that take three channels at the size",  # patches (NaFlex)
}
CLASSES = {
    (config.model_type, kind)
    for config, kinds in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.items()
    for kind in (kinds if isinstance(kinds, tuple) else (kinds,))
    if config.model_type not in ELSEWHERE and kind is not WrappedClassifier
}
CASES = sorted(CLASSES, key=lambda case: case[1].__name__)


@pytest.mark.parametrize(("model_type", "kind"), CASES, ids=[kind.__name__ for _, kind in CASES])
def test_it_loads_saves_and_loads_again(model_type, kind, tmp_path):
    def loaded():
        torch.manual_seed(0)
        config = kind.config_class(num_labels=3, **CONFIGURATIONS[model_type])
        config.architectures = [kind.__name__]
        return load_classifier(kind(config), image_processor=ViTImageProcessor(size={"height": SIZE, "width": SIZE}))

    if model_type in REFUSED:
        with pytest.raises((ImportError, ValueError), match=REFUSED[model_type]):
            loaded()
    else:
        assert_reloads(loaded(), tmp_path)
