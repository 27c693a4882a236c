"""WideResNet-d-k for 32x32 images: Zagoruyko and Komodakis, "Wide Residual Networks" (BMVC 2016, arXiv 1605.07146).

Pre-activation blocks of two 3x3 convolutions, three groups of 16k, 32k and 64k channels, 6n + 4 layers, no dropout.
Names of the weights are those of the PyTorch port that most papers use (``block1.layer.0.bn1, ..., convShortcut, bn1,
fc``).
"""

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .base import CifarNetwork, description, stage


class BasicBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions; a 1x1 shortcut where the number of channels changes."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.convShortcut = None if in_channels == channels else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        identity = x if self.convShortcut is None else self.convShortcut(out)
        out = self.conv1(out)
        return self.conv2(F.relu(self.bn2(out))) + identity


class Group(nn.Module):
    """Blocks of one width, the first with the stride."""

    def __init__(self, in_channels: int, channels: int, stride: int, blocks: int):
        super().__init__()
        self.layer = stage(BasicBlock, in_channels, channels, stride, blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(CifarNetwork):
    """Maps images (B, in_chans, h, w) to logits (B, num_classes).

    Args:
        depth: Number of layers d, 6n + 4.
        width: Widening factor k, at least 1.
        num_classes: Number of classes; 0 leaves the classifier out.
        in_chans: Channels of the images.

    Raises:
        ValueError: ``depth`` is not 6n + 4 with n >= 1, or ``width`` is below 1.
    """

    classifier_name = "fc"

    def __init__(self, depth: int, width: int, num_classes: int = 10, in_chans: int = 3):
        super().__init__(num_features=64 * width)
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1 or width < 1:
            raise ValueError(f"depth must be 6n + 4 (10, 16, 22, 28, 40, ...) and width >= 1; got {depth} and {width}")
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.block1 = Group(16, 16 * width, 1, blocks)
        self.block2 = Group(16 * width, 32 * width, 2, blocks)
        self.block3 = Group(32 * width, 64 * width, 2, blocks)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images to the last feature map (B, 64k, h/4, w/4)."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return F.relu(self.bn1(x))


_NAMES = ("wrn_cifar", "wrn16_1_cifar", "wrn28_10_cifar", "wrn40_2_cifar")
default_cfgs = generate_default_cfgs(dict.fromkeys(_NAMES, description("fc", pool_size=8)))


@register_model
def wrn_cifar(pretrained: bool = False, **kwargs) -> WideResNet:
    """WideResNet of any ``depth=`` and ``width=``."""
    return build_model_with_cfg(WideResNet, "wrn_cifar", pretrained, **kwargs)


@register_model
def wrn16_1_cifar(pretrained: bool = False, **kwargs) -> WideResNet:
    """WideResNet-16-1, as in NAD (Li et al., ICLR 2021)."""
    return build_model_with_cfg(WideResNet, "wrn16_1_cifar", pretrained, depth=16, width=1, **kwargs)


@register_model
def wrn28_10_cifar(pretrained: bool = False, **kwargs) -> WideResNet:
    """WideResNet-28-10."""
    return build_model_with_cfg(WideResNet, "wrn28_10_cifar", pretrained, depth=28, width=10, **kwargs)


@register_model
def wrn40_2_cifar(pretrained: bool = False, **kwargs) -> WideResNet:
    """WideResNet-40-2."""
    return build_model_with_cfg(WideResNet, "wrn40_2_cifar", pretrained, depth=40, width=2, **kwargs)
