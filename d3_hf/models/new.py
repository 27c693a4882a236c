"""Untrained networks, of timm or of transformers; and trained ones with an untrained head."""

from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTImageProcessor,
)

from ..labels import check_label_names, set_label_names
from .architectures import check_normalisation, new_classifier
from .head import find_head
from .source import attach, preprocessing_of


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


def with_new_head(model: PreTrainedModel, label_names: list[str]) -> PreTrainedModel:
    """Give a trained classifier an untrained head for other classes, in place.

    Args:
        model: A classifier with its ``image_processor``, as `load_classifier` makes it; its head is a linear layer.
        label_names: Class names in the order of the new logits.

    Returns:
        The model.

    Raises:
        ValueError: There are fewer than two names or a name occurs twice; the head is no linear layer, or cannot be found; see
            `find_head`. The model is as it was.
    """
    check_label_names(label_names, None)
    name = find_head(model, preprocessing_of(model).size)
    old = model.get_submodule(name)
    if not isinstance(old, nn.Linear):
        raise ValueError(f"the head of {type(model).__name__} is no linear layer but a {type(old).__name__}")
    new = nn.Linear(old.in_features, len(label_names), bias=old.bias is not None).to(old.weight)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)
    set_label_names(model.config, label_names)
    model.num_labels = len(label_names)
    return model
