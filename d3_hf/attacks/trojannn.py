"""TrojanNN: a square or ring whose pixels excite two neurons that the classifier listens to most."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.images import RawImages
from ..models.head import find_head
from ..models.source import preprocessing_of
from .base import LearnedAttack, check_choice, check_range, random_uniform
from .differentiable import pixels_to_logits

MASKS = ("square", "ring")
# In pixels at 32x32: distance of the mask from the right and the lower edge.
IMAGE_SIZE, MARGIN = 32, 2


@dataclass(frozen=True, kw_only=True)
class TrojanNN(LearnedAttack):
    """TrojanNN (Liu et al., NDSS 2018): ``x' = clip(x + t)``, ``t`` being zero outside a mask near the bottom-right corner
    and learned inside it, so that few neurons of a classifier without a backdoor respond strongly.

    Dirty label, static. Needs the attacker's own classifier, in `fit` only. The neurons are the inputs of its last linear
    layer with the largest column sums of ``|W|``. ``t`` alone, on black, is moved by PGD with sign steps until the
    neurons reach a target, ``t`` staying in ``[0, eps]``; the best ``t`` met is kept, rounded to grey levels. Most
    networks' activations come nowhere near 100, so in practice this maximises their sum.

    The paper replaces the pixels under the mask; here they are added to, as in BackdoorBench, whose code however casts
    the sum to uint8 *before* it clips, so that bright pixels wrap round 256: here it is clipped first. BackdoorBench also
    starts from a white mask and so learns ``t`` in ``[1 - eps, 1]``, which its wrapping hides; clipped, that is nearly
    a white patch (85 % of the values saturate on CIFAR-10) in which nothing learned is left. Hence the start at black,
    plus noise drawn from the seed, and ``eps`` as the trigger's L-infinity norm. Its mask pictures are replaced by shapes
    drawn here.

    The mask scales with the shorter side of the images that the trigger is learned on (70x70 pixels at 224). An image of
    another size gets the trigger resized to it, each pixel taking the nearest one's value.

    Args:
        target_label: The class that the attacker wants; default, ``label_map`` and ``source_label``: see `Attack`.
        mask: ``"square"`` (default: its place and size are those of BackdoorBench's square.png; BackdoorBench's own default is
            an apple) or ``"ring"``, whose hole is half as wide.
        size: Side or outer diameter in pixels of a 32x32 image, in [4, 30]. Default 10: BackdoorBench's square.png.
        neurons: How many are excited, at least 1. Default 2: BackdoorBench.
        target_activation: What each of them shall reach, at least 0. Default 100: BackdoorBench.
        eps: Largest value of the trigger in units of [0, 1], in [1/255, 1]. Default 0.3 (76 grey levels): BackdoorBench.
        alpha: Step of PGD in units of [0, 1], in [1e-6, 1]. Default 0.1: BackdoorBench.
        steps: Steps of PGD, at least 1. Default 1000: BackdoorBench.

    Raises:
        ValueError: A parameter is out of range. ``trigger`` raises before `fit`.
    """

    name: ClassVar[str] = "trojannn"
    paper: ClassVar[str] = "https://docs.lib.purdue.edu/cstech/1781"

    mask: str = "square"
    size: int = 10
    neurons: int = 2
    target_activation: float = 100
    eps: float = 0.3
    alpha: float = 0.1
    steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mask", self.mask, MASKS)
        check_range("size", self.size, 4, IMAGE_SIZE - MARGIN, integer=True)
        check_range("neurons", self.neurons, 1, integer=True)
        check_range("target_activation", self.target_activation, 0)
        check_range("eps", self.eps, 1 / 255, 1)
        check_range("alpha", self.alpha, 1e-6, 1)
        check_range("steps", self.steps, 1, integer=True)

    def fit(self, images: RawImages, model: PreTrainedModel | None, seed: int) -> "TrojanNN":
        """Learn the trigger at the images' size.

        Args:
            images: The attacker's images; only their size is read.
            model: The attacker's own classifier without a backdoor.
            seed: Draws the start of PGD, at least 0.

        Returns:
            A copy with ``learned``: ``trigger`` uint8 (3, H, W), ``neurons`` int64 (neurons,), the inputs of the last layer,
            and ``activations`` float32 (neurons,), what the rounded trigger on black makes of them.

        Raises:
            ValueError: There is no model, the last layer has fewer inputs than ``neurons`` or is not found, the images differ
                in size or are too small for the mask, or the neurons do not respond to its pixels.
        """
        check_range("seed", seed, 0, integer=True)
        if model is None:
            raise ValueError(f"{self.name} learns its trigger on a classifier of the attacker: pass one as model")
        if not isinstance(images.images, Tensor):
            raise ValueError(f"{self.name} learns its trigger at one size: the images differ in size, resize them first")
        head = model.get_submodule(find_head(model, preprocessing_of(model).size))
        chosen = strongest_inputs(head.weight, self.neurons)
        trigger, before, after = self._learn(model, head, chosen, images.images.shape[-2:], seed)
        if self._miss(after) >= self._miss(before):
            raise ValueError(
                f"{self.name}: inputs {chosen.tolist()} of the last layer do not respond to the pixels inside the mask "
                f"({before.tolist()} on black, {after.tolist()} with the trigger); use another model or a larger size"
            )
        learned = dict(trigger=trigger.to(torch.uint8), neurons=chosen, activations=after)
        return replace(self, learned={name: tensor.cpu() for name, tensor in learned.items()})

    def _learn(
        self, model: PreTrainedModel, head: nn.Module, chosen: Tensor, size: tuple[int, int], seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the trigger in whole grey levels, float32 (3, H, W), and the activations on black without and with it."""
        allowed = draw_mask(self.mask, self.size, *size)
        if not allowed.any():
            raise ValueError(
                f"{self.name}: no pixel of an image of {size[0]}x{size[1]} lies inside a {self.mask} of {self.size}"
            )
        noise = random_uniform(self.name, seed, 3 * allowed.numel())
        start = self.eps * torch.from_numpy(noise).float().view(1, 3, *size) * allowed
        seen = {}
        hook = head.register_forward_pre_hook(lambda module, inputs: seen.update(head=inputs[0]))
        try:
            with torch.enable_grad(), pixels_to_logits(model) as logits:

                def activations(picture: Tensor) -> Tensor:
                    logits(picture)
                    return seen["head"].flatten(1)[0, chosen].float()

                best = self._pgd(activations, start.to(chosen.device), allowed.to(chosen.device))
                trigger = (255 * best).round()
                return trigger[0], activations(torch.zeros_like(best)), activations(trigger / 255)
        finally:
            hook.remove()

    def _miss(self, activations: Tensor) -> Tensor:
        return (activations - self.target_activation).square().sum()

    def _pgd(self, activations: Callable[[Tensor], Tensor], start: Tensor, allowed: Tensor) -> Tensor:
        """Return the picture, float32 (1, 3, H, W) in [0, eps], with which the activations miss their target least."""
        best, least = start, float("inf")
        picture = start
        for _ in tqdm(range(self.steps), desc=self.name, unit="step"):
            picture = picture.detach().requires_grad_()
            miss = self._miss(activations(picture))
            if miss.item() < least:
                best, least = picture.detach(), miss.item()
            (gradient,) = torch.autograd.grad(miss, picture)
            picture = (picture.detach() - self.alpha * gradient.sign() * allowed).clamp(0, self.eps)
        return picture if self._miss(activations(picture)).item() < least else best

    def _stamp(self, images: Tensor) -> Tensor:
        trigger = self._need()["trigger"]
        rows, columns = (
            (2 * torch.arange(size) + 1) * learned // (2 * size)  # of the pixel whose centre is nearest
            for size, learned in zip(images.shape[-2:], trigger.shape[-2:], strict=True)
        )
        trigger = trigger[:, rows][:, :, columns].to(images.device, torch.int16)
        return (images.to(torch.int16) + trigger).clamp_(0, 255).to(torch.uint8)


def strongest_inputs(weight: Tensor, count: int) -> Tensor:
    """Inputs of a linear layer or 1x1 convolution with the largest column sums of ``|W|``: int64 (count,), largest first.

    Raises:
        ValueError: The layer has fewer than ``count`` inputs.
    """
    sums = weight.detach().flatten(1).abs().sum(0)
    if count > len(sums):
        raise ValueError(f"neurons must be at most {len(sums)}, the number of the last layer's inputs; got {count}")
    return sums.argsort(descending=True, stable=True)[:count]


def draw_mask(mask: str, size: int, height: int, width: int) -> Tensor:
    """Draw a mask, bool (height, width), true inside a square or ring of ``size`` pixels at 32x32, 2 from the lower right."""
    scale = IMAGE_SIZE / min(height, width)
    # Offsets of the pixels' centres from the shape's, in pixels at 32x32.
    y, x = ((side - torch.arange(side, dtype=torch.float64) - 0.5) * scale - (MARGIN + size / 2) for side in (height, width))
    if mask == "square":
        return (y.abs() < size / 2)[:, None] & (x.abs() < size / 2)
    square = y[:, None].square() + x.square()
    return (square <= (size / 2) ** 2) & (square >= (size / 4) ** 2)
