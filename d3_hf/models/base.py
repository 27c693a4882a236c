"""The public base that a suspicious classifier was fine-tuned from, under the classifier's own names.

With theta_v the suspicious model and theta_b the base, ``tau = theta_v - theta_b`` is what the fine-tuning did, its backdoor
included. Of the base only tensors are used, read as if they were hostile (see `load_classifier`); its configuration is not, so
that an encoder without a head is a base too. Whether it is one shows in the weights: fine-tuning moves them by a fraction of
their norm, while those of a network trained on its own are as good as orthogonal to the base's, so that

    ||tau|| / ||theta_b|| = sqrt(||theta_v||^2 + ||theta_b||^2) / ||theta_b||

is above 1 however long they are, and 1.41 where both are equally long.
"""

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, TimmWrapperConfig

from ..files import sha256
from . import architectures, hub
from .checkpoint_files import SAFE, read_file, read_files, read_folder, refuse_links, tell_of_others, weights_files
from .head import find_head
from .load import kind_of
from .shared import shared_names, with_all_names
from .source import Source
from .weight_names import told, unwrapped
from .weights import build_pretrained, refuse_non_finite
from .wrapper import WrappedClassifier

logger = logging.getLogger(__name__)

RELATED = 1.0  # the largest relative distance of a network from its base; unrelated networks lie above


@dataclass(frozen=True)
class Base:
    """A base, as far as it is one of a certain classifier.

    Attributes:
        weights: Its parameters and buffers under the classifier's names, on the CPU in float32 (of a module in its own types);
            without those of the head, and without counters and indices.
        source: Where they came from.
        relative_distance: ``||tau|| / ||theta_b||`` of the classifier from them, over its matrices and kernels; at most 1.
    """

    weights: dict[str, Tensor]
    source: Source
    relative_distance: float


def load_base(model: PreTrainedModel, base_model: str | Path, image_size: tuple[int, int], revision: str | None = None) -> Base:
    """Load the base of a suspicious classifier, whether it was saved as an encoder or as a classifier of other classes.

    Poolers, heads and towers that the classifier lacks are left out, and logged; what depends on the size of the images is
    brought to that of a classifier of timm. The global random state stays as it is.

    Args:
        model: The classifier; it is only read.
        base_model: Hub id (safetensors only), folder (safetensors first, else a pickle by the restricted unpickler), or file.
        image_size: (H, W) of the images that the classifier accepts, to find its head.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        FileNotFoundError: No such file, folder, Hub id or revision; a folder without weights.
        OSError: A Hub id that is neither cached nor within reach.
        ValueError: A file that is damaged, of another format, or wants to run code; NaN, infinite or quantised weights; a
            revision of what is no Hub id; the classifier has no single head; the base lacks weights of its body or has them in
            another shape, as transformers' position embeddings for another image size; it is the classifier's body itself; or
            it is no ancestor of it, by `RELATED`.
    """
    name, head = str(base_model), find_head(model, image_size)
    weights, source = _read(base_model, revision)
    body = [key for key, tensor in model.state_dict().items() if tensor.is_floating_point() and not key.startswith(f"{head}.")]
    found, others, reshaped = _under_names_of(model, weights, name)
    if reshaped and isinstance(model.config, TimmWrapperConfig):
        found, others, reshaped = _under_names_of(model, architectures.resampled(model.config, weights, name), name)
    if others:
        logger.info("%s: not a part of %s, and left out: %s", name, type(model).__name__, told(others))
    _refuse_misfits(
        f"{name} is no base of this {type(model).__name__}",
        [key for key in body if key not in found and key not in reshaped],
        {key: shapes for key, shapes in reshaped.items() if key in body},
    )
    weights = {key: found[key] for key in body}
    return Base(weights, source, _distance_from(weights, model, name))


def _distance_from(weights: dict[str, Tensor], model: PreTrainedModel, name: str) -> float:
    """`relative_distance` of the model, over its matrices and kernels, from weights that it may have been fine-tuned from."""
    own = model.state_dict()
    if all(torch.equal(weight, own[key].to(weight)) for key, weight in weights.items()):
        raise ValueError(
            f"{name} is the suspicious model itself, but for the head: there is nothing to move away from; name the model that "
            "it was fine-tuned from, or if only its head was trained, train that alone (linear_probing)"
        )
    # Gains are near 1 in all networks, and statistics follow the images.
    matrices = [key for key, p in model.named_parameters(remove_duplicate=False) if key in weights and p.ndim > 1]
    distance = relative_distance((own[key].cpu() for key in matrices), (weights[key] for key in matrices))
    if not distance <= RELATED:
        raise ValueError(
            f"{name} is not what this {type(model).__name__} was fine-tuned from: ||tau|| / ||theta_b|| is {distance:.2f}, "
            f"which is above {RELATED:g} for unrelated networks and a fraction of it for a fine-tuned one; name its own base"
        )
    return distance


def relative_distance(weights: Iterable[Tensor], base: Iterable[Tensor]) -> float:
    """``||theta_v - theta_b|| / ||theta_b||``, both as one long vector; infinite where the base is zero."""
    moved = norm = 0.0
    for weight, origin in zip(weights, base, strict=True):
        moved += float((weight.double() - origin.double()).square().sum())
        norm += float(origin.double().square().sum())
    return (moved / norm) ** 0.5 if norm else float("inf")


def _read(base_model: str | Path, revision: str | None) -> tuple[dict[str, Tensor], Source]:
    name, kind = str(base_model), kind_of(base_model)
    if kind == "hub":
        folder = hub.fetch(name, revision)
        refuse_links(folder, name)
        return read_folder(folder, name, [SAFE]), Source(kind, name, revision=folder.name)
    if revision is not None:
        raise ValueError(f"{name} is a {kind} and has no revision: leave it out")
    path = Path(base_model).expanduser()
    if kind == "folder":
        refuse_links(path, name)
        weights, files = read_folder(path, name), weights_files(path, name)
        tell_of_others(name, [file.name for file in path.iterdir()])
    else:
        weights, files = read_file(path), read_files(path)
    return weights, Source(kind, name, sha256={file.name: sha256(file) for file in files})


def _under_names_of(
    model: PreTrainedModel, weights: dict[str, Tensor], where: str
) -> tuple[dict[str, Tensor], list[str], dict[str, tuple]]:
    """The weights that the model has a place for, the names of the others, and the shapes found and needed where they differ.

    transformers itself says what it calls the weights of an encoder, of an older release or of timm: by loading them into a
    second model.
    """
    start, own = f"{model.base_model_prefix}.", model.state_dict()
    bare = {key.removeprefix(start) for key in own}
    weights = unwrapped(weights, where, own.keys() | bare)
    if isinstance(model, WrappedClassifier):
        refuse_non_finite(weights, where)
        weights = with_all_names(weights, shared_names(model), where, start)
        weights = {f"{start}{key.removeprefix(start)}": tensor for key, tensor in weights.items()}
        found = {key: tensor.to(own[key].dtype) for key, tensor in weights.items() if key in own}
        reshaped = {key: (t.shape, own[key].shape) for key, t in found.items() if t.shape != own[key].shape}
        others = weights.keys() - own.keys()
    else:
        with torch.random.fork_rng(devices=[]):  # what the base lacks is drawn
            built, differences = build_pretrained(type(model), copy.deepcopy(model.config), weights, where)
        found = {key: tensor for key, tensor in built.state_dict().items() if key not in differences.missing}
        reshaped = {key: (shape, needed) for key, shape, needed in differences.mismatched}
        others = differences.superfluous
    return {key: tensor for key, tensor in found.items() if key not in reshaped}, sorted(others), reshaped


def _refuse_misfits(start: str, missing: list[str], reshaped: dict[str, tuple]) -> None:
    shapes = [f"{key} {tuple(found)} instead of {tuple(needed)}" for key, (found, needed) in reshaped.items()]
    faults = [
        f"{len(keys)} {what}: {told(keys)}" for keys, what in ((missing, "missing"), (shapes, "of another shape")) if keys
    ]
    if faults:
        advice = "name the model that it was fine-tuned from"
        if not missing and all("pos_embed" in key or "position" in key for key in reshaped):
            advice = "position embeddings depend on the image size: name a base for images of this model's"
        raise ValueError(f"{start} ({'; '.join(faults)}): {advice}")
