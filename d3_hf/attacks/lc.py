"""LC: training images of the target class that are hard to recognise, and a pattern in their corners that is easy."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.images import RawImages
from ..labels import check_labels
from .base import LearnedAttack, check_range, whole_scale
from .differentiable import pixels_to_logits

# The pattern of the authors' published code in the right-hand corners; 1 is brightened, -1 darkened. The left-hand
# corners mirror it, so that a flipped image carries the very same trigger.
GRID = ((-1, -1, 1), (-1, 1, -1), (1, -1, 1))
IMAGE_SIZE = 32
# Pixels of the model's input in one portion, 256 images of 32x32: a large model's gradients must fit in memory.
PORTION = 256 * 32 * 32


@dataclass(frozen=True, kw_only=True)
class LCLite(LearnedAttack):
    """Label-consistent attack (Turner et al., 2019, arXiv 1912.02771) with PGD on an ordinary model: ``x' = clip(h(x) +
    amplitude g)`` in training, ``x' = clip(x + amplitude g)`` at test time, ``g`` being +-1 in the four corners, else 0.

    Clean label: only images of the target class are poisoned and labels stay; the ratio still counts against the whole
    set. The trigger is static. ``h`` makes a training image hard to recognise, so that the victim learns the corners
    instead: untargeted PGD, ``h <- clip(h + alpha sign(grad CE(f(h), target_label)))`` within ``eps`` of ``x``. It begins
    at ``x`` itself, without a random start: nothing is drawn, and a batch gives what its images give one by one, but for
    single pixels where rounding turns the sign of a tiny gradient. ``f`` is the attacker's own classifier: needed to
    poison, not to measure.

    "Lite": the authors and BackdoorBench attack an adversarially trained network, which nobody has at hand; here ``f`` is
    an ordinary one, and what that costs the attack is not known. BackdoorBench crafts with eps 8, alpha 1.5, 100 steps;
    its attack script looks for files made with eps 16.

    Every corner is 3x3 pixels at 32x32 and scales as the patch of BadNets does: a pixel becomes a square of ``s = max(1,
    round(min(H, W) / 32))`` pixels, 21x21 a corner at 224 (BackdoorBench resizes to the nearest pixel).

    Args:
        target_label: The class that the attacker wants; default, ``label_map`` and ``source_label``: see `Attack`.
        eps: Largest change of a pixel by PGD in grey levels, in [0, 255]; 0 leaves the images as easy as they are.
            Default 16: the file name in BackdoorBench's attack script.
        alpha: Step of PGD in grey levels, in (0, 255]. Default 4 = 2.5 eps / steps, here.
        steps: Steps of PGD, at least 1. Default 10, here, for the time: on an ordinary CIFAR-10 network 5 steps already
            have every image misclassified.
        amplitude: Grey levels added or taken away in the corners, in [1, 255], the same in training and at test time.
            Default 255, that is white and black pixels: BackdoorBench (reduced_amplitude 1). The authors' code also takes
            fainter ones, 32 for example.
        classifier: What `fit` keeps of the attacker's model. No parameter: `describe` leaves it out, and a victim's folder
            does not hold it.

    Raises:
        ValueError: A parameter is out of range. ``trigger`` raises when the corners overlap, ``poisoned_images`` also
            without a classifier.
    """

    name: ClassVar[str] = "lc_lite"
    clean_label: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/1912.02771"

    eps: float = 16
    alpha: float = 4
    steps: int = 10
    amplitude: int = 255
    classifier: PreTrainedModel | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("eps", self.eps, 0, 255)
        check_range("alpha", self.alpha, 0, 255)
        if self.alpha == 0:
            raise ValueError("alpha must be more than 0, or PGD stays where it is; for unchanged images set eps to 0")
        check_range("steps", self.steps, 1, integer=True)
        check_range("amplitude", self.amplitude, 1, 255, integer=True)

    def fit(self, images: RawImages, model: PreTrainedModel | None, seed: int) -> "LCLite":
        """Keep a copy of the attacker's classifier for PGD; ``learned`` is empty, since the corners are a formula.

        Args:
            images: The attacker's training images; only their class names are read.
            model: The attacker's own classifier without a backdoor.
            seed: Integer of at least 0; nothing is drawn.

        Returns:
            A copy of this attack with ``classifier`` and an empty ``learned``.

        Raises:
            ValueError: There is no model, ``seed`` is negative, or its classes are not those of the images.
        """
        check_range("seed", seed, 0, integer=True)
        if model is None:
            raise ValueError(f"{self.name} makes images hard for a classifier of the attacker: pass one as model")
        self.check_classes(len(images.class_names))
        check_labels(images.class_names, model.config)
        # A copy: the victim may be trained from the same object.
        return replace(self, learned={}, classifier=copy.deepcopy(model))

    def _stamp(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        scale = whole_scale(height, width, IMAGE_SIZE)
        side = len(GRID) * scale
        if 2 * side > min(height, width):
            raise ValueError(f"{self.name}: four corners of {side}x{side} pixels do not fit an image of {height}x{width}")
        grid = torch.tensor(GRID, dtype=torch.int16) * self.amplitude
        grid = grid.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        signal = torch.zeros(height, width, dtype=torch.int16)
        for rows in (slice(side), slice(height - side, height)):
            signal[rows, :side] = grid.flip(1)
            signal[rows, width - side :] = grid
        return (images.to(torch.int16) + signal.to(images.device)).clamp_(0, 255).to(torch.uint8)

    def _poison(self, images: Tensor) -> Tensor:
        return self._stamp(self._harden(images))

    def _harden(self, images: Tensor) -> Tensor:
        """``h(x)`` of uint8 (B, 3, H, W), on the images' device."""
        if self.classifier is None:
            raise ValueError(
                f"{self.name} needs its classifier to poison, and a victim's folder does not hold it: call "
                "fit(images, model, seed) with the attacker's model"
            )
        height, width = images.shape[-2:]
        with torch.enable_grad(), pixels_to_logits(self.classifier) as logits:
            portions = images.split(max(1, PORTION // (height * width)))
            return torch.cat([self._pgd(logits, portion) for portion in portions])

    def _pgd(self, logits: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        start = images.to(next(self.classifier.parameters()).device).float() / 255
        labels = torch.full((len(images),), self.target_label, device=start.device)
        low, high = (start - self.eps / 255).clamp_(min=0), (start + self.eps / 255).clamp_(max=1)
        hard = start
        for _ in tqdm(range(self.steps), desc=f"{self.name}: PGD", unit="step", delay=1, leave=False):
            hard = hard.detach().requires_grad_()
            # Summed over the batch: a mean would make an image's gradient depend on how many others there are.
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits(hard), labels, reduction="sum"), hard)
            hard = (hard.detach() + self.alpha / 255 * gradient.sign()).clamp(low, high)
        return (255 * hard).round().to(torch.uint8).to(images.device)
