"""``d3-hf check``: look at a model, a classifier or an encoder, before anything is trained."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..assurance.calibration import ALARM_AT, check_alarm_at
from ..data.images import RawImages
from ..data.load import LoadedImages
from ..files import atomic_file
from ..inspection.check import check
from ..inspection.encoder import check_encoder
from ..inspection.null import read_null
from ..inspection.triggers import triggers_in
from ..models.differences import EncoderFound
from ..options.arguments import NO_IMAGES, DataArguments, ModelArguments
from ..options.parser import Parser
from ..publishing.inspection.pages import check_page
from ..publishing.names import public_name
from . import ALARM, with_option

MOST_IMAGES = 500  # of which head and features are read; the dearer signals take 50 of them


@dataclass
class CheckArguments:
    """With what to compare the model, and where to write.

    Args:
        twins: Trusted models of the same kind: Hub ids, folders or files, loaded with the model's options.
        null: Scores of twins that ``save_null`` wrote, of this kind of model on these images.
        save_null: Where to write those of all twins, for the next check.
        alarm_at: There is an alarm where p is at most this; the field's 0.05.
        report: Where to write the report as one HTML file.

    Raises:
        ValueError: ``alarm_at`` is not in (0, 1), or there are no twins to save.
    """

    twins: list[str] | None = field(default=None, metadata={"help": "Trusted models of the same kind to compare with."})
    null: str | None = field(default=None, metadata={"help": "Scores of twins that --save_null wrote."})
    save_null: str | None = field(default=None, metadata={"help": "Write the scores of the twins to this JSON file."})
    alarm_at: float = field(default=ALARM_AT, metadata={"help": "Alarm where p is at most this."})
    report: str | None = field(default=None, metadata={"help": "Write the report to this HTML file."})

    def __post_init__(self):
        check_alarm_at(self.alarm_at)
        if self.save_null and not (self.twins or self.null):
            raise ValueError("--save_null keeps the scores of twins: name some with --twins")


def run(argv: list[str]) -> dict[str, Any]:
    """Run ``MODEL --dataset_name IMAGES --option value ...``: check a model, print the report.

    The signals see what would be measured on, at most 500 images unless ``max_test_images`` says otherwise; the cost is that
    of a purification with the retain set of the same options.

    Args:
        argv: Arguments without the program's name.

    Of an encoder the files are looked at, and DECREE is read in place of the signals; the images' labels are not.

    Returns:
        `Check.as_dict` or `EncoderCheck.as_dict`, and ``code``: 4 where there is an alarm, else 0.

    Raises:
        ValueError: No checkpoint or no images are named; ``null``, ``save_null`` or ``report`` is asked for of an encoder;
            or see `load_classifier`, `load_encoder`, `load_images`, `check` and `check_encoder`.
    """
    options, data_args, own = Parser([ModelArguments, DataArguments, CheckArguments]).read(
        with_option("model_name_or_path", argv)
    )
    if options.model_name_or_path is None:
        raise ValueError("no checkpoint: name a Hub id, a folder or a file")
    if data_args.dataset_name is None:
        raise ValueError(NO_IMAGES)
    null = read_null(Path(own.null).expanduser()) if own.null else None
    try:
        model = on_device(options.load())
    except EncoderFound:
        return _run_encoder(options, data_args, own)
    images = limited(data_args).load(model.config)
    twins = (on_device(options.of(place).load()) for place in own.twins or [])
    found = check(
        model,
        images.test,
        RawImages.from_dataset(images.retain),
        twins=twins,
        null=null,
        alarm_at=own.alarm_at,
    )
    found = replace(found, images=_named(images))
    facts = found.as_dict()
    print(found)
    if own.save_null:
        found.null.write(Path(own.save_null).expanduser())
    if own.report:
        write_page(Path(own.report), check_page(facts, triggers_in(found.suspicion.findings)))
    return facts | {"code": ALARM if found.alarm else 0}


def _run_encoder(options: ModelArguments, data_args: DataArguments, own: CheckArguments) -> dict[str, Any]:
    if unfit := [name for name in ("null", "save_null", "report") if getattr(own, name)]:
        raise ValueError(f"--{unfit[0]} is for classifiers, and {options.model_name_or_path} is an encoder: leave it out")
    model, images = on_device(options.load_encoder()), limited(data_args).load()
    twins = (on_device(options.of(place).load_encoder()) for place in own.twins or [])
    found = replace(check_encoder(model, images.test, twins=twins, alarm_at=own.alarm_at), images=_named(images))
    print(found)
    return found.as_dict() | {"code": ALARM if found.verdict.alarm else 0}


def _named(images: LoadedImages) -> dict[str, str | None]:
    return {"data": public_name(images.source), "configuration": images.configuration, "split": images.split}


def on_device(model: PreTrainedModel) -> PreTrainedModel:
    """The model on the GPU, if there is one."""
    return model.to("cuda") if torch.cuda.is_available() else model


def limited(data_args: DataArguments) -> DataArguments:
    """The options with a number of images to look at."""
    return data_args if data_args.max_test_images else replace(data_args, max_test_images=MOST_IMAGES)


def write_page(file: Path, page: str) -> None:
    """Write a report; it appears whole or not at all."""
    with atomic_file(file.expanduser()) as beside:
        beside.write_text(page, encoding="utf-8")
