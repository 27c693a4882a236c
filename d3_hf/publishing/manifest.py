"""``purification.json``: the facts in it that come from the environment, and the files that lie beside it."""

import importlib.metadata
import logging
import platform
import shutil
import sys
from collections.abc import Collection
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import has_length

from ..data.training_images import TrainingImages
from ..files import read_mapping
from ..models.library import network_facts
from ..models.source import Source, source_of
from .execution import SECRET, others, plain, resumed
from .names import is_local, public_name
from .pictures.of_card import NAMES as PICTURES
from .report import REJECTED

logger = logging.getLogger(__name__)

MANIFEST = "purification.json"
SCHEMA = "urn:d3_hf:purification:1"  # of schemas/purification.schema.json
VICTIM_FILE = "victim.json"  # a victim's manifest
CARD = "README.md"
RESULTS = "all_results.json"
RETAIN_INDICES = "retain_indices.json"
# Patterns of all that goes up from the top of a purified model's folder, beside the pictures that the card shows: no pickle, no
# optimizer state, no checkpoint, nothing that happens to lie there.
PUBLISHED = (
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer.json",  # of a CLIP
    "tokenizer_config.json",
    CARD,
    MANIFEST,
    RESULTS,
    RETAIN_INDICES,
    "perturbation.safetensors",  # of i-BAU
    "reversed_triggers.safetensors",  # of Neural Cleanse
    "model.sig",  # of model-signing
)
# Patterns of all that may lie there, of a purified model or of a victim: what goes before the files of another run come. The
# last is no file of ours: transformers reads an image processor there before preprocessor_config.json.
MODEL_FILES = (*PUBLISHED, *PICTURES, VICTIM_FILE, "attack.json", "trigger.safetensors", "processor_config.json")
PACKAGES = ("d3_hf", "transformers", "accelerate", "torch", "timm", "datasets", "safetensors")
# Where a run wrote and whom it told about it is no part of what it computed.
PLACES = (
    "output_dir",
    "overwrite_output_dir",
    "logging_dir",
    "run_name",
    "report_to",
    "push_to_hub",
    "resume_from_checkpoint",
    "project",
    "disable_tqdm",
    "logging_steps",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
)


def read_manifest(file: Path) -> dict[str, Any]:
    """Read a ``purification.json``, with at least ``measured`` and the ``kind``, ``name`` and ``revision`` of its ``source``.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged.
    """
    needed = {"source": {"kind": None, "name": None, "revision": None}, "measured": {}}
    return read_mapping(file, "manifest of a purification", "purify again", needed)


def source_facts(model: PreTrainedModel) -> dict[str, Any]:
    """Where the model came from: the record that `load_classifier` left, or its class when it came from elsewhere.

    Of a path only the `public_name`: files and folders are known by their SHA-256.
    """
    source = source_of(model)
    if source is None:
        return {"kind": "module", "name": type(model).__name__, "revision": None, "sha256": None}
    return public_source(source)


def public_source(source: Source) -> dict[str, Any]:
    """A record of where weights came from as published files hold it."""
    return asdict(source) | {"name": source.name if source.kind == "hub" else public_name(source.name)}


def own_defaults(kind: type[TrainingArguments]) -> dict[str, Any]:
    """The declared defaults of a defence's `PurifyConfig.own_options`, those of where a run writes left out."""
    own = set(kind.own_options()) - set(PLACES)
    return {name: value for name, value in declared_defaults(kind).items() if name in own and not name.startswith("hub_")}


def declared_defaults(kind: type) -> dict[str, Any]:
    """The default of each field of a dataclass, MISSING of one without."""
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(kind)}


def changed_options(args: TrainingArguments, by_rule: Collection[str]) -> list[str]:
    """The names of the options in `arguments_of` that are not at their declared defaults, without those that a rule settled."""
    by_rule = {*by_rule, "dataloader_pin_memory"}  # which follows from the device
    declared = declared_defaults(type(args))
    given = {name: value for name, value in arguments_of(args).items() if name not in by_rule}
    return [name for name, value in given.items() if _filled(value) != _filled(plain(declared[name]))]


def _filled(value: Any) -> Any:
    """A value, None in place of an empty one; 0 and False, which switch off what a rule would settle, are none such."""
    return None if value in ("", [], {}) else value


def arguments_of(args: TrainingArguments) -> dict[str, Any]:
    """The options that define a run: `PurifyConfig.own_options`, the seed, and every other one that is not at its default.

    Lists and mappings are among them; of ``accelerator_config`` what is not at its default. JSON-able.
    """
    own = [*args.own_options(), "seed"]
    values = args.to_dict() | {"accelerator_config": _changed(args.accelerator_config)}
    if args.parallelism_config is not None:
        values["parallelism_config"] = args.parallelism_config  # of which to_dict makes None
    # Against the declared defaults, not a second instance: making one would reset the running accelerator's state.
    defaults = declared_defaults(type(args))
    changed = [name for name, value in values.items() if (value or None) != (defaults[name] or None)]
    names = [n for n in dict.fromkeys(own + changed) if n not in PLACES and not n.startswith("hub_") and not SECRET.search(n)]
    return {name: plain(values[name]) for name in names}


def _changed(config: AcceleratorConfig) -> dict[str, Any]:
    """The entries that are not at their defaults; the number of micro-batches is an option of its own."""
    changed = {n: v for n, v in others(config.to_dict(), AcceleratorConfig().to_dict()).items() if v is not None}
    accumulation = {
        key: v for key, v in (changed.pop("gradient_accumulation_kwargs", None) or {}).items() if key != "num_steps"
    }
    return changed | ({"gradient_accumulation_kwargs": accumulation} if accumulation else {})


def read_earlier(file: Path, args: TrainingArguments) -> dict[str, Any]:
    """Read the manifest of a checkpoint that a run goes on from, and warn of options that were others there.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged.
    """
    earlier = read_mapping(file, "manifest of a checkpoint", "begin the run anew", {"arguments": {}, "steps": None})
    if different := others(earlier["arguments"], arguments_of(args)):
        logger.warning(
            "%s was trained with other %s: optimizer and schedule go on as they were there, and the manifest says what was "
            "different up to step %s",
            file.parent,
            ", ".join(different),
            earlier["steps"],
        )
    return earlier


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    """What a loaded package says of itself: one from a checkout has no metadata, or those of another version.

    Of one that is not loaded, what its metadata say; "unknown" where it has none, which is no reason to lose a run.
    """
    if package in sys.modules:
        return str(sys.modules[package].__version__)  # torch's is of a class of its own
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


class Purification(Protocol):
    """What the manifest is made of; `PurifyTrainer` is one."""

    manifest_name: str
    method: str
    paper: str | None
    plain: PreTrainedModel
    args: TrainingArguments
    reference_sha256: str
    train_dataset: Any
    retain_indices: list[int] | None
    data_source: str | None
    preprocessing: Any
    batch_norms: list[Any]
    report: Any
    state: Any
    source_checks: dict[str, Any] | None
    earlier: dict[str, Any] | None
    execution: dict[str, Any]
    schedule: dict[str, Any]

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Images per update."""


def facts_of(run: Purification) -> dict[str, Any]:
    """What every manifest holds: the run's method, source, retain set, options, execution, steps, report and versions.

    JSON-able, a purification's as ``schemas/purification.schema.json`` describes it. ``chosen`` only where a rule chose the
    method, ``resumed`` only where a checkpoint was trained otherwise, see `execution.resumed`.
    """
    facts: dict[str, Any] = {"schema": SCHEMA} if run.manifest_name == MANIFEST else {}
    facts |= {"source_checks": run.source_checks} if run.source_checks else {}
    facts |= {
        "method": run.method,
        "paper": run.paper,
        "source": source_facts(run.plain),
        "network": network_facts(run.plain),
        "reference_sha256": run.reference_sha256,
        "retain": _retain_facts(run),
        "preprocessing": {name: getattr(run.preprocessing, name) for name in ("size", "mean", "std")},
        "batch_norm": run.args.batch_norm if run.batch_norms else "none in this model",
        "arguments": arguments_of(run.args),
        "changed_options": changed_options(run.args, run.schedule.get("options", ())),
        **({"schedule": run.schedule} if run.schedule else {}),
        "execution": run.execution,
        "steps": run.state.global_step,
        "measured": run.report.measured(),
        **({"chosen": run.report.chosen} if run.report.chosen else {}),
        "versions": versions(),
    }
    parts = resumed(run.earlier, facts)
    return facts | ({"resumed": parts} if parts else {})


def _retain_facts(run: Purification) -> dict[str, Any]:
    source, images = run.data_source, run.train_dataset
    drawn = run.state.global_step * run.get_total_train_batch_size(run.args)
    count = 0 if images is None else len(images) if has_length(images) else drawn
    facts = {"n": count, "source": source and public_name(source)}
    if source and is_local(source) and isinstance(images, TrainingImages):
        facts["sha256"] = images.fingerprint()  # a last name alone says little
    if images is not None and not has_length(images):
        facts["streamed"] = True
    if run.retain_indices is not None:
        facts["indices_file"] = RETAIN_INDICES
    return facts


def remove_rejected(folder: Path) -> None:
    """Remove what an earlier run that was rejected left below a folder that now holds an accepted model."""
    if (folder / REJECTED / MANIFEST).is_file():
        shutil.rmtree(folder / REJECTED)
