"""Untrained networks, of timm or of transformers."""

from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperModel,
    ViTImageProcessor,
)

from ..labels import check_label_names, set_label_names
from .architectures import check_normalisation, initial_weights, new_classifier, processor_of, timm_config
from .config import settle_output
from .source import attach
from .weights import load_pretrained


def new_model(
    label_names: list[str],
    architecture: str,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
    image_size: int | None = None,
    model_args: dict | None = None,
) -> PreTrainedModel:
    """An untrained network, of transformers if ``architecture`` is one of its model types (``vit``), else of timm.

    Args:
        label_names: Class names in the order of the logits.
        architecture: ``vit`` and the like, or a timm name, d3_hf's own included.
        image_mean: Three numbers in units of [0, 1]; a transformers network needs them.
        image_std: The same.
        image_size: Side in pixels; a transformers network needs it.
        model_args: Arguments of the network's configuration or constructor.

    Raises:
        ValueError: See `new_classifier`; or a transformers network lacks its size or normalisation.
    """
    if architecture not in CONFIG_MAPPING:
        return new_classifier(
            architecture,
            label_names=label_names,
            image_mean=image_mean,
            image_std=image_std,
            image_size=image_size,
            model_args=model_args,
        )
    check_label_names(label_names, None)
    config, processor = _described(architecture, image_mean, image_std, image_size, model_args)
    set_label_names(config, label_names)
    return attach(AutoModelForImageClassification.from_config(config), processor)


def new_encoder(
    architecture: str,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
    image_size: int | None = None,
    model_args: dict | None = None,
) -> PreTrainedModel:
    """An untrained encoder: the network of `new_model` without its head, in evaluation mode; arguments as there.

    Raises:
        ValueError: See `new_classifier`; or a transformers network lacks its size or normalisation.
    """
    if architecture in CONFIG_MAPPING:
        config, processor = _described(architecture, image_mean, image_std, image_size, model_args)
        settle_output(config)
        return attach(AutoModel.from_config(config).eval(), processor)
    config = timm_config(architecture, 0, None, image_mean, image_std, image_size, model_args)
    settle_output(config)
    return attach(load_pretrained(TimmWrapperModel, config, initial_weights(config), architecture), processor_of(config))


def _described(
    architecture: str,
    image_mean: list[float] | None,
    image_std: list[float] | None,
    image_size: int | None,
    model_args: dict[str, Any] | None,
) -> tuple[PreTrainedConfig, ViTImageProcessor]:
    """Configuration and image processor of a transformers network."""
    if not (image_mean and image_std and image_size):
        raise ValueError(f"a new {architecture} needs image_size, image_mean and image_std")
    check_normalisation(image_mean, image_std)
    config = AutoConfig.for_model(architecture, image_size=image_size, **model_args or {})
    size = {"height": image_size, "width": image_size}
    return config, ViTImageProcessor(size=size, image_mean=image_mean, image_std=image_std)
