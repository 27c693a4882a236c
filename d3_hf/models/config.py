"""``config.json``, checked before transformers sees it: only an image classifier of one label or an encoder passes."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
)

from ..files import first_line
from ..labels import set_label_names
from .architectures import architecture_cfg
from .checkpoint_files import read_settings
from .differences import EncoderFound, headless, with_head

logger = logging.getLogger(__name__)

# Entries that lead to other files of the repository, past what is read and checked here.
DETOURS = ("configuration_files", "transformers_weights")

QUANTISED = ("quantization_config", "compression_config")

# Values of problem_type by which an image has one class of several; transformers decides by the labels where there is none.
ONE_CLASS = (None, "single_label_classification")

# Arguments of timm.create_model that load other weights or descriptions, or leave no logits.
TIMM_DETOURS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "features_only"}


def read_config(folder: Path, name: str, new_head: Sequence[str] | None = None) -> PreTrainedConfig:
    """Read a folder's ``config.json``.

    Args:
        folder: Where it is.
        name: What to call the folder in messages.
        new_head: Classes to describe in place of the configuration's own, and of its task.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, of another task or kind of model, of quantised weights or of an adapter; needs code; or leads
            to other files.
    """
    config = _read(folder, name, _refuse_no_classifier)
    if isinstance(config, TimmWrapperConfig):
        _repair_timm(config, name)
        if new_head is None and config.num_labels == 0:  # what timm writes of an encoder
            raise headless(name, "num_classes is 0 in its config.json")
    if new_head is not None:
        set_label_names(config, new_head)
        config.problem_type = None
    settle(config, name)
    return config


def read_encoder_config(folder: Path, name: str) -> PreTrainedConfig:
    """Read the ``config.json`` of an encoder's folder; of a pair of image and text the image tower's part.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is a classifier's, or no encoder of images; or see `read_config`.
    """
    config = _read(folder, name, _refuse_no_encoder)
    if isinstance(config, TimmWrapperConfig):
        _repair_timm(config, name)
        if config.num_labels:
            raise with_head(name, f"num_classes is {config.num_labels} in its config.json")
    if named := [kind for kind in config.architectures or [] if kind.endswith("ForImageClassification")]:
        raise with_head(name, f"a {named[0]}")
    config = getattr(config, "vision_config", config)
    settle_output(config)
    return config


def read_clip_config(folder: Path, name: str) -> PreTrainedConfig:
    """Read the ``config.json`` of a whole CLIP's folder.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is none of a CLIP; or see `read_config`.
    """
    config = _read(folder, name, _refuse_no_clip)
    settle_output(config)
    return config


def encoder_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of encoder that a configuration describes."""
    found = MODEL_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _read(folder: Path, name: str, refuse: Callable[[dict[str, Any], str, Any], None]) -> PreTrainedConfig:
    """Read ``config.json`` once its contents have passed ``refuse(contents, name, model_type)``."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{name} holds a PEFT adapter{_base_of(folder)}: merge it first (merge_and_unload()), and load the result"
        )
    file = folder / "config.json"
    if not file.is_file():
        inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
        advice = f"there is one in {', '.join(inner)}" if inner else "bare weights load by their file, with their architecture"
        raise FileNotFoundError(f"{name} holds no config.json; {advice}")
    contents = read_settings(file, name, "a configuration")
    _refuse_unusable(contents, name)
    # timm's own files have no model_type; transformers recognises them by this entry.
    refuse(contents, name, contents.get("model_type", "timm_wrapper" if "pretrained_cfg" in contents else None))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a config can be wrong in any way; none of them is recovered from
        raise ValueError(f"{name}: config.json cannot be used ({first_line(error)})") from error
    # A config may name an attention kernel on the Hub, which is code: let transformers choose.
    config._attn_implementation = None
    return config


def settle(config: PreTrainedConfig, name: str) -> None:
    """Refuse a configuration of another task, and let its network return one output with logits and nothing else.

    Raises:
        ValueError: The network tells no classes apart, or is trained for several labels of an image or for numbers.
    """
    if config.problem_type not in ONE_CLASS:
        raise ValueError(
            f"{name} is trained for another task (problem_type {config.problem_type!r}): a classifier here gives an image one "
            "class, by softmax; set problem_type to null if that is what it does"
        )
    # PVT's own num_labels hides the one that goes with id2label.
    if config.id2label is None and config.num_labels:
        set_label_names(config, [f"LABEL_{number}" for number in range(config.num_labels)])
    elif config.id2label and config.num_labels != len(config.id2label):
        config.num_labels = len(config.id2label)
    if not config.num_labels or config.num_labels < 2:
        raise ValueError(f"{name} has {config.num_labels or 0} class: a classifier tells at least 2 apart")
    settle_output(config)


def settle_output(config: PreTrainedConfig) -> None:
    """Let a network return one output with names, and nothing beside what is asked of it."""
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of image classifier that a configuration describes."""
    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    candidates = found if isinstance(found, tuple) else (found,)
    named = [candidate for candidate in candidates if candidate.__name__ in (config.architectures or [])]
    return (named or candidates)[0]


def _base_of(folder: Path) -> str:
    try:
        return f" of {read_settings(folder / 'adapter_config.json', '', 'settings')['base_model_name_or_path']}"
    except (OSError, ValueError, KeyError):
        return ""


def _refuse_unusable(contents: dict[str, Any], name: str) -> None:
    if detours := [entry for entry in DETOURS if contents.get(entry)]:
        raise ValueError(
            f"{name}: config.json leads to other files ({', '.join(detours)}), which are not read: give the "
            "one that is meant its usual name, and remove the entry"
        )
    inner = [part for part in contents.values() if isinstance(part, dict)]
    if any(part.get(entry) for part in (contents, *inner) for entry in QUANTISED):
        raise ValueError(f"{name} is quantised, and quantised weights cannot be purified: load the original")


def _refuse_no_classifier(contents: dict[str, Any], name: str, model_type: Any) -> None:
    if model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        _tell_of_code(contents, name, model_type)
        if model_type == "timm_wrapper" and "num_classes" not in contents:
            raise ValueError(f"{name}: config.json gives no num_classes: add how many the network has")
        return
    _refuse_code(contents, name, model_type)
    is_of_images = model_type in CONFIG_MAPPING and hasattr(CONFIG_MAPPING[model_type], "num_channels")
    fault = f"{name}: model_type {model_type!r} in config.json is no image classifier that transformers knows"
    if not is_of_images:
        raise ValueError(fault)
    advice = "timm has most encoders of images too: load its copy (timm/...) with a new head"
    raise EncoderFound(f"{fault}; {advice}", name, f"model_type {model_type!r}")


def _refuse_no_encoder(contents: dict[str, Any], name: str, model_type: Any) -> None:
    if model_type in CONFIG_MAPPING:
        kind = CONFIG_MAPPING[model_type]
        kind = kind.sub_configs.get("vision_config", kind)
        if kind in MODEL_MAPPING and encoder_class(kind()).main_input_name == "pixel_values":
            return _tell_of_code(contents, name, model_type)
    _refuse_code(contents, name, model_type)
    raise ValueError(f"{name}: model_type {model_type!r} in config.json is no encoder of images that transformers knows")


def _refuse_no_clip(contents: dict[str, Any], name: str, model_type: Any) -> None:
    if model_type == "clip" and not any(
        kind.endswith("ForImageClassification") for kind in contents.get("architectures") or []
    ):
        return _tell_of_code(contents, name, model_type)
    raise ValueError(
        f"{name}: model_type {model_type!r} in config.json is no CLIP with a tower of images and one of texts: "
        "load_encoder and the defences of encoders, as --defence par, are for an image tower alone"
    )


def _tell_of_code(contents: dict[str, Any], name: str, model_type: str) -> None:
    if contents.get("auto_map"):
        logger.warning("%s: the Python code that its auto_map names is not run, but transformers' %s", name, model_type)


def _refuse_code(contents: dict[str, Any], name: str, model_type: Any) -> None:
    if "auto_map" in contents and model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{name} needs Python code of its repository (auto_map in config.json), which is never run: build the "
            "network yourself and pass it with its weights, load_classifier(weights_file, module=...)"
        )


def _repair_timm(config: TimmWrapperConfig, name: str) -> None:
    architecture_cfg(config.architecture)
    # timm 1.0.31 writes num_classes a second time, into model_args, where TimmWrapper trips over it.
    model_args = dict(config.model_args or {})
    if detours := sorted(TIMM_DETOURS & model_args.keys()):
        raise ValueError(f"{name}: {', '.join(detours)} in model_args of config.json is no part of a classifier: remove it")
    declared = model_args.pop("num_classes", config.num_labels)
    if declared != config.num_labels:
        raise ValueError(f"{name}: config.json says {config.num_labels} classes, and {declared} in model_args")
    config.model_args = model_args or None
