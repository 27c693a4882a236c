"""Numbers the hidden units of a network while it runs on one image, and notes which numbers are the same unit.

A hidden unit is one coordinate of a hidden layer: a channel, a neuron, a dimension of the residual stream. Every tensor
carries, element by element, the number of the unit that the element belongs to: a layer numbers its outputs by the rows of
its weight, what merely moves elements moves their numbers, and what combines elements ties their numbers together.
`permutation.py` reads off the result which units may be exchanged. Nothing is known of architectures; an operation without a
rule is refused.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

Place = tuple[str, int]  # name of a tensor of the state dict, and an axis of it

ZERO = 0  # the number of elements that are zero whatever the image: no unit
# Move or copy elements: done to the numbers as to the values.
REARRANGING = frozenset(
    "view reshape flatten unflatten transpose permute movedim contiguous clone detach unbind chunk split getitem expand cat "
    "stack squeeze unsqueeze".split()
)
# Make each element from itself, or (softmax) from all elements along an axis alike.
POINTWISE = frozenset(
    "relu relu6 leaky_relu elu gelu silu hardswish hardsigmoid hardtanh sigmoid tanh dropout softmax to float".split()
)
BINARY = frozenset("add sub mul div".split())
POOLING = frozenset("max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d".split())


class UnitTracer(TorchFunctionMode):
    """A context in which a model runs on numbered pixels; see the module's docstring.

    Args:
        model: The classifier or encoder, in evaluation mode on the CPU.

    Attributes:
        names: Name in the state dict of each weight and buffer, by ``id``.
        places: Numbers along each axis, of a weight or buffer, that units lie on: int64 (length,).
        writers: Names of the weights of linear layers and convolutions that ran, in order.
        ties: int64 (2, k) each: numbers that are the same unit.
        fixed: Numbers that must not move, and why.
        attentions: For each attention, the numbers of its heads (H,), and of the units in each head (H, D), query and key
            first, then value.

    Raises:
        ValueError: A weight has two names; while the model runs, an operation on hidden units has no rule.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        state = {name: t for name, t in model.state_dict(keep_vars=True).items() if t.is_floating_point()}
        self.names = {id(t): name for name, t in state.items()}
        if len(self.names) < len(state):
            raise ValueError(f"{type(model).__name__} uses one weight under two names: untie it before permuting its units")
        self.model = model
        self.numbers = WeakTensorKeyDictionary()
        self.places: dict[Place, Tensor] = {}
        self.writers: dict[str, None] = {}
        self.count = ZERO + 1
        self.ties: list[Tensor] = []
        self.fixed: list[tuple[Tensor, str]] = []
        self.attentions: list[tuple[Tensor, list[Tensor]]] = []  # number of each head (H,), units of each part (H, D)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        outs = list(_tensors(out))
        if not outs or not any(map(self.is_numbered, _tensors((args, kwargs)))):
            return out
        name = func.__name__.strip("_")  # in-place and operator forms follow the same rule
        if name == "to" and not self.is_numbered(args[0]):
            return out  # a constant, moved to where an activation is
        if name in REARRANGING or name == "pad":
            numbers = self._rearrange(func, name, args, kwargs)
        elif name in POINTWISE:
            numbers = self.units(args[0])
        elif name in BINARY:
            numbers = self._combine(*args[:2])
        elif name in POOLING:
            numbers = self._vector(self.units(args[0]), 1).view(1, -1, 1, 1).expand(out.shape)
        elif rule := RULES.get(name):
            numbers = rule(self, out, *args, **kwargs)
        else:
            raise ValueError(f"{type(self.model).__name__}: no rule for {name} on hidden units; it cannot be permuted")
        for tensor, number in zip(outs, _tensors(numbers), strict=True):
            self.numbers[tensor] = number
        return out

    # Numbers -----------------------------------------------------------------------------------------------------------

    def is_numbered(self, value) -> bool:
        """Whether a value is a tensor with units: an activation, a weight or a buffer."""
        return isinstance(value, Tensor) and (value in self.numbers or id(value) in self.names)

    def fresh(self, count: int) -> Tensor:
        """New numbers."""
        self.count += count
        return torch.arange(self.count - count, self.count)

    def axis(self, tensor: Tensor, axis: int) -> Tensor:
        """Numbers along one axis of a weight or buffer."""
        if id(tensor) not in self.names:
            raise ValueError(f"{type(self.model).__name__} computes a weight as it runs; it cannot be permuted")
        place = self.names[id(tensor)], axis
        if place not in self.places:
            self.places[place] = self.fresh(tensor.shape[axis])
        return self.places[place]

    def units(self, tensor: Tensor) -> Tensor:
        """Numbers of all elements: int64 of the tensor's shape."""
        if tensor in self.numbers:
            return self.numbers[tensor]
        if id(tensor) in self.names:  # a position embedding, a scale: its units lie along its only long axis, or the last one
            long = [axis for axis, side in enumerate(tensor.shape) if side > 1]
            axis = long[0] if len(long) == 1 else tensor.ndim - 1
            shape = [-1 if a == axis else 1 for a in range(tensor.ndim)]
            return self.axis(tensor, axis).view(shape).expand(tensor.shape)
        if tensor.any():
            raise ValueError(f"{type(self.model).__name__} puts constants beside hidden units; it cannot be permuted")
        return torch.full(tensor.shape, ZERO)

    def fix(self, numbers: Tensor, reason: str) -> None:
        """These units must stay where they are."""
        self.fixed.append((numbers.unique(), reason))

    def tie(self, first: Tensor, second: Tensor) -> None:
        """Elements that face each other belong to one unit."""
        a, b = (numbers.flatten() for numbers in torch.broadcast_tensors(first, second))
        apart = (a != b) & (a != ZERO) & (b != ZERO)
        codes = ((a[apart] << 32) + b[apart]).unique()
        self.ties.append(torch.stack([codes >> 32, codes & 0xFFFFFFFF]))

    def _merge(self, numbers: Tensor, dims: int | Iterable[int]) -> Tensor:
        """Tie all elements along some axes, which stay with length 1."""
        merged = numbers.amax(dims, keepdim=True)  # ZERO only where all are
        self.tie(numbers, merged)
        return merged

    def _vector(self, numbers: Tensor, axis: int) -> Tensor:
        """Numbers along one axis, the elements along all others being tied."""
        return self._merge(numbers.movedim(axis, -1).flatten(0, -2), 0)[0]

    # Rules: each returns the numbers of what the operation returned ------------------------------------------------------

    def _rearrange(self, func, name, args, kwargs):
        if name == "pad" and (kwargs.get("mode", "constant"), kwargs.get("value") or 0, len(args)) != ("constant", 0, 2):
            raise ValueError(f"{type(self.model).__name__} pads with something else than zeros; it cannot be permuted")

        def swap(value):
            if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
                return type(value)(map(swap, value))
            return self.units(value) if isinstance(value, Tensor) and value.is_floating_point() else value

        return func(*map(swap, args), **{name: swap(value) for name, value in kwargs.items()})

    def _combine(self, first, second):
        if not self.is_numbered(first):
            first, second = second, first
        numbers = self.units(first)
        if not isinstance(second, Tensor) or second.numel() == 1:
            return numbers
        if self.is_numbered(second):
            other = self.units(second)
            self.tie(numbers, other)
            numbers, other = torch.broadcast_tensors(numbers, other)
            return torch.where(numbers == ZERO, other, numbers)
        # A constant (a mask, a fixed position code) may vary along axes where the units do not.
        numbers, values = torch.broadcast_tensors(numbers, second)
        for axis in range(numbers.ndim):
            if all((t != t.narrow(axis, 0, 1)).any() for t in (numbers, values)):
                self.fix(numbers, "tied to a constant")
        return numbers

    def _convolve(self, out, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        inputs, outputs = self._vector(self.units(x), 1), self.axis(weight, 0)
        self.writers[self.names[id(weight)]] = None
        if bias is not None:
            self.tie(outputs, self.axis(bias, 0))
        if groups == 1:
            self.tie(inputs, self.axis(weight, 1))
        elif groups == len(inputs) == len(outputs):
            self.tie(inputs, outputs)
        else:
            self.fix(torch.cat([inputs, outputs]), "grouped convolution")
        return outputs.view(1, -1, 1, 1).expand(out.shape)

    def _project(self, out, x, weight, bias=None):
        outputs = self.axis(weight, 0)
        self.writers[self.names[id(weight)]] = None
        self.tie(self._vector(self.units(x), -1), self.axis(weight, 1))
        if bias is not None:
            self.tie(outputs, self.axis(bias, 0))
        return outputs.expand(out.shape)

    def _embed(self, out, index, weight, *args, **kwargs):
        return self.axis(weight, 1).expand(out.shape)

    def _normalise(self, out, x, axis, tensors):
        own = self._vector(self.units(x), axis)
        for tensor in tensors:
            if tensor.ndim != 1:
                raise ValueError(f"{self.names[id(tensor)]} normalises over several axes; it cannot be permuted")
            self.tie(own, self.axis(tensor, 0))
        own = self.axis(tensors[0], 0) if tensors else own
        return own.view([-1 if a == axis % out.ndim else 1 for a in range(out.ndim)]).expand(out.shape)

    def _batch_norm(self, out, x, *tensors, **kwargs):
        return self._normalise(out, x, 1, list(_tensors((tensors, kwargs))))

    def _layer_norm(self, out, x, normalized_shape, *tensors, **kwargs):
        return self._normalise(out, x, -1, list(_tensors((tensors, kwargs))))

    def _group_norm(self, out, x, num_groups, *tensors, **kwargs):
        numbers = self._batch_norm(out, x, *tensors, **kwargs)
        if num_groups > 1:
            self.fix(numbers, "group normalisation")
        return numbers

    def _mean(self, out, x, dim=None, keepdim=False, dtype=None):
        if dim is None:
            raise ValueError(f"{type(self.model).__name__} averages over all hidden units; it cannot be permuted")
        self._merge(self.units(x), dim)
        return self.units(x).amax(dim, keepdim)

    def _attend(self, out, query, key, value, attn_mask=None, **options):
        if attn_mask is not None or not query.shape == key.shape == value.shape[:-1] + query.shape[-1:]:
            raise ValueError(f"{type(self.model).__name__} masks its attention or shares keys; it cannot be permuted")
        heads = self._score(self.units(query), self.units(key).transpose(-1, -2))
        return self._mix(heads, self.units(value)).expand(out.shape)

    def _multiply(self, out, first, second):
        first, second = self.units(first), self.units(second)
        if torch.isin(first, torch.cat([heads for heads, _ in self.attentions] or [torch.empty(0)])).all():
            return self._mix(first.narrow(-1, 0, 1).narrow(-2, 0, 1), second).expand(out.shape)
        if second.ndim == 2 or (first == first.narrow(-1, 0, 1)).all():
            raise ValueError(f"{type(self.model).__name__} multiplies matrices outside attention; it cannot be permuted")
        return self._score(first, second).expand(out.shape)

    def _score(self, query: Tensor, key: Tensor) -> Tensor:
        """Query (..., N, D) times key (..., D, M): contracts the units, leaves one number a head, (..., 1, 1)."""
        query, key = self._merge(query, -2), self._merge(key, -1)
        self.tie(query, key.transpose(-1, -2))
        units = query.flatten(0, -2)
        heads = self.fresh(len(units))
        self.attentions.append((heads, [units]))
        return heads.view(*query.shape[:-2], 1, 1)

    def _mix(self, heads: Tensor, value: Tensor) -> Tensor:
        """Attention weights of numbered heads (..., 1, 1) times value (..., M, D): the value's units, (..., 1, D)."""
        value = self._merge(value, -2)
        (parts,) = [parts for numbers, parts in self.attentions if torch.equal(numbers, heads.flatten())]
        parts.append(value.flatten(0, -2))
        return value


RULES = {
    "conv2d": UnitTracer._convolve,
    "linear": UnitTracer._project,
    "embedding": UnitTracer._embed,
    "batch_norm": UnitTracer._batch_norm,
    "layer_norm": UnitTracer._layer_norm,
    "group_norm": UnitTracer._group_norm,
    "mean": UnitTracer._mean,
    "scaled_dot_product_attention": UnitTracer._attend,
    "matmul": UnitTracer._multiply,
    "bmm": UnitTracer._multiply,
}


def _tensors(value) -> Iterable[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
