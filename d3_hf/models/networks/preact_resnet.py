"""PreAct-ResNet18 for 32x32 images: He et al., "Identity Mappings in Deep Residual Networks" (ECCV 2016, arXiv
1603.05027).

The variant of BackdoorBench and of most backdoor papers: a 3x3 stem without normalisation, stages of 64, 128, 256 and
512 channels, 1x1 shortcuts taken after the first activation, and neither BatchNorm nor ReLU before the pooling.
11,171,146 parameters at 10 classes. Names of the weights are those of the checkpoints in circulation (``conv1,
layer1.0.bn1, ..., layer2.0.shortcut.0, ..., linear``).
"""

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .base import CifarNetwork, description, stage

STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # channels, stride of the first block


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        identity = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        return self.conv2(F.relu(self.bn2(out))) + identity


class PreActResNet(CifarNetwork):
    """Maps images (B, in_chans, h, w) to logits (B, num_classes).

    Args:
        blocks: Number of blocks of each of the four stages.
        num_classes: Number of classes; 0 leaves the classifier out.
        in_chans: Channels of the images.
    """

    classifier_name = "linear"

    def __init__(self, blocks: tuple[int, int, int, int], num_classes: int = 10, in_chans: int = 3):
        super().__init__(num_features=STAGES[-1][0])
        in_channels = STAGES[0][0]
        self.conv1 = nn.Conv2d(in_chans, in_channels, 3, padding=1, bias=False)
        for number, ((channels, stride), count) in enumerate(zip(STAGES, blocks, strict=True), start=1):
            self.add_module(f"layer{number}", stage(PreActBlock, in_channels, channels, stride, count))
            in_channels = channels
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images to the last feature map (B, 512, h/8, w/8)."""
        return self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))


default_cfgs = generate_default_cfgs({"preact_resnet18_cifar": description("linear", pool_size=4)})


@register_model
def preact_resnet18_cifar(pretrained: bool = False, **kwargs) -> PreActResNet:
    """PreAct-ResNet18 with the CIFAR stem."""
    return build_model_with_cfg(PreActResNet, "preact_resnet18_cifar", pretrained, blocks=(2, 2, 2, 2), **kwargs)
