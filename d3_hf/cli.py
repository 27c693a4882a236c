"""The command line: ``d3-hf purify | measure | victim | benchmark | push | info``, and how every command and recipe ends.

Exit codes: 0 done, 1 a failure, 2 the user's mistake, 3 a broken guard rail, 130 interrupted. What went wrong is one line on
stderr; ``--debug`` adds the traceback. Nothing heavy is imported before a command runs.
"""

import argparse
import contextlib
import errno
import json
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .defenses import DEFENCES, defence
from .errors import GuardRailBroken

FAILURE, MISTAKE, BROKEN_RAIL, INTERRUPTED = 1, 2, 3, 130
MISTAKES = (ValueError, FileNotFoundError, NotADirectoryError)
RUN_AGAIN = "what is finished stays: run the same command again"
LONGEST = 800  # characters of an error; libraries print pages
ADVICE = {
    errno.ENOSPC: "free some space or write to another disk",
    errno.EDQUOT: "free some space or write to another disk",
    errno.EACCES: "check its permissions or choose another folder",
    errno.EPERM: "check its permissions or choose another folder",
    errno.EROFS: "choose another folder",
}


class Command(NamedTuple):
    """What the help says of a command.

    Attributes:
        arguments: What follows its name.
        summary: What it does.
        example: A whole command line.
        further: Lines about options that its own parser does not know.
    """

    arguments: str
    summary: str
    example: str
    further: tuple[str, ...] = ()


ABOUT = {
    "purify": Command(
        "[CONFIG.yaml] --option value ...",
        "purify a checkpoint with D3; --defence NAME takes another method",
        "d3-hf purify --model_name_or_path me/suspicious-vit --dataset_name path/to/images --retain_count 500",
        (f"  --defence  {', '.join(DEFENCES)}",),
    ),
    "measure": Command("FOLDER", "measure a victim again, from its folder alone", "d3-hf measure outputs/victim"),
    "victim": Command(
        "[CONFIG.yaml] --option value ...",
        "plant a backdoor, for research; --set FILE.yaml makes a set of victims",
        "d3-hf victim recipes/configs/fire_drill_vit_victim.yaml --seed 0 --output_dir outputs/victim",
        ("  --set FILE.yaml [--only GROUP/VICTIM ...]  the victims of a set, see recipes/victims.yaml",),
    ),
    "benchmark": Command(
        "GRID.yaml [--shard i/n]",
        "victims x retain sets x defences x seeds: tables and plots",
        "d3-hf benchmark recipes/grids/cpu.yaml --dataset_name uoft-cs/cifar10",
    ),
    "push": Command(
        "FOLDER --hub_model_id REPOSITORY",
        "upload a purified folder, private by default",
        "d3-hf push outputs/purified --hub_model_id me/model-purified",
    ),
    "info": Command("SOURCE", "what a checkpoint is and what D3 could move of it", "d3-hf info google/vit-base-patch16-224"),
}
COMMON = """\
  --json     one JSON object on stdout and nothing else there
  --debug    show where an error came from"""
CODES = """\
exit codes: 0 done, 1 failure, 2 mistake in what was given, 3 a guard rail broke (the model is in rejected/), 130 interrupted"""


def purify(argv: list[str]) -> dict[str, Any]:
    """Run the recipe of D3, or of the method that ``--defence``, or ``--defense``, names."""
    from .commands.purify import main

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--defence", "--defense", default="d3", nargs="?", const="")
    chosen, argv = parser.parse_known_args(argv)
    return main(argv, *defence(chosen.defence))


def measure(argv: list[str]) -> dict[str, Any]:
    """Measure a victim again."""
    from .commands.measure import measure_victim

    return measure_victim(argv)


def victim(argv: list[str]) -> dict[str, Any]:
    """Make a victim, or with ``--set`` those of a set."""
    from .victims.sets import make_set, make_victim

    if "--set" in argv:
        return {"folders": make_set(argv)}
    made = make_victim(argv)
    return {"folder": made.folder, "attack": made.attack.describe() if made.attack else None, "measured": made.measured}


def benchmark(argv: list[str]) -> dict[str, Any]:
    """Run a benchmark grid."""
    from .commands.benchmark import main

    return {"rows": json.loads(main(argv).to_json(orient="records"))}


def push(argv: list[str]) -> dict[str, Any]:
    """Push a purified folder."""
    from .commands.push import main

    return main(argv)


def info(argv: list[str]) -> dict[str, Any]:
    """Say what a checkpoint is."""
    from .commands.info import main

    return main(argv)


COMMANDS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    command.__name__: command for command in (purify, measure, victim, benchmark, push, info)
}


def main() -> None:
    """Run one command of ``d3-hf``."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        with _closed_early_quietly():
            print(_usage(), flush=True)
        return
    if name not in COMMANDS:
        print(f"d3-hf: unknown command {name!r}: choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(MISTAKE)
    run(COMMANDS[name], argv)


def run(function: Callable[[list[str]], Any], argv: list[str]) -> NoReturn:
    """Run a command or a recipe's function and exit: code as above, an error as one line on stderr.

    Args:
        function: Takes the arguments; if it is one of `COMMANDS`, ``--json`` prints what it returns, and all that it prints
            itself goes to stderr.
        argv: Arguments without the program's name. A ``--debug`` with a value is left in, for `TrainingArguments`.
    """
    name = next((name for name, command in COMMANDS.items() if command is function), None)
    title = f"d3-hf {name}" if name else Path(sys.argv[0]).name
    debug, argv = _take_debug(argv)
    as_json = name is not None and "--json" in argv
    argv = [argument for argument in argv if not as_json or argument != "--json"]
    if name and {"-h", "--help", "--help_all"} & set(argv):
        print(_header(name))
    code, found = 0, None
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            found = function(argv)
    except KeyboardInterrupt as stop:
        code, message = INTERRUPTED, f"interrupted; {str(stop) or RUN_AGAIN}"
    except Exception as error:
        code, message = exit_code(error), one_line(error)
        if code == BROKEN_RAIL:
            found = error.results | {"rejected": error.reasons, "folder": str(error.folder)}
        if debug:
            traceback.print_exc()
    if as_json and found is not None and os.environ.get("RANK", "0") == "0":
        print(json.dumps(found, indent=2))
    if code:
        print(f"{title}: {message}", file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def _closed_early_quietly() -> Iterator[None]:
    """What is printed inside into a pager that is closed early ends the process without a traceback."""
    if not hasattr(signal, "SIGPIPE"):  # Windows
        yield
        return
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGPIPE, before)


def exit_code(error: Exception) -> int:
    """3 for a broken guard rail, 2 for what the user can put right in the command, 1 for everything else."""
    if isinstance(error, GuardRailBroken):
        return BROKEN_RAIL
    return MISTAKE if isinstance(error, MISTAKES) else FAILURE


def one_line(error: Exception) -> str:
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
    commands = [f"{_summary(name)}\n      {command.example}\n" for name, command in ABOUT.items()]
    return "\n".join(["usage: d3-hf COMMAND ...\n", *commands, COMMON, "  --help     after a command: its options\n", CODES])


def _header(name: str) -> str:
    """What a command's help begins with: an example, what it does, and the options that its own parser does not know."""
    command = ABOUT[name]
    return "\n".join(["example:", f"      {command.example}", "", _summary(name), *command.further, COMMON, ""])


def _summary(name: str) -> str:
    return f"  {f'{name} {ABOUT[name].arguments}':<40}  {ABOUT[name].summary}"


if __name__ == "__main__":
    main()
