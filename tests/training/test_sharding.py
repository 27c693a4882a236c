"""Two processes with two micro-batches each, by DDP, FSDP2 or ZeRO, are one process with four: the same windows and weights."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from places import HELPERS, RECIPES
from safetensors.torch import load_file
from sharded import RESUMED, RUNS, run
from tiny import tiny_resnet, tiny_samples
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer

from d3_hf import load_classifier
from d3_hf.defenses import DEFENCES, defence

LAUNCHES = RECIPES / "accelerate"


def by_recipe(name):
    return ["accelerate.commands.launch", "--config_file", str(LAUNCHES / f"{name}.yaml"), str(HELPERS / "cpu_shim.py")]


LAUNCHERS = {
    "ddp": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "fsdp": by_recipe("fsdp2"),
    "zero2": by_recipe("zero2"),
    "zero3": by_recipe("zero3"),
}
without_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed")
ZEROS = [pytest.param(mode, marks=without_deepspeed) for mode in ("zero2", "zero3")]
MODES = ["ddp", "fsdp", *ZEROS]
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
        command = [sys.executable, "-m", *LAUNCHERS[mode], str(HELPERS / "sharded.py"), mode, str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd=HELPERS)
        assert done.returncode == 0, done.stderr[-3000:]
        folders[mode] = folder
        return folder

    return launch


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return functools.cache(lambda name: run(tmp_path_factory.mktemp("alone") / "run", name, 4, use_cpu=True))


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_one(launched, alone, mode, name):
    record = json.loads((launched(mode) / f"{name}.json").read_text())
    ways = {
        "ddp": ["DistributedDataParallel", "Tensor"],
        "fsdp": [f"FSDP{type(alone(name).model).__name__}", "DTensor"],
        "zero2": ["DeepSpeedEngine", "Tensor", 2, True],
        "zero3": ["DeepSpeedEngine", "Tensor", 3, not name.startswith("hf")],  # all weights partitioned, or too small for it
    }
    assert record["mode"] == [2, *ways[mode]]
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
@pytest.mark.parametrize("mode", MODES[1:])
def test_sharded_runs_leave_the_files_of_a_plain_one(launched, alone, mode, name):
    plain, folder = Path(alone(name).args.output_dir), launched(mode) / name
    assert {file.name for file in folder.iterdir()} == {file.name for file in plain.iterdir()}
    model, saved = load_classifier(folder), alone(name).model.state_dict()
    for file in (launched(mode) / f"{name}.safetensors", None):  # the copy in the other process, and the file
        for key, value in (load_file(file) if file else model.state_dict()).items():
            torch.testing.assert_close(value, saved[key], rtol=1e-5, atol=1e-6)
    manifests = [json.loads((each / "purification.json").read_text()) for each in (plain, folder)]
    for manifest in manifests:
        manifest.pop("arguments")
        manifest.pop("active_share", None)  # on shards all steps are dense
        for weight in manifest.get("selected_weights", []):
            weight["relative_distance"] = pytest.approx(weight["relative_distance"], rel=1e-5)
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("mode", MODES)
def test_resumed_equals_uninterrupted(launched, mode, name):
    found, expected = (load_file(launched(mode) / folder / WEIGHTS) for folder in (f"{name} resumed", name))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    before = load_file(launched(mode) / name / "checkpoint-2" / WEIGHTS)
    assert not all(torch.equal(before[key], expected[key]) for key in expected)


def test_checkpoints_hold_no_weights_as_a_pickle(launched):
    files = {file.name for file in (launched("fsdp") / "hf sample" / "checkpoint-2").iterdir()}
    assert "optimizer.bin" in files and not any("pytorch_model" in file for file in files)


@pytest.mark.parametrize("mode", ZEROS)
def test_one_process_goes_on_from_partitions(launched, alone, mode, tmp_path):
    checkpoint = launched(mode) / "hf sample" / "checkpoint-2"
    random_states = {"rng_state.pth": {"rng_state_0.pth", "rng_state_1.pth"}}
    beside = Path(alone("hf sample").args.output_dir) / "checkpoint-2"
    expected = {name for file in beside.iterdir() for name in random_states.get(file.name, {file.name})}
    assert {file.name for file in checkpoint.iterdir()} == expected
    resumed = run(tmp_path / "run", "hf sample", 4, str(checkpoint), use_cpu=True)
    for key, value in alone("hf sample").model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_the_best_model_is_not_the_last(alone):
    assert alone("hf best").state.best_model_checkpoint.endswith("checkpoint-2")


def test_a_sharded_run_is_resumed_as_one(launched, tmp_path):
    with pytest.raises(ValueError, match="holds no optimizer.pt: with FSDP resume what FSDP began"):
        run(tmp_path, "hf sample", 4, str(launched("fsdp") / "hf sample" / "checkpoint-2"), use_cpu=True)


PLUGIN = dict(fsdp_version=2, cpu_ram_efficient_loading=False, cpu_offload=None, set_state_dict_type=lambda kind: None)
ZERO = {"zero_optimization": {"stage": 3, "offload_param": {"device": "none", "nvme_path": None}}, "gradient_clipping": 0.0}
QUANTIZED = {"stage": 3, "zero_quantized_weights": True}
OFFLOAD = {"stage": 3, "offload_param": {"device": "cpu"}}


@pytest.fixture
def pretended(monkeypatch):
    """Make every Trainer believe that it was launched in a way, with a plugin of these attributes."""

    def pretend(kind, **attributes):
        create = Trainer.create_accelerator_and_postprocess

        def created(self):
            create(self)
            self.is_deepspeed_enabled = kind == "deepspeed"
            self.is_fsdp_enabled = kind == "fsdp"
            plugin = SimpleNamespace(**(attributes if kind == "fsdp" else {"deepspeed_config": attributes}))
            monkeypatch.setattr(AcceleratorState, f"{kind}_plugin", plugin, raising=False)

        monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", created)

    return pretend


@pytest.mark.parametrize("name", DEFENCES)
@pytest.mark.parametrize(("kind", "called", "plugin"), [("fsdp", "FSDP", PLUGIN), ("deepspeed", "DeepSpeed", ZERO)])
def test_other_defences_refuse_shards(pretended, tmp_path, kind, called, plugin, name):
    config_class, trainer_class = defence(name)
    args = config_class(output_dir=str(tmp_path / "run"), use_cpu=True)
    pretended(kind, **plugin)
    if name in ("d3", "fine_tuning"):
        trainer = trainer_class(tiny_resnet(), args, tiny_samples())
        assert trainer.plain is not trainer.model
    else:
        message = f"{trainer_class.__name__} does not run under {called}, only D3 and fine-tuning do: launch with DDP"
        with pytest.raises(ValueError, match=message):
            trainer_class(tiny_resnet(), args, tiny_samples())


@pytest.mark.parametrize(
    ("kind", "changed", "options", "message"),
    [
        ("deepspeed", {"zero_optimization": {"stage": 1}}, {}, "ZeRO stage 1 is not supported: set zero_stage to 2 or 3"),
        ("deepspeed", {"optimizer": {}}, {}, "configuration names an optimizer: leave it out, the run's own options say it"),
        ("deepspeed", {}, {"optim": "adafactor", "optim_args": None}, "would hand Adafactor flat pieces of weights: use sgd"),
        ("deepspeed", {"zero_optimization": OFFLOAD}, {}, "with offload is not supported: set offload_param_device to none"),
        ("deepspeed", {"zero_optimization": QUANTIZED}, {}, "ZeRO with zero_quantized_weights is not supported: leave it out"),
        ("deepspeed", {"bf16": {"enabled": True}}, {}, "bf16 under DeepSpeed is not supported: leave it out, or launch with"),
        ("deepspeed", {"gradient_clipping": 1.0}, {}, "max_grad_norm is 0.0: set gradient_clipping to auto"),
        ("deepspeed", {}, {"active_set": True}, "active_set does not fit: on shards every process"),
        ("deepspeed", {}, {"average_last": 0.5}, "average_last does not run under DeepSpeed"),
        ("fsdp", {"fsdp_version": 1}, {}, "FSDP1 is not supported: set fsdp_version to 2"),
        ("fsdp", {"cpu_ram_efficient_loading": True}, {}, "set fsdp_cpu_ram_efficient_loading to false"),
        ("fsdp", {"cpu_offload": CPUOffloadPolicy()}, {}, "set fsdp_offload_params to false"),
        ("fsdp", {}, {"active_set": True}, "active_set does not fit: on shards every process"),
        ("fsdp", {}, {"average_last": 0.5}, "average_last does not run under FSDP"),
    ],
)
def test_launches_that_are_refused(pretended, tmp_path, kind, changed, options, message):
    config_class, trainer_class = defence("d3")
    args = config_class(output_dir=str(tmp_path / "run"), use_cpu=True, **options)
    pretended(kind, **((PLUGIN if kind == "fsdp" else ZERO) | changed))
    with pytest.raises(ValueError, match=message):
        trainer_class(tiny_resnet(), args, tiny_samples())
