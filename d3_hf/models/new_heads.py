"""Encoders: trained networks without a head for the classes that are wanted, loaded under an untrained one."""

import logging

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..data.preprocessing import Preprocessing
from .differences import headless
from .head import NoOneHead, find_head
from .kinds import is_encoder
from .probe import probe
from .weight_names import told
from .weights import build_pretrained

logger = logging.getLogger(__name__)


def load_under_new_head(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    weights: dict[str, Tensor],
    where: str,
    preprocessing: Preprocessing,
) -> PreTrainedModel:
    """Build a classifier whose body has exactly these weights, and draw its head from torch's global seed.

    Args:
        model_class: What to build.
        config: Its configuration, with the new classes.
        weights: As their file has them; a head among them counts for nothing.
        where: Where they come from, for messages.
        preprocessing: What the network is given.

    Returns:
        The classifier in float32 and in evaluation mode.

    Raises:
        ValueError: Weights other than the head's are missing or of another shape, or superfluous and no pooler or head of
            another task; the network does not take what the processor gives, or has no single head, see `find_head`; or see
            `build_pretrained`.
    """
    model, differences = build_pretrained(model_class, config, weights, where)
    spare, differences = differences.without_spare(model)
    expected = differences.lone_matrix(model)
    if differences.superfluous or expected is None:
        differences.refuse(where)  # if there are any
    probe(model, preprocessing, where)
    try:
        head = find_head(model, preprocessing.size)
    except NoOneHead as error:
        raise NoOneHead(f"{where}: {error}") from error
    if expected not in (None, head):
        differences.refuse(where)
    with torch.no_grad():
        model.get_submodule(head).reset_parameters()
    for names, fate in ((spare, "left out, as no part of an image classifier"), ([head], "drawn anew, to be trained")):
        if names:
            logger.info("%s: %s %s", where, told(names), fate)
    return model


def refuse_encoder(model: PreTrainedModel, where: str) -> None:
    """Raise a ValueError for a model in memory that gives features and no logits."""
    if is_encoder(model):
        raise headless(where, f"a {type(model).__name__}")
