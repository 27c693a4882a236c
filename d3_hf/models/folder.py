"""Folders with a ``config.json``: what `save_pretrained`, timm and `WrappedClassifier` write, and what the Hub serves.

The configuration is checked before transformers sees it, and the weights are read here: of all that a folder can
bring, only JSON and tensors are used.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
)

from ..files import first_line
from ..labels import check_label_names, set_label_names
from .architectures import architecture_cfg
from .weights import load_module, load_pretrained, read_weights
from .wrapper import WrappedClassifier, WrappedClassifierConfig, class_name, count_classes, processor_of

logger = logging.getLogger(__name__)


def open_folder(
    folder: Path,
    name: str,
    module: nn.Module | None = None,
    label_names: Sequence[str] | None = None,
    image_processor: BaseImageProcessor | None = None,
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load the classifier of a folder and its image processor; arguments and errors as `load_classifier`.

    Args:
        folder: Where the files are.
        name: What to call it in messages and in the configuration.
        module: Network to load the weights of a `WrappedClassifier` into.
        label_names: Class names in place of the configuration's.
        image_processor: Processor in place of the folder's.
    """
    _refuse_links(folder, name)
    config = _read_config(folder, name)
    if label_names is not None:
        check_label_names(label_names, config.num_labels)
        set_label_names(config, label_names)
    weights: dict[str, Any] = {}
    for file in weights_files(folder, name):
        weights |= read_weights(file)
    if isinstance(config, WrappedClassifierConfig):
        model = _rewrap(config, weights, module, name)
        image_processor = image_processor or processor_of(config)
    elif module is not None:
        raise ValueError(f"{name} is a {config.model_type} model, not a wrapped module: leave module out")
    else:
        model = load_pretrained(_model_class(config), config, weights, name)
        image_processor = image_processor or read_processor(folder, name)
    model.name_or_path = model.config.name_or_path = name
    return model, image_processor


def _refuse_links(folder: Path, name: str) -> None:
    """Raise a ValueError for a link out of the folder, which would read, and later publish, a file of whoever loads it."""
    # A snapshot of the Hub cache is links into its repository's own folder.
    home = folder.resolve().parents[1] if folder.resolve().parent.name == "snapshots" else folder.resolve()
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not file.resolve().is_relative_to(home):
            raise ValueError(f"{name}: {file.name} is a link out of the folder and not followed: put the file itself there")


def weights_files(folder: Path, name: str) -> list[Path]:
    """Return the files with a folder's weights: safetensors where there are any, whole or in shards."""
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    for files in ([folder / "model.safetensors"], shards, [folder / "pytorch_model.bin"]):
        if files and all(file.is_file() for file in files):
            return files
    raise FileNotFoundError(f"{name} holds no model.safetensors (nor shards of it, nor a local pytorch_model.bin)")


def read_processor(source: str | Path, name: str) -> BaseImageProcessor:
    """Return the image processor of a folder or Hub id.

    Raises:
        ValueError: There is none that transformers knows.
    """
    try:
        return AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except (ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} has no image processor that transformers knows: put its preprocessor_config.json "
            "there, or in Python pass one as image_processor"
        ) from error


def _read_config(folder: Path, name: str) -> PreTrainedConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{name} holds no config.json; bare weights load by their file, with their architecture")
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: config.json is no JSON ({first_line(error)})") from error
    _refuse_unusable(contents, folder, name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a config can be wrong in any way; none of them is recovered from
        raise ValueError(f"{name}: config.json cannot be used ({first_line(error)})") from error
    # A config may name an attention kernel on the Hub, which is code: let transformers choose.
    config._attn_implementation = None
    if isinstance(config, TimmWrapperConfig):
        _repair_timm(config, name)
    return config


def _refuse_unusable(contents: Any, folder: Path, name: str) -> None:
    if not isinstance(contents, dict):
        raise ValueError(f"{name}: config.json holds a {type(contents).__name__}, not a configuration")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{name} holds a PEFT adapter: merge it into its base model first")
    if "quantization_config" in contents:
        raise ValueError(f"{name} is quantised, and quantised weights cannot be purified: load the original")
    # timm's own files have no model_type; transformers recognises them by this entry.
    model_type = contents.get("model_type", "timm_wrapper" if "pretrained_cfg" in contents else None)
    if model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return
    if "auto_map" in contents and model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{name} needs Python code of its repository (auto_map in config.json), which is never run: build the "
            "network yourself and pass it with its weights, load_classifier(weights_file, module=...)"
        )
    raise ValueError(f"{name}: model_type {model_type!r} in config.json is no image classifier that transformers knows")


def _repair_timm(config: TimmWrapperConfig, name: str) -> None:
    architecture_cfg(config.architecture)
    # timm 1.0.31 writes num_classes a second time, into model_args, where TimmWrapper trips over it.
    model_args = dict(config.model_args or {})
    declared = model_args.pop("num_classes", config.num_labels)
    if declared != config.num_labels:
        raise ValueError(f"{name}: config.json says {config.num_labels} classes, and {declared} in model_args")
    config.model_args = model_args or None


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    candidates = found if isinstance(found, tuple) else (found,)
    named = [candidate for candidate in candidates if candidate.__name__ in (config.architectures or [])]
    return (named or candidates)[0]


def _rewrap(config: WrappedClassifierConfig, weights: dict[str, Any], module: nn.Module | None, name: str) -> WrappedClassifier:
    if module is None:
        raise ValueError(
            f"{name} holds the weights of a {config.module_class}, whose code is not stored here: load it in Python, with "
            "one passed as module"
        )
    if not (config.image_size and config.image_mean and config.image_std):
        raise ValueError(f"{name}: config.json lacks image_size, image_mean or image_std")
    if class_name(module) != config.module_class:
        logger.warning("%s was saved from a %s and is loaded into a %s", name, config.module_class, class_name(module))
    prefix = f"{WrappedClassifier.base_model_prefix}."
    load_module(module, {key.removeprefix(prefix): tensor for key, tensor in weights.items()}, name)
    classes = count_classes(module, tuple(config.image_size))
    if classes != config.num_labels:
        raise ValueError(f"{name} has {config.num_labels} classes, but the module returns {classes} logits")
    return WrappedClassifier(config, module)
