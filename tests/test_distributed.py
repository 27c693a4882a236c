"""Two processes with two micro-batches each are one process with four: the same window, the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched import run
from safetensors.torch import load_file

from d3_hf.defenses.d3 import HINGES

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(HERE / "launched.py"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=200, env=environment, cwd=HERE)
    assert done.returncode == 0, done.stderr[-3000:]
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
