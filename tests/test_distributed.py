"""Two processes: D3 with two micro-batches each is one process with four, and every other defence runs and agrees."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched import run
from launched_defences import VICTIMS
from launched_defences import run as run_defence
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_trained import weights

from d3_hf.defenses import DEFENCES
from d3_hf.defenses.d3 import HINGES

HERE = Path(__file__).parent


def launch(script, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=HERE)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    launch(HERE / "launched.py", folder)
    return folder


@pytest.mark.parametrize("hinge", HINGES)
def test_two_processes_equal_one(two_processes, tmp_path, hinge):
    record = json.loads((two_processes / f"{hinge}.json").read_text())
    assert record["mode"] == [2, "DistributedDataParallel"]
    alone = run(str(tmp_path), hinge, 4)
    for name, value in load_file(two_processes / f"{hinge}.safetensors").items():
        torch.testing.assert_close(value, alone.model.state_dict()[name], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(alone.state.log_history[:4], record["log"][:4], strict=True):
        for key in ("loss", "clean_loss", "active_fraction", "distance"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4)


# Those whose step is a mean over the images, whatever process they are on; the others draw or count per process.
EQUAL = ("d3", "fine_tuning", "linear_probing", "ft_sam", "fst", "tsc", "fine_pruning", "nad")


@pytest.fixture(scope="module")
def every_defence(tmp_path_factory):
    folder = tmp_path_factory.mktemp("defences")
    for make in set(VICTIMS.values()):
        save_file(weights(make), folder / f"{make.__name__}.safetensors")
    launch(HERE / "launched_defences.py", folder)
    return folder


@pytest.mark.parametrize("name", DEFENCES)
def test_every_defence_runs_on_two_processes(every_defence, name):
    with safe_open(every_defence / f"{name}.safetensors", "pt") as found:
        assert found.metadata() == {"processes": "2", "versions": "1"}
        together = {key: found.get_tensor(key) for key in found.keys()}
    victim = load_file(every_defence / f"{VICTIMS[name].__name__}.safetensors")
    assert any(not torch.equal(together[key], victim[key]) for key in victim)
    if name in EQUAL:
        alone = run_defence(str(every_defence), name, 8).model.state_dict()
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
