"""What a card says beside the run, as options, which load in no time."""

from dataclasses import dataclass, field

from .licences import licence_of
from .names import HUB_ID, is_local


@dataclass
class SourceArguments:
    """What the publisher knows of the source and the run does not.

    Args:
        license: Of the source, where its README does not name one; see `licences.licence_of`.
        finetuned_from: Hub id that a folder or a file was downloaded from: the card's ``base_model``, and where the licence is
            looked up. (``base_model`` among a method's options is another thing: what the suspicious model itself came from.)

    Raises:
        ValueError: The licence looks misspelt, or ``finetuned_from`` is no Hub id.
    """

    license: str | None = field(default=None, metadata={"help": "Licence of the source, as apache-2.0, if it names none."})
    finetuned_from: str | None = field(default=None, metadata={"help": "Hub id that a folder or file was downloaded from."})

    def details(self) -> dict[str, str | None]:
        """What goes to `PublishingTrainer.describe`."""
        return {"license": self.license, "finetuned_from": self.finetuned_from}

    def __post_init__(self):
        if self.license is not None:
            licence_of(self.license)
        if self.finetuned_from and (is_local(self.finetuned_from) or not HUB_ID.fullmatch(self.finetuned_from)):
            raise ValueError(f"finetuned_from={self.finetuned_from} is no Hub id, as google/vit-base-patch16-224")


@dataclass
class CardArguments(SourceArguments):
    """What a classifier's card says beside the run.

    Args:
        license, finetuned_from: See `SourceArguments`.
        clean_model: Folder, Hub id or file of a model without a backdoor that was trained alike: its rates are the floor.
            Default: that of the victim, where the attack is given as a victim's folder.
        show_images: Whether the card shows test images with the trigger, see `workflow.purify`.

    Raises:
        ValueError: See `SourceArguments`.
    """

    clean_model: str | None = field(
        default=None, metadata={"help": "Model without a backdoor, trained alike: the floor in the card's table."}
    )
    show_images: bool | None = field(
        default=None, metadata={"help": "Show test images with the trigger in the card; default: those of public data sets."}
    )
