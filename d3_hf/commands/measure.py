"""``d3-hf measure``: measure a victim again, from its folder alone."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..arguments import DataArguments, Parser
from ..attacks import load_attack
from ..card import rates_table
from ..evaluation import measure, rates
from ..labels import check_labels
from ..models import load_classifier
from ..preprocessing import Preprocessing
from ..victims import VICTIM_FILE


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


def measure_victim(argv: list[str]) -> dict[str, Any]:
    """Run ``FOLDER --option value ...``: measure a victim with the attack that its folder holds, print it beside the record.

    Args:
        argv: Arguments without the program's name.

    Returns:
        ``accuracy``, ``asr`` and ``ra`` as fractions with ``_ci95`` and ``_n``; without an attack ``accuracy`` only.

    Raises:
        FileNotFoundError: The folder is none that `make_victim` wrote.
        ValueError: The folder's record is damaged, or see `load_classifier`, `load_images` and `measure`.
    """
    argv = ["--folder", *argv] if argv and not argv[0].startswith("-") else argv
    (options,) = Parser([MeasureArguments]).read(argv)
    folder = Path(options.folder)
    if not (folder / VICTIM_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {VICTIM_FILE}: it is no folder that make_victim wrote")
    try:
        facts = json.loads((folder / VICTIM_FILE).read_text())
        recipe, planted, before = dict(facts["recipe"]), facts["planted"], facts["measured"]["victim"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / VICTIM_FILE} is no record of make_victim ({error!r}): make the victim again") from error
    recorded = {field.name: recipe[field.name] for field in fields(DataArguments) if field.name in recipe}
    given = {name: value for name in ("dataset_name", "max_test_images") if (value := getattr(options, name)) is not None}
    _, _, test = DataArguments(**recorded | given).load()
    model = load_classifier(str(folder))
    check_labels(test.class_names, model.config)
    attack = load_attack(folder) if planted else None
    found = rates(measure(model, test, Preprocessing.from_processor(model.image_processor), attack))
    print(rates_table({"measured now": found, "recorded": before}))
    return found
