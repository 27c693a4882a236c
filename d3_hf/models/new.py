"""Untrained networks, of timm or of transformers."""

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTImageProcessor,
)

from ..labels import check_label_names, set_label_names
from .architectures import check_normalisation, new_classifier
from .source import attach


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
    if not (image_mean and image_std and image_size):
        raise ValueError(f"a new {architecture} needs image_size, image_mean and image_std")
    check_label_names(label_names, None)
    check_normalisation(image_mean, image_std)
    config = AutoConfig.for_model(architecture, image_size=image_size, **model_args or {})
    set_label_names(config, label_names)
    model = AutoModelForImageClassification.from_config(config)
    size = {"height": image_size, "width": image_size}
    return attach(model, ViTImageProcessor(size=size, image_mean=image_mean, image_std=image_std))
