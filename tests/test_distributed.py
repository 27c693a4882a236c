"""Two processes with two micro-batches each are one process with four: the same window, the same weights."""

import json

import pytest
import torch
from launched import CASES, run
from processes import launch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    launch("launched.py", folder, timeout=200)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(two_processes, tmp_path, case):
    record = json.loads((two_processes / f"{case}.json").read_text())
    assert record["mode"] == [2, "DistributedDataParallel"]
    alone = run(str(tmp_path), case, 4)
    for name, value in load_file(two_processes / f"{case}.safetensors").items():
        torch.testing.assert_close(value, alone.model.state_dict()[name], rtol=1e-5, atol=1e-5)
    steps = CASES[case]["max_steps"]
    for ours, theirs in zip(alone.state.log_history[:steps], record["log"][:steps], strict=True):
        for key in ("loss", "clean_loss", "active_fraction", "distance"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4, abs=1e-5)


def test_each_process_takes_its_own_active_images(two_processes):
    record = json.loads((two_processes / "active.json").read_text())
    windows = [list(zip(counts[::2], counts[1::2], strict=True)) for counts in record["active"]]
    assert any((one == (0, 0)) != (two == (0, 0)) for one, two in zip(*windows, strict=True))  # one alone has none
    for active, with_graph in zip(record["active"], record["with_graph"], strict=True):
        assert with_graph == [2, 2] + [max(count, 1) for count in active[2:]]  # the first window is dense; one takes part
