"""The small encoder-decoders of the input-aware attack: one draws a pattern for each image, one a mask.

Written from the description in Nguyen and Tran (NeurIPS 2020, arXiv 2010.08138).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Levels and channels of the first one (each further level has twice as many): authors' code.
LEVELS, WIDTH = 3, 32
STRIDE = 2**LEVELS


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Convolution 3x3 and BatchNorm (momentum 0.05: authors' code); the norm makes the convolution's bias needless."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs, momentum=0.05))


class EncoderDecoder(nn.Module):
    """Three levels down, three up, without skip connections: images to maps with values in [0, 1] of the same size.

    Fully convolutional. Sides that eight does not divide are padded by repeating the last row and column, and the result is
    cropped.

    Args:
        outputs: Channels of the result.
    """

    def __init__(self, outputs: int):
        super().__init__()
        channels = [WIDTH * 2**level for level in range(LEVELS)]
        layers: list[nn.Module] = []
        for inputs, level in zip([3, *channels], channels, strict=False):
            layers += [block(inputs, level), nn.ReLU(), block(level, level), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [block(channels[-1], channels[-1]), nn.ReLU()]
        for level, below in zip(reversed(channels), [*reversed(channels[:-1]), outputs], strict=True):
            layers += [nn.Upsample(scale_factor=2, mode="bilinear"), block(level, level), nn.ReLU()]
            layers += [block(level, below), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor) -> Tensor:
        """Map float32 (B, 3, H, W) in [0, 1] to float32 (B, outputs, H, W) in [0, 1]."""
        height, width = images.shape[-2:]
        padded = F.pad(standardized(images), (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
        return squashed(self.layers(padded)[..., :height, :width])


def standardized(images: Tensor) -> Tensor:
    """Images in [0, 1] as the networks see them: (x - 0.5) / 0.25."""
    return (images - 0.5) / 0.25


def squashed(values: Tensor) -> Tensor:
    """tanh(v) / 2 + 1/2, in [0, 1]."""
    return torch.tanh(values) / 2 + 0.5
