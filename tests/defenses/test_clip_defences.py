"""Defences of a whole CLIP: what a step computes, resuming, what is saved, refusals."""

import json
import math
import shutil

import jsonschema
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image
from places import ROOT
from tiny_encoders import colours, tiny_clip, tiny_dinov2
from tiny_pairs import tiny_pair
from transformers import AutoModel, AutoProcessor

from d3_hf.data.pairs import captioned
from d3_hf.data.views import view
from d3_hf.defenses import CLIP_DEFENCES, defence
from d3_hf.defenses.clip.clean_clip import changed_caption
from d3_hf.models.clip import tokens

SCHEMA = ROOT / "d3_hf" / "publishing" / "schemas" / "purification.schema.json"
PAIRS = captioned(colours(20))
QUICK = {"per_device_train_batch_size": 8, "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-3}
SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def build(name, folder, make=tiny_pair, pairs=PAIRS, **options):
    config_class, trainer_class = defence(name)
    return trainer_class(make(), config_class(str(folder), **QUICK | {"max_steps": 2} | options), pairs)


def same(one, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def moved(run):
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return run


def losses_of(run):
    """Each pair's loss of the first batch, and the batch."""
    run.batch_number = 0
    batch = run.training_batch(run.train_dataset.__getitems__(list(range(8))))
    with torch.no_grad():
        output = run.model.eval()(**{name: values for name, values in batch.items() if name != "labels"})
        return run.pair_losses(output.image_embeds, output.text_embeds, run.model.logit_scale.exp())[0]


def features(model, images, captions):
    """What both towers make of images at the model's size, as they are, and of captions."""
    pixels = (images.float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        return model.eval().get_image_features(pixel_values=pixels).pooler_output, model.get_text_features(
            **tokens(model, captions)
        ).pooler_output


def slow_info_nce(ones, others, scale):
    found = []
    for i, one in enumerate(ones):
        scores = torch.stack([scale * F.cosine_similarity(one, other, 0) for other in others])
        found.append(scores.logsumexp(0) - scores[i])
    return torch.stack(found)


def slow_clip(images, texts, scale):
    return (slow_info_nce(images, texts, scale) + slow_info_nce(texts, images, scale)) / 2


def distances(ones, others):
    return torch.stack([(f / f.norm() - g / g.norm()).square().sum() for f, g in zip(ones, others, strict=True)])


def test_fine_tuning_is_the_symmetric_loss_at_the_models_scale(tmp_path):
    run = moved(build("clip_fine_tuning", tmp_path))
    losses, scale = losses_of(run), run.model.logit_scale.exp().detach()
    images, texts = features(run.model, PAIRS.images.images[:8], PAIRS.captions[:8])
    torch.testing.assert_close(losses, slow_clip(images, texts, scale), rtol=1e-4, atol=1e-4)
    assert losses.std() > 0.01


def test_clean_clip_is_four_terms_of_pairs_views_and_changed_captions(tmp_path):
    run = moved(build("clean_clip", tmp_path, pair_weight=0.7, modality_weight=1.3))
    losses, scale, generator = losses_of(run), run.model.logit_scale.exp().detach(), run.generator()
    plain, captions = PAIRS.images.images[:8], PAIRS.captions[:8]
    changed = [changed_caption(caption, generator) for caption in captions]
    views = view(plain, generator)
    images, texts = features(run.model, plain, captions)
    other_images, other_texts = features(run.model, views, changed)
    expected = (
        0.7 / 2 * slow_info_nce(images, texts, scale)
        + 0.7 / 2 * slow_info_nce(texts, images, scale)
        + 1.3 / 2 * slow_info_nce(images, other_images, scale)
        + 1.3 / 2 * slow_info_nce(texts, other_texts, scale)
    )
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(views, plain) and changed != captions


@pytest.mark.parametrize("threshold", [2.15, 1e-4])
def test_par_is_the_loss_less_the_distances_of_both_towers_up_to_the_cut_off(threshold, tmp_path):
    run = moved(build("clip_par", tmp_path, feature_threshold=threshold))
    losses, scale = losses_of(run), run.model.logit_scale.exp().detach()
    now, before = (features(model, PAIRS.images.images[:8], PAIRS.captions[:8]) for model in (run.model, tiny_pair()))
    apart = [distances(f, g) for f, g in zip(now, before, strict=True)]
    assert all(1e-3 < of_tower.mean() < 2.15 for of_tower in apart)
    expected = slow_clip(*now, scale) - (0.5 * sum(apart) if threshold > 1 else 0)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


def test_a_changed_caption_has_some_of_its_words_in_another_order():
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(200):
        changed = changed_caption("a photo of one red dog", generator).split()
        assert set(changed) <= set("a photo of one red dog".split()) and changed != "a photo of one red dog".split()
        seen.add(len(changed))
    assert {4, 5, 6} <= seen
    assert changed_caption("dog", generator) == "dog" and len(changed_caption("a b", generator)) in (1, 3)


def test_the_scale_of_cosines_stays_at_100_at_most_and_both_towers_move(tmp_path):
    run = build("clip_fine_tuning", tmp_path)
    with torch.no_grad():
        run.model.logit_scale.fill_(5.0)
    run.train()
    assert run.model.logit_scale.item() == pytest.approx(math.log(100), abs=1e-2)
    old = tiny_pair().state_dict()
    for start in ("vision_model", "text_model", "visual_projection", "text_projection"):
        assert any(n.startswith(start) and not torch.equal(t, old[n]) for n, t in run.model.state_dict().items())


@pytest.mark.parametrize("name", CLIP_DEFENCES)
def test_a_resumed_run_ends_as_the_uninterrupted_one_and_what_is_saved_reloads(name, tmp_path):
    whole = build(name, tmp_path / "run", **SAVING)
    whole.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = build(name, tmp_path / "run", **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed.model, whole.model) and not same(whole.model, tiny_pair())
    resumed.save_model()
    assert same(AutoModel.from_pretrained(tmp_path / "run"), whole.model)
    words = AutoProcessor.from_pretrained(tmp_path / "run")(text=["a photo of a red"], return_tensors="pt")
    assert torch.equal(words["input_ids"], tokens(whole.model, ["a photo of a red"])["input_ids"])
    facts, card = json.loads((tmp_path / "run" / "purification.json").read_text()), (tmp_path / "run" / "README.md").read_text()
    jsonschema.validate(facts, json.loads(SCHEMA.read_text()))
    assert facts["kind"] == "clip" and facts["method"] in card and facts["retain"]["n"] == 20 and not facts.get("schedule")
    assert "pipeline_tag: zero-shot-image-classification" in card and "AutoProcessor.from_pretrained" in card
    assert "image and text encoder (CLIP) was **purified**" in card and "on images with captions" in card
    assert "RA and PACC" not in card and "guard rail" not in card


def test_captions_of_a_data_set_count_and_other_captions_are_another_run(tmp_path):
    features = Features({"image": ImageColumn(), "text": Value("string")})
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in PAIRS.images.images]
    table = Dataset.from_dict({"image": pictures, "text": PAIRS.captions}, features=features)
    runs = [build("clip_fine_tuning", tmp_path / str(number), pairs=pairs) for number, pairs in enumerate((PAIRS, table))]
    other = build("clip_fine_tuning", tmp_path / "other", pairs=table.add_column("index", range(20)).select(range(19, -1, -1)))
    for run in (*runs, other):
        run.train()
    assert same(runs[0].model, runs[1].model) and other.retain_indices == list(range(19, -1, -1))
    assert runs[0].train_dataset.fingerprint() == runs[1].train_dataset.fingerprint() != other.train_dataset.fingerprint()


# Refusals --------------------------------------------------------------------------------------------------------------


def test_what_is_no_whole_clip_or_lacks_captions_or_a_tokenizer_is_refused(tmp_path):
    for make in (tiny_clip, tiny_dinov2):
        with pytest.raises(ValueError, match="CleanCLIP trains a whole CLIP, which load_clip makes"):
            build("clean_clip", tmp_path, make)
    config_class, trainer_class = defence("par")
    with pytest.raises(ValueError, match="CLIPModel: PAR trains one tower alone"):
        trainer_class(tiny_pair(), config_class(str(tmp_path), **QUICK), PAIRS.images)
    with pytest.raises(ValueError, match="CLIPModel is an encoder without a head"):
        config_class, trainer_class = defence("fine_tuning")
        trainer_class(tiny_pair(), config_class(str(tmp_path), use_cpu=True), PAIRS.images)
    with pytest.raises(ValueError, match="trained on images with captions: pass Pairs, .* not a RawImages"):
        build("clip_par", tmp_path, pairs=PAIRS.images)
    with pytest.raises(ValueError, match="has no column text: name the one with captions by --text_column"):
        build("clip_par", tmp_path, pairs=Dataset.from_dict({"image": [1], "label": [0]}))
    wordless = tiny_pair()
    wordless.tokenizer = None
    with pytest.raises(ValueError, match="has no tokenizer"):
        build("clip_par", tmp_path, lambda: wordless)
    with pytest.raises(ValueError, match="must be at least 2: a pair is compared"):
        build("clip_par", tmp_path, per_device_train_batch_size=1)


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for name, options in {
        "clip_par": ["feature_weight", "feature_threshold"], "clean_clip": ["pair_weight", "modality_weight"],
    }.items() for option in options],
)  # fmt: skip
def test_a_number_out_of_its_range_is_refused_by_name(name, option, tmp_path):
    with pytest.raises(ValueError, match=f"^{option} must be "):
        build(name, tmp_path, **{option: -1.0})
