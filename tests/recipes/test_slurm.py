"""The Slurm script of a purification: what a job that Slurm has put back into the queue is launched with."""

import os
import subprocess

import pytest
from places import RECIPES

SLURM = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NODEID": "0"}
PROGRAMS = {
    "srun": 'shift; exec "$@"',
    "scontrol": "echo node1",
    "accelerate": 'printf "%s\\n" "$@"',
    "d3-hf": 'echo "/place/$2.yaml"',
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
@pytest.mark.parametrize("argv", [["run.yaml", "--seed", "1"], ["fire_drill_vit"], ["--output_dir=~/given"]])
def test_a_requeued_job_goes_on(tmp_path, argv, restarts):
    found = launched(tmp_path, *argv, restarts=restarts)
    assert found == [*argv, *RESUME * (restarts == "1"), "--save_strategy", "epoch", "--save_total_limit", "2"]
