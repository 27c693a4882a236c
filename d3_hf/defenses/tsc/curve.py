"""Quadratic Bezier curves between two sets of weights of one network."""

import torch
from torch import Tensor, nn

from .permutation import State


def bezier(t: float, start: list[Tensor], control: list[Tensor], end: list[Tensor]) -> list[Tensor]:
    """Point ``gamma(t) = (1 - t)^2 A + 2 t (1 - t) M + t^2 B`` of a quadratic Bezier curve.

    Args:
        t: Position in [0, 1].
        start: A, one tensor per weight.
        control: M.
        end: B.

    Returns:
        New tensors.
    """
    point = torch._foreach_mul(start, (1 - t) ** 2)
    torch._foreach_add_(point, control, alpha=control_share(t))
    torch._foreach_add_(point, end, alpha=t**2)
    return point


def control_share(t: float) -> float:
    """``d gamma(t) / d M = 2 t (1 - t)``, by which a gradient at the curve's point becomes one of the control point."""
    return 2 * t * (1 - t)


def relative_distance(first: list[Tensor], second: list[Tensor]) -> float:
    """``||second - first|| / ||first||`` over all weights together."""
    length, size = (torch.stack(torch._foreach_norm(t)).norm() for t in (torch._foreach_sub(second, first), first))
    return (length / size).item()


class Curve:
    """A curve whose control point M a network's parameters are, except between `move_to` and `move_back`.

    Args:
        model: The network.
        start: A: its state there, with buffers.
        end: B.

    Attributes:
        is_at_point: Whether the parameters are a point of the curve.
    """

    def __init__(self, model: nn.Module, start: State, end: State):
        self.start, self.end, self.is_at_point = start, end, False
        self._parameters = dict(model.named_parameters())

    def weights(self) -> list[Tensor]:
        """The parameters, detached."""
        return [parameter.detach() for parameter in self._parameters.values()]

    def end_weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """A and B, in the order of `weights`."""
        return [self.start[name] for name in self._parameters], [self.end[name] for name in self._parameters]

    def begin(self) -> None:
        """Put the control point half way between the ends."""
        torch._foreach_copy_(self.weights(), torch._foreach_lerp(*self.end_weights(), 0.5))

    def move_to(self, t: float) -> None:
        """Move the parameters from the control point to ``gamma(t)``."""
        start, end = self.end_weights()
        self._t, self._control, self.is_at_point = t, [weight.clone() for weight in self.weights()], True
        torch._foreach_copy_(self.weights(), bezier(t, start, self._control, end))

    def move_back(self, decay: float) -> None:
        """Make the gradient at ``gamma(t)``, with that of ``decay / 2 * ||gamma(t)||^2``, M's; move the parameters to M."""
        weights = self.weights()
        for parameter, weight in zip(self._parameters.values(), weights, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(weight, alpha=decay).mul_(control_share(self._t))
        torch._foreach_copy_(weights, self._control)
        self._control, self.is_at_point = None, False
