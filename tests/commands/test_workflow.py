"""The whole path: a fire drill at toy size through `accelerate launch`, and what it leaves behind."""

import json
import re
import subprocess
import sys

import jsonschema
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from places import ROOT
from transformers import AutoModelForImageClassification, pipeline

import d3_hf
from d3_hf.commands.purify import run
from d3_hf.data.load import load_images
from d3_hf.publishing.card import render_card
from d3_hf.publishing.manifest import SCHEMA
from d3_hf.publishing.pictures.of_card import CLASSES, TRIGGERED
from d3_hf.publishing.summary import headline
from d3_hf.publishing.tables import results_table

TOY = {"max_steps": 6, "disable_tqdm": True, "use_cpu": True, "report_to": "none"}
DROP = {f"accuracy_drop{suffix}" for suffix in ("", "_ci95", "_n", "_p")}
DRIFTS = {f"trigger_drift_{when}{suffix}" for when in ("before", "after") for suffix in ("", "_n")}
DIGITS = ["--model_name_or_path", "VICTIM", "--dataset_name", "digits"]
KEYS = {f"{rate}_{when}" for rate in ("accuracy", "asr", "ra", "pacc") for when in ("before", "after")}


@pytest.fixture(scope="module")
def drill(tmp_path_factory):
    """Run the ViT recipe's fire drill with few steps, as a user would launch it."""
    folder = tmp_path_factory.mktemp("drill")
    victim = yaml.safe_load((ROOT / "recipes/configs/fire_drill_vit_victim.yaml").read_text())
    victim |= {**TOY, "output_dir": str(folder / "victim")}
    (folder / "victim.yaml").write_text(yaml.safe_dump(victim))
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(ROOT / "recipes" / "d3_vit.py")),
        *(str(ROOT / "recipes/configs/fire_drill_vit.yaml"), "--victim_config", str(folder / "victim.yaml")),
        *("--output_dir", str(folder / "purified"), "--max_steps", "6", "--use_cpu", "--hub_model_id", "me/purified"),
        *("--max_accuracy_drop", "1"),  # six steps make no model
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_drill_prints_the_table_and_the_distances(drill):
    _, done = drill
    for rate in ("ACC", "ACC drop", "ASR", "RA", "PACC", "trigger drift", "DER"):
        assert f"| {rate} |" in done.stdout
    assert "D3 moved classifier.weight to relative distance" in done.stdout and "training" in done.stdout
    assert "D3 moves 1 weight (classifier.weight)" in done.stdout
    phases = re.findall(r"^(\d)/8 (\w+) ", done.stdout, re.M)
    assert [int(number) for number, _ in phases] == list(range(1, 9))
    ways = ["preparing", "training", "measuring", "saving"]  # the victim, which is then purified
    assert [way for _, way in phases] == [*ways, "measuring", "purifying", "measuring", "saving"]
    assert "'train_objective':" in done.stdout and "'train_loss':" not in done.stdout
    assert "Measuring" in done.stderr and "Decoding images" in done.stderr  # progress bars


def test_drill_leaves_these_files(drill):
    folder, _ = drill
    assert {file.name for file in (folder / "purified").iterdir()} == {
        "README.md", "all_results.json", "config.json", "model.safetensors", "preprocessor_config.json", "purification.json",
        "retain_indices.json", CLASSES, TRIGGERED,
    }  # fmt: skip


def test_results_have_exactly_these_keys(drill):
    folder, done = drill
    results = json.loads((folder / "purified" / "all_results.json").read_text())
    assert set(results) == KEYS | {f"{k}_ci95" for k in KEYS} | {f"{k}_n" for k in KEYS} | DROP | DRIFTS | {"der"}
    assert results["accuracy_before_n"] == 360 and results["asr_after_n"] < 360
    for key in KEYS:
        low, high = results[f"{key}_ci95"]
        assert 0 <= low <= results[key] <= high <= 1
    drops = [results[f"{rate}_before"] - results[f"{rate}_after"] for rate in ("asr", "accuracy")]
    assert results["der"] == pytest.approx((max(0, drops[0]) - max(0, drops[1]) + 1) / 2)
    assert results_table(results) in done.stdout


def test_manifest_repeats_the_run(drill):
    folder, _ = drill
    manifest = json.loads((folder / "purified" / "purification.json").read_text())
    indices = json.loads((folder / "purified" / "retain_indices.json").read_text())
    poisoned = json.loads((folder / "victim" / "victim.json").read_text())["planted"]["poisoned_rows"]
    schema = json.loads((ROOT / "d3_hf/publishing/schemas/purification.schema.json").read_text())
    jsonschema.validate(manifest, schema)
    assert manifest["schema"] == schema["$id"] == SCHEMA
    assert manifest["source"]["kind"] == "folder" and "model.safetensors" in manifest["source"]["sha256"]
    assert manifest["retain"] == {"n": len(indices), "source": "digits", "indices_file": "retain_indices.json"}
    assert manifest["arguments"]["lambda_clean"] == 10 and manifest["arguments"]["epsilon"] == 0.02  # the drill's
    assert manifest["arguments"]["max_steps"] == 6 and manifest["arguments"]["seed"] == 42
    assert manifest["measured"]["trigger"]["name"] == "badnets"
    assert (manifest["measured"]["data"], manifest["measured"]["split"]) == ("digits", "test")
    assert manifest["selected_weights"][0]["name"] == "classifier.weight"
    assert not set(poisoned) & set(indices) and len(set(indices)) == len(indices)
    assert "hub_token" not in json.dumps(manifest) and str(folder) not in json.dumps(manifest["arguments"])


def test_card(drill):
    folder, _ = drill
    card = ModelCard.load(folder / "purified" / "README.md")
    assert card.data.pipeline_tag == "image-classification" and "purified" in card.data.tags
    assert card.data.eval_results is None and card.data.datasets is None  # the digits are no data set of the Hub
    assert "Images: digits (test)." in card.content
    results = json.loads((folder / "purified" / "all_results.json").read_text())
    said = headline(results, {"name": "badnets"})
    assert f"# purified\n\n{said}\n\nThis image classifier" in card.text and said.startswith("Known trigger (badnets): ASR ")
    for name in (CLASSES, TRIGGERED):
        assert f"]({name})" in card.text and (folder / "purified" / name).read_bytes()[:4] == b"\x89PNG"
    for text in ("## Lineage", "`classifier.weight`", "`lambda_clean`", "retain_indices.json", "me/purified", "Limits"):
        assert text in card.content


def test_reload_gives_the_same_logits(drill):
    folder, _ = drill
    model = d3_hf.load_classifier(str(folder / "purified"))
    auto = AutoModelForImageClassification.from_pretrained(folder / "purified").eval()
    image = load_images("digits")["test"][0]["image"]
    pixels = model.image_processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        assert torch.equal(model(pixel_values=pixels).logits, auto(pixel_values=pixels).logits)
    best = pipeline("image-classification", model=str(folder / "purified"))(image)[0]
    assert best["label"] == model.config.id2label[int(model(pixel_values=pixels).logits.argmax())]


def test_victim_card_warns_in_its_first_line(drill):
    folder, _ = drill
    card = ModelCard.load(folder / "victim" / "README.md")
    assert card.text.strip().splitlines()[0].startswith("This model is **deliberately backdoored, for research**")
    assert "backdoored-for-research" in card.data.tags


def test_without_a_trigger_only_accuracy_is_reported(drill, tmp_path):
    folder, _ = drill
    results = run(
        [
            "--model_name_or_path",
            str(folder / "victim"),
            "--dataset_name",
            "digits",
            "--retain_count",
            "40",
            "--output_dir",
            str(tmp_path),
            "--max_steps",
            "2",
        ]
        + ["--max_test_images", "50", "--disable_tqdm", "true", "--use_cpu", "--max_accuracy_drop", "1"]
        + ["--license", "mit", "--finetuned_from", "them/vit", "--clean_model", str(folder / "victim")]
    )
    rates = {"accuracy_before", "accuracy_after"}
    assert set(results) == rates | {f"{k}_ci95" for k in rates} | {f"{k}_n" for k in rates} | DROP
    assert results["accuracy_after_n"] == 50
    card = (tmp_path / "README.md").read_text()
    assert "ASR, RA and PACC were not measured" in card and "\n\nNo trigger was known: accuracy " in card
    data = ModelCard(card).data
    assert (data.license, data.base_model, data.base_model_relation) == ("mit", "them/vit", "finetune")
    before = results["accuracy_before"]  # of the victim, which stands in for a model without backdoor
    assert TRIGGERED not in card and re.search(rf"\| ACC \| ({100 * before:.1f} % .*?) \| .* \| \1 \| 50 \|", card)


def test_a_card_without_measurements_says_so():
    facts = {
        "method": "D3", "paper": None, "source": {"kind": "hub", "name": "me/base", "revision": "a" * 40, "sha256": None},
        "retain": {"n": 3, "source": None}, "preprocessing": {"size": [8, 8], "mean": [0.5], "std": [0.5]},
        "network": {"class": "ViTForImageClassification", "architecture": "vit", "library": "transformers"},
        "batch_norm": "train", "arguments": {}, "measured": {}, "versions": {"d3_hf": "0"},
    }  # fmt: skip
    card = render_card(facts, None, "purified-base")
    assert card.data.base_model == "me/base" and card.data.base_model_relation == "finetune"
    assert "Nothing was measured" in card.content and "a" * 40 in card.content


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no checkpoint: give --model_name_or_path"),
        (["--model_name_or_path", "VICTIM"], "no images: give --dataset_name"),
        (["--victim_config", "absent.yaml"], "no images: give --dataset_name"),
        (
            ["--victim_config", "absent.yaml", "--dataset_name", "digits", "--attack", "badnets"],
            "--attack is that of the victim",
        ),
        ([*DIGITS, "--attack", "unheard"], "unknown attack 'unheard'"),
        ([*DIGITS, "--license", "appache-2.0"], "did you mean apache-2.0"),
        ([*DIGITS, "--finetuned_from", "weights.pth"], "finetuned_from=weights.pth is no Hub id"),
        ([*DIGITS, "--train_split", "learn"], "no split 'learn'; it has train, test"),
        ([*DIGITS, "--retain_count", "5000"], "5000"),
        (DIGITS, "^5 % of 1437 images are 72, fewer than 10 a class: give --retain_count or --retain_fraction"),
    ],
)
def test_bad_input(drill, tmp_path, argv, message):
    argv = [str(drill[0] / "victim") if a == "VICTIM" else a for a in argv]
    with pytest.raises(ValueError, match=message):
        run([*argv, "--output_dir", str(tmp_path / "out"), "--use_cpu"])
    assert not (tmp_path / "out").exists()
