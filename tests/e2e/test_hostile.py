"""Hostile and broken inputs, on the command line: each ends in one line and an exit code, and nothing is written or lost.

One of each kind; what else can be wrong with a checkpoint, an option or a picture is in the test_hostile files beside the tests
of those.
"""

import logging
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
from hostile import NAMES, config, content, contents, good_images, good_model, pickle_with_code, picture, truncated, weights
from pictures import encoded, noise

from d3_hf.cli import COMMANDS, run

OPTIONS = (
    "--model_name_or_path model --dataset_name images --retain_count 6 --output_dir out --max_steps 1 --use_cpu "
    "--disable_tqdm true --max_accuracy_drop 1 --per_device_train_batch_size 4"
)
PURIFY, WITH_YAML = f"purify {OPTIONS}", f"purify o.yaml {OPTIONS}"
ALL = f"{PURIFY} --retain_count 12"  # every training image


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        name: What is wrong with it.
        command: The command and its options.
        says: Regular expression: all of what follows ``d3-hf COMMAND: `` in the last line of stderr; with code 0 somewhere.
        spoil: Spoils the input in a folder.
        code: Exit code.
        patch: Changes the surroundings, by a MonkeyPatch.
    """

    name: str
    command: str
    says: str
    spoil: Callable[[Path], object] = lambda here: None
    code: int = 2
    patch: Callable[[pytest.MonkeyPatch], object] = lambda monkeypatch: None


def options(text):
    """Write a configuration."""
    return content(text.encode(), "o.yaml")


def no_permission(monkeypatch):
    """As the system reports it to others than root."""
    monkeypatch.setattr(os, "access", lambda place, mode: False)


def no_space(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)


def closed_port(monkeypatch):
    """Nobody listens where the Hub should be."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def earlier_run(here):
    (here / "out").mkdir()
    (here / "out/purification.json").write_text("{}")
    (here / "out/README.md").write_text("an earlier run")


def without_test_images(here):
    for file in (here / "images/test").rglob("*.png"):
        file.unlink()


def without_splits(here):
    (here / "images/train").rename(here / "train")
    shutil.rmtree(here / "images")
    (here / "train").rename(here / "images")


def only_cats(here):
    for split in ("train", "test"):
        for name in NAMES[1:]:
            shutil.rmtree(here / "images" / split / name)


def renamed(here):
    for split in ("train", "test"):
        (here / "images" / split / "cat").rename(here / "images" / split / "ship")


def all_alike(here):
    for file in (here / "images/train").rglob("*.png"):
        file.write_bytes(encoded(noise(16, 16, 3, seed=7)))


NAN = weights(lambda tensors: tensors["classifier.bias"].fill_(float("nan")))
MAP = {"AutoConfig": "evil.EvilConfig", "AutoModelForImageClassification": "evil.EvilModel"}
HALF_A_JPEG = encoded(noise(40, 40, 3), "JPEG")[:900]
VICTIM = "victim --model_name_or_path model --dataset_name images --output_dir out --use_cpu"

CASES = [
    Case("pickle with code", PURIFY, "model/pytorch_model.bin was not opened: it wants to run posix.mkdir, .*safetensors.*",
         pickle_with_code),
    Case("NaN weights", PURIFY, "model: NaN or infinite values in classifier.bias", NAN),
    Case("truncated weights", PURIFY, "model/model.safetensors is no complete safetensors file .*: fetch it again", truncated),
    Case("code in auto_map", PURIFY, r"model needs Python code of its repository \(auto_map in config.json\), which is .*",
         config(model_type="evil", auto_map=MAP)),
    Case("victim.json of another kind", "measure model", "model/victim.json is no record of make_victim .*: make the .*",
         content(b"[]", "model/victim.json")),
    Case("YAML with an object", WITH_YAML, "o.yaml is no YAML: .*",
         options("a: !!python/object/apply:os.mkdir ['ran']")),
    Case("attack on a class that is not there", f"""{PURIFY} --attack '{{"name": "badnets", "target_label": 3}}'""",
         "target_label 3 is out of range: there are classes 0 to 2"),
    Case("over-broad target_modules", WITH_YAML, r"target_modules='.\*' matches all of it, a ViTForImageClassification; .*",
         options("target_modules: .*")),
    Case("wrong type in a grid", "benchmark o.yaml", "o.yaml: defences must be dict.*; got 5, a int",
         options("{output_dir: out, dataset_name: images, victims: [model], victims_dir: ., defences: 5}")),
    Case("poison ratio out of range", f"{VICTIM} --attack badnets --poison_ratio 2", ".*ratio.*2.*"),
    Case("no permission", PURIFY, "output_dir out cannot be written: no permission in .*", code=1, patch=no_permission),
    Case("no disk", PURIFY, r"out could not be written \(.*No space left on device\): nothing of it was kept; .*run it again.*",
         code=1, patch=no_space),
    Case("the output of another run", PURIFY, r"output_dir out holds the results of another run .*--overwrite_output_dir.*",
         earlier_run),
    Case("output into the source", f"{PURIFY} --output_dir model", "output_dir model is where the suspicious model lies, .*"),
    Case("resuming from nothing", f"{PURIFY} --resume_from_checkpoint absent", "absent is no whole checkpoint .*"),
    Case("Hub id, closed port", "info me/vit", "me/vit is no local path .*cannot be reached: go online once", code=1,
         patch=closed_port),
    Case("fp16 without a GPU", f"{PURIFY} --fp16", "fp16 is for a GPU and this run has none: use bf16, or leave it out"),
    Case("an empty test split", PURIFY, ".*", without_test_images, 0),
    Case("folder without splits", PURIFY,
         r"no separate split 'test': measuring on its rest of train[\s\S]*fewer than 10 images", without_splits, 0),
    Case("nothing left to measure on", ALL, "images has no split 'test' and the retain set is all of 'train': nothing is .*",
         without_splits),
    Case("folder of one class", PURIFY, "found no label column; .*; a folder of images takes labels from .* two or more .*",
         only_cats),
    Case("classes of other names", PURIFY, "class 0 is 'dog' in the dataset and 'cat' in the model; .*", renamed),
    Case("truncated picture", ALL, r"cannot decode row \d+ of split 'train' \(.*strange.jpg\): .*replace the picture or .*",
         picture(HALF_A_JPEG, "jpg")),
    Case("1x1 with a trigger", f"{PURIFY} --attack badnets", "badnets: a patch of 3x3 .* does not fit an image of 1x1; .*",
         content(encoded(noise(1, 1, 3)), "images/test/dog/1.png")),
    Case("20,000x10", ALL, "classifier", picture(encoded(noise(10, 20_000, 3))), 0),
    Case("all images alike", ALL, "11 of the 12 images of the retain set are copies of others", all_alike, 0),
]  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good checkpoint and good images."""
    folder = tmp_path_factory.mktemp("good")
    good_model(folder)
    good_images(folder)
    return folder


@pytest.fixture
def here(good, tmp_path, monkeypatch):
    """A copy of them, to be spoilt, as the working directory."""
    folder = shutil.copytree(good, tmp_path / "here")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


def ended(command, capsys):
    """Exit code of a command, and what it printed."""
    name, *argv = shlex.split(command)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as bare:
        bare.setattr(logging.root, "handlers", [])  # pytest's own: warnings go to stderr, as on the command line
        run(COMMANDS[name], argv)
    return stop.value.code, capsys.readouterr()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_input_is_one_line_and_a_code(case: Case, here, monkeypatch, capsys):
    case.spoil(here)
    case.patch(monkeypatch)
    before = contents(here)
    code, shown = ended(case.command, capsys)
    after = contents(here)
    assert code == case.code, shown.err[-2000:]
    assert "Traceback" not in shown.err
    if case.code == 0:
        assert re.search(case.says, shown.out + shown.err), shown.err[-2000:]
        assert {path: value for path, value in after.items() if path.partition("/")[0] != "out"} == before
        assert "out/purification.json" in after
        return
    assert re.fullmatch(f"d3-hf {case.command.split()[0]}: {case.says}", shown.err.splitlines()[-1]), shown.err[-2000:]
    assert shown.err.count("d3-hf ") == 1 and shown.err.endswith("\n") and after == before


def test_tf32_without_a_gpu(here, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, shown = ended(f"{PURIFY} --tf32 true", capsys)
    assert code == 2 and re.fullmatch("d3-hf purify: .*tf32.*GPU.*", shown.err.splitlines()[-1])
