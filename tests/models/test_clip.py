"""`load_clip`: both towers with their tokenizer, saved and reloaded by Auto classes, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import PROCESSOR, SIZE
from tiny_encoders import tiny_clip, tiny_dinov2
from tiny_pairs import UNIT, tiny_pair, tiny_tokenizer, write_pair
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from d3_hf.models import load_clip, load_encoder
from d3_hf.models.clip import encode_texts, tokens
from d3_hf.models.kinds import encode, is_clip, is_encoder
from d3_hf.models.source import preprocessing_of

PIXELS = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
TEXTS = ["a photo of a red dog", "a cat", "the blue"]


def edited(folder, file, **changes):
    settings = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(settings))


@pytest.fixture
def folder(tmp_path):
    write_pair(tmp_path / "clip")
    return tmp_path / "clip"


def test_both_towers_load_with_their_digests_and_auto_classes_reload_what_is_saved(folder, tmp_path):
    loaded, model = load_clip(folder), tiny_pair().eval()
    assert is_clip(loaded) and is_encoder(loaded) and not loaded.training and preprocessing_of(loaded).size == (SIZE, SIZE)
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= loaded.source.sha256.keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    again = AutoModel.from_pretrained(write_pair(tmp_path / "second", loaded)).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "second")
    assert type(processor).__name__ == "CLIPProcessor"
    with torch.no_grad():
        output = again(pixel_values=PIXELS, **processor(text=TEXTS, padding=True, truncation=True, return_tensors="pt"))
        images, texts = encode(loaded, PIXELS), encode_texts(loaded, TEXTS)
    assert images.shape == texts.shape == (3, UNIT)
    torch.testing.assert_close(output.image_embeds, images / images.norm(dim=1, keepdim=True))
    torch.testing.assert_close(output.text_embeds, texts / texts.norm(dim=1, keepdim=True))


def test_a_text_has_the_same_features_alone_and_in_a_batch_and_a_long_one_is_cut_off():
    model = tiny_pair()
    together, alone = encode_texts(model, TEXTS), torch.cat([encode_texts(model, [text]) for text in TEXTS])
    torch.testing.assert_close(together, alone)
    assert tokens(model, ["dog " * 50])["input_ids"].shape == (1, 12)


def test_a_model_in_memory_is_kept_with_the_tokenizer_that_is_passed():
    model = tiny_pair()
    tokenizer = model.tokenizer
    assert load_clip(model) is model and model.tokenizer is tokenizer
    model.tokenizer = None
    with pytest.raises(ValueError, match="in memory without its tokenizer"):
        load_clip(model)
    with pytest.raises(ValueError, match="has no tokenizer: load it with"):
        tokens(model, ["a"])
    assert load_clip(model, tokenizer=tokenizer).tokenizer is tokenizer


def test_an_image_tower_alone_is_refused_and_a_pair_where_an_encoder_is_needed(tmp_path):
    for make in (tiny_clip, tiny_dinov2):
        make().save_pretrained(tmp_path / make.__name__)
        PROCESSOR.save_pretrained(tmp_path / make.__name__)
        with pytest.raises(ValueError, match="no CLIP with a tower of images and one of texts: load_encoder and the defences"):
            load_clip(tmp_path / make.__name__)
        with pytest.raises(ValueError, match="no CLIPModel with both towers"):
            load_clip(make(), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="has two towers: load_clip takes both"):
        load_encoder(tiny_pair())
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(ValueError, match="is a file: of a CLIP the folder or the Hub id is loaded"):
        load_clip(tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("visual_projection.weight", "has no projection"),
        ("text_projection.weight", "has no projection"),
        ("logit_scale", "1 missing: logit_scale"),
        ("text_model.final_layer_norm.bias", "1 missing"),
    ],
)
def test_a_checkpoint_without_a_weight_is_refused(name, wanted, folder):
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=wanted):
        load_clip(folder)


def test_a_buffer_of_older_releases_is_no_weight(folder):
    weights = load_file(folder / "model.safetensors") | {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert is_clip(load_clip(folder))
    save_file(weights | {"text_model.spare": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 unexpected: text_model.spare"):
        load_clip(folder)


def test_a_tokenizer_that_is_missing_foreign_or_of_another_model_is_refused(folder):
    other = shutil.copytree(folder, folder.parent / "other")
    edited(other, "tokenizer_config.json", tokenizer_class="MyTokenizer", auto_map={"AutoTokenizer": ["evil.py", None]})
    with pytest.raises(ValueError, match="its tokenizer, a MyTokenizer, is not read"):
        load_clip(other)
    edited(
        other, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", auto_map=None, tokenizer_file="/etc/words"
    )
    with pytest.raises(ValueError, match="tokenizer_file in tokenizer_config.json leads to another file"):
        load_clip(other)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="its tokenizer cannot be used") as caught:
        load_clip(folder)
    assert "\n" not in str(caught.value)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_clip(folder)
    assert is_clip(load_clip(folder, tokenizer=tiny_tokenizer()))
    large, left, unending = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer()
    large.add_tokens(["further", "words"])
    left.padding_side = "left"
    unending.backend_tokenizer.post_processor = None
    for tokenizer, wanted in (
        (large, "has 22 words and the text tower 20"),
        (left, "cannot fill texts up on the right"),
        (unending, "gives all texts the same features"),
    ):
        with pytest.raises(ValueError, match=wanted):
            load_clip(folder, tokenizer=tokenizer)


def test_the_auto_tokenizer_is_the_one_that_was_saved(folder):
    saved = AutoTokenizer.from_pretrained(folder)
    assert saved(TEXTS)["input_ids"] == tiny_tokenizer()(TEXTS)["input_ids"]
