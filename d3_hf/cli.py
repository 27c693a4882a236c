"""The command line, ``d3-hf COMMAND``, and how every command and recipe ends.

Exit codes: 0 done, 1 a failure, 2 the user's mistake, 3 a broken guard rail, 4 an alarm of ``check``, 130 interrupted, 143
terminated. What went wrong is one line on stderr, and with ``--json`` also the object on stdout, as its ``error`` beside its
``code``; ``--debug`` adds the traceback. An alarm is a result and no error: the object is whole, and its ``code`` is 4. Nothing
heavy is imported before a command runs.
"""

import contextlib
import errno
import json
import os
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from .commands import COMMANDS, Command
from .commands.launch import ANSWERS, answer, launch, take_launch
from .errors import GuardRailBroken, ProcessesFailed, Terminated

FAILURE, MISTAKE, BROKEN_RAIL, INTERRUPTED, TERMINATED = 1, 2, 3, 130, 143
MISTAKES = (ValueError, FileNotFoundError, NotADirectoryError)
RUN_AGAIN = "what is finished stays: run the same command again"
HELP = {"-h", "--help", "--help_all"}
LONGEST = 800  # characters of an error; libraries print pages
ADVICE = {
    errno.ENOSPC: "free some space or write to another disk",
    errno.EDQUOT: "free some space or write to another disk",
    errno.EACCES: "check its permissions or choose another folder",
    errno.EPERM: "check its permissions or choose another folder",
    errno.EROFS: "choose another folder",
}
COMMON = """\
  --json     one JSON object on stdout and nothing else there; of a failure its error and code
  --debug    show where an error came from"""
SEVERAL = "  --num_processes N  so many processes, one a GPU; --accelerate_config fsdp2 or FILE: as that says"
CODES = """\
exit codes: 0 done, 1 failure, 2 mistake in what was given, 3 a guard rail broke (the model is in rejected/),
            4 an alarm of check, 130 interrupted, 143 terminated"""


def main() -> None:
    """Run one command of ``d3-hf``."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        with _closed_early_quietly():
            print(_usage(), flush=True)
        return
    if name in ("-V", "--version"):
        print(f"d3_hf {sys.modules['d3_hf'].__version__}")
        return
    if name not in COMMANDS:
        what = "--json goes after the command" if name == "--json" else f"unknown command {name!r}"
        message = f"{what}: choose one of {', '.join(COMMANDS)}"
        print(f"d3-hf: {message}", file=sys.stderr)
        if "--json" in sys.argv:
            _print_json({"error": message, "code": MISTAKE})
        sys.exit(MISTAKE)
    run(COMMANDS[name], argv)


def run(task: Command | Callable[[list[str]], Any], argv: list[str]) -> NoReturn:
    """Run a command or a recipe's function and exit: code as above, an error as one line on stderr.

    Args:
        task: Takes the arguments. What a command returns, or ``error`` and ``code``, is all that stdout gets with ``--json``;
            the rest goes to stderr.
        argv: Arguments without the program's name. A ``--debug`` with a value is left in, for `TrainingArguments`.
    """
    is_command = isinstance(task, Command)
    title = f"d3-hf {task.name}" if is_command else Path(sys.argv[0]).name
    debug, argv = _take_debug(argv)
    as_json = is_command and "--json" in argv
    code, message, found = 0, None, None
    try:
        with _terminated_as_interrupted(), contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            found = _run_command(task, argv, debug) if is_command else task(argv)
        _close_process_group()
        code = (found or {}).get("code", 0) if is_command else 0
    except KeyboardInterrupt as stop:
        code, what = (TERMINATED, "terminated") if isinstance(stop, Terminated) else (INTERRUPTED, "interrupted")
        message = f"{what}; {str(stop) or RUN_AGAIN}"
    except Exception as error:
        code, message = exit_code(error), error_line(error)
        if isinstance(error, GuardRailBroken):
            found = error.results | {"rejected": error.reasons, "folder": str(error.folder)}
        elif isinstance(error, ProcessesFailed):
            found = error.found
        if debug:
            traceback.print_exc()
    if message:
        found = (found or {}) | {"error": message, "code": code}
    if ANSWERS in os.environ:  # of several processes, which the one that launched them answers for
        answer(found, code)
        sys.exit(code)
    if message:
        print(f"{title}: {message}", file=sys.stderr)
    if as_json and found is not None and os.environ.get("RANK", "0") == "0":
        _print_json(found)
    sys.exit(code)


def _close_process_group() -> None:
    """Of several processes, wait for the others and end the connection, before the interpreter is taken apart.

    Not after an error: the others may never come to the same place.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        from accelerate import PartialState

        PartialState().wait_for_everyone()
        distributed.destroy_process_group()


def _run_command(command: Command, argv: list[str], debug: bool) -> dict[str, Any] | None:
    """Run a command here, or on the processes that it is asked to launch; its help begins here."""
    plain = [argument for argument in argv if argument != "--json"]
    asked, plain = take_launch(plain) if command.trains else (None, plain)
    if HELP & set(plain):
        print(_header(command))
    elif asked:
        return launch(command.name, [*plain, *["--json"] * ("--json" in argv), *["--debug"] * debug], asked)
    return command.run(plain)


def _print_json(found: dict[str, Any]) -> None:
    print(json.dumps(found, indent=2))


@contextlib.contextmanager
def _closed_early_quietly() -> Iterator[None]:
    """What is printed inside into a pager that is closed early ends the process without a traceback."""
    if not hasattr(signal, "SIGPIPE"):  # Windows
        yield
        return
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGPIPE, before)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`, unless something else listens for it."""

    def terminate(number, frame):
        raise Terminated

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def exit_code(error: Exception) -> int:
    """3 for a broken guard rail, 2 for what the user can put right in the command, 1 for everything else."""
    if isinstance(error, ProcessesFailed):
        return error.code
    if isinstance(error, GuardRailBroken):
        return BROKEN_RAIL
    return MISTAKE if isinstance(error, MISTAKES) else FAILURE


def error_line(error: Exception) -> str:
    """What, where, what to do, in one line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        advice = ADVICE.get(error.errno)
        text = ": ".join(str(part) for part in (error.strerror, error.filename, advice) if part)
    elif not isinstance(error, ValueError | OSError | RuntimeError | FloatingPointError):
        text = f"{type(error).__name__}: {text or 'no message'}; nobody foresaw this, --debug shows where it comes from"
    return textwrap.shorten(text or type(error).__name__, LONGEST, placeholder=" ... (all of it: --debug)")


def _take_debug(argv: list[str]) -> tuple[bool, list[str]]:
    """Whether ``--debug`` is given, and the arguments without it; with one of the Trainer's values it is the Trainer's."""
    ours = [
        place
        for place, argument in enumerate(argv)
        if argument == "--debug" and argv[place + 1 : place + 2] not in (["underflow_overflow"], ["tpu_metrics_debug"])
    ]
    return bool(ours), [argument for place, argument in enumerate(argv) if place not in ours]


def _usage() -> str:
    """What ``d3-hf --help`` prints."""
    commands = [f"{_summary(command)}\n      {command.example}" for command in COMMANDS.values()]
    further = [COMMON, "  --help     after a command: its options", "  --version  in place of a command\n"]
    return "\n".join(["usage: d3-hf COMMAND ...\n", *commands, "", *further, CODES])


def _header(command: Command) -> str:
    """What a command's help begins with: an example, what it does, and the options that its own parser does not know."""
    further = [*command.further, *([SEVERAL] if command.trains else []), COMMON]
    return "\n".join(["example:", f"      {command.example}", "", _summary(command), *further, ""])


def _summary(command: Command) -> str:
    return f"  {f'{command.name} {command.arguments}':<40}  {command.summary}"


if __name__ == "__main__":
    main()
