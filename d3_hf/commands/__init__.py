"""The commands of ``d3-hf``: what each is called and does, here; how it does it, in a file each, with one ``run(argv)``.

A file is imported when its command runs, so that the list of commands costs nothing.
"""

import importlib
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..defenses import CLIP_DEFENCES, DEFENCES, ENCODER_DEFENCES
from ..options.recipes import named

ALARM = 4  # exit code of a command that found what it was to raise an alarm for: a result, no error

OF_FEATURES = f"of encoders {', '.join(ENCODER_DEFENCES)}; of a CLIP {', '.join(CLIP_DEFENCES)}"


@dataclass(frozen=True)
class Command:
    """A command, as its help describes it.

    Attributes:
        name: Its name, which is its module's here.
        arguments: What follows its name.
        summary: What it does.
        example: A whole command line.
        further: Lines about options that its own parser does not know.
        trains: Whether it may run on several processes.
    """

    name: str
    arguments: str
    summary: str
    example: str
    further: tuple[str, ...] = ()
    trains: bool = False

    def run(self, argv: list[str]) -> dict[str, Any]:
        """Run it with the arguments after its name; what it returns is JSON-able. Errors: see its module.

        Its entry ``code``, where it has one, is what to exit with.
        """
        return importlib.import_module(f"{__name__}.{self.name}").run(argv)


def _listed(what: str, names: Iterable[str]) -> tuple[str, ...]:
    """Lines that say which names there are for it."""
    return tuple(textwrap.wrap(", ".join(names), 110, initial_indent=f"  {what:<10} ", subsequent_indent=" " * 13))


COMMANDS = {
    command.name: command
    for command in (
        Command(
            name="drill",
            arguments="[--cnn] --option value ...",
            summary="see it work: make a small victim on handwritten digits, purify it, in minutes",
            example="d3-hf drill --output_dir outputs/drill",
            further=(f"  {'--cnn':<10} a ResNet in place of a ViT",),
            trains=True,
        ),
        Command(
            name="purify",
            arguments="[CONFIG] --option value ...",
            summary="purify a checkpoint with D3; --defence NAME takes another method",
            example="d3-hf purify --model_name_or_path me/suspicious-vit --dataset_name path/to/images --retain_count 500",
            further=(
                *_listed("--defence", [*DEFENCES, f"auto; {OF_FEATURES}"]),
                "  CONFIG     a YAML file of options, or a name that d3-hf recipes lists",
            ),
            trains=True,
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
            arguments="MODEL --option value ...",
            summary="measure a model, with a trigger by --attack; a victim needs no option",
            example="d3-hf measure outputs/purified --dataset_name path/to/images --attack badnets",
        ),
        Command(
            name="victim",
            arguments="[CONFIG] --option value ...",
            summary="plant a backdoor, for research; --set FILE makes a set of victims",
            example="d3-hf victim fire_drill_vit_victim --seed 0 --output_dir outputs/victim",
            further=(
                "  --set FILE [--only GROUP/VICTIM ...]  the victims of a set",
                "  --encoder  plant it in an encoder, by an attack on encoders",
                "  --clip     in a CLIP, by pairs that carry a trigger and a caption of the target class",
                *_listed("  FILE", named("set of victims")),
                "  CONFIG     a YAML file of options, or a name that d3-hf recipes lists",
            ),
            trains=True,
        ),
        Command(
            name="benchmark",
            arguments="GRID [--shard i/n]",
            summary="victims x retain sets x defences x seeds: tables and plots",
            example="d3-hf benchmark cpu --dataset_name uoft-cs/cifar10",
            further=_listed("GRID", named("grid")),
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
        Command(
            name="recipes",
            arguments="[FILE]",
            summary="list the configurations, grids and scripts that come along, or say where one lies",
            example="d3-hf recipes grids/cpu",
        ),
        Command(
            name="env",
            arguments="",
            summary="versions and devices, for a bug report",
            example="d3-hf env --json",
        ),
    )
}


def with_option(name: str, argv: list[str]) -> list[str]:
    """The arguments with ``--name`` before the first one, where that is a bare value."""
    return [f"--{name}", *argv] if argv and not argv[0].startswith("-") else argv
