"""Runs a script of the tests in two processes that train together."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

HERE = Path(__file__).parent


def launch(script, folder, timeout):
    """Run ``tests/helpers/SCRIPT FOLDER`` on two processes, within so many seconds.

    They are forks of this one, which has imported everything already. A fork cannot compute gradients once its parent has had a
    GPU compute some; where there is one, torchrun starts the processes.
    """
    if torch.cuda.is_available():
        _launch_by_torchrun(script, folder, timeout)
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = [multiprocessing.get_context("fork").Process(target=_run, args=(script, folder, rank, port)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout)
        process.kill()
    assert [process.exitcode for process in started] == [0, 0], f"{script} failed, see stderr"


def _run(script, folder, rank, port):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)  # the threads of the parent are not here
    AcceleratorState._reset_state(reset_partial_state=True)
    sys.argv = [script, str(folder)]
    runpy.run_path(str(HERE / script), run_name="__main__")


def _launch_by_torchrun(script, folder, timeout):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=HERE)
    assert done.returncode == 0, done.stderr[-3000:]
