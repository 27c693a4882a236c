"""The command line: ``d3-hf purify | measure | make-victim | benchmark``."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

USAGE = """usage: d3-hf COMMAND ...

  purify [CONFIG.yaml] --option value ...       purify a checkpoint with D3; --defence NAME uses another method
  measure FOLDER [--dataset_name ...]           measure a victim again, from its folder alone
  make-victim [CONFIG.yaml] --option value ...  plant a backdoor, for research; --set FILE.yaml makes a set
  benchmark GRID.yaml [--shard i/n]             victims x retain sets x defences x seeds: tables and plots

`d3-hf COMMAND --help` lists a command's options."""


@dataclass
class MeasureArguments:
    """What to measure.

    Args:
        folder: Folder that `make_victim` wrote.
        dataset_name: Where the images lie, if no longer where the victim's own record says.
        max_test_images: Measure on the first so many test images only.
    """

    folder: str = field(metadata={"help": "Folder of a victim."})
    dataset_name: str | None = field(default=None, metadata={"help": "Images in place of the recorded ones."})
    max_test_images: int | None = field(default=None, metadata={"help": "Measure on the first so many test images."})


def measure_victim(argv: list[str] | None = None) -> dict[str, Any]:
    """Run ``FOLDER --option value ...``: measure a victim with the attack that its folder holds, print it beside the record.

    Args:
        argv: Arguments without the program's name; default ``sys.argv[1:]``.

    Returns:
        ``accuracy``, ``asr`` and ``ra`` as fractions with ``_ci95`` and ``_n``; without an attack ``accuracy`` only.

    Raises:
        FileNotFoundError: The folder is none that `make_victim` wrote.
        ValueError: See `load_classifier`, `load_images` and `measure`.
    """
    from transformers import HfArgumentParser

    from .arguments import DataArguments
    from .attacks import load_attack
    from .card import rates_table
    from .evaluation import measure, rates
    from .labels import check_labels
    from .models import load_classifier
    from .preprocessing import Preprocessing
    from .victims import VICTIM_FILE

    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--folder")
    (options,) = HfArgumentParser([MeasureArguments]).parse_args_into_dataclasses(argv)
    folder = Path(options.folder)
    if not (folder / VICTIM_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {VICTIM_FILE}: it is no folder that make_victim wrote")
    facts = json.loads((folder / VICTIM_FILE).read_text())
    recorded = {field.name: facts["recipe"][field.name] for field in fields(DataArguments) if field.name in facts["recipe"]}
    given = {name: value for name in ("dataset_name", "max_test_images") if (value := getattr(options, name)) is not None}
    _, _, test = DataArguments(**recorded | given).load()
    model = load_classifier(str(folder))
    check_labels(test.class_names, model.config)
    attack = load_attack(folder) if facts["planted"] else None
    found = rates(measure(model, test, Preprocessing.from_processor(model.image_processor), attack))
    print(rates_table({"measured now": found, "recorded": facts["measured"]["victim"]}))
    return found


def purify(argv: list[str]) -> Any:
    """Run the recipe of D3, or of the method that ``--defence`` names."""
    from .defenses import defence
    from .workflow import main

    name = "d3"
    if "--defence" in argv:
        place = argv.index("--defence")
        name = argv[place + 1] if place + 1 < len(argv) else ""
        argv = argv[:place] + argv[place + 2 :]
    return main(argv, *defence(name))


def plant(argv: list[str]) -> Any:
    """Run the recipe that makes victims."""
    from .victim_sets import make_set, make_victim

    return make_set(argv) if "--set" in argv else make_victim(argv)


def benchmark(argv: list[str]) -> Any:
    """Run a benchmark grid."""
    from .benchmark.command import main

    return main(argv)


COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "purify": purify,
    "measure": measure_victim,
    "make-victim": plant,
    "benchmark": benchmark,
}


def main() -> None:
    """Run one command; an error in what the user gave is one line and exit status 1."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE)
        return
    if name not in COMMANDS:
        sys.exit(f"d3-hf: unknown command {name!r}\n{USAGE}")
    try:
        COMMANDS[name](argv)
    except (ValueError, OSError) as error:
        sys.exit(f"d3-hf {name}: {error}")


if __name__ == "__main__":
    main()
