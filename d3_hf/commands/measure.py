"""``d3-hf measure``: a victim, a purified model or any other, with a trigger that may have become known later."""

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..options.arguments import NO_IMAGES, AttackArguments, DataArguments, ModelArguments, ProbeArguments
from ..options.parser import Parser
from . import with_option

if TYPE_CHECKING:  # these take seconds, which help and mistakes need not
    from transformers import PreTrainedModel

    from ..attacks import Attack


def run(argv: list[str]) -> dict[str, Any]:
    """Run ``MODEL --option value ...``: measure a model, print it beside what its folder has recorded of the same trigger.

    A victim's folder knows its images and its trigger; options given go over them. Of any other model, purified ones too, the
    images have to be named, and with ``--attack`` the trigger, which may have become known after all was done. An encoder is
    measured by probes, trained on what the retain set leaves; a CLIP that this package trained, zero-shot.

    Args:
        argv: Arguments without the program's name.

    Returns:
        ``accuracy``, ``asr``, ``ra`` and ``pacc`` as fractions with ``_ci95`` and ``_n``, and more, see `rates`; without an
        attack ``accuracy`` only. Of an encoder what `measure_encoder` makes.

    Raises:
        ValueError: No model or no images are named, a record in the folder is damaged, or see `load_classifier`, `load_images`,
            `AttackArguments.load` and `measure`.
    """
    parser = Parser([ModelArguments, DataArguments, AttackArguments, ProbeArguments])
    model_args, data_args, attack_args, probe_args = parser.read(with_option("model_name_or_path", argv))
    if model_args.model_name_or_path is None:
        raise ValueError("no model: name a Hub id, a folder or a file")
    from ..attacks import load_attack
    from ..data.preprocessing import Preprocessing
    from ..evaluation.measure import measure, rates
    from ..labels import check_labels
    from ..publishing.manifest import MANIFEST, VICTIM_FILE, read_manifest
    from ..publishing.tables import rates_table
    from ..victims.record import read_record, recorded_images

    folder = Path(model_args.model_name_or_path).expanduser()
    record, attack = None, attack_args.load()
    if data_args.dataset_name is None or (folder / VICTIM_FILE).is_file():
        try:
            record = read_record(folder)
        except FileNotFoundError as error:
            raise ValueError(f"{NO_IMAGES}; only a folder that make_victim wrote knows its own") from error
        data_args = recorded_images(record, **_given(data_args))
        attack = attack or (load_attack(folder) if record["planted"] else None)
        if count := record["measured"].get("n_probe"):  # of an encoder
            probe_args = ProbeArguments(**{"probe_count": count} | _given(probe_args))
    purified = read_manifest(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    recorded = _of_victim(record, attack) if record else _of_purified(folder, purified, attack)
    model = _classifier(model_args, record or purified or {})
    if (record or purified or {}).get("kind") == "clip":
        return _measure_clip(model_args, data_args, attack, recorded)
    if model is None:
        return _measure_encoder(model_args, data_args, probe_args, attack, recorded)
    test = data_args.load(model.config).test
    check_labels(test.class_names, model.config)
    found = rates(measure(model, test, Preprocessing.from_processor(model.image_processor), attack))
    print(rates_table({"measured now": found} | ({"recorded": recorded} if recorded else {})))
    return found


def _given(options: DataArguments | ProbeArguments) -> dict[str, Any]:
    """The options that are not at their defaults."""
    return {f.name: value for f in fields(options) if (value := getattr(options, f.name)) != f.default}


def _classifier(model_args: ModelArguments, said: dict[str, Any]) -> "PreTrainedModel | None":
    """The model; None where it is an encoder, as the record in its folder says or the checkpoint shows."""
    from ..models.differences import EncoderFound

    if said.get("kind", "classifier") != "classifier":
        return None
    try:
        return model_args.load()
    except EncoderFound:
        return None


def _measure_encoder(
    model_args: ModelArguments,
    data_args: DataArguments,
    probe_args: ProbeArguments,
    attack: "Attack | None",
    recorded: dict[str, Any] | None,
) -> dict[str, Any]:
    from ..evaluation.encoders import measure_encoder
    from ..models.source import preprocessing_of
    from ..publishing.tables import encoder_table

    model, images = model_args.load_encoder(), data_args.load()
    probe, _ = probe_args.draw(images.rest)
    found = measure_encoder(model, probe, images.test, preprocessing_of(model), attack)
    print(encoder_table({"measured now": found, "recorded": recorded}))
    return found


def _measure_clip(
    model_args: ModelArguments, data_args: DataArguments, attack: "Attack | None", recorded: dict[str, Any] | None
) -> dict[str, Any]:
    from ..data.pairs import check_named
    from ..evaluation.encoders import measure_clip
    from ..models.source import preprocessing_of
    from ..publishing.tables import encoder_table

    model, test = model_args.load_clip(), data_args.load().test
    check_named(test.class_names)
    found = measure_clip(model, test, preprocessing_of(model), attack)
    print(encoder_table({"measured now": found, "recorded": recorded}))
    return found


def _of_victim(record: dict[str, Any], attack: "Attack | None") -> dict[str, Any] | None:
    """What a victim's record has of this trigger."""
    planted = (record["planted"] or {}).get("attack")
    return record["measured"]["victim"] if planted == (attack and attack.describe()) else None


def _of_purified(folder: Path, purified: dict[str, Any] | None, attack: "Attack | None") -> dict[str, Any] | None:
    """What a purified model's folder has recorded of it with this trigger, or without one."""
    from ..publishing.manifest import RESULTS

    if purified is None or not (folder / RESULTS).is_file():
        return None
    if purified["measured"].get("trigger") != (attack and attack.describe()):
        return None
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    if purified.get("kind", "classifier") != "classifier":
        return results["after"]
    return {key.replace("_after", "", 1): value for key, value in results.items() if "_after" in key}
