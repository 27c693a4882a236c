"""A CLIP on the command line: poisoned pairs, measuring, purifying end to end, refusals."""

import json

import pytest
from PIL import Image
from tiny import PROCESSOR
from tiny_encoders import NAMES, colours, tiny_dinov2
from tiny_pairs import write_pair
from transformers import AutoModel

from d3_hf.commands import COMMANDS
from d3_hf.defenses import CLIP_DEFENCES
from d3_hf.models import load_clip

ATTACK = '{"name": "badnets", "size": 4, "image_size": 16, "target_label": 2}'
QUICK = ["--max_steps", "2", "--use_cpu", "--disable_tqdm", "true", "--per_device_train_batch_size", "8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with one sub-folder of pictures for each class, and a CLIP."""
    folder, images = tmp_path_factory.mktemp("place"), colours(60)
    for row, (image, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
        file = folder / "images" / NAMES[label] / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    write_pair(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def options(place):
    return ["--dataset_name", str(place / "images"), "--retain_count", "24", *QUICK]


@pytest.fixture(scope="module")
def victim(place, options):
    argv = ["--clip", "--model_name_or_path", str(place / "clip"), "--attack", ATTACK, "--poison_ratio", "0.2"]
    return COMMANDS["victim"].run([*argv, "--output_dir", str(place / "victim"), *options]), str(place / "victim")


def test_a_victim_is_made_and_measured_again_from_its_folder(victim, place, capsys):
    found, folder = victim
    assert found["attack"]["name"] == "badnets" and set(found["measured"]) == {"n_images", "victim", "untouched"}
    record = json.loads((place / "victim" / "victim.json").read_text())
    assert record["kind"] == "clip" and len(record["planted"]["poisoned_rows"]) == 7  # a fifth of 36
    assert not set(record["planted"]["poisoned_rows"]) & set(retained(place))
    card = (place / "victim" / "README.md").read_text()
    assert "This CLIP is **deliberately backdoored" in card and "on 7 of 36 pairs" in card and "victim, zero-shot" in card
    assert COMMANDS["measure"].run([folder]) == found["measured"]["victim"]
    assert "recorded, zero-shot" in capsys.readouterr().out
    assert load_clip(folder).tokenizer(["a red"])["input_ids"]


def retained(place):
    from d3_hf.options.arguments import DataArguments

    return DataArguments(str(place / "images"), retain_count=24).load().retain["index"]


@pytest.mark.parametrize("name", CLIP_DEFENCES)
def test_purify_takes_the_defences_of_a_clip_end_to_end(name, victim, place, options, tmp_path, capsys):
    argv = ["--defence", name, "--model_name_or_path", victim[1], "--attack", victim[1], "--license", "mit"]
    found = COMMANDS["purify"].run([*argv, "--output_dir", str(tmp_path / "out"), *options])
    assert set(found) == {"before", "after"} and found["before"] == victim[0]["measured"]["victim"]
    assert json.loads((tmp_path / "out" / "all_results.json").read_text()) == found
    shown, card = capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()
    assert "before, zero-shot" in shown and "4/4 saving the CLIP" in shown and "Purified CLIP, card and evidence" in shown
    assert "Known trigger (badnets): zero-shot ASR" in card and "put into 5 templates" in card and "license: mit" in card
    facts = json.loads((tmp_path / "out" / "purification.json").read_text())
    assert facts["kind"] == "clip" and facts["measured"]["zero_shot"]["templates"] and facts["retain"]["n"] == 24
    assert {"tokenizer.json", "model.safetensors"} <= facts["source"]["sha256"].keys()
    assert json.loads((tmp_path / "out" / "retain_indices.json").read_text()) == list(retained(place))
    assert AutoModel.from_pretrained(tmp_path / "out").config.model_type == "clip"
    images = ["--dataset_name", str(place / "images"), "--retain_count", "24", "--attack", victim[1]]
    assert COMMANDS["measure"].run([str(tmp_path / "out"), *images]) == found["after"]


def test_what_cannot_work_is_said_in_one_line(place, options, tmp_path):
    clip, encoder = str(place / "clip"), str(tmp_path / "encoder")
    tiny_dinov2().save_pretrained(encoder)
    PROCESSOR.save_pretrained(encoder)
    out = ["--output_dir", str(tmp_path / "out")]
    purify = ["--defence", "clean_clip", *out]
    for command, argv, wanted in (
        ("purify", [*purify, "--model_name_or_path", encoder, *options], "no CLIP with a tower of images and one of texts"),
        ("purify", [*purify, *options], "no CLIP: give --model_name_or_path"),
        ("purify", [*purify, "--model_name_or_path", clip], "no images: give --dataset_name"),
        ("purify", [*purify, "--model_name_or_path", clip, "--dataset_name", "digits"], "no captions and no class names"),
        ("purify", [*purify, "--model_name_or_path", clip, "--image_size", "32", *options], "image_size cannot be set"),
        ("victim", ["--clip", *out, "--model_name_or_path", clip, *options], "no attack on pairs: give --attack"),
        ("victim", ["--clip", *out, "--attack", "badnets", *options], "no CLIP: give --model_name_or_path"),
        (
            "victim",
            ["--clip", *out, "--model_name_or_path", clip, "--attack", "badencoder", *options],
            "badencoder needs a classifier or an encoder to learn from",
        ),
    ):
        with pytest.raises(ValueError, match=wanted) as caught:
            COMMANDS[command].run(argv)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
