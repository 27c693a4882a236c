"""The commands of ``d3-hf``: what each is called and does, here; how it does it, in a file each, with one ``run(argv)``.

A file is imported when its command runs, so that the list of commands costs nothing.
"""

import importlib
import textwrap
from dataclasses import dataclass
from typing import Any

from ..defenses import DEFENCES

ALARM = 4  # exit code of a command that found what it was to raise an alarm for: a result, no error


@dataclass(frozen=True)
class Command:
    """A command, as its help describes it.

    Attributes:
        name: Its name, which is its module's here.
        arguments: What follows its name.
        summary: What it does.
        example: A whole command line.
        further: Lines about options that its own parser does not know.
    """

    name: str
    arguments: str
    summary: str
    example: str
    further: tuple[str, ...] = ()

    def run(self, argv: list[str]) -> dict[str, Any]:
        """Run it with the arguments after its name; what it returns is JSON-able. Errors: see its module.

        Its entry ``code``, where it has one, is what to exit with.
        """
        return importlib.import_module(f"{__name__}.{self.name}").run(argv)


COMMANDS = {
    command.name: command
    for command in (
        Command(
            name="purify",
            arguments="[CONFIG.yaml] --option value ...",
            summary="purify a checkpoint with D3; --defence NAME takes another method",
            example="d3-hf purify --model_name_or_path me/suspicious-vit --dataset_name path/to/images --retain_count 500",
            further=tuple(
                textwrap.wrap(", ".join([*DEFENCES, "auto"]), 110, initial_indent="  --defence  ", subsequent_indent=" " * 13)
            ),
        ),
        Command(
            name="check",
            arguments="MODEL --dataset_name IMAGES",
            summary="look at a model before anything is trained; alarms need --twins",
            example="d3-hf check me/suspicious-vit --dataset_name path/to/images --twins twins/0 twins/1 --report check.html",
        ),
        Command(
            name="audit",
            arguments="PURIFIED --source SUSPICIOUS",
            summary="a purified model beside what it was purified from, without a trigger",
            example="d3-hf audit outputs/purified --source me/suspicious-vit --dataset_name path/to/images",
        ),
        Command(
            name="measure",
            arguments="FOLDER",
            summary="measure a victim again, from its folder alone",
            example="d3-hf measure outputs/victim",
        ),
        Command(
            name="victim",
            arguments="[CONFIG.yaml] --option value ...",
            summary="plant a backdoor, for research; --set FILE.yaml makes a set of victims",
            example="d3-hf victim recipes/configs/fire_drill_vit_victim.yaml --seed 0 --output_dir outputs/victim",
            further=("  --set FILE.yaml [--only GROUP/VICTIM ...]  the victims of a set, see recipes/victims.yaml",),
        ),
        Command(
            name="benchmark",
            arguments="GRID.yaml [--shard i/n]",
            summary="victims x retain sets x defences x seeds: tables and plots",
            example="d3-hf benchmark recipes/grids/cpu.yaml --dataset_name uoft-cs/cifar10",
        ),
        Command(
            name="push",
            arguments="FOLDER --hub_model_id REPOSITORY",
            summary="upload a purified folder, private by default",
            example="d3-hf push outputs/purified --hub_model_id me/model-purified",
        ),
        Command(
            name="info",
            arguments="SOURCE",
            summary="what a checkpoint is and what D3 could move of it",
            example="d3-hf info google/vit-base-patch16-224",
        ),
    )
}


def with_option(name: str, argv: list[str]) -> list[str]:
    """The arguments with ``--name`` before the first one, where that is a bare value."""
    return [f"--{name}", *argv] if argv and not argv[0].startswith("-") else argv
