"""Image processors of older releases, and two descriptions of one."""

import json
import shutil

import pytest
import transformers
from networks import MEAN, NORM

from d3_hf.models import load_classifier
from d3_hf.models.processors import read_processor

OLD = {
    "do_normalize": True,
    "do_resize": True,
    "image_mean": MEAN,
    "image_std": [0.5] * 3,
    "resample": 2,
    "size": 32,
    "crop_size": 32,
}
# Every feature extractor for images of transformers 4.
FEATURE_EXTRACTORS = (
    "Beit ChineseCLIP CLIP ConditionalDetr ConvNext DeformableDetr DeiT Detr Donut DPT Flava GLPN ImageGPT LayoutLMv2 "
    "LayoutLMv3 Levit MaskFormer MobileNetV1 MobileNetV2 MobileViT OwlViT Perceiver PoolFormer Segformer VideoMAE Vilt ViT "
    "Yolos"
).split()


@pytest.mark.parametrize("key", ["image_processor_type", "feature_extractor_type"])
@pytest.mark.parametrize("name", ["ViT", "ConvNext", "DeiT"])
def test_feature_extractors_are_read_as_what_took_over(tmp_path, name, key, vit_folder):
    shutil.copytree(vit_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(OLD | {key: f"{name}FeatureExtractor"}))
    processor = load_classifier(tmp_path).image_processor
    assert type(processor) is getattr(transformers, f"{name}ImageProcessor") and list(processor.image_mean) == MEAN


def test_every_feature_extractor_has_a_successor(tmp_path):
    for name in FEATURE_EXTRACTORS:
        (tmp_path / "preprocessor_config.json").write_text(
            json.dumps(OLD | {"image_processor_type": f"{name}FeatureExtractor"})
        )
        assert type(read_processor(tmp_path, "it")) is getattr(transformers, f"{name}ImageProcessor")


@pytest.mark.parametrize("kind", ["vit_folder", "timm_folder"])
@pytest.mark.parametrize("agree", [True, False])
def test_two_descriptions_agree_or_are_refused(request, tmp_path, kind, agree):
    shutil.copytree(request.getfixturevalue(kind), tmp_path, dirs_exist_ok=True)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}, **NORM).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    changed = settings if agree else settings | {"image_mean": [0.1] * 3}
    if kind == "vit_folder":
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": changed}))
    else:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(changed))
    if agree:
        load_classifier(tmp_path)
        return
    with pytest.raises(ValueError, match=r"p\w+_config.json and \w+.json describe two image processors \(image_mean\): remove"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", "preprocessor_config.json is no JSON"),
        ("[]", "preprocessor_config.json holds a list, not settings"),
        ('{"image_processor_type": "EvilProcessor"}', r"no image processor .* \(image_processor_type 'EvilProcessor'\): put"),
        ('{"image_processor_type": "EvilFeatureExtractor"}', r"no image processor .*'EvilFeatureExtractor'"),
        ('{"image_processor_type": 3}', "no image processor"),
    ],
)
def test_descriptions_that_are_none(vit_folder, tmp_path, contents, message):
    shutil.copytree(vit_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").write_text(contents)
    with pytest.raises(ValueError, match=message) as caught:
        load_classifier(tmp_path)
    assert "\n" not in str(caught.value)


def test_offline_is_named_where_a_processor_is_looked_for_on_the_hub():
    with pytest.raises(ValueError, match="them/vit has no image processor .*: HF_HUB_OFFLINE .*keeps it offline: unset it, or"):
        read_processor("them/vit", "them/vit")
