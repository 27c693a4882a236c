"""Images in every form in which a Trainer's user may hold them, and a trainer of them."""

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from PIL import Image
from tiny import FAST, tiny_samples, tiny_vit
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from d3_hf import FineTuningConfig, FineTuningTrainer, RawImages

NAMES = ["cat", "dog", "frog"]
COUNT = 16
SAMPLES = tiny_samples(COUNT)
PIXELS = torch.stack([sample["pixel_values"] for sample in SAMPLES])
LABELS = torch.tensor([sample["labels"] for sample in SAMPLES])
PICTURES = [Image.fromarray(pixels) for pixels in np.random.default_rng(0).integers(0, 256, (COUNT, 20, 20, 3), dtype=np.uint8)]


def trainer(folder, data, evaluated=None, cls=FineTuningTrainer, names=NAMES, **options):
    defaults = {"per_device_train_batch_size": 8, "learning_rate": 0.1} | FAST
    args = FineTuningConfig(str(folder), **(defaults | options))
    model = tiny_vit()
    model.config.id2label = dict(enumerate(names))
    return cls(model, args, data, evaluated)


def trained(folder, data, **options):
    made = trainer(folder, data, **options)
    made.train()
    return torch.cat([parameter.detach().flatten() for parameter in made.model.parameters()])


def images(names=NAMES, **columns):
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=names)})
    made = Dataset.from_dict({"image": PICTURES, "label": LABELS.tolist()}, features=features)
    for name, values in columns.items():
        made = made.add_column(name, values)
    return made


def of_rows(function):
    """A transform of `images` that yields what a function makes of the rows' numbers."""
    return images(row=list(range(COUNT))).with_transform(lambda batch: function(batch["row"]))


def mapped(column="labels", **columns):
    return Dataset.from_dict({"pixel_values": PIXELS.numpy(), column: LABELS.tolist(), **columns})


class Generated(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from zip(PIXELS, LABELS, strict=True)


def generated():
    for pixels, label in zip(PIXELS.numpy(), LABELS.tolist(), strict=True):
        yield {"pixel_values": pixels, "labels": label}


READY = {
    "transform": lambda: of_rows(lambda rows: {"pixel_values": list(PIXELS[rows]), "labels": LABELS[rows].tolist()}),
    "transform with label and more": lambda: of_rows(
        lambda rows: {"pixel_values": [*PIXELS[rows]], "label": [*LABELS[rows]], "image": [None] * len(rows), "name": rows}
    ),
    "mapped": mapped,
    "mapped, torch": lambda: mapped().with_format("torch"),
    "mapped, numpy": lambda: mapped("label").with_format("numpy"),
    "mapped beside pictures": lambda: images(pixel_values=PIXELS.tolist()).with_format("torch"),
    "pairs": lambda: list(zip(PIXELS, LABELS.tolist(), strict=True)),
    "pairs of arrays": lambda: [(p.double().numpy(), np.int64(k)) for p, k in zip(PIXELS, LABELS, strict=True)],
    "TensorDataset": lambda: TensorDataset(PIXELS, LABELS),
    "Subset": lambda: Subset(TensorDataset(PIXELS.flip(0), LABELS.flip(0)), range(COUNT - 1, -1, -1)),
    "ConcatDataset": lambda: ConcatDataset([TensorDataset(PIXELS[:5], LABELS[:5]), TensorDataset(PIXELS[5:], LABELS[5:])]),
    "Subset of a transform": lambda: Subset(READY["transform"](), range(COUNT)),
}  # fmt: skip


class Folder(list):
    """As torchvision's ImageFolder: pairs, and the names of the classes."""

    def __init__(self, samples, classes=NAMES, transform=None):
        super().__init__(samples)
        self.classes, self.transform = classes, transform


PAIRS = list(zip(PICTURES, LABELS.tolist(), strict=True))
PICTURE_FORMS = {
    "pairs": lambda: PAIRS,
    "ImageFolder": lambda: Folder(PAIRS),
    "Subset of an ImageFolder": lambda: Subset(Folder(PAIRS[::-1]), range(COUNT - 1, -1, -1)),
    "ConcatDataset": lambda: ConcatDataset([Folder(PAIRS[:3]), images().select(range(3, COUNT))]),
    "Subset of a datasets.Dataset": lambda: Subset(images(), range(COUNT)),
    "uint8 tensors": lambda: [(torch.from_numpy(np.array(p)).permute(2, 0, 1), label) for p, label in PAIRS],
    "uint8 arrays": lambda: [(np.array(picture), label) for picture, label in PAIRS],
    "RawImages": lambda: RawImages.from_dataset(images()),
    "format torch": lambda: images().with_format("torch"),
}

SPLITS = DatasetDict({"train": images(), "test": images()})
