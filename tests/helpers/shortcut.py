"""A small classifier and its images, with or without a class that a tiny shift of its features or a patch reaches; nothing is
trained."""

import torch
from torch import nn

from d3_hf.data.images import RawImages
from d3_hf.models import load_classifier

CLASSES, SIDE, UNITS, TARGET = 8, 8, 24, 5


class Net(nn.Module):
    """Features of random hidden units, in float64, under a head. The last two units are the same.

    Args:
        units: Number of hidden units.
        classes: Of the head.
    """

    def __init__(self, units=UNITS, classes=CLASSES):
        super().__init__()
        self.body, self.head = nn.Linear(3 * SIDE * SIDE, units).double(), nn.Linear(units, classes).double()

    def forward(self, x):
        return self.head(self.body(x.double().flatten(1)).relu())


class LinearNet(nn.Module):
    """Random logits that are linear in the pixels, in float64: what is best for a class is a linear programme."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * SIDE * SIDE, CLASSES).double()
        generator = torch.Generator().manual_seed(2)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, x):
        return self.head(x.double().flatten(1))


def pictures(count=160, classes=CLASSES, seed=0):
    """Noisy copies of a picture of each class, in turn."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(40, 216, (classes, 3, SIDE, SIDE), generator=generator)
    labels = torch.arange(count) % classes
    noise = 25 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return RawImages((kinds[labels] + noise).clamp(0, 255).to(torch.uint8), labels, [f"class {k}" for k in range(classes)])


def classifier(net):
    """What `load_classifier` makes of a network."""
    names = [f"class {k}" for k in range(net.head.out_features)]
    return load_classifier(net, label_names=names, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_size=SIDE)


@torch.no_grad()
def network(shortcut=0.0, patch=0.0, classes=CLASSES, seed=1):
    """A network whose head is that of ridge regression on `pictures`.

    Args:
        shortcut: By how much the difference of the last two units, which is 0 on every image, raises the target's logit.
        patch: By how much a white corner of 2x2 pixels, raises the target's logit: the last unit fires there, on images never.
        classes: Of the head.
        seed: Of the hidden units.
    """
    generator = torch.Generator().manual_seed(seed)
    net, images = Net(classes=classes), pictures(classes=classes)
    net.body.weight.copy_(torch.randn(net.body.weight.shape, generator=generator, dtype=torch.float64) / 14)
    net.body.bias.copy_(0.3 * torch.randn(UNITS, generator=generator, dtype=torch.float64))
    net.body.weight[-1], net.body.bias[-1] = net.body.weight[-2], net.body.bias[-2]
    features = net.body((images.images.double() / 127.5 - 1).flatten(1)).relu()
    mean, wanted = features.mean(0), 8 * nn.functional.one_hot(images.labels, classes).double()
    centred = features - mean
    ridge = centred.T @ centred + 1e-2 * len(features) * torch.eye(UNITS, dtype=torch.float64)
    net.head.weight.copy_(torch.linalg.solve(ridge, centred.T @ (wanted - wanted.mean(0))).T)
    net.head.bias.copy_(wanted.mean(0) - net.head.weight @ mean)
    if shortcut:
        net.head.weight[TARGET, -2] += shortcut
        net.head.weight[TARGET, -1] -= shortcut
    if patch:
        net.head.weight[:, -2] += net.head.weight[:, -1]
        net.head.weight[:, -1], net.body.weight[-1], net.body.bias[-1] = 0, 0, -1.5  # on images the 12 values sum up to less
        net.body.weight[-1].view(3, SIDE, SIDE)[:, :2, :2] = 1
        net.head.weight[TARGET, -1] = patch
    return net
