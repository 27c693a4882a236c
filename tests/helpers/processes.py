"""Starts a script of the tests on two processes."""

import os
import subprocess
import sys
from pathlib import Path


def launch(script, folder, timeout):
    """Run ``tests/SCRIPT FOLDER`` by torchrun on two processes, within so many seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, str(folder)]
    environment, here = os.environ | {"OMP_NUM_THREADS": "1"}, Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=here)
    assert done.returncode == 0, done.stderr[-3000:]
