"""`d3-hf check` and `audit` from folders: what it prints and writes, its exit codes, and the null that it keeps."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import torch
from command_line import command
from datasets import ClassLabel, Dataset, Features, Image
from pictures import encoded
from places import ROOT

from d3_hf.assurance.signals import SIGNALS
from d3_hf.models.new import new_classifier

CLASSES, SIDE, TARGET = 6, 16, 4
NAMES = [f"kind {k}" for k in range(CLASSES)]
VIT = {"img_size": SIDE, "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}
SCHEMA = ROOT / "d3_hf" / "publishing" / "schemas" / "check.schema.json"


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    pixels = torch.randint(0, 256, (count, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    rows = [{"bytes": encoded(image), "path": None} for image in pixels.numpy()]
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    return Dataset.from_dict({"image": rows, "label": labels.tolist()}, features=features)


def save(folder, seed, factor=1.0, classes=CLASSES):
    """A new ViT with the row of one class of its head made longer."""
    torch.manual_seed(seed)
    names = [f"kind {k}" for k in range(classes)]
    model = new_classifier("vit_tiny_patch16_224", label_names=names, model_args=VIT, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    with torch.no_grad():
        model.timm_model.head.weight[TARGET] *= factor
    model.save_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """Inside a folder with images, a model whose head has a long row, and trusted ones."""
    folder = tmp_path_factory.mktemp("check")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("data").mkdir()
        images(60, 0).to_parquet("data/train.parquet")
        images(36, 1).to_parquet("data/test.parquet")
        save("suspect", 0, factor=30.0)
        for seed in (1, 2, 3):
            save(f"twin{seed}", seed)
        save("other", 4, classes=7)
        yield folder


COMMON = ["--dataset_name", "data", "--retain_count", "30"]
TWINS = ["--twins", "twin1", "twin2", "twin3"]


def found_by(capsys, *argv):
    code = command("check", *argv, "--json")
    return code, json.loads(capsys.readouterr().out)


def test_an_alarm_ends_with_4_and_is_whole(here, capsys):
    argv = ["suspect", *COMMON, *TWINS, "--alarm_at", "0.25", "--save_null", "null.json", "--report", "out/report.html"]
    code, found = found_by(capsys, *argv)
    assert code == found["code"] == 4 and "error" not in found
    jsonschema.validate(found, json.loads(SCHEMA.read_text()))
    suspicion = found["suspicion"]
    assert suspicion["outcome"] == "alarm at p = 0.25 (3 twins)" and suspicion["twins"] == ["twin1", "twin2", "twin3"]
    assert suspicion["signals"]["head_rows"]["suspect_class"] == f"kind {TARGET}"
    assert found["images"] == {"data": "data", "configuration": None, "split": "test"}
    assert found["fit"]["images"] == 36 and {cost["images"] for cost in found["cost"]} == {30}
    assert [(cost["defence"], cost["why_not"]) for cost in found["cost"]] == [("d3", None), ("ft_sam", None)]
    page, null = Path("out/report.html").read_text(), Path("null.json").read_text()
    assert "alarm at p = 0.25" in page and page.count("data:image/") == len(SIGNALS)
    assert str(here) not in page + null + json.dumps(found)

    code, again = found_by(capsys, "suspect", *COMMON, "--null", "null.json", "--alarm_at", "0.25")
    assert code == 4 and again["suspicion"] == suspicion
    assert command("check", "other", "--dataset_name", "data", "--class_map", "names", "--null", "null.json") == 2
    assert "the null is of another kind of models: parameters" in capsys.readouterr().err.splitlines()[-1]


def test_without_twins_it_ends_with_0_and_concludes_nothing(capsys):
    assert command("check", "suspect", *COMMON) == 0
    shown = capsys.readouterr()
    assert "nothing can be concluded" in shown.out.splitlines()[-1]
    assert any(
        line.startswith('  head_rows: of the model\'s own classes "kind 4" is the most suspicious')
        for line in shown.out.splitlines()
    )
    assert "schedule for a network" not in shown.out  # what the timed trainings say is no part of the report


def test_twins_that_are_too_few_cannot_alarm(capsys):
    code, found = found_by(capsys, "suspect", *COMMON, "--twins", "twin1")
    words = "no alarm possible at this power: 1 twin gives p >= 0.5; 19 are needed for 0.05"
    assert code == found["code"] == 0 and found["suspicion"]["outcome"] == words


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([], 2, "no checkpoint: name a Hub id, a folder or a file"),
        (["suspect"], 2, "no images: give --dataset_name"),
        (["suspect", *COMMON, "--alarm_at", "5"], 2, r"alarm_at must be in \(0, 1\), as 0.05; got 5"),
        (["suspect", *COMMON, "--save_null", "x.json"], 2, "name some with --twins"),
        (["suspect", *COMMON, "--null", "absent.json"], 2, "no null absent.json: write one with"),
        (["suspect", *COMMON, "--twins", "absent/twin"], 1, "absent/twin is no local path"),
        (["suspect", *COMMON, "--twins", "suspect"], 2, "suspect is the model itself"),
        (["suspect", *COMMON, "--twins", "other"], 2, "other is of another kind than the model: parameters"),
        (["other", *COMMON], 2, "the dataset has 6 classes .* the model 7"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(capsys, argv, code, message):
    before = sorted(Path().rglob("*"))
    assert command("check", *argv) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"^d3-hf check: .*{message}", last)
    assert sorted(Path().rglob("*")) == before


def test_an_audit_of_two_folders(here, capsys):
    argv = ["twin1", "--source", "suspect", "--dataset_name", "data", "--max_test_images", "30", "--report", "audit.html"]
    assert command("audit", *argv, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    jsonschema.validate(found, json.loads(SCHEMA.with_name("audit.schema.json").read_text()))
    assert found["signals"]["head_rows"]["before"]["suspect_class"] == f"kind {TARGET}"
    assert found["accuracy"]["accuracy_drop_n"] == 30 and found["images"]["data"] == "data"
    assert (found["suspicious"]["source"]["name"], found["purified"]["source"]["name"]) == ("suspect", "twin1")
    page = Path("audit.html").read_text()
    assert found["outcome"] in page and page.count("data:image/") == len(SIGNALS) and str(here) not in page + json.dumps(found)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no purified model: name its folder"),
        (["twin1"], "no suspicious model: give --source"),
        (["twin1", "--source", "suspect"], "no images: give --dataset_name"),
        (["suspect", "--source", "suspect", "--dataset_name", "data"], "are the same: name what it was purified from"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_about_an_audit_is_one_line(capsys, argv, message):
    assert command("audit", *argv) == 2
    assert re.search(f"^d3-hf audit: .*{message}", capsys.readouterr().err.splitlines()[-1])
