"""D3 runs that SIGKILL ends at chosen instants, resumed until they finish.

Every run is a fork of this process, which has imported everything: a run then costs its steps alone. An instant is a number
of ticks: one before each forward pass, one after each update, one whenever a file of the output folder is opened, renamed or
removed, and one when a weights or state file lies there half written.
"""

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from tiny import SGD, tiny_samples, tiny_vit
from transformers import modeling_utils
from transformers.trainer_utils import get_last_checkpoint

from d3_hf.defenses.d3.trainer import D3Config, D3Trainer
from d3_hf.files import PARTIAL, sha256
from d3_hf.training.checkpoints import find_damage, last_whole_checkpoint

FORWARD, UPDATED, HALF_WRITTEN = "before a forward pass", "after an update", "a file is half written"
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir"}  # not os.mkdir: how often two processes try it is a race


class Clock:
    """Counts what happens, most of it to a folder's files, and kills this process at an instant."""

    def __init__(self, folder, instant):
        self.folder, self.instant, self.ticks = str(folder), instant, []

    def tick(self, what):
        self.ticks.append(what)
        if len(self.ticks) == self.instant:
            os.kill(os.getpid(), signal.SIGKILL)

    def hear(self, event, arguments):
        if event in FILE_EVENTS and arguments and self.folder in str(arguments[0]):
            self.tick(event)

    def halving(self, write):
        def slow(content, file, *args, **kwargs):
            Path(file).write_bytes(b"half")
            self.tick(HALF_WRITTEN)
            return write(content, file, *args, **kwargs)

        return slow


def run(folder, instant, processes):
    """One D3 run, or the rest of one, in this process; what happened, tick by tick."""
    clock = Clock(folder, instant)
    torch.save, modeling_utils.safe_save_file = clock.halving(torch.save), clock.halving(modeling_utils.safe_save_file)

    class Ticking(D3Trainer):
        def training_step(self, *args):
            clock.tick(FORWARD)
            return super().training_step(*args)

        def optimizer_step(self):
            super().optimizer_step()
            clock.tick(UPDATED)

    args = D3Config(
        str(folder), max_steps=7, save_strategy="steps", save_steps=3, save_total_limit=2, learning_rate=0.05, epsilon=0.5,
        per_device_train_batch_size=4 // processes, logging_steps=3, use_cpu=True, disable_tqdm=True,
        **SGD, resume_from_checkpoint="true" if last_whole_checkpoint(folder) else None,
    )  # fmt: skip
    trainer = Ticking(tiny_vit(), args, tiny_samples(18))
    assert args.world_size == processes
    sys.addaudithook(clock.hear)
    trainer.train(args.resume_from_checkpoint)
    trainer.save_model()
    return clock.ticks


def fork(folder, instant, rank, processes, port):
    if pid := os.fork():
        return pid
    try:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if processes > 1:
            os.environ |= {name: str(value) for name, value in place.items()}
        torch.set_num_threads(1)  # the threads of the parent are not here
        AcceleratorState._reset_state(reset_partial_state=True)
        with open(f"{folder}.{rank}.log", "a") as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        Path(f"{folder}.{rank}.ticks").write_text(json.dumps(run(folder, instant, processes)))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def attempt(folder, instant=None, victim=0, processes=1):
    """Run all processes; when one dies the others are killed too, as torchrun does. True if the run ended by itself."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    running = {fork(folder, instant if rank == victim else None, rank, processes, port): rank for rank in range(processes)}
    killed = False
    while running:
        pid, status = os.wait()
        rank = running.pop(pid)
        if status:
            assert killed or os.WIFSIGNALED(status), Path(f"{folder}.{rank}.log").read_text()[-3000:]
            killed = True
            for other in running:
                os.kill(other, signal.SIGKILL)
    return not killed


def ticks_of(folder, rank=0):
    """What happened in a run that ended by itself, tick by tick."""
    return json.loads(Path(f"{folder}.{rank}.ticks").read_text())


def kill_and_resume(folder, instants, victim=0, processes=1):
    """A run that is killed at each of the instants in turn and then left to end; what each kill left behind."""
    left = []
    for instant in instants:
        if not attempt(folder, instant, victim, processes):
            left.append(look(folder))
    assert attempt(folder, None, victim, processes)
    return left


def look(folder):
    """What a kill left behind; every checkpoint that anyone could find must be whole."""
    found = [str(path) for path in folder.glob("checkpoint-*")]
    assert all(find_damage(Path(path)) is None for path in found), found
    assert not found or get_last_checkpoint(folder) == str(last_whole_checkpoint(folder))
    return {"writing": (folder / PARTIAL).exists(), "checkpoints": len(found)}


def weights_of(folder):
    return sha256(folder / "model.safetensors")
