"""Run by test_resume.py: D3 runs that SIGKILL ends at chosen instants, resumed until they finish.

Every run is a fork of this process, which has torch loaded and no threads: a run then costs its steps and not its imports. An
instant is a number of ticks: one before each forward pass, one after each update, one whenever a file of the output folder is
opened, renamed or removed, and one when a weights or state file lies there half written.
"""

import gc
import json
import os
import random
import re
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from tiny import tiny_samples, tiny_vit
from transformers import modeling_utils
from transformers.trainer_utils import get_last_checkpoint

from d3_hf.defenses.d3.trainer import D3Config, D3Trainer
from d3_hf.files import sha256
from d3_hf.training.checkpoints import PARTIAL, damage, last_whole

KILLS, DDP_KILLS = 20, 2
re._MAXCACHE = 4096  # transformers has more patterns than Python remembers
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


class Clock:
    """Counts ticks below a folder and kills this process at one of them."""

    def __init__(self, folder, instant):
        self.folder, self.instant, self.ticks = str(folder), instant, 0

    def tick(self):
        self.ticks += 1
        if self.ticks == self.instant:
            os.kill(os.getpid(), signal.SIGKILL)

    def hear(self, event, arguments):
        if event in FILE_EVENTS and arguments and self.folder in str(arguments[0]):
            self.tick()

    def halving(self, write):
        def slow(content, file, *args, **kwargs):
            Path(file).write_bytes(b"half")
            self.tick()
            return write(content, file, *args, **kwargs)

        return slow


def run(folder, instant, processes):
    """One D3 run, or the rest of one, in this process."""
    clock = Clock(folder, instant)
    torch.save, modeling_utils.safe_save_file = clock.halving(torch.save), clock.halving(modeling_utils.safe_save_file)

    class Ticking(D3Trainer):
        def training_step(self, *args):
            clock.tick()
            return super().training_step(*args)

        def optimizer_step(self, step):
            result = super().optimizer_step(step)
            clock.tick()
            return result

    args = D3Config(
        str(folder), max_steps=7, save_strategy="steps", save_steps=3, save_total_limit=2, learning_rate=0.05, epsilon=0.5,
        per_device_train_batch_size=4 // processes, logging_steps=3, use_cpu=True, disable_tqdm=True,
        resume_from_checkpoint="true" if last_whole(folder) else None,
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
        if processes > 1:
            places = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": processes,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os.environ |= {name: str(value) for name, value in places.items()}
        with open(f"{folder}.{rank}.log", "a") as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        Path(f"{folder}.{rank}.ticks").write_text(str(run(folder, instant, processes)))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def attempt(folder, instant=None, victim=0, processes=1):
    """Run all processes; when one dies the others are killed too, as torchrun does. True if the run ended by itself."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pids = {fork(folder, instant if rank == victim else None, rank, processes, port) for rank in range(processes)}
    killed = False
    while pids:
        pid, status = os.wait()
        pids.discard(pid)
        if status:
            assert killed or os.WIFSIGNALED(status), Path(f"{folder}.0.log").read_text()[-3000:]
            killed = True
            for other in pids:
                os.kill(other, signal.SIGKILL)
    return not killed


def look(folder):
    """What a kill left behind; every checkpoint that anyone could find must be whole."""
    found = [str(path) for path in folder.glob("checkpoint-*")]
    assert all(damage(Path(path)) is None for path in found), found
    assert not found or get_last_checkpoint(folder) == str(last_whole(folder))
    return {"writing": (folder / PARTIAL).exists(), "checkpoints": len(found)}


def survive(root, kills, processes):
    """``kills`` runs, each killed at a random instant, every tenth one twice, and resumed to its end."""
    started, draw = time.perf_counter(), random.Random(processes)
    root.mkdir()
    assert attempt(root / "whole", processes=processes)
    ticks = [int(Path(f"{root / 'whole'}.{rank}.ticks").read_text()) for rank in range(processes)]
    weights, deaths = [], []
    for number in range(kills):
        folder, victim = root / str(number), number % processes
        for instant in [draw.randint(1, ticks[victim]), *([draw.randint(1, ticks[victim] // 2)] if number % 10 == 1 else [])]:
            if not attempt(folder, instant, victim, processes):
                deaths.append(look(folder))
        assert attempt(folder, None, victim, processes)
        weights.append(sha256(folder / "model.safetensors"))
    whole = sha256(root / "whole" / "model.safetensors")
    seconds = time.perf_counter() - started
    return {"whole": whole, "resumed": weights, "deaths": deaths, "ticks": ticks, "seconds": seconds}


if __name__ == "__main__":
    root = Path(sys.argv[1])
    tiny_vit().save_pretrained(root / "warm")  # compiles what every save would compile again
    gc.freeze()  # what is loaded by now is not collected again in every run
    report = {name: survive(root / name, *how) for name, how in {"single": (KILLS, 1), "ddp": (DDP_KILLS, 2)}.items()}
    (root / "report.json").write_text(json.dumps(report))
    os._exit(0)  # frozen objects would be reported as leaks
