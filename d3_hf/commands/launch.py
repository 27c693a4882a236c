"""One launcher: with ``--num_processes`` or ``--accelerate_config`` a command runs on several processes, and answers as one.

accelerate starts the command again in each of them. They hand over how they ended, in a folder that `ANSWERS` names, and the
process that launched them says it: one object, one line, the exit code of the first that failed.
"""

import json
import logging
import os
import signal
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

from ..errors import ProcessesFailed

ANSWERS = "D3_HF_ANSWERS"
OPTIONS = ("--num_processes", "--num-processes", "--accelerate_config", "--accelerate-config")
RUN_AGAIN = "the others were stopped; what is finished stays"


@dataclass
class LaunchArguments:
    """On how many processes.

    Args:
        num_processes: How many, >= 1; by default as ``accelerate_config`` says. 1 launches none.
        accelerate_config: YAML file of `accelerate config`, or the name of one in ``recipes/accelerate``.

    Raises:
        ValueError: ``num_processes`` is below 1.
    """

    num_processes: int | None = field(default=None, metadata={"help": "So many processes, one a GPU."})
    accelerate_config: str = field(default="ddp", metadata={"help": "How, by name or as a file."})

    def __post_init__(self):
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"--num_processes must be at least 1; got {self.num_processes}")


def take_launch(argv: list[str]) -> tuple[LaunchArguments | None, list[str]]:
    """What the arguments ask for, None where that is one process as usual; and the arguments without it.

    Raises:
        ValueError: The processes are started already, or see `LaunchArguments`.
    """
    if not any(argument.partition("=")[0] in OPTIONS for argument in argv):
        return None, argv
    from ..options.parser import Parser

    parser = Parser([LaunchArguments], add_help=False, allow_abbrev=False)
    asked, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if "LOCAL_RANK" in os.environ:
        raise ValueError("the processes are started already: give --num_processes to `accelerate launch`, before the script")
    alone = asked.num_processes == 1 and asked.accelerate_config == LaunchArguments.accelerate_config
    return None if alone else asked, rest


def launch(name: str, argv: list[str], asked: LaunchArguments) -> dict[str, Any] | None:
    """Run a command on several processes of this machine.

    Args:
        name: The command's.
        argv: Its arguments, ``--json`` and ``--debug`` among them.
        asked: On how many, and how.

    Returns:
        What the command returns in the main process.

    Raises:
        FileNotFoundError: There is no such configuration.
        ValueError: The configuration is for one process or for several machines, or there are too few GPUs.
        ProcessesFailed: One has failed, or all were interrupted or terminated.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    line = [*_line(asked, "--use_cpu" in argv), "-m", "d3_hf.cli", name, *argv]
    before, rank = dict(os.environ), 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ[ANSWERS] = folder
        logging.disable(logging.ERROR)  # what the launcher says of a failure, beside the one line that says why
        try:
            launch_command(launch_command_parser().parse_args(line))
            code = 0
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            code = failure.exitcode
        except CalledProcessError as failed:
            code = failed.returncode
        except SignalException as stopped:
            code = 128 + stopped.sigval
        finally:
            logging.disable(logging.NOTSET)
            os.environ.clear()
            os.environ |= before
        answers = {int(file.stem): json.loads(file.read_text()) for file in Path(folder).glob("*.json")}
    if code == 0:
        return answers[0]["found"]
    told = [answers[number]["found"] for number in (0, rank) if number in answers and answers[number]["code"] == code]
    raise ProcessesFailed(told[0] if told else _unsaid(code, rank))


def _line(asked: LaunchArguments, on_cpu: bool) -> list[str]:
    """What `accelerate launch` is told."""
    import torch

    from ..options.parser import read_yaml
    from ..options.recipes import find_recipe

    file = find_recipe(asked.accelerate_config, "accelerate configuration")
    content = read_yaml(file)
    if content.get("num_machines", 1) != 1:
        raise ValueError(
            f"{file} is for several machines: `accelerate launch` on each of them, as in slurm/purify.sh (see `d3-hf recipes`)"
        )
    kind, processes = str(content.get("distributed_type")), asked.num_processes or content.get("num_processes")
    if kind != "FSDP" and (kind == "MULTI_CPU" or not kind.startswith("MULTI_")):
        raise ValueError(f"{file} starts one process (distributed_type {kind}): leave --accelerate_config out")
    gpus = torch.cuda.device_count()
    if gpus and not on_cpu and isinstance(processes, int) and processes > gpus:
        raise ValueError(f"{processes} processes, one a GPU, and there are {gpus} of these: give --num_processes {gpus}")
    count = ["--num_processes", str(processes)] if processes else []
    return ["--config_file", file, *count, "--main_process_port", "0"]  # a free port


def answer(found: dict[str, Any] | None, code: int) -> None:
    """Hand over how this process has ended."""
    from ..files import atomic_file

    with atomic_file(Path(os.environ[ANSWERS], f"{os.environ.get('RANK', 0)}.json")) as beside:
        beside.write_text(json.dumps({"found": found, "code": code}))


def _unsaid(code: int, rank: int) -> dict[str, Any]:
    """What is known of processes of which none has said why it ended."""
    if code < 0:
        return {"error": f"process {rank} was ended by {signal.Signals(-code).name}; {RUN_AGAIN}", "code": 1}
    return {"error": f"process {rank} ended with exit code {code} and gave no reason; {RUN_AGAIN}", "code": code}
