"""Facts about a run that come from the environment, for ``purification.json``: source, arguments, versions."""

import importlib.metadata
import platform
from dataclasses import asdict, fields
from typing import Any

from transformers import PreTrainedModel

from .config import PurifyConfig

MANIFEST = "purification.json"
RETAIN_INDICES = "retain_indices.json"
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
    """Where the model came from: the record that `load_classifier` left, or its class when it came from elsewhere."""
    source = getattr(model, "source", None)
    if source is None:
        return {"kind": "module", "name": type(model).__name__, "revision": None, "sha256": None}
    return asdict(source)


def arguments_of(args: PurifyConfig) -> dict[str, Any]:
    """The options that define a run: all of the defence's own, the seed, and every other one that is not at its default."""
    kinds = [kind for kind in type(args).__mro__ if issubclass(kind, PurifyConfig)]
    own = [name for kind in reversed(kinds) for name in kind.__annotations__] + ["seed"]
    values = args.to_dict()
    # Against the declared defaults, not a second instance: making one would reset the running accelerator's state.
    changed = [
        f.name for f in fields(args) if _is_plain(values.get(f.name)) and (values[f.name] or None) != (f.default or None)
    ]
    names = [n for n in dict.fromkeys(own + changed) if n not in PLACES and not n.startswith("hub_")]
    return {name: values[name] for name in names}


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
