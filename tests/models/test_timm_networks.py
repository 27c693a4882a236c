"""One small network of every timm module: loaded, saved, loaded again, and the same. What is refused stands in `REFUSED`.

The weights are drawn here and not by timm, whose initial ones take longer than all the rest.
"""

import pytest
import timm
import torch
from networks import NORM
from reloading import assert_reloads
from safetensors.torch import save_file
from timm.models import _registry

from d3_hf.models import architectures, load_classifier
from d3_hf.models.shared import shared_names

pytestmark = pytest.mark.slow

NETWORKS = """
    beit_base_patch16_224 halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 test_convnext
    cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224
    densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 test_efficientnet efficientvim_m1
    efficientvit_b0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
    gemma4_vit_167m_enc ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t
    inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 test_mambaout
    test_coatnet poolformerv2_s12 gmlp_ti16_224 lcnet_035 mobilenetv5_base mobilevit_xxs mvitv2_tiny
    naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small test_nfnet pit_ti_224 pnasnet5large pvt_v2_b0
    qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d test_resnet resnetv2_18 rexnet_100
    selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
    swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11
    visformer_tiny test_vit vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224 vitamin_small_224 volo_d1_224
    ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224
""".split()
SMALL = {"depth": 1, "embed_dim": 64, "num_heads": 2}
ARGUMENTS = {
    "beit_base_patch16_224": SMALL,
    "deepseek_vit_412m": SMALL,
    "gemma4_vit_167m_enc": SMALL,
    "mobilenetv5_base": {"channel_multiplier": 0.125},
    "naflexvit_base_patch16_parfac_gap": SMALL,
    "nasnetalarge": {"num_features": 2016, "stem_size": 48},
    "qwen3_vit_88m": SMALL,
    "samvit_base_patch16_224": SMALL,
    "vgg11": {"mlp_ratio": 0.01},
}
SIZES = {"inception_resnet_v2": 128, "inception_v3": 128, "inception_v4": 128}  # 64 pixels, but for these
SIZES |= dict.fromkeys(("crossvit_tiny_240", "deepseek_vit_412m", "efficientformer_l1", "gemma4_vit_167m_enc", "halonet_h1"))
REFUSED = {"gemma4_vit_167m_enc": r"returns \(1, 256, 64\) instead of logits \(1, 3\)"}  # tokens for a language model


def module_of(name):
    return _registry._model_to_module.get(name, name)  # an older timm lacks some, and must not fail while tests are collected


def test_every_module_is_here():
    theirs = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("timm.")]
    assert {module_of(name) for name in NETWORKS} == {module_of(name) for name in theirs}


def drawn(name, tensor):
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    if name.endswith("running_var"):
        return torch.ones(tensor.shape)
    return torch.rand(tensor.shape) / 2 + 0.5 if tensor.ndim == 1 else torch.randn(tensor.shape) / 20


@pytest.mark.parametrize("name", NETWORKS, ids=module_of)
def test_it_loads_saves_and_loads_again(name, tmp_path):
    arguments = dict(num_labels=3, image_size=SIZES.get(name, 64), model_args=ARGUMENTS.get(name), **NORM)
    config = architectures.timm_config(name, label_names=None, **arguments)
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=3, **(config.model_args or {}))
    torch.manual_seed(0)
    weights = {key: drawn(key, tensor) for key, tensor in network.state_dict().items()}
    for first, *others in shared_names(network):
        weights |= {other: weights[first].clone() for other in others}
    save_file(weights, tmp_path / "weights.safetensors")
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            load_classifier(tmp_path / "weights.safetensors", architecture=name, **arguments)
    else:
        assert_reloads(load_classifier(tmp_path / "weights.safetensors", architecture=name, **arguments), tmp_path / "saved")
