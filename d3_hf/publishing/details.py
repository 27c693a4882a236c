"""What a publisher says of a model beyond its manifest: the arguments of `Trainer.create_model_card`."""

from dataclasses import dataclass, fields, replace
from typing import Any

from huggingface_hub import ModelCard

from .licences import FIELDS, licence_of
from .manifest import is_local
from .metadata import TASKS

Names = str | list[str] | None


@dataclass(frozen=True)
class CardDetails:
    """What goes into a card's metadata besides what the run knows; what was measured is never changed by it.

    Attributes:
        language: Of the class names, as ISO 639 codes.
        license: Of the model, see `licences.licence_of`; its source's where it is not given.
        tags: Further tags.
        model_name: Title of the card, in place of the repository's name.
        finetuned_from: Hub id of the model that was purified, for one that was loaded from files.
        tasks: What the model does, of `metadata.TASKS`, and nothing else.
        dataset_tags: Hub ids of the data sets that the retain set was drawn from.
        dataset: The same, where ``dataset_tags`` is not given.
        dataset_args: What the images measured on were, as ``"split: test"``.
    """

    language: Names = None
    license: str | None = None
    tags: Names = None
    model_name: str | None = None
    finetuned_from: str | None = None
    tasks: Names = None
    dataset_tags: Names = None
    dataset: Names = None
    dataset_args: Names = None

    def updated(self, given: dict[str, Any]) -> "CardDetails":
        """These with what else is given, None meaning nothing; tags are added to those that are there.

        Raises:
            TypeError: There is no such detail.
        """
        if unknown := given.keys() - {field.name for field in fields(self)}:
            raise TypeError(f"a card has no {', '.join(sorted(unknown))}: it takes {', '.join(f.name for f in fields(self))}")
        given = {name: value for name, value in given.items() if value is not None}
        if "tags" in given:
            given["tags"] = [*dict.fromkeys([*listed(self.tags), *listed(given["tags"])])]
        return replace(self, **given)

    def check(self, source: dict[str, Any], has_results: bool, kind: str = "classifier") -> None:
        """Refuse what would contradict the run.

        Args:
            source: Of the manifest.
            has_results: Whether something was measured.
            kind: Of the model, a key of `metadata.TASKS`.

        Raises:
            ValueError: Another task, another model than was purified, a misspelt licence, or arguments of a measurement that
                there was not.
        """
        self.licence()
        if other := set(listed(self.tasks)) - {TASKS[kind]}:
            raise ValueError(f"tasks={', '.join(sorted(other))}: the model is for {TASKS[kind]}")
        if self.finetuned_from and source["kind"] == "hub" and self.finetuned_from != source["name"]:
            raise ValueError(f"finetuned_from={self.finetuned_from}, but the model that was purified is {source['name']}")
        if self.dataset_args and not has_results:
            raise ValueError("dataset_args says what was measured on, and nothing was measured: use purify(), or leave it out")

    def licence(self) -> dict[str, Any]:
        """The licence as metadata; empty where it is not given."""
        return licence_of(self.license) if self.license else {}

    def put_on(self, card: ModelCard) -> ModelCard:
        """Add these to a card's metadata, and return it."""
        data = card.data
        if self.language is not None:
            data.language = self.language
        for name in FIELDS if self.license else ():
            setattr(data, name, self.licence().get(name))  # the others are of the source's, which this one replaces
        data.tags = [*dict.fromkeys([*(data.tags or []), *listed(self.tags)])]
        if self.finetuned_from and not is_local(self.finetuned_from):  # a path is none of the readers'
            data.base_model, data.base_model_relation = self.finetuned_from, "finetune"
        if names := listed(self.dataset_tags) or listed(self.dataset):
            data.datasets = names
        for result in data.eval_results or []:
            result.dataset_args = self.dataset_args
        return card


def listed(names: Any) -> list[Any]:
    """One entry of a card's metadata or several, or None, as a list."""
    return [] if names is None else list(names) if isinstance(names, list | tuple) else [names]
