"""What was tried, on disk at once: an interrupted ladder goes on where it was, and never with another run's results."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data.images import RawImages, content_hashes
from ..files import atomic_file, read_mapping
from ..publishing.manifest import PLACES
from ..training.reference import fingerprint_of, fingerprints
from .choose import Tried
from .floor import keeps_floor
from .plan import Plan, Rung

RECORD = "tried.json"  # in output_dir


class Record:
    """The trials of a run, one file; read and written by the main process.

    Args:
        plan: What the run is known by: the model's weights, the images, the options that are given. With
            ``overwrite_output_dir`` it begins anew.

    Raises:
        ValueError: The file is damaged, or of another run.
    """

    def __init__(self, plan: Plan):
        self.file, self._plan = Path(plan.args.output_dir) / RECORD, plan
        self._run = {
            "model_sha256": fingerprint_of(fingerprints(plan.model.state_dict())),
            "retain_sha256": images_digest(plan.images),
            "options": _as_read({name: v for name, v in plan.args.of_trials().items() if name not in PLACES}),
        }
        self._entries: dict[str, Any] = {}
        if self.file.is_file() and not plan.args.overwrite_output_dir:
            advice = "remove it, or add --overwrite_output_dir to begin anew"
            found = read_mapping(self.file, "record of what was tried", advice, {"run": {}, "tried": {}})
            if different := [name for name, value in self._run.items() if found["run"].get(name) != value]:
                self._refuse(different)
            self._entries = found["tried"]

    def get(self, rung: Rung) -> Tried | None:
        """What trying a recipe found, if it was tried; a ValueError if one of that name was another recipe.

        One that was given up below a floor which is lower now is to be tried again.
        """
        if (entry := self._entries.get(rung.recipe.name)) is None:
            return None
        if entry["recipe"] != self._of(rung):
            self._refuse([f"recipe {rung.recipe.name!r}"])
        found = Tried.from_json(entry["found"])
        return None if found.stopped_at and keeps_floor(found.pair, self._plan.max_accuracy_drop) else found

    def put(self, rung: Rung, found: Tried) -> None:
        """Write down what trying a recipe found."""
        self._entries[rung.recipe.name] = {"recipe": self._of(rung), "found": asdict(found)}
        with atomic_file(self.file) as beside:
            beside.write_text(json.dumps({"run": self._run, "tried": self._entries}, indent=2) + "\n", encoding="utf-8")

    def _of(self, rung: Rung) -> dict[str, Any]:
        return _as_read(rung.described() | {"options": rung.options, "place": rung.place})

    def _refuse(self, different: list[str]) -> None:
        raise ValueError(
            f"{self.file} is of another run ({', '.join(different)} differ): choose another output_dir, or add "
            "--overwrite_output_dir to begin anew"
        )


def _as_read(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def images_digest(images: RawImages) -> str:
    """SHA-256 of images, labels and class names, in their order."""
    digest = hashlib.sha256(repr((images.labels.tolist(), images.class_names)).encode())
    for one in content_hashes(images):
        digest.update(one)
    return digest.hexdigest()
