"""Two processes with two micro-batches each are one process with four: the same window, the same weights."""

import json

import pytest
import torch
import yaml
from launched import CASES, run
from processes import launch
from safetensors.torch import load_file
from tiny import FAST, NEW_VIT

from d3_hf.victims.record import read_record


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
        for key in ("objective", "clean_loss", "active_fraction", "distance"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4, abs=1e-5)


def test_each_process_takes_its_own_active_images(two_processes):
    record = json.loads((two_processes / "active.json").read_text())
    windows = [list(zip(counts[::2], counts[1::2], strict=True)) for counts in record["active"]]
    assert any((one == (0, 0)) != (two == (0, 0)) for one, two in zip(*windows, strict=True))  # one alone has none
    shares = [1.0] + [(sum(one) + sum(two)) / 8 for one, two in zip(*windows, strict=True)]  # of both processes' images
    assert any(share < 2 / 3 for share in shares[:-1])
    for counts, with_graph in zip(record["active"], record["with_graph"], strict=True):
        dense = [shares[number // 2] >= 2 / 3 for number in range(len(counts))]  # by the window before
        assert with_graph == [2 if d else max(count, 1) for count, d in zip(counts, dense, strict=True)]  # one takes part


def test_two_processes_hold_the_same_images(two_processes):
    ends = json.loads((two_processes / "ends.json").read_text())
    assert ends["same"] == ["trained"] * 2
    assert all(end.startswith("the processes hold different retain sets: give all") for end in ends["different"])
    assert not (two_processes / "end").exists()


def test_a_set_waits_for_the_clean_model_that_the_next_victim_needs(tmp_path):
    victims = {"clean": {}, "badnets": {"attack": "badnets", "clean_model": "toy/clean"}}
    base = NEW_VIT | FAST | {"dataset_name": "digits", "retain_count": 100, "max_test_images": 60}
    content = {"output_dir": str(tmp_path / "victims"), "groups": {"toy": {"base": base, "victims": victims}}}
    (tmp_path / "set.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    launch("launched_set.py", tmp_path, timeout=200)
    clean, badnets = (read_record(tmp_path / "victims" / "toy" / name) for name in victims)
    assert badnets["clean_model"]["sha256"]["model.safetensors"] == clean["weights_sha256"]
