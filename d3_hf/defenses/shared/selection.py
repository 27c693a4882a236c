"""Which weights are theta_s: ``"head"``, ``"all-linear"``, name suffixes or a regular expression, as PEFT reads them.

Only weights are ever selected, never biases. A fused query-key-value matrix counts as three weights, because one norm
constraint on the fused matrix would be weaker than three. Names are those of the live model, not of the file it came from.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...models.computed import refuse_computed
from ...models.head import find_head, is_matrix, last_first


@dataclass(frozen=True)
class Segment:
    """One selected weight: the rows ``[start, stop)`` of a parameter (all rows unless the parameter is fused).

    Attributes:
        name: Parameter name in the model; a fused matrix adds ``[q]``, ``[k]`` or ``[v]``.
        parameter: The live parameter, float32.
        start: First row.
        stop: Row after the last one.
    """

    name: str
    parameter: nn.Parameter
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """View of this segment's rows in a tensor of the parameter's shape (the parameter itself, or its gradient)."""
        return tensor[self.start : self.stop]


def select_weights(
    model: nn.Module, target_modules: str | list[str], image_size: tuple[int, int] = (224, 224)
) -> list[Segment]:
    """Select the weights that a defence moves.

    Args:
        model: The classifier.
        target_modules: ``"head"``: the classifier layer, found by structure. ``"all-linear"``: every ``nn.Linear`` and the
            input projection of every ``nn.MultiheadAttention``, head included. A list of names: a module matches if its
            name equals one or ends with ``"." + one``. Any other string: a regular expression that must match a whole
            module name. Lists and expressions may also name ``nn.Conv2d`` layers, taken as matrices.
        image_size: (H, W) of the images that the model accepts, used to find the head.

    Returns:
        One ``Segment`` per selected weight, in the model's order, never empty.

    Raises:
        ValueError: Nothing matches (the candidates are listed); a match is no linear layer; a selected weight is computed from
            others, frozen, not float32, zero, or shared with another part of the model.
    """
    modules = dict(model.named_modules())
    if target_modules == "head":
        names = [find_head(model, image_size)]
    elif target_modules == "all-linear":
        names = [name for name, module in modules.items() if isinstance(module, nn.Linear | nn.MultiheadAttention)]
    elif isinstance(target_modules, str):
        try:
            names = [name for name in modules if re.fullmatch(target_modules, name)]
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"target_modules={target_modules!r} is not a regular expression: {error}") from error
    else:
        names = [n for n in modules if any(n == target or n.endswith("." + target) for target in target_modules)]
    if not names:
        candidates = [name for name, module in modules.items() if is_matrix(module)]
        raise ValueError(f"target_modules={target_modules!r} matches no module; linear layers are: {last_first(candidates)}")
    segments = [segment for name in names for segment in _segments(name, modules[name], target_modules)]
    _check(model, segments)
    return segments


def _segments(name: str, module: nn.Module, target_modules: str | list[str]) -> list[Segment]:
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None:
            raise ValueError(f"{name}: attention with separate key and value sizes is not supported; exclude it by name")
        refuse_computed(name, module, "in_proj_weight")
        return _thirds(f"{name}.in_proj_weight", module.in_proj_weight)
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise ValueError(
            f"target_modules={target_modules!r} matches {name or 'all of it'}, a {type(module).__name__}; only linear and "
            "convolution layers have weights that D3 can move: narrow the pattern"
        )
    refuse_computed(name, module)
    if isinstance(module, nn.Linear) and name.rpartition(".")[2] == "qkv" and module.out_features % 3 == 0:
        return _thirds(f"{name}.weight", module.weight)
    return [Segment(f"{name}.weight", module.weight, 0, len(module.weight))]


def _thirds(name: str, parameter: nn.Parameter) -> list[Segment]:
    rows = len(parameter) // 3
    return [Segment(f"{name}[{part}]", parameter, i * rows, (i + 1) * rows) for i, part in enumerate("qkv")]


def _check(model: nn.Module, segments: list[Segment]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for segment in segments:
        if not segment.parameter.requires_grad:
            raise ValueError(f"{segment.name} is selected but frozen; set requires_grad or exclude it from target_modules")
        if segment.parameter.dtype != torch.float32:
            raise ValueError(
                f"{segment.name} is {segment.parameter.dtype}: small projections would vanish; load the model in float32 "
                "(mixed precision by bf16=True or fp16=True keeps float32 weights)"
            )
        if len(owners[id(segment.parameter)]) > 1:
            raise ValueError(
                f"{segment.name} is tied: {' and '.join(owners[id(segment.parameter)])} share a weight; untie or exclude it"
            )
        if not segment.of(segment.parameter).detach().norm() > 0:
            raise ValueError(
                f"{segment.name} has norm zero (or NaN): a weight on a sphere of radius zero cannot move; exclude it"
            )
