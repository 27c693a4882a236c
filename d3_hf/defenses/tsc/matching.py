"""Which exchange of hidden units brings two networks of one structure closest together, or farthest apart.

Units are compared by their activations on images, as in Ainsworth et al., "Git Re-Basin" (ICLR 2023), and in TSC's code.
"""

import itertools
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .permutation import Group, Orders, Part, State, Structure

IMAGES = 32  # at once: the outputs of all layers are held


class Correlation:
    """Correlation of each of the units x with each of the units y over samples that come in batches.

    ``cov(x, y) / (std(x) std(y) + 1e-4)``, as in TSC's code. Moments are about the first batch's means, in float32.
    """

    def __init__(self):
        self.sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add a batch of float32 (samples, units) each."""
        if not self.sums:
            self.centres = x.mean(0), y.mean(0)
        x, y = x - self.centres[0], y - self.centres[1]
        count = torch.full_like(x[:1, 0], len(x))
        new = [count, x.sum(0), y.sum(0), x.square().sum(0), y.square().sum(0), x.T @ y]
        self.sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.sums else new

    def value(self) -> Tensor:
        """Correlations: float32 (units of x, units of y)."""
        count, *sums = self.sums
        x, y, xx, yy, xy = (s / count for s in sums)
        deviations = torch.outer((xx - x.square()).clamp_min(0).sqrt(), (yy - y.square()).clamp_min(0).sqrt())
        return (xy - torch.outer(x, y)) / (deviations + 1e-4)


class _Average:
    """Mean correlation of a part's units over the outputs that are these units."""

    def __init__(self, part: Part, writers: tuple[str, ...]):
        self.units = math.prod(part.shape)
        self.correlations = [
            (name, columns, Correlation())
            for (name, axis), indices in part.indices.items()
            if axis == 0 and name in writers
            for columns in indices.flatten(0, 1).T
        ]

    def add(self, x: dict[str, Tensor], y: dict[str, Tensor]) -> None:
        for name, columns, correlation in self.correlations:
            correlation.add(x[name][:, columns], y[name][:, columns])

    def value(self) -> Tensor:
        if not self.correlations:  # heads themselves: what is in them decides
            return torch.zeros(self.units, self.units)
        return torch.stack([correlation.value() for _, _, correlation in self.correlations]).mean(0)


@torch.no_grad()
def correlate(
    model: nn.Module, structure: Structure, first: State, second: State, batches: Iterable[Tensor]
) -> list[list[Tensor]]:
    """Correlate the activations of the same network with two sets of weights.

    An activation is the output of a layer that writes the unit, at every position of every image; where several layers write a
    unit (the residual stream), or one layer in several rows, their correlations are averaged. Exchanging the units of one group
    changes no activation of another, so that one pass serves all groups.

    Args:
        model: The network; it is put in evaluation mode, its weights are not used.
        structure: What `find_structure` found in it.
        first: State dict, on the model's device.
        second: State dict; the same object as ``first`` saves half of the work.
        batches: Images as the model takes them, float (B, 3, H, W).

    Returns:
        For each group and part, float32 (units, units): ``[i, j]`` is unit i of ``first`` with unit j of ``second``.
    """
    model.eval()
    outputs: dict[str, Tensor] = {}

    def remember(name):
        def hook(module, args, output):
            channel = 1 if isinstance(module, nn.Conv2d) else -1
            outputs[name] = output.float().movedim(channel, -1).flatten(0, -2)

        return hook

    hooks = [model.get_submodule(name.rpartition(".")[0]).register_forward_hook(remember(name)) for name in structure.writers]
    pairs = [[_Average(part, structure.writers) for part in group.parts] for group in structure.groups]
    try:
        for pixels in itertools.chain.from_iterable(batch.split(IMAGES) for batch in batches):
            functional_call(model, first, kwargs={"pixel_values": pixels})
            x = dict(outputs)
            if second is not first:
                functional_call(model, second, kwargs={"pixel_values": pixels})
            for average in itertools.chain(*pairs):
                average.add(x, outputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [[average.value() for average in averages] for averages in pairs]


def match(structure: Structure, correlations: list[list[Tensor]], maximize: bool) -> Orders:
    """The exchange of the second network's units with the largest, or smallest, sum of correlations with the first's.

    Linear sum assignment; for attention one inside each pair of heads, then one of the heads by what their insides reach.

    Args:
        structure: What `find_structure` found.
        correlations: What `correlate` returned.
        maximize: True aligns the second network with the first; False takes it as far away as possible.

    Returns:
        Orders for `permute`, to be applied to the second network's state dict.
    """
    return [_match(g, [c.cpu() for c in cs], maximize) for g, cs in zip(structure.groups, correlations, strict=True)]


def _match(group: Group, correlations: list[Tensor], maximize: bool) -> list[Tensor]:
    from scipy.optimize import linear_sum_assignment

    blocks = group.parts[0].shape[0]
    values = torch.zeros(blocks, blocks)
    inside: dict[tuple[int, int, int], Tensor] = {}
    for p, (part, correlation) in enumerate(zip(group.parts, correlations, strict=True)):
        size = part.shape[1]
        for a, b in itertools.product(range(blocks), repeat=2):
            pair = correlation[a * size : (a + 1) * size, b * size : (b + 1) * size]
            rows, columns = linear_sum_assignment(pair, maximize)
            values[a, b] += pair[rows, columns].sum()
            inside[p, a, b] = b * size + torch.as_tensor(columns)
    _, sources = linear_sum_assignment(values, maximize)
    return [torch.cat([inside[p, a, b] for a, b in enumerate(sources)]) for p in range(len(group.parts))]


def matched(correlations: list[list[Tensor]], orders: Orders) -> float:
    """Mean correlation of the units that an exchange brings together: in [-1, 1]."""
    pairs = [
        correlation.cpu()[torch.arange(len(order)), order]
        for cs, os in zip(correlations, orders, strict=True)
        for correlation, order in zip(cs, os, strict=True)
    ]
    return torch.cat(pairs).mean().item()
