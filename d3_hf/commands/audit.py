"""``d3-hf audit``: a purified model beside what it was purified from."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..inspection.audit import audit
from ..inspection.triggers import triggers_in
from ..options.arguments import NO_IMAGES, DataArguments, ModelArguments
from ..options.parser import Parser
from ..publishing.inspection.pages import audit_page
from ..publishing.names import public_name
from . import with_option
from .check import limited, on_device, write_page


@dataclass
class AuditArguments:
    """What to compare the purified model with, and where to write.

    Args:
        source: The suspicious model: Hub id, of which ``revision`` is then said, folder or file.
        report: Where to write the report as one HTML file.
        relearn: Also tune copies of the models with a small backdoor of our own, and see how soon it takes.
        twin: A trusted model of the same kind that is tuned with it too: Hub id, folder or file.

    Raises:
        ValueError: There is a twin and no relearning test.
    """

    source: str | None = field(default=None, metadata={"help": "The suspicious model that it was purified from."})
    report: str | None = field(default=None, metadata={"help": "Write the report to this HTML file."})
    relearn: bool = field(default=False, metadata={"help": "See how soon each model learns a small backdoor of our own."})
    twin: str | None = field(default=None, metadata={"help": "A trusted model of the same kind, for --relearn."})

    def __post_init__(self):
        if self.twin and not self.relearn:
            raise ValueError("--twin is for the relearning test: add --relearn true")


def run(argv: list[str]) -> dict[str, Any]:
    """Run ``PURIFIED --dataset_name IMAGES --source SUSPICIOUS --option value ...``: audit a model, print the report.

    Args:
        argv: Arguments without the program's name.

    Returns:
        `Audit.as_dict`.

    Raises:
        ValueError: A model or images are not named, or see `load_classifier`, `load_images` and `audit`.
    """
    options, data_args, own = Parser([ModelArguments, DataArguments, AuditArguments]).read(
        with_option("model_name_or_path", argv)
    )
    if options.model_name_or_path is None:
        raise ValueError("no purified model: name its folder")
    if own.source is None:
        raise ValueError("no suspicious model: give --source (a Hub id, a folder or a file)")
    if data_args.dataset_name is None:
        raise ValueError(NO_IMAGES)
    purified = on_device(options.of(options.model_name_or_path).load())
    suspicious = on_device(options.of(own.source, options.revision).load())
    images = limited(data_args).load(suspicious.config)
    twin = on_device(options.of(own.twin).load()) if own.twin else None
    found = audit(purified, suspicious, images.test, relearn=own.relearn, twin=twin)
    named = {"data": public_name(images.source), "configuration": images.configuration, "split": images.split}
    found = replace(found, images=named)
    print(found)
    facts = found.as_dict()
    if own.report:
        write_page(Path(own.report), audit_page(facts, triggers_in(found.before), triggers_in(found.after)))
    return facts
