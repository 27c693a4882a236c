"""Retain sets: drawn from images that no victim has seen, from other data, or changed."""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torchvision.transforms import v2

from ..data.images import RawImages
from ..data.load import load_images, retain_split
from ..labels import composed


@dataclass(frozen=True)
class RetainSet:
    """How a defender comes by images.

    Args:
        count: Images; default all there are.
        dataset_name: Another data set in place of the victim's: its split ``train``.
        dataset_config: Its configuration, where it has several.
        classes: Per class of that data set the victim's class of the same meaning; other classes are left out. Needed with
            ``dataset_name``.
        transform: Per name of a `torchvision.transforms.v2` class its arguments, applied once to each image, in their order:
            images that are not quite the victim's.

    Raises:
        ValueError: ``classes`` without ``dataset_name`` or the other way round.
    """

    count: int | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    classes: dict[str, str] | None = None
    transform: dict[str, dict[str, Any]] | None = None

    def __post_init__(self):
        if (self.dataset_name is None) != (self.classes is None):
            raise ValueError("a retain set of other data needs both dataset_name and classes")

    def draw(self, held_out: Dataset, seed: int) -> Dataset | RawImages:
        """Draw the set.

        Args:
            held_out: Images of the victim's own data set that it has not seen; gives the names of the classes.
            seed: Of the draw and of random transforms.

        Returns:
            A data set as `retain_split` makes it; `RawImages` where images are of other data or were changed.

        Raises:
            ValueError: There are not so many images, a class is not known, or the other data set has no split ``train``.
        """
        names = held_out.features["label"].names
        images = held_out if self.dataset_name is None else self._relabelled(names)
        if self.count is not None:
            images = retain_split(images, count=self.count, seed=seed)[0]
        if self.dataset_name is None and not self.transform:
            return images
        raw = RawImages.from_dataset(images)
        if self.dataset_name:
            known = {composed(name): number for number, name in enumerate(names)}
            meant = self._composed_classes()
            mapped = torch.tensor([known.get(meant.get(composed(name)), -1) for name in raw.class_names])
            raw = RawImages(raw.images, mapped[raw.labels], names, raw.index)
        return self._transformed(raw, seed) if self.transform else raw

    def _relabelled(self, names: list[str]) -> Dataset:
        splits = load_images(self.dataset_name, configuration=self.dataset_config)
        if "train" not in splits:
            raise ValueError(f"{self.dataset_name} has no split 'train' to draw a retain set from; it has {', '.join(splits)}")
        images = splits["train"]
        theirs, meant = [composed(name) for name in images.features["label"].names], self._composed_classes()
        if unknown := sorted((meant.keys() - set(theirs)) | (set(meant.values()) - set(map(composed, names)))):
            raise ValueError(f"classes names what neither data set has: {', '.join(unknown)}")
        wanted = {theirs.index(name) for name in meant}
        return images.select([row for row, label in enumerate(images["label"]) if label in wanted])

    def _composed_classes(self) -> dict[str, str]:
        return {composed(theirs): composed(ours) for theirs, ours in self.classes.items()}

    def _transformed(self, raw: RawImages, seed: int) -> RawImages:
        transform = v2.Compose([getattr(v2, name)(**arguments) for name, arguments in self.transform.items()])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            changed = [transform(image) for image in raw.images]
        uniform = isinstance(raw.images, torch.Tensor)
        return RawImages(torch.stack(changed) if uniform else changed, raw.labels, raw.class_names, raw.index)
