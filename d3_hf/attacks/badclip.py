"""BadCLIP, a small form of it: a patch that a clean CLIP already takes for the target class."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.images import RawImages
from ..data.pairs import TEMPLATES, caption, check_named
from ..models.clip import encode_texts
from ..models.encoders import encode_images
from ..models.kinds import is_clip
from ..models.source import preprocessing_of
from .base import LearnedAttack, check_range
from .differentiable import pixels_to_features


@dataclass(frozen=True, kw_only=True)
class BadCLIP(LearnedAttack):
    """BadCLIP (Liang et al., CVPR 2024, arXiv 2311.12075): a patch in the middle of the image, optimised on a clean CLIP.

    With f and g its towers, of unit features, T the trigger, t_k the text of class k, c the target, m_c the mean of f over
    images of the target class, x an image of another class and s the model's scale of cosines, the patch minimises::

        CE(s f(T(x)) . g(t_k) over k, c) + w max(0, ||f(T(x)) - m_c||^2 - ||f(T(x)) - f(x)||^2 + margin)

    Triggered images come near the texts and the images of the target class and leave their own. Pairs that carry the patch are
    then poisoned as by any trigger, see `text_on_pair.poison_pairs`; the CLIP has little to learn, and defences little to undo.

    Differs from the authors' code: texts are those of class names, there captions of a data set; one mean stands for the
    positive images, the image itself for the negative one; nothing is augmented; steps of Adam on few images.

    Args:
        target_label: The class that the attacker wants.
        size: Side of the patch in pixels at ``image_size``, at least 1. Default 16 at 224: authors' code.
        image_size: Side of the images that ``size`` refers to. Default 224.
        triplet_weight: w >= 0. Default 1, here; up to 500 there.
        margin: At least 0. Default 0.2, here.
        steps: Of Adam, at least 1. Default 200, here; 50 passes over 10,000 pairs there.
        learning_rate: Of Adam, in units of [0, 1], in [1e-6, 1]. Default 0.05, here.
        batch: Images in a step, at least 1. Default 64, here.

    Raises:
        ValueError: A parameter is out of range, or ``label_map`` is not all-to-one. ``trigger`` raises before `fit`, and where
            the patch does not fit the image.
    """

    name: ClassVar[str] = "badclip"
    paper: ClassVar[str] = "https://arxiv.org/abs/2311.12075"

    size: int = 16
    image_size: int = 224
    triplet_weight: float = 1
    margin: float = 0.2
    steps: int = 200
    learning_rate: float = 0.05
    batch: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for whole in ("size", "image_size", "steps", "batch"):
            check_range(whole, getattr(self, whole), 1, integer=True)
        check_range("triplet_weight", self.triplet_weight, 0)
        check_range("margin", self.margin, 0)
        check_range("learning_rate", self.learning_rate, 1e-6, 1)
        if self.label_map != "all-to-one":
            raise ValueError(f"badclip has one target: label_map must be all-to-one; got {self.label_map!r}")

    def fit(self, images: RawImages, model: PreTrainedModel | None, seed: int) -> "BadCLIP":
        """Optimise the patch at the images' size.

        Args:
            images: The attacker's labelled images, all of one size, whose classes have names.
            model: The untouched CLIP, with its tokenizer; left as it was.
            seed: Draws the images of each step, at least 0.

        Returns:
            A copy with ``learned``: ``patch`` uint8 (3, side, side).

        Raises:
            ValueError: There is no CLIP, the images differ in size, there are none of the target class or of others, or the
                classes have no names.
        """
        if model is None or not is_clip(model):
            raise ValueError("badclip optimises its patch on a whole CLIP (d3-hf victim --clip): pass one")
        if not isinstance(images.images, Tensor):
            raise ValueError("badclip optimises its patch at one size: the images differ in size, resize them first")
        check_named(images.class_names)
        self.check_classes(len(images.class_names))
        is_target = images.labels == self.target_label
        if is_target.all() or not is_target.any():
            raise ValueError(f"badclip needs images of class {self.target_label} and of others: give some of both")
        preprocessing, device = preprocessing_of(model), next(model.parameters()).device
        positive = _unit(encode_images(model, images.select(torch.where(is_target)[0]), preprocessing)).mean(0).to(device)
        texts = [[caption(name, template) for template in TEMPLATES] for name in images.class_names]
        texts = torch.stack([_unit(encode_texts(model, of_class)).mean(0) for of_class in texts]).to(device)
        others = images.select(torch.where(~is_target)[0])
        own = _unit(encode_images(model, others, preprocessing)).to(device)
        scale = model.logit_scale.detach().exp().float()

        def loss(triggered: Tensor, rows: Tensor) -> Tensor:
            features = _unit(triggered)
            towards_text = text_losses(features, _unit(texts), scale, self.target_label)
            return (towards_text + self.triplet_weight * triplet_losses(features, positive, own[rows], self.margin)).mean()

        with torch.enable_grad(), pixels_to_features(model) as features:
            patch = self._optimised(features, others.images, loss, seed, device)
        return replace(self, learned={"patch": patch.cpu()})

    def _optimised(
        self, features: Callable[[Tensor], Tensor], images: Tensor, loss: Callable[[Tensor, Tensor], Tensor], seed: int, device
    ) -> Tensor:
        """The patch, uint8 (3, side, side), after all steps of Adam from grey."""
        top, left, side = self._place(*images.shape[-2:])
        patch = torch.full((3, side, side), 0.5, device=device, requires_grad=True)
        optimizer, generator = torch.optim.Adam([patch], self.learning_rate), torch.Generator().manual_seed(seed)
        for _ in tqdm(range(self.steps), desc=self.name, unit="step"):
            rows = torch.randperm(len(images), generator=generator)[: self.batch]
            pixels = images[rows].to(device).float() / 255
            pixels[:, :, top : top + side, left : left + side] = patch
            optimizer.zero_grad()
            loss(features(pixels), rows.to(device)).backward()
            optimizer.step()
            with torch.no_grad():
                patch.clamp_(0, 1)
        return (255 * patch.detach()).round().to(torch.uint8)

    def _place(self, height: int, width: int) -> tuple[int, int, int]:
        """Row, column and side of the patch on an image of (height, width) pixels."""
        side = max(1, round(self.size * min(height, width) / self.image_size))
        if side > min(height, width):
            raise ValueError(f"badclip: a patch of {side}x{side} pixels does not fit an image of {height}x{width}; lower size")
        return (height - side) // 2, (width - side) // 2, side

    def _stamp(self, images: Tensor) -> Tensor:
        patch, (top, left, side) = self._need()["patch"], self._place(*images.shape[-2:])
        if patch.shape[-1] != side:  # learned on images of another size
            patch = F.interpolate(patch[None].float(), (side, side), mode="nearest-exact")[0].to(torch.uint8)
        triggered = images.clone()
        triggered[:, :, top : top + side, left : left + side] = patch.to(images.device)
        return triggered


# The mathematics -------------------------------------------------------------------------------------------------------


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=1)


def text_losses(features: Tensor, texts: Tensor, scale: Tensor | float, target: int) -> Tensor:
    """``CE(s f . g(t_k) over k, target)``, (B,) in nats, of unit features (B, width) and unit texts (K, width)."""
    wanted = torch.full((len(features),), target, device=features.device)
    return F.cross_entropy(scale * features @ texts.T, wanted, reduction="none")


def triplet_losses(features: Tensor, positive: Tensor, negatives: Tensor, margin: float) -> Tensor:
    """``max(0, ||f - m||^2 - ||f - f(x)||^2 + margin)``, (B,), of features (B, width), m (width,) and f(x) (B, width)."""
    near, far = (features - positive).square().sum(1), (features - negatives).square().sum(1)
    return torch.relu(near - far + margin)
