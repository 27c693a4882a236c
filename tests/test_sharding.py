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
from safetensors.torch import load_file
from sharded import RESUMED, RUNS, run
from tiny import tiny_resnet, tiny_samples
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer

from d3_hf import load_classifier
from d3_hf.defenses import DEFENCES, defence

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes" / "accelerate"
LAUNCHERS = {
    "ddp": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "fsdp": ["accelerate.commands.launch", "--config_file", str(RECIPES / "fsdp2.yaml"), str(HERE / "cpu_shim.py")],
}
WEIGHTS = "model.safetensors"
LOGGED = ("loss", "clean_loss", "active_fraction", "distance", "grad_norm", "lambda", "distillation_loss", "eval_loss")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder of all runs in a mode, launched when first asked for, and once even if it fails."""
    folders = {}

    def launch(mode):
        if mode in folders:
            return folders[mode] or pytest.fail(f"the {mode} launch failed")
        folders[mode] = None
        folder = tmp_path_factory.mktemp(mode)
        command = [sys.executable, "-m", *LAUNCHERS[mode], str(HERE / "sharded.py"), mode, str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd=HERE)
        assert done.returncode == 0, done.stderr[-3000:]
        folders[mode] = folder
        return folder

    return launch


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return functools.cache(lambda name: run(tmp_path_factory.mktemp("alone") / "run", name, 4, use_cpu=True))


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("mode", LAUNCHERS)
def test_two_processes_equal_one(launched, alone, mode, name):
    record = json.loads((launched(mode) / f"{name}.json").read_text())
    network = type(alone(name).model).__name__
    assert record["mode"] == [2, *(["DistributedDataParallel", "Tensor"] if mode == "ddp" else [f"FSDP{network}", "DTensor"])]
    expected = load_file(Path(alone(name).args.output_dir) / WEIGHTS)
    found = load_file(launched(mode) / name / WEIGHTS)
    assert list(found) == list(expected)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)
    history = alone(name).state.log_history
    assert any("loss" in entry for entry in history)
    for ours, theirs in zip(history, record["log"], strict=True):
        keys = [key for key in LOGGED if key in ours]
        assert [theirs[key] for key in keys] == pytest.approx([ours[key] for key in keys], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_sharded_runs_leave_the_files_of_a_plain_one(launched, alone, name):
    plain, folder = Path(alone(name).args.output_dir), launched("fsdp") / name
    assert {file.name for file in folder.iterdir()} == {file.name for file in plain.iterdir()}
    model, saved = load_classifier(folder), alone(name).model.state_dict()
    for file in (launched("fsdp") / f"{name}.safetensors", None):  # the copy in the other process, and the file
        for key, value in (load_file(file) if file else model.state_dict()).items():
            torch.testing.assert_close(value, saved[key], rtol=1e-5, atol=1e-6)
    manifests = [json.loads((each / "purification.json").read_text()) for each in (plain, folder)]
    for manifest in manifests:
        manifest.pop("arguments")
        manifest.pop("active_share", None)  # under FSDP all steps are dense
        for weight in manifest.get("selected_weights", []):
            weight["relative_distance"] = pytest.approx(weight["relative_distance"], rel=1e-5)
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("mode", LAUNCHERS)
def test_resumed_equals_uninterrupted(launched, mode, name):
    found, expected = (load_file(launched(mode) / folder / WEIGHTS) for folder in (f"{name} resumed", name))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    before = load_file(launched(mode) / name / "checkpoint-2" / WEIGHTS)
    assert not all(torch.equal(before[key], expected[key]) for key in expected)


def test_checkpoints_hold_no_weights_as_a_pickle(launched):
    files = {file.name for file in (launched("fsdp") / "hf sample" / "checkpoint-2").iterdir()}
    assert "optimizer.bin" in files and not any("pytorch_model" in file for file in files)


def test_the_best_model_is_not_the_last(alone):
    assert alone("hf best").state.best_model_checkpoint.endswith("checkpoint-2")


def test_a_sharded_run_is_resumed_as_one(launched, tmp_path):
    with pytest.raises(ValueError, match="holds no optimizer.pt: with FSDP resume what FSDP began"):
        run(tmp_path, "hf sample", 4, str(launched("fsdp") / "hf sample" / "checkpoint-2"), use_cpu=True)


PLUGIN = dict(fsdp_version=2, cpu_ram_efficient_loading=False, cpu_offload=None, set_state_dict_type=lambda kind: None)


@pytest.fixture
def pretended(monkeypatch):
    """Make every Trainer believe that it was launched in a way, with a plugin of these attributes."""

    def pretend(kind, **attributes):
        create = Trainer.create_accelerator_and_postprocess

        def created(self):
            create(self)
            self.is_deepspeed_enabled = kind == "deepspeed"
            self.is_fsdp_enabled = kind == "fsdp"
            monkeypatch.setattr(self.accelerator.state, "fsdp_plugin", SimpleNamespace(**attributes), raising=False)

        monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", created)

    return pretend


@pytest.mark.parametrize("name", DEFENCES)
def test_other_defences_refuse_shards(pretended, tmp_path, name):
    config_class, trainer_class = defence(name)
    args = config_class(output_dir=str(tmp_path / "run"), use_cpu=True)
    pretended("fsdp", **PLUGIN)
    if name in ("d3", "fine_tuning"):
        trainer = trainer_class(tiny_resnet(), args, tiny_samples())
        assert trainer.plain is not trainer.model
    else:
        message = f"{trainer_class.__name__} does not run under FSDP, only D3 and fine-tuning do: launch with DDP"
        with pytest.raises(ValueError, match=message):
            trainer_class(tiny_resnet(), args, tiny_samples())


@pytest.mark.parametrize(
    ("kind", "changed", "options", "message"),
    [
        ("deepspeed", {}, {}, "DeepSpeed is not supported: launch with FSDP2 .* or DDP"),
        ("fsdp", {"fsdp_version": 1}, {}, "FSDP1 is not supported: set fsdp_version to 2"),
        ("fsdp", {"cpu_ram_efficient_loading": True}, {}, "set fsdp_cpu_ram_efficient_loading to false"),
        ("fsdp", {"cpu_offload": CPUOffloadPolicy()}, {}, "set fsdp_offload_params to false"),
        ("fsdp", {}, {"active_set": True}, "active_set does not fit: under FSDP every process"),
        ("fsdp", {}, {"average_last": 0.5}, "average_last does not run under FSDP"),
    ],
)
def test_launches_that_are_refused(pretended, tmp_path, kind, changed, options, message):
    config_class, trainer_class = defence("d3")
    args = config_class(output_dir=str(tmp_path / "run"), use_cpu=True, **options)
    pretended(kind, **(PLUGIN | changed))
    with pytest.raises(ValueError, match=message):
        trainer_class(tiny_resnet(), args, tiny_samples())
