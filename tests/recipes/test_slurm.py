"""The Slurm script of a purification: what a job that Slurm has put back into the queue is launched with."""

import os
import subprocess
import sys
from inspect import signature

import pytest
from places import RECIPES

from d3_hf.training.config import PurifyConfig

SLURM = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NODEID": "0"}
PROGRAMS = {
    "srun": 'shift; exec "$@"',
    "scontrol": "echo node1",
    "accelerate": 'printf "%s\\n" "$@"',
    "d3-hf": 'echo "/place/$2.yaml"',
    "python": f'exec {sys.executable} "$@"',
}
RESUME = ["--resume_from_checkpoint", "true"]


def launched(folder, *argv, restarts):
    """The recipe's arguments, as the script in ``folder`` launches it."""
    programs = folder / "programs"
    programs.mkdir()
    for name, line in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{line}\n")
        (programs / name).chmod(0o755)
    environment = os.environ | SLURM | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "HOME": str(folder / "home")}
    environment |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    script = ["bash", str(RECIPES / "slurm" / "purify.sh"), *argv]
    done = subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arguments = done.stdout.splitlines()
    assert arguments[:3] == ["launch", "--config_file", "/place/accelerate/multi_node.yaml"]
    return arguments[arguments.index("d3_hf.cli") + 2 :]


@pytest.mark.parametrize("restarts", [None, "1"])
@pytest.mark.parametrize("has_checkpoint", [False, True])
@pytest.mark.parametrize(
    ("argv", "output_dir"),
    [
        (["run.yaml", "--seed", "1"], "from file"),
        (["run.yaml", "--output_dir", "first", "--output_dir", "given"], "given"),
        (["run.yaml", "--output_dir=~/given"], "home/given"),
        (["bare.yaml"], "outputs/purified"),
    ],
    ids=["file", "command line", "home", "nowhere"],
)
def test_a_requeued_job_goes_on_if_there_is_a_checkpoint(tmp_path, argv, output_dir, has_checkpoint, restarts):
    (tmp_path / "run.yaml").write_text("output_dir: 'from file'  # quoted\nmax_steps: 2\n")
    (tmp_path / "bare.yaml").write_text("max_steps: 2\n")
    (tmp_path / output_dir / "checkpoint-5" if has_checkpoint else tmp_path / output_dir).mkdir(parents=True)
    resumes = has_checkpoint and restarts == "1"
    found = launched(tmp_path, *argv, restarts=restarts)
    assert found == [*argv, *RESUME * resumes, "--save_strategy", "epoch", "--save_total_limit", "2"]


def test_the_script_knows_where_the_recipe_writes():
    default = signature(PurifyConfig).parameters["output_dir"].default
    assert f'"{default}"' in (RECIPES / "slurm" / "purify.sh").read_text()
