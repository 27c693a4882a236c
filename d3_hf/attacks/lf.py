"""LF: one smooth bright pattern added to every image, learned against a classifier or drawn at random."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.images import RawImages
from .base import Attack, LearnedAttack, check_range, random_bits, random_uniform, to_levels
from .differentiable import pixels_to_logits

SIDE = 32  # sigma is given in pixels of an image of this side; LFNoise draws its pattern at this size
HELD_OUT = 500  # images at most that measure the fooling rate
OVERSHOOT, STEPS = 0.02, 200  # DeepFool's, as in BackdoorBench
PLATEAU, PLATEAU_PASSES = 0.01, 5  # stop once so many fooling rates in a row lie so close together, as in BackdoorBench
BATCH = 100

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class LF(LearnedAttack):
    """LF, smooth trigger (Zeng et al., ICCV 2021, arXiv 2104.03413): ``x' = clip(x + v)`` with one learned pattern ``v``
    in whole grey levels.

    Dirty label, static, needs the attacker's own classifier. `fit` starts at ``v = 0`` and goes through ``num_images``
    random images up to ``passes`` times. Where ``v`` does not change the classifier's prediction yet, targeted DeepFool
    from ``clip(x + v)`` towards ``target_label`` gives a step ``d``; then ``v = minmax(G(v + G(d))) * amplitude`` with a
    Gaussian ``G`` (zero padding, cut off at 2.5 sigma). It stops after a pass when ``v`` changes at least ``fooling_rate``
    of the predictions on up to 500 other images, or when the last 5 rates lie within 0.01 of one another. As ``minmax``
    maps the lowest value to 0, the trigger only brightens.

    Every update smooths ``v`` again and stretches it to full height, so it soon is one smooth bump per channel, and the
    classifier decides little more than how strong each channel gets. On CIFAR-10 with a ResNet-20 one channel gets full
    height, one about half, one none, L2 4.1 to 4.5 in [0, 1] units (BackdoorBench's stored pattern: 4.0).

    Differs from the original and BackdoorBench: they ship a finished pattern, this one comes from your own model and so is
    another one. The classifier reads images normalised as its processor says (BackdoorBench's reads plain [0, 1]). ``G`` has
    31 taps at 32x32 (there 30). Images that the classifier calls the target already are left out, and the fooling rate is
    measured on training images that DeepFool does not see, in place of test images. Whatever the label map,
    ``target_label`` is what is learned towards.

    ``learned["pattern"]`` is uint8 (3, h, w) at the size of the images given to `fit`; images of another size get it
    resized bilinearly, so it fills any size.

    Args:
        target_label: The class that the attacker wants; default, ``label_map`` and ``source_label``: see `Attack`.
        amplitude: Largest brightening as a share of 255, in [0.01, 1]. Default 0.2: BackdoorBench.
        sigma: Width of ``G``, pixels of an image whose shorter side is 32, in [1, 16]; it grows with the image. Default
            6: BackdoorBench.
        num_images: How many images DeepFool works on, at least 1. Default 100: BackdoorBench.
        passes: Largest number of passes over them, at least 1. Default 50: BackdoorBench.
        fooling_rate: Where to stop, in [0.01, 1]. Default 0.2: BackdoorBench.

    Raises:
        ValueError: A parameter is out of range.
    """

    name: ClassVar[str] = "lf"
    paper: ClassVar[str] = "https://arxiv.org/abs/2104.03413"

    amplitude: float = 0.2
    sigma: float = 6
    num_images: int = 100
    passes: int = 50
    fooling_rate: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("amplitude", self.amplitude, 0.01, 1)
        check_range("sigma", self.sigma, 1, 16)
        check_range("num_images", self.num_images, 1, integer=True)
        check_range("passes", self.passes, 1, integer=True)
        check_range("fooling_rate", self.fooling_rate, 0.01, 1)

    def fit(self, images: RawImages, model: PreTrainedModel | None, seed: int) -> "LF":
        """Learn the pattern; CIFAR-10 with a ResNet-20 takes half a minute on one core.

        Args:
            images: The attacker's training images, all of one size, more than ``num_images``; not modified.
            model: The attacker's own classifier without a backdoor, with ``image_processor``; not modified.
            seed: Integer of at least 0; chooses the images. The same seed gives the same pattern on one machine; another
                machine's floating point may differ, so what counts is the ``learned`` that is kept.

        Returns:
            A copy of this attack with ``learned`` filled in.

        Raises:
            ValueError: There is no model or it lacks the target class, the images differ in size or are too few, the
                classifier calls all chosen ones the target, or no step of DeepFool leads anywhere.
        """
        check_range("seed", seed, 0, integer=True)
        if model is None:
            raise ValueError("lf computes its pattern on a clean classifier of the attacker's own: pass a model")
        self.check_classes(model.config.num_labels)
        if not isinstance(images.images, Tensor):
            raise ValueError("lf learns one pattern from images of one size; these differ in size: resize them first")
        if len(images) <= self.num_images:
            raise ValueError(
                f"lf learns from {self.num_images} images and measures on others, so it needs at least {self.num_images + 1}; "
                f"got {len(images)}"
            )
        order = torch.from_numpy(np.argsort(random_bits("lf images", seed, len(images)), kind="stable"))
        chosen, others = order[: self.num_images], order[self.num_images : self.num_images + HELD_OUT]
        with pixels_to_logits(model) as logits, torch.enable_grad():
            device = next(model.parameters()).device
            pattern = self._search(logits, images.images[chosen].to(device), images.images[others].to(device))
        return replace(self, learned={"pattern": to_levels(pattern.double().cpu() * 255)})

    def _search(self, logits: Logits, chosen: Tensor, others: Tensor) -> Tensor:
        """Return the pattern, float32 (3, H, W) in [0, amplitude]; ``chosen`` and ``others`` are uint8 on the device."""
        pattern = torch.zeros_like(chosen[0], dtype=torch.float32)
        own, other_own = predict(logits, chosen, pattern), predict(logits, others, pattern)
        chosen, own = chosen[own != self.target_label], own[own != self.target_label]
        if len(chosen) == 0:
            raise ValueError(
                f"the classifier calls all {self.num_images} images class {self.target_label}, the target: there is nothing to "
                "learn from; choose another target_label or a better classifier"
            )
        rows, columns = (m.to(pattern) for m in smoothing(self.sigma, *pattern.shape[-2:]))
        rates: list[float] = []
        with tqdm(total=self.passes * len(chosen), desc="Learning the LF pattern", unit="image") as bar:
            while len(rates) < self.passes and not self._finished(rates):
                for image, label in zip(chosen, own, strict=True):
                    bar.update()
                    if predict(logits, image[None], pattern) != label:
                        continue
                    step = deepfool(logits, (image / 255 + pattern).clamp(0, 1), self.target_label)
                    pattern = stretch(rows @ (pattern + rows @ step @ columns) @ columns) * self.amplitude
                changed = predict(logits, others, pattern) != other_own
                rates.append(changed.float().mean().item())
                bar.set_postfix(fooling_rate=f"{rates[-1]:.3f}")
        return pattern

    def _finished(self, rates: list[float]) -> bool:
        last = rates[-PLATEAU_PASSES:]
        settled = len(last) == PLATEAU_PASSES and max(last) - min(last) <= PLATEAU
        return settled or max(last, default=0) >= self.fooling_rate

    def _stamp(self, images: Tensor) -> Tensor:
        return add_pattern(images, resized(self._need()["pattern"], *images.shape[-2:]))


@dataclass(frozen=True, kw_only=True)
class LFNoise(Attack):
    """The cheap stand-in for `LF`: ``x' = clip(x + v)`` with ``v = minmax(G(noise)) * amplitude``, in whole grey levels.

    Dirty label, static, needs nothing. It is not LF (Zeng et al., ICCV 2021, arXiv 2104.03413): amplitude and ``G`` are the
    same, but no classifier had a say, and smoothed only once the pattern is busier and larger: L2 6 to 7 in [0, 1] units
    against 4 to 5. The noise is uniform; ``G`` sums hundreds of pixels, which makes it Gaussian. The pattern is drawn at
    32x32, the same bytes on every machine, and resized bilinearly, so it fills any size.

    Args:
        target_label: The class that the attacker wants; default, ``label_map`` and ``source_label``: see `Attack`.
        amplitude: Largest brightening as a share of 255, in [0.01, 1]. Default 0.2: BackdoorBench's LF.
        sigma: Width of the Gaussian ``G``, pixels of an image of 32x32, in [1, 16]. Default 6: BackdoorBench's LF.
        seed: Draws the noise, at least 0. Default 0: here.

    Raises:
        ValueError: A parameter is out of range.
    """

    name: ClassVar[str] = "lf_noise"
    paper: ClassVar[str] = "https://arxiv.org/abs/2104.03413"

    amplitude: float = 0.2
    sigma: float = 6
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("amplitude", self.amplitude, 0.01, 1)
        check_range("sigma", self.sigma, 1, 16)
        check_range("seed", self.seed, 0, integer=True)

    def _stamp(self, images: Tensor) -> Tensor:
        return add_pattern(images, resized(smooth_noise(self.seed, self.sigma, self.amplitude), *images.shape[-2:]))


@torch.no_grad()
def predict(logits: Logits, images: Tensor, pattern: Tensor) -> Tensor:
    """Classes int64 (B,) of uint8 (B, 3, H, W) with a float pattern in [0, 1] added."""
    batches = images.split(BATCH)
    return torch.cat([logits((batch / 255 + pattern).clamp(0, 1)).argmax(1) for batch in batches])


def deepfool(logits: Logits, image: Tensor, target: int) -> Tensor:
    """Targeted DeepFool (Moosavi-Dezfooli et al., CVPR 2016): linearise the boundary to the target again and again.

    Args:
        logits: Differentiable function of float32 (1, 3, H, W) in [0, 1].
        image: float32 (3, H, W) in [0, 1].
        target: The class to reach.

    Returns:
        float32 (3, H, W) to add to the image; not clipped. After 200 steps it is returned where it is.
    """
    moved = torch.zeros_like(image)
    for _ in range(STEPS):
        point = (image + (1 + OVERSHOOT) * moved).requires_grad_()
        scores = logits(point[None])[0]
        current = scores.argmax()
        if current == target:
            break
        gap = scores[current] - scores[target]
        (gradient,) = torch.autograd.grad(gap, point)
        # The small number carries the step over the boundary; a gradient of zero leaves it where it is.
        length = gradient.square().sum().clamp_min(torch.finfo(gradient.dtype).tiny)
        moved = moved - (gap.detach() + 1e-4) / length * gradient
    return (1 + OVERSHOOT) * moved


def smoothing(sigma: float, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Matrices float64 (H, H) and (W, W) such that ``rows @ image @ columns`` is the image smoothed with zero padding;
    sigma in pixels of an image whose shorter side is 32."""
    sigma = sigma * min(height, width) / SIDE
    radius = round(2.5 * sigma)
    total = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2).sum()

    def matrix(side: int) -> Tensor:
        offset = np.abs(np.arange(side)[:, None] - np.arange(side)[None, :])
        return torch.from_numpy(np.where(offset <= radius, np.exp(-0.5 * (offset / sigma) ** 2) / total, 0.0))

    return matrix(height), matrix(width)


def stretch(pattern: Tensor) -> Tensor:
    """Map the smallest value, over all pixels and channels, to 0 and the largest to 1."""
    low, high = pattern.aminmax()
    if not high > low:  # NaN too
        raise ValueError("lf: DeepFool found no step on the classifier (its gradients are zero or not finite)")
    return (pattern - low) / (high - low)


@lru_cache(maxsize=16)
def smooth_noise(seed: int, sigma: float, amplitude: float) -> Tensor:
    """LFNoise's pattern, uint8 (3, 32, 32). Shared by the callers; do not modify."""
    draws = random_uniform("lf noise", seed, 3 * SIDE * SIDE) - 0.5
    rows, columns = smoothing(sigma, SIDE, SIDE)
    return to_levels(stretch(rows @ torch.from_numpy(draws).reshape(3, SIDE, SIDE) @ columns) * (amplitude * 255))


def resized(pattern: Tensor, height: int, width: int) -> Tensor:
    """Resize a pattern uint8 (3, h, w) bilinearly to uint8 (3, height, width); itself where the size is right."""
    if tuple(pattern.shape[-2:]) == (height, width):
        return pattern
    return to_levels(F.interpolate(pattern[None].double(), (height, width), mode="bilinear")[0])


def add_pattern(images: Tensor, pattern: Tensor) -> Tensor:
    """``clip(x + v)`` for uint8 images (B, 3, H, W) and a uint8 pattern (3, H, W) on the CPU."""
    return (images.to(torch.int16) + pattern.to(images.device, torch.int16)).clamp_(0, 255).to(torch.uint8)
