"""Names of weights: what wrappers and toolboxes put around them, and how they are told in a message."""

import logging
import os
import re
from collections.abc import Collection, Iterable

from torch import Tensor

logger = logging.getLogger(__name__)

# Put before the name of each module that is wrapped, at any place: torch.compile, FSDP, activation checkpointing.
INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

# Put before every name: DataParallel and AveragedModel; the attributes to which Lightning modules and the like give their
# network. No image classifier of timm or transformers has one of them before all of its own names.
AROUND = ("module.", "model.", "net.", "network.")

COUNTER = "n_averaged"  # AveragedModel's own, beside the weights
FSDP_FLAT = re.compile(r"(^|\.)_?flat_param(_\d+)?$")
PEFT = re.compile(r"^base_model\.model\.|\.(lora_[AB]|lora_embedding_[AB]|modules_to_save|hada_w\d_\w|lokr_w\d|ia3_l)(\.|$)")

SHOWN, GROUPS = 4, 5  # names, and beginnings of names, in a message


def unwrapped(weights: dict[str, Tensor], where: str, own: Collection[str] = ()) -> dict[str, Tensor]:
    """Remove from the names of weights what wrappers put there, as far as that is beyond doubt.

    Args:
        weights: By name, as their file has them.
        where: Where they come from, for messages.
        own: Names that the network has, if they are known: none of them is changed.

    Raises:
        ValueError: They are an adapter's or a part of a sharded network, and no network's own.
    """
    refuse_partial(weights, where)
    found, own = weights, set(own)
    if COUNTER in found and all(name.startswith(AROUND[0]) for name in found.keys() - {COUNTER}):
        found = {name: tensor for name, tensor in found.items() if name != COUNTER}
    for part in INSIDE:
        if not found.keys() & own:
            found = _renamed(found, {name: name.replace(part, "") for name in found})
    while not found.keys() & own and (part := next((p for p in AROUND if all(name.startswith(p) for name in found)), None)):
        found = _renamed(found, {name: name.removeprefix(part) for name in found})
    if found.keys() != weights.keys():
        logger.info("%s: names read without what wrappers of a network add, as in %s", where, next(iter(weights)))
    return found


def refuse_partial(names: Iterable[str], where: str) -> None:
    """Raise a ValueError for weights that make no network of their own: an adapter's, or FSDP's flattened shards."""
    for name in names:
        if PEFT.search(name):
            raise ValueError(
                f"{where} holds the weights of an adapter ({name}): merge it into its base model (merge_and_unload()) and load "
                "the result"
            )
        if FSDP_FLAT.search(name):
            raise ValueError(
                f"{where} holds flattened shards of FSDP ({name}): gather them first, with the full state dict (accelerate: "
                "FULL_STATE_DICT, or accelerate merge-weights)"
            )


def from_mmpretrain(weights: dict[str, Tensor], classifier: str) -> dict[str, Tensor]:
    """Rename ``backbone.*`` and ``head.fc.*``, as MMPretrain calls them, to a timm network's; other names stay."""
    if "head.fc.weight" not in weights or not all(name.startswith(("backbone.", "head.")) for name in weights):
        return weights
    renamed = {name: name.removeprefix("backbone.").replace("head.fc.", f"{classifier}.") for name in weights}
    return _renamed(weights, renamed)


def _renamed(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The weights under other names; as they were where two would get the same."""
    return {names[old]: tensor for old, tensor in weights.items()} if len(set(names.values())) == len(names) else weights


def told(names: Iterable[str]) -> str:
    """Join names for a message: all where they are few, else how many there are of each beginning, so that none is left out."""
    names = sorted(names)
    if len(names) <= SHOWN:
        return ", ".join(names)
    depth = len(os.path.commonprefix([name.split(".")[:-1] for name in names]))
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(".".join(name.split(".")[: depth + 1]), []).append(name)
    # Few names are a head's or a wrapper's own and tell most; a network's stages are many.
    rarest = sorted(groups.items(), key=lambda item: len(item[1]))
    shown = [found[0] if len(found) == 1 else f"{len(found)} of {group}.* (as {found[0]})" for group, found in rarest]
    left = len(shown) - GROUPS
    return ", ".join(shown[:GROUPS]) + (f" and {left} other beginnings" if left > 0 else "")
