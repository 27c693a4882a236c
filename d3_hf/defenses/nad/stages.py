"""The stages of a network, between which attention is compared, found by running one black image, not by names.

Of a convolutional network a stage is the last module in the row from image to logits that gives features of one height and
width, at least two of them; later features of one pixel are left out, because a normalised map of one number is constant. Of a
ViT, and this form is this project's, the features are the hidden states of the patch tokens; class and register tokens are left
out. The last block is left out as well, since a head that reads the class token never sees what it does to the patches; the
others are divided into four stages like a ResNet's. Any other structure (windowed attention, for example) is refused.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...models.evaluating import evaluating

STAGES = 4  # into which the blocks of a ViT are divided


MOST_PREFIX_TOKENS = 16  # class, distillation and register tokens; more would be another structure


# The stages ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A module whose output is compared.

    Attributes:
        name: Its name in the model.
        module: The live module.
        grid: Rows and columns of its output.
        tokens: Whether the output is (B, prefix + positions, channels) instead of (B, channels, rows, columns).
    """

    name: str
    module: nn.Module
    grid: tuple[int, int]
    tokens: bool

    def features(self, output: Tensor) -> Tensor:
        """The module's output as (B, channels, positions)."""
        return output[:, -math.prod(self.grid) :].transpose(1, 2) if self.tokens else output.flatten(2)


def find_stages(model: nn.Module, image_size: tuple[int, int]) -> list[Stage]:
    """Find the stages of a convolutional network or a ViT, in order; see the module's text for what counts as one.

    Args:
        model: Classifier that takes ``pixel_values`` (1, 3, H, W).
        image_size: (H, W) that the model accepts.

    Raises:
        ValueError: The network is neither: no row of modules with fewer and fewer pixels, no blocks of patch tokens.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    shapes = _shapes(model, image_size)
    grids = {name: _grid(output, image_size) for name, (_, output) in shapes.items()}
    order = list(shapes).index
    blocks, counts = _token_blocks(modules, shapes)
    parent = blocks[0].rpartition(".")[0] + "." if blocks else ""
    maps = [name for name, grid in grids.items() if grid and not (blocks and name.startswith(parent))]
    tokens = [name for name, (_, output) in shapes.items() if len(output) == 3 and output[1] > 1]
    tokens_last = bool(tokens) and all(order(name) < order(tokens[-1]) for name in maps)
    keeps_patches = len(counts) == 1 and maps and 0 <= min(counts) - math.prod(grids[maps[-1]]) <= MOST_PREFIX_TOKENS
    if tokens_last and keeps_patches:
        read = blocks[:-1]
        ends = sorted({math.ceil(len(read) * number / STAGES) - 1 for number in range(1, STAGES + 1)})
        return [Stage(read[end], modules[read[end]], grids[maps[-1]], tokens=True) for end in ends]
    by_grid: dict[tuple[int, int], list[str]] = {}
    for name in [] if tokens_last else _row("", modules, shapes, image_size):
        by_grid.setdefault(grids[name], []).append(name)
    if len(by_grid) < 2 or list(by_grid) != sorted(by_grid, reverse=True):
        raise ValueError(
            f"NAD finds no stages in {type(model).__name__}: it knows convolutional networks that reduce the image in steps "
            "and ViTs whose blocks keep one token per patch"
        )
    lasts = [[n for n in names if any(modules[n].children())] or names for names in by_grid.values()]
    return [Stage(names[-1], modules[names[-1]], grid, tokens=False) for grid, names in zip(by_grid, lasts, strict=True)]


Shape = tuple[int, ...]


def _shapes(model: nn.Module, image_size: tuple[int, int]) -> dict[str, tuple[Shape, Shape]]:
    """Shapes of input and output of every module that ran, in the order in which they finished; () for no tensor."""
    shapes: dict[str, tuple[Shape, Shape]] = {}

    def remember(name):
        def hook(module, args, output):
            shapes[name] = _shape(args[0] if args else None), _shape(output)

        return hook

    hooks = [module.register_forward_hook(remember(name)) for name, module in model.named_modules(remove_duplicate=False)]
    try:
        with evaluating(model), torch.no_grad():
            model(pixel_values=next(model.parameters()).new_zeros(1, 3, *image_size))
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def _shape(value: Any) -> Shape:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _grid(shape: Shape, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """Height and width of features that are a reduced image: of its proportions (channels-last ones are not) and not 1x1."""
    if len(shape) != 4 or shape[2:] == (1, 1):
        return None
    (height, width), (full_height, full_width) = shape[2:], image_size
    return (height, width) if abs(height * full_width - width * full_height) <= max(image_size) else None


def _token_blocks(modules: dict[str, nn.Module], shapes: dict[str, tuple[Shape, Shape]]) -> tuple[list[str], set[int]]:
    """The longest row of numbered siblings of one class that give tokens (1, N, C), and every N of such siblings."""
    groups: dict[tuple, list[str]] = {}
    for name, (_, output) in shapes.items():
        parent, _, number = name.rpartition(".")
        if number.isdigit() and len(output) == 3 and output[0] == 1:
            groups.setdefault((parent, type(modules[name]), output), []).append(name)
    longest = max(groups.values(), key=len, default=[])
    return longest if len(longest) > 1 else [], {output[1] for _, _, output in groups}


def _row(name: str, modules: dict[str, nn.Module], shapes: dict[str, tuple[Shape, Shape]], image_size) -> list[str]:
    """The modules in a row from image to logits: those that reduce the image more than once, or end it, are opened."""
    inside = [f"{name}.{child}".lstrip(".") for child, _ in modules[name].named_children()]
    while lists := [child for child in inside if child not in shapes]:  # a ModuleList does not run: its members do
        inside = [n for n in inside if n in shapes] + [f"{n}.{c}" for n in lists for c, _ in modules[n].named_children()]
    inside.sort(key=list(shapes).index)
    before, after = (_grid(shape, image_size) for shape in shapes[name])
    steps = {_grid(shapes[child][1], image_size) for child in inside} - {None, before}
    if after and len(steps) < 2:
        return [name]
    return [found for child in inside for found in _row(child, modules, shapes, image_size)]


@contextmanager
def record_features(stages: list[Stage]) -> Iterator[dict[str, Tensor]]:
    """Inside, the dict holds under each stage's name its features of the latest forward pass."""
    features: dict[str, Tensor] = {}

    def remember(stage):
        return lambda module, args, output: features.__setitem__(stage.name, stage.features(output))

    hooks = [stage.module.register_forward_hook(remember(stage)) for stage in stages]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()
        features.clear()
