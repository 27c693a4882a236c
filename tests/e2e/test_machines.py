"""The Slurm script of one large purification, with two launchers that meet on the loopback interface."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from places import ROOT
from safetensors.torch import load_file
from tiny import NEW_VIT

from d3_hf.commands.purify import run
from d3_hf.victims.sets import make_victim

IMAGES = {"dataset_name": "digits", "retain_count": 64, "max_test_images": 40}
QUIET = {"disable_tqdm": True, "use_cpu": True}
# Slurm starts its tasks at once, each with its rank; the machines' names are found by scontrol.
SRUN = """#!/bin/bash
shift
for rank in 0 1; do SLURM_NODEID=$rank "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
"""
SCONTROL = "#!/bin/bash\necho 127.0.0.1\n"


@pytest.mark.slow
def test_two_launchers_equal_one_process(tmp_path):
    victim = NEW_VIT | IMAGES | QUIET | {"max_steps": 2, "output_dir": str(tmp_path / "victim")}
    (tmp_path / "victim.yaml").write_text(yaml.safe_dump(victim))
    make_victim([str(tmp_path / "victim.yaml")])
    options = IMAGES | QUIET | {"model_name_or_path": str(tmp_path / "victim"), "max_steps": 3, "max_accuracy_drop": 1}
    options["cutmix"] = 0  # each process mixes its own images
    (tmp_path / "purify.yaml").write_text(yaml.safe_dump(options))
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "node[1-2]", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    together = ["--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "together")]
    script = ["bash", str(ROOT / "recipes/slurm/purify.sh"), str(tmp_path / "purify.yaml"), *together]
    environment = os.environ | slurm | {"PATH": path}
    done = subprocess.run(script, capture_output=True, text=True, timeout=240, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    run([str(tmp_path / "purify.yaml"), "--per_device_train_batch_size", "8", "--output_dir", str(tmp_path / "alone")])
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("together", "alone"))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # two runs apart would see half of the window each
