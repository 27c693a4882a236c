"""ResNet-8/20/32/44/56 for 32x32 images: He et al., "Deep Residual Learning" (CVPR 2016, arXiv 1512.03385), section 4.2.

Three stages of 16, 32 and 64 channels, 6n + 2 layers, and option-A shortcuts without parameters: where a stage begins,
every second pixel is kept and the new channels are zero. Names of the weights are those of the checkpoints in
circulation (``conv1, bn1, layer1.0.conv1, ..., linear``). 269,722 parameters at depth 20 and 10 classes.
"""

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .base import CifarNetwork, description, stage

STAGES = ((16, 1), (32, 2), (64, 2))  # channels, stride of the first block


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and an option-A shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.added = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.added == 0:
            return x
        before = self.added // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added - before))


class CifarResNet(CifarNetwork):
    """Maps images (B, in_chans, h, w) to logits (B, num_classes).

    Args:
        depth: Number of layers, 6n + 2.
        num_classes: Number of classes; 0 leaves the classifier out.
        in_chans: Channels of the images.

    Raises:
        ValueError: ``depth`` is not 6n + 2 with n >= 1.
    """

    classifier_name = "linear"

    def __init__(self, depth: int, num_classes: int = 10, in_chans: int = 3):
        super().__init__(num_features=STAGES[-1][0])
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n + 2 (8, 20, 32, 44, ...); got {depth}")
        self.conv1 = nn.Conv2d(in_chans, STAGES[0][0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STAGES[0][0])
        in_channels = STAGES[0][0]
        for number, (channels, stride) in enumerate(STAGES, start=1):
            self.add_module(f"layer{number}", stage(BasicBlock, in_channels, channels, stride, blocks))
            in_channels = channels
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images to the last feature map (B, 64, h/4, w/4)."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))


_NAMES = ("resnet8_cifar", "resnet20_cifar", "resnet32_cifar", "resnet44_cifar", "resnet56_cifar")
default_cfgs = generate_default_cfgs(dict.fromkeys(_NAMES, description("linear", pool_size=8)))


@register_model
def resnet8_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-8."""
    return build_model_with_cfg(CifarResNet, "resnet8_cifar", pretrained, depth=8, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-20."""
    return build_model_with_cfg(CifarResNet, "resnet20_cifar", pretrained, depth=20, **kwargs)


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-32."""
    return build_model_with_cfg(CifarResNet, "resnet32_cifar", pretrained, depth=32, **kwargs)


@register_model
def resnet44_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-44."""
    return build_model_with_cfg(CifarResNet, "resnet44_cifar", pretrained, depth=44, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-56."""
    return build_model_with_cfg(CifarResNet, "resnet56_cifar", pretrained, depth=56, **kwargs)
