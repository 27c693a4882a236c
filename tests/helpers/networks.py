"""Networks, files and fixtures for the tests of `load_classifier`."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from d3_hf.models import new_classifier

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
NORM = {"image_mean": MEAN, "image_std": STD}
WRN = {"architecture": "wrn_cifar", "model_args": {"depth": 10, "width": 1}}
TIMM_VIT = {"img_size": 32, "patch_size": 4, "depth": 1, "embed_dim": 32, "num_heads": 2}
NAMES = [f"class {index}" for index in range(10)]
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A user's own network, with a name of its own for every weight."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=4)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.norm(self.stem(x)).relu().mean((2, 3)))


class PairNet(Net):
    def forward(self, x):
        return super().forward(x), x


class TiedNet(Net):
    def __init__(self):
        super().__init__()
        self.again = self.head


@pytest.fixture(scope="session")
def network() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("wrn_cifar", num_classes=10, depth=10, width=1).eval()
    model.bn1.running_mean.uniform_()
    return model


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**sizes, intermediate_size=32, num_labels=10, id2label=dict(enumerate(NAMES)))
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}, **NORM).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def timm_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("timm")
    new_classifier("vit_tiny_patch16_224", label_names=NAMES, model_args=TIMM_VIT, **NORM).save_pretrained(folder)
    return folder


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES).logits


def saved(folder: Path, weights, suffix: str = ".pth") -> Path:
    path = folder / f"weights{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    return path
