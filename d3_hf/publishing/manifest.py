"""Facts about a run that come from the environment, for ``purification.json``: source, arguments, versions."""

import importlib.metadata
import os
import platform
from dataclasses import MISSING, asdict, fields
from typing import Any

from transformers import PreTrainedModel

from ..training.config import PurifyConfig

MANIFEST = "purification.json"
RETAIN_INDICES = "retain_indices.json"
REJECTED = "rejected"  # folder below output_dir, and the manifest's entry with the reasons
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
)


def source_of(model: PreTrainedModel) -> dict[str, Any]:
    """Where the model came from: the record that `load_classifier` left, or its class when it came from elsewhere.

    Of a path only the `public_name`: files and folders are known by their SHA-256.
    """
    source = getattr(model, "source", None)
    if source is None:
        return {"kind": "module", "name": type(model).__name__, "revision": None, "sha256": None}
    return asdict(source) | {"name": source.name if source.kind == "hub" else public_name(source.name)}


def is_local(place: str) -> bool:
    """Whether a place is a path on this machine, and no name on the Hub."""
    path = os.path.expanduser(place)
    return os.path.isabs(path) or os.path.exists(path)


def public_name(place: str) -> str:
    """What published files call a place: a path by its last name, without this machine's folders; a Hub id as it is."""
    return os.path.basename(os.path.abspath(os.path.expanduser(place))) if is_local(place) else place


def own_options(kind: type[PurifyConfig]) -> list[str]:
    """Names of the options that a defence's configuration declares itself, with those that all defences share."""
    kinds = [k for k in kind.__mro__ if issubclass(k, PurifyConfig)]
    return list(dict.fromkeys(name for k in reversed(kinds) for name in k.__annotations__))


def own_defaults(kind: type[PurifyConfig]) -> dict[str, Any]:
    """The declared defaults of `own_options`, those of where a run writes left out."""
    own = set(own_options(kind)) - set(PLACES)
    found = {f.name: f.default_factory() if f.default is MISSING else f.default for f in fields(kind) if f.name in own}
    return {name: value for name, value in found.items() if not name.startswith("hub_")}


def arguments_of(args: PurifyConfig) -> dict[str, Any]:
    """The options that define a run: all of the defence's own, the seed, and every other one that is not at its default."""
    own = own_options(type(args)) + ["seed"]
    values = args.to_dict()
    # Against the declared defaults, not a second instance: making one would reset the running accelerator's state.
    changed = [
        f.name for f in fields(args) if _is_plain(values.get(f.name)) and (values[f.name] or None) != (f.default or None)
    ]
    names = [n for n in dict.fromkeys(own + changed) if n not in PLACES and not n.startswith("hub_")]
    return {name: public_name(values[name]) if isinstance(values[name], str) else values[name] for name in names}


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
