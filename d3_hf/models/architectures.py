"""From the name of a timm architecture, d3_hf's own included, to a classifier that Auto classes reload."""

import difflib
import logging
import sys
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from ..files import first_line
from ..labels import check_label_names, set_label_names
from .source import attach
from .weight_names import told
from .weights import load_pretrained

logger = logging.getLogger(__name__)


def new_classifier(
    architecture: str,
    *,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_size: int | tuple[int, int] | None = None,
    model_args: dict[str, Any] | None = None,
) -> TimmWrapperForImageClassification:
    """Build an untrained classifier with the initial weights that its architecture prescribes, from torch's global
    seed.

    ``TimmWrapperForImageClassification(config)`` alone would draw every convolution and linear layer from N(0, 0.02).

    Args:
        architecture: Name that `timm.create_model` knows.
        num_labels: Number of classes, at least 2; the number of ``label_names`` where those are given.
        label_names: Class names in the order of the logits.
        image_mean: Mean of each channel, on the scale where a pixel is in [0, 1]. Default: the architecture's, if it
            has one; the CIFAR networks of d3_hf have none.
        image_std: Standard deviation of each channel, on the same scale.
        image_size: Pixels, one number or (height, width). Default: the architecture's (32 for the CIFAR networks).
        model_args: Further arguments of the architecture, such as ``{"patch_size": 4, "depth": 6}``.

    Returns:
        The classifier in evaluation mode, with ``image_processor`` set.

    Raises:
        ValueError: The architecture is unknown, has no normalisation of its own and none is given, or refuses an
            argument; the number of classes is missing or below 2 or not that of ``label_names``; a name occurs twice.
    """
    num_labels = check_label_names(label_names, num_labels)
    if num_labels is None:
        raise ValueError(f"{architecture}: give num_labels or label_names")
    config = timm_config(architecture, num_labels, label_names, image_mean, image_std, image_size, model_args)
    model = load_pretrained(TimmWrapperForImageClassification, config, initial_weights(config), architecture)
    return attach(model, processor_of(config))


def initial_weights(config: TimmWrapperConfig) -> dict[str, Tensor]:
    """Initial weights that an architecture prescribes, from torch's global seed; a ValueError if it refuses its arguments."""
    try:
        network = timm.create_model(config.architecture, num_classes=config.num_labels, **(config.model_args or {}))
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{config.architecture} with model_args={config.model_args}: {first_line(error)}") from error
    return network.state_dict()


def timm_config(
    architecture: str,
    num_labels: int,
    label_names: Sequence[str] | None,
    image_mean: Sequence[float] | None,
    image_std: Sequence[float] | None,
    image_size: int | tuple[int, int] | None,
    model_args: dict[str, Any] | None,
) -> TimmWrapperConfig:
    """Describe a classifier so that Auto classes can read it back; arguments and errors as `new_classifier`."""
    cfg = architecture_cfg(architecture)
    model_args = dict(model_args or {})
    image_size = model_args.get("img_size") if image_size is None else image_size
    if image_size is not None and cfg.fixed_input_size:
        model_args.setdefault("img_size", image_size)
    config = TimmWrapperConfig(
        architecture=architecture,
        num_labels=num_labels,
        model_args=model_args or None,
        pretrained_cfg=_preprocessing(architecture, cfg, image_mean, image_std, image_size),
    )
    if label_names is not None:
        set_label_names(config, label_names)
    return config


def set_size(config: TimmWrapperConfig, size: tuple[int, int]) -> None:
    """Describe a network for images of another size, (height, width) in pixels, nothing of which is cut off."""
    config.pretrained_cfg = dict(getattr(config, "pretrained_cfg", None) or {}) | {"input_size": [3, *size], "crop_pct": 1.0}
    if architecture_cfg(config.architecture).fixed_input_size:
        config.model_args = dict(config.model_args or {}) | {"img_size": list(size)}


def resampled(config: TimmWrapperConfig, weights: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Bring what depends on the size of the images, such as position embeddings, to the network's, as timm does.

    Args:
        config: Of the network.
        weights: Of the same network at any size.
        where: Where they come from, for messages.

    Raises:
        ValueError: timm cannot.
    """
    home = sys.modules[timm.model_entrypoint(config.architecture.partition(".")[0]).__module__]
    if not hasattr(home, "checkpoint_filter_fn"):
        return weights
    own_names = {name.removeprefix("timm_model."): tensor for name, tensor in weights.items()}
    try:
        with torch.device("meta"):
            network = timm.create_model(config.architecture, num_classes=config.num_labels, **config.model_args or {})
        return home.checkpoint_filter_fn(own_names, network)
    except Exception as error:  # foreign weights can make it fail in any way; none of them is recovered from
        raise ValueError(
            f"{where}: its weights cannot be brought to another size of images ({first_line(error)}): leave image_size out"
        ) from error


def processor_of(config: TimmWrapperConfig) -> TimmWrapperImageProcessor:
    """Return the image processor that `AutoImageProcessor` reads from a folder with this ``config.json``."""
    return TimmWrapperImageProcessor(pretrained_cfg=config.pretrained_cfg, architecture=config.architecture)


def architecture_cfg(architecture: str) -> PretrainedCfg:
    """Return timm's own description of an architecture.

    Raises:
        ValueError: timm does not know the architecture, or not this tag of it.
    """
    name = architecture.partition(".")[0]
    if not timm.is_model(name):
        ours = [f"{name}_cifar"] if timm.is_model(f"{name}_cifar") else []  # the papers' names of the networks for 32x32
        close = list(dict.fromkeys(ours + difflib.get_close_matches(name, timm.list_models(), n=3)))[:3]
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists those that are known"
        raise ValueError(f"unknown architecture {architecture!r}: {hint}")
    try:
        return timm.get_pretrained_cfg(architecture) or PretrainedCfg(mean=None, std=None)
    except RuntimeError as error:
        raise ValueError(f"unknown architecture {architecture!r}: {first_line(error)}") from error


def classes_in(weights: dict[str, Tensor], architecture: str, where: str) -> int:
    """Read the number of classes off the classifier's weight.

    Raises:
        ValueError: The architecture does not have exactly one classifier, or the weights do not hold it.
    """
    classifier = architecture_cfg(architecture).classifier
    # Bare names, or those that TimmWrapper saves.
    names = {f"{classifier}.weight", f"timm_model.{classifier}.weight"} & weights.keys()
    if len(names) != 1:
        raise ValueError(
            f"{where}: cannot tell the number of classes of this {architecture}, whose classifier is {classifier}, where the "
            f"weights are {told(weights)}: give the classes' names, or in Python num_labels; an encoder, which has none, takes "
            "a new head, --new_head of d3-hf victim"
        )
    name = names.pop()
    logger.info("%s: %d classes, from the shape of %s", where, len(weights[name]), name)
    return len(weights[name])


def _preprocessing(
    architecture: str,
    cfg: PretrainedCfg,
    image_mean: Sequence[float] | None,
    image_std: Sequence[float] | None,
    image_size: int | tuple[int, int] | None,
) -> dict[str, Any]:
    if (image_mean is None) != (image_std is None):
        raise ValueError("image_mean and image_std come together: give both or neither")
    mean, std = (cfg.mean, cfg.std) if image_mean is None else (image_mean, image_std)
    if mean is None or std is None:
        raise ValueError(
            f"{architecture} fixes no normalisation: give the training's image_mean and image_std, three numbers each "
            "in units of [0, 1] (0 0 0 and 1 1 1 where the network takes pixels / 255)"
        )
    size, crop = list(cfg.input_size[1:]), cfg.crop_pct
    if image_size is not None:
        size, crop = list(height_width(image_size)), 1.0  # a given size is the image's own: nothing is cut off
    found = {
        "input_size": [3, *size],
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        "interpolation": cfg.interpolation,
        "crop_pct": crop,
        "crop_mode": cfg.crop_mode,
    }
    check_normalisation(found["mean"], found["std"])
    logger.info(
        "%s: preprocessing %s (%s)",
        architecture,
        found,
        "the architecture's own" if image_mean is None else "as given",
    )
    return found


def height_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) in pixels of an ``image_size`` argument."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ValueError(f"image_size must be positive, one number or (height, width); got {image_size}")
    return int(height), int(width)


def check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise a ValueError unless there are three means in [0, 1] and three positive standard deviations up to 1."""
    if len(mean) != 3 or len(std) != 3 or not all(0 <= m <= 1 for m in mean) or not all(0 < s <= 1 for s in std):
        raise ValueError(
            f"image_mean must be three numbers in [0, 1], image_std three in (0, 1]; got {list(mean)}, {list(std)}"
        )
