"""WideResNet-d-k for 32x32 images: Zagoruyko and Komodakis, "Wide Residual Networks" (BMVC 2016, arXiv 1605.07146).

Pre-activation blocks of two 3x3 convolutions, three groups of 16k, 32k and 64k channels, 6n + 4 layers, no dropout.
Names of the weights are those of the PyTorch port that most papers use (``block1.layer.0.bn1, ..., convShortcut, bn1,
fc``).
"""

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


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
        first = BasicBlock(in_channels, channels, stride)
        self.layer = nn.Sequential(first, *[BasicBlock(channels, channels, 1) for _ in range(blocks - 1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """Maps images (B, in_chans, h, w) to logits (B, num_classes).

    Args:
        depth: Number of layers d, 6n + 4.
        width: Widening factor k, at least 1.
        num_classes: Number of classes; 0 leaves the classifier out.
        in_chans: Channels of the images.

    Raises:
        ValueError: ``depth`` is not 6n + 4 with n >= 1, or ``width`` is below 1.
    """

    def __init__(self, depth: int, width: int, num_classes: int = 10, in_chans: int = 3):
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1 or width < 1:
            raise ValueError(f"depth must be 6n + 4 (10, 16, 22, 28, 40, ...) and width >= 1; got {depth} and {width}")
        self.num_features = self.head_hidden_size = 64 * width
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.block1 = Group(16, 16 * width, 1, blocks)
        self.block2 = Group(16 * width, 32 * width, 2, blocks)
        self.block3 = Group(32 * width, 64 * width, 2, blocks)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        """Return the layer that makes the logits."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new, random classifier of ``num_classes`` classes in place; 0 leaves it out."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images to the last feature map (B, 64k, h/4, w/4)."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return F.relu(self.bn1(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Average the feature map over its pixels and classify it."""
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        return self.forward_head(self.forward_features(x))


# Checkpoints in circulation were trained with different normalisations: none is right by default, so none is given.
_CFG = {
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "num_classes": 10,
    "mean": None,
    "std": None,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "first_conv": "conv1",
    "classifier": "fc",
}
default_cfgs = generate_default_cfgs(dict.fromkeys(("wrn_cifar", "wrn16_1_cifar", "wrn28_10_cifar", "wrn40_2_cifar"), _CFG))


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
