"""Two processes with two micro-batches each, by DDP or FSDP2, are one process with four: the same windows, the same weights."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from every_defence import required
from places import HELPERS, RECIPES
from processes import launch
from safetensors.torch import load_file
from sharded import RESUMED, RUNS, run
from tiny import tiny_resnet, tiny_samples
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer

from d3_hf import load_classifier
from d3_hf.defenses import DEFENCES, defence

MODES = ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)]
WEIGHTS = "model.safetensors"
LOGGED = ("objective", "clean_loss", "active_fraction", "distance", "grad_norm", "lambda", "distillation_loss", "eval_loss")


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """The folder of all runs by DDP."""
    folder = tmp_path_factory.mktemp("ddp")
    launch("sharded.py", folder, timeout=200)
    return folder


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    """The folder of all runs by FSDP2, launched as a user does, but for the device."""
    folder = tmp_path_factory.mktemp("fsdp")
    launcher = ["accelerate.commands.launch", "--config_file", str(RECIPES / "accelerate" / "fsdp2.yaml")]
    command = [sys.executable, "-m", *launcher, str(HELPERS / "cpu_shim.py"), str(HELPERS / "sharded.py"), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd=HELPERS)
    assert done.returncode == 0, done.stderr.partition("torch.distributed.elastic.multiprocessing.errors")[0][-6000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return functools.cache(lambda name: run(tmp_path_factory.mktemp("alone") / "run", name, 4, use_cpu=True))


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_one(request, alone, mode, name):
    folder = request.getfixturevalue(mode)
    record = json.loads((folder / f"{name}.json").read_text())
    wrapped = {"ddp": ["DistributedDataParallel", "Tensor"], "fsdp": [f"FSDP{type(alone(name).model).__name__}", "DTensor"]}
    assert record["mode"] == [2, *wrapped[mode]]
    expected = load_file(Path(alone(name).args.output_dir) / WEIGHTS)
    found = load_file(folder / name / WEIGHTS)
    assert list(found) == list(expected)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5)
    history = alone(name).state.log_history
    assert any("objective" in entry for entry in history)
    for ours, theirs in zip(history, record["log"], strict=True):
        keys = [key for key in LOGGED if key in ours]
        assert [theirs[key] for key in keys] == pytest.approx([ours[key] for key in keys], rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_sharded_runs_leave_the_files_of_a_plain_one(fsdp, alone, name):
    plain, folder = Path(alone(name).args.output_dir), fsdp / name
    assert {file.name for file in folder.iterdir()} == {file.name for file in plain.iterdir()}
    model, saved = load_classifier(folder), alone(name).model.state_dict()
    in_the_other_process = load_file(fsdp / f"{name}.safetensors")
    for weights in (in_the_other_process, model.state_dict()):
        for key, value in weights.items():
            torch.testing.assert_close(value, saved[key], rtol=1e-5, atol=1e-5)
    manifests = [json.loads((each / "purification.json").read_text()) for each in (plain, folder)]
    assert [manifest.pop("execution")["distributed_type"] for manifest in manifests] == ["NO", "FSDP"]
    for manifest in manifests:
        del manifest["arguments"], manifest["changed_options"]
        if "lambda" in manifest:  # summed in another order
            manifest["lambda"] = pytest.approx(manifest["lambda"], rel=1e-4)
        for weight in manifest.get("selected_weights", []):
            weight["relative_distance"] = pytest.approx(weight["relative_distance"], rel=1e-4)
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("mode", MODES)
def test_resumed_equals_uninterrupted(request, mode, name):
    folder = request.getfixturevalue(mode)
    found, expected = (load_file(folder / run / WEIGHTS) for run in (f"{name} resumed", name))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    before = load_file(folder / name / "checkpoint-2" / WEIGHTS)
    assert not all(torch.equal(before[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_a_sharded_checkpoint_holds_no_weights_as_a_pickle_and_is_resumed_on_shards(fsdp, tmp_path):
    checkpoint = fsdp / "D3 batch hinge" / "checkpoint-2"
    files = {file.name for file in checkpoint.iterdir()}
    assert "optimizer.bin" in files and not any("pytorch_model" in file for file in files)
    with pytest.raises(ValueError, match="holds no optimizer.pt: with FSDP resume what FSDP began"):
        run(tmp_path, "D3 batch hinge", 4, str(checkpoint), use_cpu=True)


def test_the_best_model_is_not_the_last(alone):
    assert alone("D3 best").state.best_model_checkpoint.endswith("checkpoint-2")


PLUGIN = dict(fsdp_version=2, cpu_ram_efficient_loading=False, cpu_offload=None, set_state_dict_type=lambda kind: None)


@pytest.fixture
def pretended(monkeypatch):
    """Make every Trainer believe that it was launched with FSDP, with a plugin of these attributes."""

    def pretend(**attributes):
        create = Trainer.create_accelerator_and_postprocess

        def created(self):
            create(self)
            self.is_fsdp_enabled = True
            monkeypatch.setattr(AcceleratorState, "fsdp_plugin", SimpleNamespace(**attributes), raising=False)

        monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", created)

    return pretend


@pytest.mark.parametrize("name", DEFENCES)
def test_other_defences_refuse_shards(pretended, tmp_path, name):
    config_class, trainer_class = defence(name)
    args = config_class(output_dir=str(tmp_path / "run"), use_cpu=True, **required(name))
    if name == "d3":
        args.sam_rho = 0.0  # which on this network it has by rule
    pretended(**PLUGIN)
    if name in ("d3", "fine_tuning"):
        trainer = trainer_class(tiny_resnet(), args, tiny_samples())
        assert trainer.plain is not trainer.model
    else:
        message = f"{trainer_class.__name__} does not run under FSDP, only D3 and fine-tuning do: launch with DDP"
        with pytest.raises(ValueError, match=message):
            trainer_class(tiny_resnet(), args, tiny_samples())


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"fsdp_version": 1}, {}, "FSDP1 is not supported: set fsdp_version to 2"),
        ({"cpu_ram_efficient_loading": True}, {}, "set fsdp_cpu_ram_efficient_loading to false"),
        ({"cpu_offload": CPUOffloadPolicy()}, {}, "set fsdp_offload_params to false"),
        ({}, {"active_set": True}, "active_set does not fit: on shards every process"),
        ({}, {"average_last": 0.5}, "average_last does not run under FSDP"),
        ({}, {"sam_rho": None}, "sam_rho does not run under FSDP: set it to 0, or launch with DDP"),  # by rule
    ],
)
def test_launches_that_are_refused(pretended, tmp_path, changed, options, message):
    config_class, trainer_class = defence("d3")
    args = config_class(output_dir=str(tmp_path / "run"), use_cpu=True, **{"sam_rho": 0.0} | options)
    pretended(**PLUGIN | changed)
    with pytest.raises(ValueError, match=message):
        trainer_class(tiny_resnet(), args, tiny_samples())
