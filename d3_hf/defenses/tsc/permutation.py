"""Permutation symmetries of a network: which hidden units may be exchanged, and exchanging them.

Exchanging two hidden units (channels, neurons, dimensions of the residual stream) wherever they occur leaves the network's
function as it is. `hidden_units.py` finds where each unit occurs; units that occur in the same places may be exchanged.
Within attention, heads are exchanged as blocks, and inside a head the query and key dimensions together, the values apart.
What the network returns stays as it is: of an encoder also the last residual stream, whose channels are its features.
`matching.py` chooses an exchange by what the units do.
"""

import copy
import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...models.kinds import is_encoder
from .hidden_units import Place, UnitTracer

State = dict[str, Tensor]  # a state dict
Occurrences = dict[int, dict[Place, list[int]]]  # for each unit, the indices at which it lies in each place
RETURNED = "returned"


@dataclass(frozen=True)
class Part:
    """Units in equal blocks, numbered 0 .. blocks * size - 1, block by block.

    Attributes:
        indices: For each place, int64 (blocks, size, m): the m indices along the axis that belong to each unit.
    """

    indices: dict[Place, Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of blocks, units per block."""
        return tuple(next(iter(self.indices.values())).shape[:2])


@dataclass(frozen=True)
class Group:
    """Units that may be exchanged: blocks as wholes, in all parts alike, and the units inside each block of each part.

    Channels, neurons and the residual stream are one part of one block. Attention has one block a head and two parts: query and
    key dimensions, value dimensions.

    Attributes:
        name: The layer that writes the units, or the first of them.
        parts: The parts, with the same number of blocks.
    """

    name: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Structure:
    """What `find_structure` found.

    Attributes:
        groups: The groups, in the order in which the network runs.
        writers: Names of the weights whose layer's outputs are units.
        fixed: One line for each layer with outputs that no exchange may move, with the reason; what the network returns is not
            listed.
    """

    groups: tuple[Group, ...]
    writers: tuple[str, ...]
    fixed: tuple[str, ...]


Orders = list[list[Tensor]]  # per group and part, int64 (units,): the old number of the unit at each new position


# Finding the groups ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def find_structure(model: nn.Module, image_size: tuple[int, int]) -> Structure:
    """Find which hidden units may be exchanged, and try it: a random exchange of all groups must leave what is returned.

    Works on a float64 copy on the CPU; the model is not touched. Three forward passes.

    Args:
        model: Takes ``pixel_values`` (B, 3, H, W). A classifier returns an object with ``logits`` (B, C); of an encoder all
            that it returns stays, since whoever uses it may read any of it.
        image_size: (H, W) that the model accepts.

    Raises:
        ValueError: See `UnitTracer`; nothing may be exchanged; the exchange changes what is returned by more than 1e-5 of its
            largest number.
    """
    model = copy.deepcopy(model).cpu().double().eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *image_size, generator=generator, dtype=torch.float64)
    tracer = UnitTracer(model)
    pixels = images[:1]
    tracer.numbers[pixels] = tracer.fresh(3).view(1, 3, 1, 1).expand(pixels.shape)
    tracer.fix(tracer.numbers[pixels], "tied to the image")
    with tracer:
        returned = _returned(model, model(pixel_values=pixels))
    for tensor in returned:
        tracer.fix(tracer.units(tensor), RETURNED)
    structure = _collect(tracer)
    name = type(model).__name__
    if not structure.groups:
        reasons = "; ".join(structure.fixed) or "all are what it returns"
        raise ValueError(f"{name}: no hidden units may be exchanged ({reasons})")
    state = model.state_dict()
    exchanged = permute(state, structure, random_orders(structure, generator))
    outputs = (functional_call(model, s, kwargs={"pixel_values": images}) for s in (state, exchanged))
    pairs = zip(*(_returned(model, output) for output in outputs), strict=True)
    change = torch.stack([_change(*pair) for pair in pairs]).max()
    if not change < 1e-5:
        what = "features" if is_encoder(model) else "logits"
        raise ValueError(f"{name}: exchanging hidden units changes the {what} by {change:.1e}: its structure is not understood")
    return structure


def _returned(model: nn.Module, output: Any) -> list[Tensor]:
    """The tensors of a model's output that no exchange may change."""
    return [t for t in output.to_tuple() if isinstance(t, Tensor)] if is_encoder(model) else [output.logits]


def _change(before: Tensor, after: Tensor) -> Tensor:
    """Largest difference as a share of the largest number; NaN where there is one."""
    return (after - before).abs().max() / before.abs().max().clamp_min(torch.finfo(before.dtype).tiny)


def _collect(tracer: UnitTracer) -> Structure:
    """Turn numbers and ties into groups."""
    unit_of = _components(tracer.count, torch.cat(tracer.ties, dim=1))
    occurrences: Occurrences = defaultdict(lambda: defaultdict(list))
    for place, numbers in tracer.places.items():
        for index, unit in enumerate(unit_of[numbers].tolist()):
            occurrences[unit][place].append(index)
    reasons = {unit: reason for numbers, reason in tracer.fixed for unit in unit_of[numbers].tolist()}

    found = _attention_units(tracer, unit_of, occurrences, reasons)
    in_heads = {u for heads, parts in tracer.attentions for part in (heads, *parts) for u in unit_of[part].flatten().tolist()}
    writes = {(name, 0): order for order, name in enumerate(tracer.writers)}
    alike = defaultdict(list)
    for unit, places in occurrences.items():
        if unit not in reasons and unit not in in_heads and writes.keys() & places.keys():
            alike[_signature(places)].append(unit)
    found += [[torch.tensor([units])] for units in alike.values() if len(units) > 1]

    groups = []
    for parts in found:
        parts = tuple(_part(units, occurrences) for units in parts)
        first = min(writes[place] for part in parts for place in part.indices if place in writes)
        groups.append((first, Group(list(tracer.writers)[first], parts)))
    groups.sort(key=lambda item: item[0])
    moving = {unit for parts in found for part in parts for unit in part.flatten().tolist()}
    fixed = []
    for name in tracer.writers:
        outputs = unit_of[tracer.places[name, 0]].tolist()
        why = Counter(reasons.get(unit, "tied to each other") for unit in outputs if unit not in moving)
        fixed += [f"{name}: {n} of {len(outputs)} outputs {reason}" for reason, n in why.items() if reason != RETURNED]
    return Structure(tuple(group for _, group in groups), tuple(tracer.writers), tuple(fixed))


def _components(count: int, ties: Tensor) -> Tensor:
    """Connected components: for each number the smallest one that it is tied to, directly or not; int64 (count,)."""
    smallest = torch.arange(count)
    while True:
        low = smallest[ties].amin(0)
        lower = smallest.scatter_reduce(0, ties.flatten(), low.repeat(2), "amin")
        lower = lower[lower]
        if torch.equal(lower, smallest):
            return smallest
        smallest = lower


def _signature(places: dict[Place, list[int]]) -> tuple:
    return tuple(sorted((place, len(indices)) for place, indices in places.items()))


def _attention_units(
    tracer: UnitTracer, unit_of: Tensor, occurrences: Occurrences, reasons: dict[int, str]
) -> list[list[Tensor]]:
    """Units (heads, size) of each part of each attention whose heads may be exchanged; for the others a reason is added."""
    attentions = []
    for heads, parts in tracer.attentions:
        parts = [unit_of[part] for part in (heads[:, None], *parts)]
        attentions.append([part for part in parts if part[0, 0].item() in occurrences])  # a head has weights in few networks
    uses = Counter(unit for parts in attentions for part in parts for unit in part.flatten().tolist())
    found = []
    for parts in attentions:
        units = [part.flatten().tolist() for part in parts]
        if any(uses[unit] > 1 for unit in itertools.chain(*units)):
            reason = "in heads that are tied to each other"
        elif any(len({_signature(occurrences[unit]) for unit in part}) > 1 for part in units):
            reason = "in heads that are not alike"
        elif any(unit in reasons for unit in itertools.chain(*units)):
            reason = "in heads with fixed units"
        else:
            found.append(parts)
            continue
        for unit in itertools.chain(*units):
            reasons.setdefault(unit, reason)
    return found


def _part(units: Tensor, occurrences: Occurrences) -> Part:
    places = occurrences[units[0, 0].item()]
    return Part({place: torch.tensor([[occurrences[u][place] for u in row] for row in units.tolist()]) for place in places})


# Exchanging units ------------------------------------------------------------------------------------------------------


def permute(state: State, structure: Structure, orders: Orders) -> State:
    """Exchange units in a state dict: the same function, other weights.

    Args:
        state: The model's state dict.
        structure: What `find_structure` found in the model.
        orders: For each group and part, int64 (units,): the old number of the unit that comes to each position.

    Returns:
        A new state dict; tensors that hold no exchanged unit are shared with the old one.
    """
    sources: dict[Place, Tensor] = {}
    for group, of_parts in zip(structure.groups, orders, strict=True):
        for part, order in zip(group.parts, of_parts, strict=True):
            for (name, axis), indices in part.indices.items():
                source = sources.setdefault((name, axis), torch.arange(state[name].shape[axis]))
                indices = indices.flatten(0, 1)
                source[indices] = indices[order]
    permuted = dict(state)
    for (name, axis), source in sources.items():
        permuted[name] = permuted[name].index_select(axis, source.to(permuted[name].device))
    return permuted


def random_orders(structure: Structure, generator: torch.Generator) -> Orders:
    """Draw an exchange of all groups, from a CPU generator."""
    orders = []
    for group in structure.groups:
        blocks = torch.randperm(group.parts[0].shape[0], generator=generator)
        sizes = [part.shape[1] for part in group.parts]
        orders.append([torch.cat([b * s + torch.randperm(s, generator=generator) for b in blocks.tolist()]) for s in sizes])
    return orders
