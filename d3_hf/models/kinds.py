"""The kinds of model: a classifier gives logits, an encoder features, a CLIP those of images and of texts."""

from typing import Any

from torch import Tensor, nn
from transformers import MODEL_MAPPING


def is_encoder(model: nn.Module) -> bool:
    """Whether a transformers model is one without a head, whose output is features."""
    found = MODEL_MAPPING.get(type(getattr(model, "config", None)), ())
    return type(model) in (found if isinstance(found, tuple) else (found,))


def is_clip(model: nn.Module) -> bool:
    """Whether a transformers model is a whole CLIP, with a tower of images and one of texts."""
    return is_encoder(model) and model.config.model_type == "clip"


def model_kind(model: nn.Module) -> str:
    """``"classifier"``, ``"encoder"`` or ``"clip"``, as manifests and cards say."""
    return "clip" if is_clip(model) else "encoder" if is_encoder(model) else "classifier"


def features_in(model: nn.Module, output: Any) -> Tensor:
    """The features of a batch: one vector for each image, as the network pools them.

    A pooler with a dense layer of its own, as ViT's and DeiT's, counts for nothing: self-supervised checkpoints leave it
    untrained, and no head reads it. The class token is taken in its place.

    Args:
        model: The encoder.
        output: What it returned.

    Returns:
        (B, width), with gradient where the output has one.

    Raises:
        ValueError: It pools nothing.
    """
    pooled = getattr(output, "pooler_output", None)
    if has_dense_pooler(model):
        pooled = output.last_hidden_state[:, 0]
    if not isinstance(pooled, Tensor):
        raise ValueError(
            f"{type(model).__name__} returns no features of whole images (pooler_output): it is no encoder of them"
        )
    return pooled.flatten(1)


def encode(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Features (B, width) of images (B, 3, h, w) ready for the encoder, see `features_in`; of a CLIP projected ones."""
    if is_clip(model):
        return model.get_image_features(pixel_values=pixel_values).pooler_output.flatten(1)
    return features_in(model, model(pixel_values=pixel_values))


def has_dense_pooler(model: nn.Module) -> bool:
    """Whether what an encoder calls its pooler is a layer with weights."""
    return hasattr(getattr(model, "pooler", None), "dense")
