"""Tensors that a network uses under more than one name: how they are read from a file and written into one.

A safetensors file stores each name by itself. What is written holds a copy under every name, equal to the others, because
transformers fills a name that a file lacks with new numbers, under all its names. What is read may hold one or all of them, as
long as they say the same.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def shared_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter or buffer that has several, in the model's order."""
    names = defaultdict(list)
    for kind in (model.named_parameters, model.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            names[id(tensor)].append(name)
    return [found for found in names.values() if len(found) > 1]


def with_all_names(weights: dict[str, Tensor], shared: list[list[str]], where: str, prefix: str = "") -> dict[str, Tensor]:
    """Weights in which a shared tensor is there under each of its names, once the file has it under one.

    Args:
        weights: As a file has them.
        shared: See `shared_names`.
        where: Where the weights come from, for messages.
        prefix: What the file may leave out before every name.

    Raises:
        ValueError: The file gives one tensor different values under two names: which of them counts depends on who loads it.
    """
    completed = dict(weights)
    for names in shared:
        stored = {name: name if name in weights else name.removeprefix(prefix) for name in names}
        held = [name for name in names if stored[name] in weights]
        for name in held[1:]:
            if not torch.equal(weights[stored[name]], weights[stored[held[0]]]):
                raise ValueError(
                    f"{where}: {stored[held[0]]} and {stored[name]} are one tensor of the network and differ in the file: it "
                    "is damaged, or made to be read in two ways"
                )
        if held:
            completed |= {name: weights[stored[held[0]]] for name in names if name not in held}
    return completed


def state_to_save(model: PreTrainedModel, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A state dict that `save_pretrained` takes: each name with memory of its own.

    Names that a class of transformers declares as tied are left to it: it leaves them out, and ties them again.

    Args:
        model: Whose state it is.
        state_dict: The state, where it is not the model's own.
    """
    state = dict(model.state_dict() if state_dict is None else state_dict)
    declared = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    seen = set()
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        if memory in seen and name not in declared:
            state[name] = tensor.clone()
        seen.add(memory)
    return state
