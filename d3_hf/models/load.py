"""`load_classifier`: one entry for every kind of checkpoint, each treated as if it came from an attacker.

No code of a checkpoint runs: safetensors first, other files only with torch's restricted unpickler, never a Hub
repository's own Python. What comes out is a `transformers.PreTrainedModel` in float32 with ``image_processor`` and
``source`` set; see `source.py`.
"""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel, TimmWrapperConfig, TimmWrapperForImageClassification

from ..data.preprocessing import Preprocessing
from ..files import sha256
from ..labels import check_label_names, label_names_of, set_label_names
from . import architectures, hub, wrapper
from .checkpoint_files import HUB_FILES as HUB_FILES  # what is fetched from a Hub repository
from .checkpoint_files import SAFE, defining_files, read_file, read_files, tell_of_others
from .config import settle
from .folder import open_folder
from .new_heads import load_under_new_head, refuse_encoder
from .probe import probe, refuse_unseen_edges
from .processors import read_processor
from .source import Source, attach, image_processor_of, source_of
from .weight_names import from_mmpretrain, unwrapped
from .weights import PICKLED, load_module, load_pretrained, refuse_non_finite

logger = logging.getLogger(__name__)

# Which arguments go with which kind of source; the others are settled by the source itself.
OPTIONS = {
    "hub": {"revision", "module", "num_labels", "label_names", "image_processor", "new_head"},
    "folder": {"module", "num_labels", "label_names", "image_processor", "new_head"},
    "file": {
        "architecture",
        "model_args",
        "module",
        "num_labels",
        "label_names",
        "image_mean",
        "image_std",
        "image_size",
        "new_head",
    },
    "module": {"num_labels", "label_names", "image_mean", "image_std", "image_size"},
    "model": {"num_labels", "label_names", "image_processor"},
}
SIZABLE = ("hub", "folder")  # whose own size of images may be changed by whoever trains on it
DEFAULT_SIZE = 32  # CIFAR-10, CIFAR-100 and GTSRB, the data sets of most backdoor papers

Loaded = tuple[PreTrainedModel, BaseImageProcessor, Source]
Opener = Callable[..., tuple[PreTrainedModel, BaseImageProcessor]]  # `open_folder` or that of encoders


def load_classifier(
    source: str | Path | nn.Module,
    *,
    architecture: str | None = None,
    model_args: dict[str, Any] | None = None,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_size: int | tuple[int, int] | None = None,
    image_processor: BaseImageProcessor | None = None,
    revision: str | None = None,
    module: nn.Module | None = None,
    new_head: Sequence[str] | None = None,
) -> PreTrainedModel:
    """Load an image classifier from anywhere, without running code that it brings.

    An encoder, which has no head, is none yet: ``new_head`` makes one of it, to be trained.

    Args:
        source: One of

            - a Hub id of transformers or timm (``google/vit-base-patch16-224``,
              ``timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k``); safetensors only;
            - a folder that ``save_pretrained`` or timm wrote; ``pytorch_model.bin`` is opened with the restricted
              unpickler;
            - a ``.safetensors`` file, a ``.pth``, ``.pt``, ``.th``, ``.tar``, ``.bin`` or ``.ckpt`` state dict, or the
              ``.index.json`` of shards, together with ``architecture`` or ``module``;
            - a module that maps normalised images (B, 3, h, w) to logits (B, C), which becomes a `WrappedClassifier`;
              the network itself, not inside DataParallel or torch.compile;
            - a transformers model, which is kept.
        architecture: timm name of the network that a file's weights belong to, d3_hf's own included
            (``resnet20_cifar``, ``preact_resnet18_cifar``, ``wrn16_1_cifar``, ...).
        model_args: Further arguments of the architecture, such as ``{"img_size": 32, "patch_size": 4}``.
        num_labels: Number of classes, at least 2. Default: the source's own; checked against it.
        label_names: Class names in the order of the logits.
        image_mean: Mean of each channel of a file's or a module's training images, on the scale where a pixel is in
            [0, 1]. Default: the architecture's, if it has one.
        image_std: Standard deviation of each channel, on the same scale.
        image_size: Pixels, one number or (height, width), for files and modules; for folders and Hub ids together with
            ``new_head``, where the network takes several sizes: the image processor then brings images to this one and cuts
            nothing off. Default: the architecture's or the processor's; 32 for a module.
        image_processor: Processor to use in place of the source's own.
        revision: Branch, tag or commit of a Hub id; pin a commit to be sure of what is loaded.
        module: Network to load a file, or what a `WrappedClassifier` saved, into.
        new_head: Class names in the order of the logits of an untrained head, drawn from torch's global seed: for the folder,
            Hub id or file of an encoder, or of a classifier of other classes, whose head is not used. All other weights of the
            network are the checkpoint's; its poolers, heads of other tasks and text tower are left out, and logged.

    Returns:
        The classifier in float32 (a transformers model in memory keeps its type) and in evaluation mode, with two
        plain attributes: ``image_processor`` and ``source``, a `Source`; see `source.py`.

    Raises:
        FileNotFoundError: No such file, folder, Hub id or revision; a folder without ``config.json`` or weights.
        OSError: A Hub id that is neither cached nor within reach.
        ValueError: A file that is damaged, of another format, or wants to run code; weights that are missing,
            superfluous, of another shape, NaN, infinite or quantised; an encoder without ``new_head``; an index that
            contradicts its shards, or two copies of the weights that differ; a link out of the folder; an unknown
            architecture; another task than one class for each image; a number of classes that is not the source's, or below 2;
            a checkpoint that needs a repository's own code, is quantised or an adapter; a missing normalisation or image
            processor, or one that `Preprocessing` does not know; a network that does not take what it gives, see `probe`, or
            not the edge of it; an argument that the kind of source has no use for.
        TypeError: ``source`` is none of the above.
    """
    given = {name: value for name, value in locals().items() if name != "source" and value is not None}
    kind = kind_of(source)
    if kind == "model":
        refuse_encoder(source, source.name_or_path or type(source).__name__)
    useful = OPTIONS[kind] | ({"image_size"} if new_head is not None and kind in SIZABLE else set())
    check_useful(given, useful, kind, name_of(source))
    if new_head is not None:
        _check_new_head(given, kind, name_of(source))
    check_label_names(label_names, num_labels)
    if kind != "file":  # whose classes may have to be told; those of the others are compared below
        given.pop("num_labels", None)
    loader = {
        "hub": from_hub,
        "folder": from_folder,
        "file": _from_file,
        "module": _from_module,
        "model": _from_model,
    }[kind]
    model, processor, origin = loader(source, **given)
    settle(model.config, name_of(source))
    set_label_names(model.config, label_names_of(model.config, name_of(source)))  # so that all of a configuration says the same
    if num_labels is not None and model.config.num_labels != num_labels:
        raise ValueError(f"{name_of(source)} has {model.config.num_labels} classes, not num_labels={num_labels}")
    preprocessing = Preprocessing.from_processor(processor)
    probe(model.eval(), preprocessing, name_of(source))
    if new_head is not None and image_size is not None:
        refuse_unseen_edges(model, preprocessing.size, name_of(source))
    return attach(model, processor, origin)


def _check_new_head(given: dict[str, Any], kind: str, name: str) -> None:
    check_label_names(given["new_head"], None)
    if given.keys() & {"label_names", "num_labels"}:
        raise ValueError(f"{name}: a new head has its own classes: leave class_names (in Python label_names, num_labels) out")
    if kind == "file" and "module" in given:
        raise ValueError(f"{name}: new_head goes with architecture, not with module, which has a head of its own")
    check_one_size(given, name)


def check_useful(given: dict[str, Any], useful: set[str], kind: str, name: str) -> None:
    """Raise a ValueError for arguments that the kind of source has no use for."""
    if useless := sorted(given.keys() - useful):
        raise ValueError(f"{name}: {', '.join(useless)} cannot be set for a {kind} source, which settles it itself")


def check_one_size(given: dict[str, Any], name: str) -> None:
    """Raise a ValueError where two arguments say the size of the images."""
    if given.keys() >= {"image_size", "image_processor"}:
        raise ValueError(f"{name}: an image_processor says the size itself: leave image_size out")


def kind_of(source: Any) -> str:
    """Which of the kinds in `OPTIONS` a source is.

    Raises:
        FileNotFoundError: It looks like a path, and nothing is there.
        TypeError: It is of no kind that is known.
    """
    if isinstance(source, PreTrainedModel):
        return "model"
    if isinstance(source, nn.Module):
        return "module"
    if not isinstance(source, str | Path):
        raise TypeError(f"cannot load a {type(source).__name__}: pass a Hub id, a path or a module")
    path = Path(source).expanduser()
    if path.is_dir():
        return "folder"
    if path.is_file():
        return "file"
    is_name = isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source)
    if not is_name or path.suffix in (".safetensors", ".json", *PICKLED):
        raise FileNotFoundError(f"no such file or folder: {source}")
    return "hub"


def name_of(source: Any) -> str:
    """What a source is called in messages."""
    return wrapper.class_name(source) if isinstance(source, nn.Module) else str(source)


def from_hub(repo: str, opener: Opener = open_folder, revision: str | None = None, **options) -> Loaded:
    """Fetch a Hub repository and open it."""
    folder = hub.fetch(repo, revision)
    # Of the cache's folder no pickle counts, which another program may have put there.
    model, processor = opener(folder, repo, formats=(SAFE,), **options)
    return model, processor, Source("hub", repo, revision=folder.name)  # a snapshot's folder is named after its commit


def from_folder(source: str | Path, opener: Opener = open_folder, **options) -> Loaded:
    """Open a folder and take the digests of its files."""
    folder = Path(source).expanduser()
    model, processor = opener(folder, str(source), **options)
    tell_of_others(str(source), [file.name for file in folder.iterdir()])
    digests = {file.name: sha256(file) for file in defining_files(folder, str(source))}
    return model, processor, Source("folder", str(source), sha256=digests)


def _from_file(
    source: str | Path,
    architecture: str | None = None,
    model_args: dict[str, Any] | None = None,
    module: nn.Module | None = None,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_size: int | tuple[int, int] | None = None,
    new_head: Sequence[str] | None = None,
) -> Loaded:
    path, name = Path(source).expanduser(), str(source)
    check_network_of_file(path, name, architecture, module, model_args)
    weights = read_file(path)
    if module is not None:
        load_module(module, unwrapped(weights, name, module.state_dict().keys()), name)
        model, processor, _ = _from_module(module, label_names, image_mean, image_std, image_size)
    else:
        weights = from_mmpretrain(unwrapped(weights, name), architectures.architecture_cfg(architecture).classifier)
        names = label_names if new_head is None else new_head
        count = check_label_names(names, num_labels) or architectures.classes_in(weights, architecture, name)
        config = architectures.timm_config(architecture, count, names, image_mean, image_std, image_size, model_args)
        processor = architectures.processor_of(config)
        if new_head is None:
            model = load_pretrained(TimmWrapperForImageClassification, config, weights, name)
        else:
            weights = weights if image_size is None else architectures.resampled(config, weights, name)
            preprocessing = Preprocessing.from_processor(processor)
            model = load_under_new_head(TimmWrapperForImageClassification, config, weights, name, preprocessing)
    return model, processor, Source("file", name, sha256={file.name: sha256(file) for file in read_files(path)})


def check_network_of_file(
    path: Path, name: str, architecture: str | None, module: nn.Module | None, model_args: dict[str, Any] | None
) -> None:
    """Raise a ValueError unless it is told, by one of the two, which network the weights of a file are of."""
    if (architecture is None) == (module is None):
        folder = f"; or load its folder, {path.parent}" if (path.parent / "config.json").is_file() else ""
        raise ValueError(
            f"{name} holds weights without their network: give its architecture, a timm name, or in Python its module{folder}"
        )
    if architecture is not None:
        architectures.architecture_cfg(architecture)  # a wrong name is told before a large file is read
    elif model_args is not None:
        raise ValueError("model_args goes with architecture, not with module")


def _from_module(
    module: nn.Module,
    label_names: Sequence[str] | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Loaded:
    settings = module_settings(module, image_mean, image_std, image_size)
    count = wrapper.count_classes(module, tuple(settings["image_size"]))
    config = wrapper.WrappedClassifierConfig(num_labels=count, **settings)
    if label_names is not None:
        check_label_names(label_names, count)
        set_label_names(config, label_names)
    return wrapper.WrappedClassifier(config, module), wrapper.processor_of(config), Source("module", config.module_class)


def module_settings(
    module: nn.Module,
    image_mean: Sequence[float] | None,
    image_std: Sequence[float] | None,
    image_size: int | tuple[int, int] | None,
) -> dict[str, Any]:
    """What the configuration of a wrapped module says of it and of its images.

    Raises:
        ValueError: The normalisation is missing or none, the size is none, or a weight is not finite.
    """
    name = wrapper.class_name(module)
    if image_mean is None or image_std is None:
        raise ValueError(f"{name}: give the training's image_mean and image_std (0 0 0 and 1 1 1 where it takes pixels / 255)")
    architectures.check_normalisation(image_mean, image_std)
    refuse_non_finite(module.state_dict(), name)
    height, width = architectures.height_width(DEFAULT_SIZE if image_size is None else image_size)
    logger.info("%s: images of %d x %d pixels", name, height, width)
    mean, std = ([float(value) for value in values] for values in (image_mean, image_std))
    return {"module_class": name, "image_size": [height, width], "image_mean": mean, "image_std": std}


def _from_model(
    model: PreTrainedModel,
    label_names: Sequence[str] | None = None,
    image_processor: BaseImageProcessor | None = None,
) -> Loaded:
    processor, source = check_in_memory(model, image_processor)
    if label_names is not None:
        check_label_names(label_names, model.config.num_labels)
        set_label_names(model.config, label_names)
    return model, processor, source


def check_in_memory(model: PreTrainedModel, image_processor: BaseImageProcessor | None) -> tuple[BaseImageProcessor, Source]:
    """The image processor and the source of a transformers model in memory.

    Raises:
        ValueError: It has an adapter, is quantised, has weights that are not finite, or its image processor is not found.
    """
    name = model.name_or_path or type(model).__name__
    _refuse_additions(model, name)
    refuse_non_finite(model.state_dict(), name)
    processor = image_processor or image_processor_of(model) or _find_processor(model, name)
    return processor, source_of(model) or Source("module", name)


def _refuse_additions(model: PreTrainedModel, name: str) -> None:
    if getattr(model, "_hf_peft_config_loaded", False):  # only of models with PEFT's mixin
        raise ValueError(f"{name} carries a PEFT adapter: merge it into the model first (merge_and_unload())")
    if getattr(model, "is_quantized", False):
        raise ValueError(f"{name} is quantised, and quantised weights cannot be purified: load the original")


def _find_processor(model: PreTrainedModel, name: str) -> BaseImageProcessor:
    if isinstance(model.config, TimmWrapperConfig) and getattr(model.config, "pretrained_cfg", None):
        return architectures.processor_of(model.config)
    if not model.name_or_path:
        raise ValueError(
            f"{name} came from no folder and no Hub id to find its image processor in: pass one as image_processor"
        )
    return read_processor(model.name_or_path, name)
