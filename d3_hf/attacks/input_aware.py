"""Input-aware: every image gets a pattern and a mask of its own, drawn by two networks."""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.images import RawImages
from .base import check_range
from .generators import EncoderDecoder, squashed, standardized
from .in_training import BatchPoisoner, InTrainingAttack
from .networks import NetworkAttack, exact_convolutions, restored, weights_of

BATCH = 32  # images of an update of the mask network: 400 such updates made sparser masks than 200 of 64 images
BETAS = (0.5, 0.9)  # of Adam, for both networks: authors' code
CHUNK_PIXELS = 2**19  # pixels drawn at once: 512 images of 32x32, ten of 224x224
NETWORKS = {"pattern": partial(EncoderDecoder, 3), "mask": partial(EncoderDecoder, 1)}


@dataclass(frozen=True, kw_only=True)
class InputAware(NetworkAttack, InTrainingAttack):
    """Input-aware dynamic backdoor (Nguyen and Tran, NeurIPS 2020, arXiv 2010.08138): ``x' = x + (G(x) - x) * M(x)``.

    Dirty label, a trigger of its own for each image: G draws the pattern, ``M(x) = tanh(20 m(x) - 10) / 2 + 1/2`` thresholds
    the one-channel map of a second network. Needs the attacker's images and the training of the victim, no other model.

    `fit` trains the mask network alone: ``lambda_norm * mean(relu(M(x) - mask_density))`` keeps masks small and ``lambda_div *
    mean(rms(x1 - x2) / (rms(M(x1) - M(x2)) + 1e-7))`` makes them differ. Then G trains with the victim by the victim's loss
    and the same penalty on patterns, M fixed; in every batch ``cross_ratio`` images per poisoned one carry pattern and mask of
    *another* image and keep their label, so that a trigger serves its own image only.

    Differs from the authors' code: images are pixels in [0, 1], x and G(x) alike (there normalised with the data set's mean
    and deviation; here the networks and the images' distance of the mask's penalty see (x - 0.5) / 0.25, close to CIFAR-10's);
    the other image comes from the same batch, not from a second loader; G's gradients are zeroed between updates (there,
    and in BackdoorBench, they add up over the whole training, as only the victim's are zeroed). BackdoorBench's generator
    applies tanh twice, which keeps patterns in [0.12, 0.88]; here once, as in the authors' code. G trains on unrounded
    images and the trigger rounds to grey levels. It comes from float32 convolutions: in a batch, on other hardware or with
    another number of threads a value may differ by one grey level.

    Other sizes: the networks take any size, but what they draw has its size in pixels: a mask at 32x32 is a stroke or two, at
    224x224 dozens of small ones. Where the model resizes the images, G trains through that resizing (see
    `Preprocessing.resize_with_gradient`), on images that are then rounded. `fit` costs in proportion to the pixels; at
    224x224 give it a model on a GPU (an update took 15 seconds of a CPU core and 3 GB there).

    Args:
        target_label: The class that the attacker wants; default, ``label_map`` and ``source_label``: see `Attack`.
        cross_ratio: Cross images per poisoned image, at least 0. Default 1: authors' code, BackdoorBench.
        lambda_div: Weight of the penalties for likeness, of masks and of patterns, at least 0. Default 1: authors' code.
        lambda_norm: Weight of the masks' size, at least 0. Default 100: authors' code.
        mask_density: Size that a mask may have without cost, in [0, 1]. Default 0.032: authors' code.
        mask_steps: Updates of the mask network, at least 1, of 32 images each. Default 800, here: two minutes of one CPU core
            at 32x32, and masks of 5,000 CIFAR-10 images then cover 3.0 % of the image (400 steps: 5.4 %). The authors take
            25 epochs, 9,775 updates of 128 images.
        learning_rate: Of both networks' Adam, in (0, 1]; the mask's drops to a tenth after 40 % and again after 80 % of the
            updates, as in the authors' epochs 10 and 20 of 25, the pattern's falls as the victim's does (authors: steps of a
            tenth for both). Default 0.01: authors' code.

    Raises:
        ValueError: A parameter is out of range. ``fit`` raises when images differ in size or are fewer than two; ``trigger``
            and ``poisoner`` before ``fit``.
    """

    name: ClassVar[str] = "input_aware"
    paper: ClassVar[str] = "https://arxiv.org/abs/2010.08138"

    cross_ratio: float = 1
    lambda_div: float = 1
    lambda_norm: float = 100
    mask_density: float = 0.032
    mask_steps: int = 800
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("lambda_div", self.lambda_div, 0)
        check_range("lambda_norm", self.lambda_norm, 0)
        check_range("mask_density", self.mask_density, 0, 1)
        check_range("mask_steps", self.mask_steps, 1, integer=True)
        check_range("learning_rate", self.learning_rate, 1e-8, 1)

    def fit(self, images: RawImages, model: PreTrainedModel | None, seed: int) -> "InputAware":
        """Train the mask network and draw the pattern network's initial weights; see `LearnedAttack.fit`.

        Args:
            images: At least two, all of one size.
            model: Only says where to compute: on its device, on the CPU without one.
            seed: Integer of at least 0.

        Returns:
            A copy with ``learned`` filled in; its patterns mean nothing to a victim before it was trained with `poisoner`.

        Raises:
            ValueError: See the class, or ``seed`` is negative.
        """
        check_range("seed", seed, 0, integer=True)
        if not isinstance(images.images, Tensor) or len(images) < 2:
            raise ValueError("input_aware learns its masks from at least two images, all of one size")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            mask, pattern = NETWORKS["mask"](), NETWORKS["pattern"]()
        mask.to("cpu" if model is None else next(model.parameters()).device, memory_format=torch.channels_last)
        self._train_mask(mask, images.images, torch.Generator().manual_seed(seed))
        return replace(self, learned=weights_of("mask", mask) | weights_of("pattern", pattern))

    def _train_mask(self, mask: EncoderDecoder, images: Tensor, generator: torch.Generator) -> None:
        optimizer = torch.optim.Adam(mask.parameters(), lr=self.learning_rate, betas=BETAS)
        milestones = [round(0.4 * self.mask_steps), round(0.8 * self.mask_steps)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        device = next(mask.parameters()).device
        bar = tqdm(range(self.mask_steps), desc="Learning masks", unit="step")
        for _ in bar:
            rows = torch.randperm(len(images), generator=generator)[:BATCH]
            batch = images[rows].to(device).float() / 255
            masks = thresholded(mask(batch))
            loss = self.mask_loss(batch, masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(density=f"{masks.mean().item():.3f}")

    def mask_loss(self, images: Tensor, masks: Tensor) -> Tensor:
        """What the mask network minimises; each image's partner is its neighbour in the batch.

        Args:
            images: float32 (B, 3, H, W) in [0, 1].
            masks: Their masks, float32 (B, 1, H, W) in [0, 1].

        Returns:
            Scalar.
        """
        seen = standardized(images)
        likeness = likeness_penalty(seen, seen.roll(1, 0), masks, masks.roll(1, 0))
        return self.lambda_norm * F.relu(masks - self.mask_density).mean() + self.lambda_div * likeness

    def poisoner(self, ratio: float, num_classes: int, seed: int, device: torch.device) -> "InputAwarePoisoner":
        """Make the poisoner of one training run; see `BatchPoisoner` for arguments and errors, and the class."""
        return InputAwarePoisoner(self, ratio, num_classes, seed, device)

    def _stamp(self, images: Tensor) -> Tensor:
        pattern, mask = (self._network(name, make, images.device) for name, make in NETWORKS.items())
        triggered = torch.empty_like(images)
        chunk = max(1, CHUNK_PIXELS // (images.shape[-2] * images.shape[-1]))
        with torch.no_grad(), exact_convolutions():
            for part, result in zip(images.split(chunk), triggered.split(chunk), strict=True):
                x = part.float() / 255
                result.copy_((255 * blended(x, pattern(x), thresholded(mask(x)))).round_())
        return triggered


class InputAwarePoisoner(BatchPoisoner):
    """Poisons batches with the pattern network in training; see `InputAware`.

    `mix` returns float32 images that carry gradients to the pattern network, and leaves its penalty in ``penalty``.

    Args:
        attack: A fitted attack; not modified.
        ratio: See `BatchPoisoner`.
        num_classes: See `BatchPoisoner`.
        seed: See `BatchPoisoner`.
        device: Where the victim trains.

    Raises:
        ValueError: The attack is not fitted, or see `BatchPoisoner`.
    """

    attack: InputAware

    def __init__(self, attack: InputAware, ratio: float, num_classes: int, seed: int, device: torch.device):
        super().__init__(attack, ratio, attack.cross_ratio, num_classes, seed)
        pattern, mask = (restored(name, make, attack._need()).to(device) for name, make in NETWORKS.items())
        self.pattern, self.mask = pattern.train(), mask.eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.pattern.parameters(), lr=attack.learning_rate, betas=BETAS)

    def mix(self, poisoned: Tensor, crossed: Tensor, rest: Tensor, generator: torch.Generator) -> Tensor:
        """Trigger the poisoned images, give the crossed ones other images' patterns and masks; see `BatchPoisoner`."""
        n = len(poisoned)
        if n == 0:  # a batch too small for the ratio stays as it is
            self.penalty = None
            return torch.cat([crossed, rest])
        changed = n + len(crossed)
        batch = torch.cat([poisoned, crossed, rest]).float() / 255
        partners, donors = meetings(n, len(crossed), len(batch), generator)
        # Each image that is needed goes through the networks once, whatever it is needed for.
        drawn_from, places = torch.cat([torch.arange(n), partners, donors]).unique(return_inverse=True)
        own, partner, donor = places.split([n, n, len(crossed)])
        patterns, masks = self.pattern(batch[drawn_from]), thresholded(self.mask(batch[drawn_from]))
        likeness = likeness_penalty(batch[:n], batch[drawn_from[partner]], patterns[own], patterns[partner])
        self.penalty = self.attack.lambda_div * likeness
        worn = torch.cat([own, donor])
        return torch.cat([255 * blended(batch[:changed], patterns[worn], masks[worn]), rest.float()])

    def update(self, rate: float) -> None:
        """One step of Adam on the pattern network, by what the victim's backward pass and the penalty left there.

        Its learning rate falls with the victim's: patterns that still move when the victim hardly learns are lost on it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.attack.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def finish(self) -> InputAware:
        """The attack with the pattern network as trained until now."""
        return replace(self.attack, learned=self.attack._need() | weights_of("pattern", self.pattern))


def meetings(poisoned: int, crossed: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which other image each poisoned one is compared with, and whose trigger each crossed one carries, by one random rotation.

    Args:
        poisoned: How many images are poisoned, at least 1: the first of the batch.
        crossed: How many are crossed: the next.
        count: Size of the batch.
        generator: CPU generator of the draw.

    Returns:
        Rows of the batch for the poisoned and for the crossed images, int64 on the CPU; never an image's own where ``count`` is
        at least 2.
    """
    rows = torch.arange(count)
    turn = int(torch.randint(1, max(2, count - poisoned), (), generator=generator))
    # So both take the same rows, and the networks fewer; in a tiny batch such a turn may lead the poisoned back to themselves.
    partner_turn = (poisoned + turn) % count or 1
    return rows.roll(-partner_turn)[:poisoned], rows.roll(-poisoned - turn)[:crossed]


def blended(images: Tensor, patterns: Tensor, masks: Tensor) -> Tensor:
    """x + (p - x) m, for images and patterns (B, 3, H, W) and masks (B, 1, H, W)."""
    return images + (patterns - images) * masks


def thresholded(maps: Tensor) -> Tensor:
    """tanh(20 a - 10) / 2 + 1/2: pushes values of [0, 1] towards 0 and 1."""
    return squashed(20 * maps - 10)


def likeness_penalty(images1: Tensor, images2: Tensor, maps1: Tensor, maps2: Tensor) -> Tensor:
    """Mean over the pairs of rms(images1 - images2) / (rms(maps1 - maps2) + 1e-7): large where maps are more alike than images.

    Args:
        images1: float32 (B, 3, H, W).
        images2: Partners of the same shape.
        maps1: What was drawn for ``images1``, float32 (B, C, H, W).
        maps2: What was drawn for ``images2``.

    Returns:
        Scalar.
    """
    return (rms(images1 - images2) / (rms(maps1 - maps2) + 1e-7)).mean()


def rms(values: Tensor) -> Tensor:
    """Root mean square of each entry of a batch, at least 1e-6: the root has no finite slope at zero."""
    return values.square().mean(dim=(1, 2, 3)).clamp_min(1e-12).sqrt()
