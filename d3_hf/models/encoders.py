"""`load_encoder`: an encoder from every kind of checkpoint that `load_classifier` takes, by the same rules.

An encoder is a network without a head: it maps images to features, and whoever uses it trains a head, a probe or a text tower
on them. What comes out is a `transformers.PreTrainedModel` that Auto classes reload, with ``image_processor`` and ``source``
set; `kinds.encode` gives its features.
"""

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, TimmWrapperModel

from ..data.images import RawImages
from ..data.preprocessing import Preprocessing
from ..files import sha256
from . import architectures, wrapper
from .checkpoint_files import PICKLED, SAFE, read_file, read_files, read_folder, refuse_links
from .config import encoder_class, read_encoder_config, settle_output
from .differences import with_head
from .evaluating import evaluating
from .folder import resized, rewrapped
from .kinds import encode, has_dense_pooler, is_clip, is_encoder
from .load import (
    OPTIONS,
    SIZABLE,
    Loaded,
    check_in_memory,
    check_network_of_file,
    check_one_size,
    check_useful,
    from_folder,
    from_hub,
    kind_of,
    module_settings,
    name_of,
)
from .probe import probe, refuse_unseen_edges
from .processors import read_processor
from .source import Source, attach
from .weight_names import told, unwrapped
from .weights import build_pretrained, load_module

logger = logging.getLogger(__name__)

OF_CLASSES = {"num_labels", "label_names", "new_head"}  # options that an encoder has no use for
FEATURES = "features (B, width)"


def load_encoder(
    source: str | Path | nn.Module,
    *,
    architecture: str | None = None,
    model_args: dict[str, Any] | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_size: int | tuple[int, int] | None = None,
    image_processor: BaseImageProcessor | None = None,
    revision: str | None = None,
    module: nn.Module | None = None,
) -> PreTrainedModel:
    """Load an encoder of images from anywhere, without running code that it brings.

    Args:
        source: As `load_classifier` takes it: a Hub id, folder or file of a transformers encoder (``Dinov2Model``,
            ``ViTModel``, ``ResNetModel``, ``CLIPVisionModel``; of ``CLIPModel`` and the like the image tower) or of a timm
            network with ``num_classes`` 0; a module that maps images (B, 3, h, w) to features (B, width), which becomes a
            `WrappedEncoder`; a transformers encoder, which is kept. Projections, heads of other tasks and text towers are left
            out, and logged.
        architecture: timm name of the network that a file's weights belong to.
        model_args: Further arguments of the architecture.
        image_mean: Mean of each channel of a file's or a module's training images, on the scale where a pixel is in [0, 1].
        image_std: Standard deviation of each channel, on the same scale.
        image_size: Pixels, one number or (height, width); also for folders and Hub ids, where the network takes several sizes.
        image_processor: Processor to use in place of the source's own.
        revision: Branch, tag or commit of a Hub id.
        module: Network to load a file, or what a `WrappedEncoder` saved, into.

    Returns:
        The encoder in float32 (a transformers model in memory keeps its type) and in evaluation mode, with the plain attributes
        ``image_processor`` and ``source``.

    Raises:
        FileNotFoundError: See `load_classifier`.
        OSError: See `load_classifier`.
        ValueError: It is a classifier, or no encoder of images: it pools nothing, or draws its features at random; or see
            `load_classifier`.
        TypeError: ``source`` is none of the above.
    """
    given = {name: value for name, value in locals().items() if name != "source" and value is not None}
    kind, name = kind_of(source), name_of(source)
    sized = {"image_size"} if kind in SIZABLE else set()
    check_useful(given, OPTIONS[kind] - OF_CLASSES | sized, kind, name)
    check_one_size(given, name)
    loader = {
        "hub": partial(from_hub, opener=_open_folder),
        "folder": partial(from_folder, opener=_open_folder),
        "file": _from_file,
        "module": _from_module,
        "model": _from_model,
    }[kind]
    model, processor, origin = loader(source, **given)
    preprocessing = Preprocessing.from_processor(processor)
    probe(model.eval(), preprocessing, name)
    if image_size is not None:
        refuse_unseen_edges(model, preprocessing.size, name)
    return attach(model, processor, origin)


def encode_images(
    model: PreTrainedModel, images: RawImages, preprocessing: Preprocessing, batch_size: int = 256, change: Any = None
) -> Tensor:
    """Features of every image, in evaluation mode; the model is left as it was.

    Args:
        model: The encoder.
        images: Raw images.
        preprocessing: The encoder's.
        batch_size: Raw images per batch, at least 1.
        change: What is done to raw uint8 (B, 3, H, W) first; None: nothing.

    Returns:
        float32 (N, width) on the CPU, in the order of the images.

    Raises:
        ValueError: A feature is not finite.
    """
    device, order, features = next(model.parameters()).device, [], []
    with evaluating(model), torch.no_grad():
        for rows, raw, _ in images.batches(batch_size):
            raw = raw.to(device) if change is None else change(raw.to(device))
            features.append(encode(model, preprocessing(raw)).float().cpu())
            order.append(rows)
    found = torch.cat(features)[torch.cat(order).argsort()]
    if not found.isfinite().all():
        raise ValueError(f"features of {type(model).__name__} are not finite (NaN or infinite): its weights are broken")
    return found


def _open_folder(
    folder: Path,
    name: str,
    module: nn.Module | None = None,
    image_processor: BaseImageProcessor | None = None,
    image_size: int | tuple[int, int] | None = None,
    formats: Iterable[str] = (SAFE, PICKLED),
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    refuse_links(folder, name)
    config = read_encoder_config(folder, name)
    weights = read_folder(folder, name, formats)
    if isinstance(config, wrapper.WrappedEncoderConfig):
        rewrapped(config, weights, module, name, FEATURES)
        model, image_processor = wrapper.WrappedEncoder(config, module), image_processor or wrapper.processor_of(config)
    elif module is not None:
        raise ValueError(f"{name} is a {config.model_type} model, not a wrapped module: leave module out")
    else:
        image_processor, weights = image_processor or read_processor(folder, name), unwrapped(weights, name)
        if image_size is not None:
            weights, image_processor = resized(config, weights, name, image_processor, image_size)
        model = _built(encoder_class(config), config, weights, name)
    model.name_or_path = model.config.name_or_path = name
    return model, image_processor


def _built(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, weights: dict[str, Tensor], name: str
) -> PreTrainedModel:
    """The encoder with exactly these weights; heads of other tasks count for nothing, nor does a dense pooler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a pooler that the file lacks is the same in every process, and when a run is resumed
        model, differences = build_pretrained(model_class, config, weights, name)
    spare, differences = differences.without_spare(model)
    if has_dense_pooler(model):
        differences = differences.without_missing("pooler.")
    differences.refuse(name)
    if spare:
        logger.info("%s: %s left out, as no part of an encoder of images", name, told(spare))
    return model


def _from_file(
    source: str | Path,
    architecture: str | None = None,
    model_args: dict[str, Any] | None = None,
    module: nn.Module | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Loaded:
    path, name = Path(source).expanduser(), str(source)
    check_network_of_file(path, name, architecture, module, model_args)
    weights = read_file(path)
    if module is not None:
        load_module(module, unwrapped(weights, name, module.state_dict().keys()), name)
        model, processor, _ = _from_module(module, image_mean, image_std, image_size)
    else:
        config = architectures.timm_config(architecture, 0, None, image_mean, image_std, image_size, model_args)
        settle_output(config)
        weights = unwrapped(weights, name)
        weights = weights if image_size is None else architectures.resampled(config, weights, name)
        model, processor = _built(TimmWrapperModel, config, weights, name), architectures.processor_of(config)
    return model, processor, Source("file", name, sha256={file.name: sha256(file) for file in read_files(path)})


def _from_module(
    module: nn.Module,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Loaded:
    settings = module_settings(module, image_mean, image_std, image_size)
    wrapper.count_classes(module, tuple(settings["image_size"]), FEATURES)
    config = wrapper.WrappedEncoderConfig(**settings)
    return wrapper.WrappedEncoder(config, module), wrapper.processor_of(config), Source("module", config.module_class)


def _from_model(model: PreTrainedModel, image_processor: BaseImageProcessor | None = None) -> Loaded:
    if is_clip(model):
        raise ValueError(
            f"{type(model).__name__} has two towers: load_clip takes both, load_encoder the image tower of its folder"
        )
    if not is_encoder(model):
        raise with_head(model.name_or_path or type(model).__name__, f"a {type(model).__name__}")
    settle_output(model.config)
    return model, *check_in_memory(model, image_processor)
