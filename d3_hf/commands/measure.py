"""``d3-hf measure``: measure a victim again, from its folder alone."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..options.parser import Parser
from . import with_option


@dataclass
class MeasureArguments:
    """What to measure.

    Args:
        folder: Folder that `make_victim` wrote.
        dataset_name: Where the images lie, if no longer where the victim's own record says.
        max_test_images: Measure on so many test images only, see `DataArguments`.
    """

    folder: str = field(metadata={"help": "Folder of a victim."})
    dataset_name: str | None = field(default=None, metadata={"help": "Images in place of the recorded ones."})
    max_test_images: int | None = field(default=None, metadata={"help": "Measure on so many test images, drawn at random."})


def run(argv: list[str]) -> dict[str, Any]:
    """Run ``FOLDER --option value ...``: measure a victim with the attack that its folder holds, print it beside the record.

    Args:
        argv: Arguments without the program's name.

    Returns:
        ``accuracy``, ``asr``, ``ra`` and ``pacc`` as fractions with ``_ci95`` and ``_n``, and more, see `rates`; without an
        attack ``accuracy`` only. Of an encoder what `measure_encoder` makes.

    Raises:
        FileNotFoundError: The folder is none that `make_victim` wrote.
        ValueError: The folder's record is damaged, or see `load_classifier`, `load_images` and `measure`.
    """
    (options,) = Parser([MeasureArguments]).read(with_option("folder", argv))
    from ..attacks import load_attack  # these take seconds, which help and mistakes need not
    from ..data.preprocessing import Preprocessing
    from ..evaluation.measure import measure, rates
    from ..labels import check_labels
    from ..models import load_classifier
    from ..publishing.tables import rates_table
    from ..victims.record import read_record, recorded_images

    folder = Path(options.folder)
    record = read_record(folder)
    images = recorded_images(record, dataset_name=options.dataset_name, max_test_images=options.max_test_images)
    if record.get("kind") == "encoder":
        return _measure_encoder(folder, record, images)
    model = load_classifier(str(folder))
    test = images.load(model.config).test
    check_labels(test.class_names, model.config)
    attack = load_attack(folder) if record["planted"] else None
    found = rates(measure(model, test, Preprocessing.from_processor(model.image_processor), attack))
    print(rates_table({"measured now": found, "recorded": record["measured"]["victim"]}))
    return found


def _measure_encoder(folder: Path, record: dict[str, Any], images: Any) -> dict[str, Any]:
    from ..attacks import load_attack
    from ..data.images import RawImages
    from ..evaluation.encoders import measure_encoder, split_probe
    from ..models import load_encoder
    from ..models.source import preprocessing_of
    from ..publishing.tables import encoder_table

    model, found = load_encoder(folder), images.load()
    probe, _ = split_probe(RawImages.from_dataset(found.rest), record["measured"]["n_probe"])
    rates = measure_encoder(model, probe, found.test, preprocessing_of(model), load_attack(folder))
    print(encoder_table({"measured now": rates, "recorded": record["measured"]["victim"]}))
    return rates
