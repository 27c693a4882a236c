"""What a victim's folder says of itself: ``victim.json``, and the images that its record names."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from .arguments import DataArguments
from .victims import VICTIM_FILE


def read_record(folder: Path) -> dict[str, Any]:
    """The content of ``victim.json``, with at least ``recipe``, ``planted`` and ``measured``.

    Raises:
        FileNotFoundError: The folder is none that `make_victim` wrote.
        ValueError: The record is damaged.
    """
    file = folder / VICTIM_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {VICTIM_FILE}: it is no folder that make_victim wrote")
    try:
        record = json.loads(file.read_text())
        dict(record["recipe"]), record["planted"], record["measured"]["victim"]  # what the readers rely on
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no record of make_victim ({error!r}): make the victim again") from error
    return record


def recorded_images(record: dict[str, Any], **given: Any) -> DataArguments:
    """The images that a victim was made with; ``given`` options that are not None go over the recorded ones."""
    recipe = record["recipe"]
    recorded = {field.name: recipe[field.name] for field in fields(DataArguments) if field.name in recipe}
    return DataArguments(**recorded | {name: value for name, value in given.items() if value is not None})
