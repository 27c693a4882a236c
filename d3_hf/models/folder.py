"""Folders with a ``config.json``: what `save_pretrained`, timm and `WrappedClassifier` write, and what the Hub serves.

The configuration is checked before transformers sees it, and the weights are read here: of all that a folder can
bring, only JSON and tensors are used.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, TimmWrapperConfig
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from ..data.preprocessing import Preprocessing
from ..labels import check_label_names, set_label_names
from . import architectures
from .checkpoint_files import PICKLED, SAFE, read_folder, refuse_links
from .config import model_class, read_config
from .new_heads import load_under_new_head
from .processors import at_size, read_processor
from .weight_names import unwrapped
from .weights import load_module, load_pretrained
from .wrapper import WrappedClassifier, WrappedClassifierConfig, class_name, count_classes, processor_of

logger = logging.getLogger(__name__)


def open_folder(
    folder: Path,
    name: str,
    module: nn.Module | None = None,
    label_names: Sequence[str] | None = None,
    image_processor: BaseImageProcessor | None = None,
    new_head: Sequence[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    formats: Iterable[str] = (SAFE, PICKLED),
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load the classifier of a folder and its image processor; arguments and errors as `load_classifier`.

    Args:
        folder: Where the files are.
        name: What to call it in messages and in the configuration.
        module: Network to load the weights of a `WrappedClassifier` into.
        label_names: Class names in place of the configuration's.
        image_processor: Processor in place of the folder's.
        new_head: Classes of an untrained head in place of the folder's, if it has one.
        image_size: With a new head, size of the images in place of the processor's.
        formats: See `weights_files`.
    """
    refuse_links(folder, name)
    config = read_config(folder, name, new_head)
    weights = read_folder(folder, name, formats)
    if isinstance(config, WrappedClassifierConfig):
        if new_head is not None:
            raise ValueError(f"{name} is a wrapped module: give the module its new head, and load that")
        classes = rewrapped(config, weights, module, name)
        if classes != config.num_labels:
            raise ValueError(f"{name} has {config.num_labels} classes, but the module returns {classes} logits")
        model = WrappedClassifier(config, module)
        image_processor = image_processor or processor_of(config)
    elif module is not None:
        raise ValueError(f"{name} is a {config.model_type} model, not a wrapped module: leave module out")
    else:
        weights = _without_background(config, unwrapped(weights, name))
        if new_head is None:  # an encoder is told before its processor is looked for
            model = load_pretrained(model_class(config), config, weights, name)
        image_processor = image_processor or read_processor(folder, name)
        if new_head is not None:
            model, image_processor = _load_under_new_head(config, weights, name, image_processor, image_size)
    if label_names is not None:
        check_label_names(label_names, model.config.num_labels)
        set_label_names(model.config, label_names)
    model.name_or_path = model.config.name_or_path = name
    return model, image_processor


def _load_under_new_head(
    config: PreTrainedConfig,
    weights: dict[str, Tensor],
    name: str,
    image_processor: BaseImageProcessor,
    image_size: int | tuple[int, int] | None,
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    if image_size is not None:
        weights, image_processor = resized(config, weights, name, image_processor, image_size)
    preprocessing = Preprocessing.from_processor(image_processor)
    return load_under_new_head(model_class(config), config, weights, name, preprocessing), image_processor


def resized(
    config: PreTrainedConfig,
    weights: dict[str, Tensor],
    name: str,
    image_processor: BaseImageProcessor,
    image_size: int | tuple[int, int],
) -> tuple[dict[str, Tensor], BaseImageProcessor]:
    """Weights and image processor for images of another size, of which a timm network's configuration is told too.

    Raises:
        ValueError: The weights, or the processor, cannot be brought to it.
    """
    size = architectures.height_width(image_size)
    if isinstance(config, TimmWrapperConfig):
        architectures.set_size(config, size)
        weights = architectures.resampled(config, weights, name)
    is_timms = isinstance(image_processor, TimmWrapperImageProcessor)  # which the configuration describes
    return weights, architectures.processor_of(config) if is_timms else at_size(image_processor, size, name)


def _without_background(config: PreTrainedConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the logits in front of the first class that TensorFlow's networks have, as timm does (label_offset)."""
    described = getattr(config, "pretrained_cfg", None) if isinstance(config, TimmWrapperConfig) else None
    offset = described.pop("label_offset", None) if isinstance(described, dict) else None
    if not offset:
        return weights
    head = architectures.architecture_cfg(config.architecture).classifier
    names = {f"{start}{head}.{end}" for start in ("", "timm_model.") for end in ("weight", "bias")}
    return {
        key: tensor[offset:] if key in names and len(tensor) == config.num_labels + offset else tensor
        for key, tensor in weights.items()
    }


def rewrapped(
    config: WrappedClassifierConfig,
    weights: dict[str, Tensor],
    module: nn.Module | None,
    name: str,
    what: str = "logits (B, C)",
) -> int:
    """Load the weights of a wrapped module into one of its class, and count its logits or features, see `count_classes`.

    Raises:
        ValueError: There is no module; the configuration is not whole; the weights are not the module's, see `load_module`.
    """
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
    return count_classes(module, tuple(config.image_size), what)
