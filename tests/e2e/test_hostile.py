"""Every hostile or broken input of the table ends in one line and an exit code, and nothing is written or lost."""

import gc
import hashlib
import logging
import multiprocessing
import os
import re
import shlex
import shutil
import socket

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from hostile import CHECKPOINTS, CONFIGS, NAMES, PURIFY, SURROUNDINGS, Case
from hostile_data import DATA, good_images
from pictures import noise
from tiny import tiny_vit

from d3_hf.cli import COMMANDS, run
from d3_hf.data.images import RawImages
from d3_hf.defenses.d3.trainer import D3Config, D3Trainer

CASES = [*CHECKPOINTS, *CONFIGS, *SURROUNDINGS, *DATA]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good checkpoint and good images."""
    folder = tmp_path_factory.mktemp("good")
    model = tiny_vit()
    model.config.id2label = dict(enumerate(NAMES))
    model.config.label2id = {name: number for number, name in enumerate(NAMES)}
    model.save_pretrained(folder / "model"), model.image_processor.save_pretrained(folder / "model")
    good_images(folder)
    gc.freeze()  # accelerate collects all garbage after each training, which takes seconds among everything that is imported
    yield folder
    gc.unfreeze()


@pytest.fixture
def here(good, tmp_path, monkeypatch, tmp_path_factory):
    """A copy of them, to be spoilt, as the working directory."""
    folder = shutil.copytree(good, tmp_path / "here")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


def contents(folder):
    """What lies in a folder: the digest of each file, where each link leads, and the folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "a folder"
        found[name] = os.readlink(path) if path.is_symlink() else digest
    return found


def command_of(case):
    words = shlex.split(case.words)
    if words and words[0] in COMMANDS:
        return words
    first, further = (words[:1], words[1:]) if case.words.endswith(".yaml") else ([], words)
    return ["purify", *first, *shlex.split(PURIFY), *further]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_input_is_one_line_and_a_code(case: Case, here, monkeypatch, capsys):
    if case.needs_no_gpu and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    case.make(here)
    case.patch(monkeypatch)
    before = contents(here)
    name, *argv = command_of(case)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, monkeypatch.context() as bare:
        bare.setattr(logging.root, "handlers", [])  # pytest's own: warnings go to stderr, as on the command line
        run(COMMANDS[name], argv)
    shown, after = capsys.readouterr(), contents(here)
    assert stop.value.code == case.code, shown.err[-2000:]
    assert "Traceback" not in shown.err
    if case.code == 0:
        assert re.search(case.says, shown.out + shown.err), shown.err[-2000:]
        assert {path: value for path, value in after.items() if path.partition("/")[0] != "out"} == before
        assert "out/purification.json" in after
        return
    assert re.fullmatch(f"d3-hf {name}: {case.says}", shown.err.splitlines()[-1]), shown.err[-2000:]
    assert shown.err.count("d3-hf ") == 1 and shown.err.endswith("\n") and after == before


def test_the_table_is_long_and_names_each_case_once():
    assert len(CASES) >= 60 and len({case.name for case in CASES}) == len(CASES)


def train(rank, port, seed, folder):
    """One of two processes; writes down what its training ended with."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    AcceleratorState._reset_state(reset_partial_state=True)  # what this process inherited
    labels = torch.arange(8) % len(NAMES)
    images = RawImages(torch.from_numpy(noise(8, 3, 16, 16, seed=seed)), labels, list(NAMES))
    args = D3Config(str(folder / "out"), max_steps=1, per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True)
    try:
        D3Trainer(tiny_vit(), args, images).train()
        end = "trained"
    except ValueError as error:
        end = str(error)
    (folder / f"{rank}").write_text(f"{args.world_size} {end}")


@pytest.mark.parametrize(
    ("seeds", "end"), [((0, 0), "trained"), ((0, 1), "the processes hold different retain sets: give all")]
)
def test_two_processes_hold_the_same_images(tmp_path, seeds, end):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # nothing is imported again
    started = [fork.Process(target=train, args=(rank, port, seeds[rank], tmp_path)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(100)
        process.kill()
    assert all((tmp_path / f"{rank}").read_text().startswith(f"2 {end}") for rank in range(2))
    assert not (tmp_path / "out").exists()
