"""Bits hidden in images: a small U-Net writes them, a small network reads them back.

Both are fully convolutional. The image is divided into cells of 4x4 pixels, counted from its top left corner, and every
cell carries one bit. The design is from scratch; the idea is StegaStamp's (Tancik et al., CVPR 2020, arXiv 1904.05343).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

CELL = 4
WIDTH = 32
# What the encoder multiplies lies within +-4 and +-1 and comes in these steps: every product is a multiple of 2**-10, and every
# sum of them stays so small that float32 holds it exactly.
INPUT_STEP, WEIGHT_STEP = 2**-4, 2**-6
# Half of that: no sum lies midway between two inputs of the next layer, where rounding could go either way. It also outweighs
# the error of convolutions by transforms (Winograd), which some devices choose: about 1e-4 here.
OFF_TIES = 2**-11

BATCH, SIDE, LEARNING_RATE = 64, 32, 4e-3
# Weights of the three penalties in `train`, chosen on CIFAR-10 by what the decoder reads and how much residuals differ.
FAINT, ALIKE, MOVED = 0.05, 0.25, 1.0


def to_step(values: Tensor, step: float) -> Tensor:
    """Round to multiples of ``step``; the gradient passes as if nothing had happened."""
    return values.div(step).round().mul(step).detach() + (values - values.detach())


def activation(values: Tensor) -> Tensor:
    """ReLU up to 4, in steps."""
    return to_step(values.clamp(0, 4), INPUT_STEP)


def cells(images: Tensor) -> Tensor:
    """Grey levels float32 (B, 3, H, W) as (B, 12, h, w) in [-2, 2), H and W padded to whole cells, four pixels a place."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % CELL, 0, -height % CELL), mode="replicate")
    return F.pixel_unshuffle(padded / 64 - 2, 2)


def tiled(secret: Tensor, height: int, width: int) -> Tensor:
    """Repeat ``secret`` over all cells of an image of ``height`` x ``width`` pixels: (rows, columns)."""
    rows, columns = (torch.arange(math.ceil(side / CELL), device=secret.device) for side in (height, width))
    return secret[rows % secret.shape[0]][:, columns % secret.shape[1]]


class ExactConv(nn.Conv2d):
    """3x3 convolution with inputs and weights in such coarse steps that float32 adds them without error.

    An ordinary convolution adds in an order that depends on the size of the batch, the device and the number of threads; its
    last bits differ, and now and then a grey level of the trigger. This one gives the same numbers everywhere.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, 3, stride, padding=1)

    def forward(self, values: Tensor) -> Tensor:
        """Convolve float32 (B, inputs, h, w)."""
        weight = to_step(self.weight.clamp(-1, 1), WEIGHT_STEP)
        bias = to_step(self.bias, WEIGHT_STEP * INPUT_STEP) + OFF_TIES
        return F.conv2d(values, weight, bias, self.stride, self.padding)


class Encoder(nn.Module):
    """U-Net at half and quarter resolution that turns an image and bits into a residual."""

    def __init__(self):
        super().__init__()
        self.fine = ExactConv(12, WIDTH)
        self.down = ExactConv(WIDTH, 2 * WIDTH, stride=2)
        self.middle = ExactConv(2 * WIDTH + 1, 2 * WIDTH)
        self.up = ExactConv(3 * WIDTH, WIDTH)
        self.out = ExactConv(WIDTH, 12)

    def forward(self, images: Tensor, bits: Tensor) -> Tensor:
        """Residual float32 (B, 3, H, W) in (-1, 1), the same numbers alone and in a batch and on every device.

        Args:
            images: Grey levels, float32 (B, 3, H, W), whole numbers in [0, 255].
            bits: What to write, (rows, columns) of 0 and 1, one per cell.
        """
        height, width = images.shape[-2:]
        # As large as any input: with +-1 the networks take several times as many steps to find the bits.
        signs = (8 * bits.float() - 4).expand(len(images), 1, -1, -1)
        fine = activation(self.fine(to_step(cells(images), INPUT_STEP)))
        coarse = activation(self.down(fine))
        coarse = activation(self.middle(torch.cat([coarse, signs], dim=1)))
        fine = activation(self.up(torch.cat([fine, F.interpolate(coarse, scale_factor=2)], dim=1)))
        out = F.pixel_shuffle(to_step(self.out(fine), INPUT_STEP), 2)[..., :height, :width]
        return out / (1 + out.abs())  # in place of tanh, whose last bit depends on the machine


class Decoder(nn.Module):
    """Reads one bit per cell."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(12, WIDTH, 3, padding=1), nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(),
            nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1), nn.ReLU(),
            nn.Conv2d(2 * WIDTH, 1, 1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, rows, columns) for grey levels float32 (B, 3, H, W); positive means 1."""
        return self.layers(cells(images)).squeeze(1)


def add(images: Tensor, residual: Tensor) -> Tensor:
    """Whole grey levels in [0, 255], float32, with gradients to the residual."""
    return to_step(images + residual, 1).clamp(0, 255)


def new(network: type[nn.Module], generator: torch.Generator, device: torch.device) -> nn.Module:
    """A network with He's initial weights, drawn from ``generator`` (CPU) and not from the global one."""
    with torch.device("meta"):
        made = network()
    made = made.to_empty(device="cpu")
    for name, parameter in made.named_parameters():
        if name.endswith("weight"):
            nn.init.kaiming_normal_(parameter, generator=generator)
        else:
            nn.init.zeros_(parameter)
    return made.to(device)


def losses(encoder: Encoder, decoder: Decoder, images: Tensor, bits: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """What one batch costs; see `train`.

    Returns:
        Binary cross entropy in nats per bit, and the weighted sum of the penalties.
    """
    residual = bound * encoder(images, bits)
    targets = bits.float().expand(len(images), -1, -1)
    reading = F.binary_cross_entropy_with_logits(decoder(add(images, residual)), targets)
    directions = F.normalize(residual.flatten(1), dim=1)
    alike = (directions @ directions.T).fill_diagonal_(0).square().sum() / (len(images) * (len(images) - 1))
    elsewhere = decoder(add(images, residual.roll(1, 0)))
    moved = F.binary_cross_entropy_with_logits(elsewhere, torch.full_like(elsewhere, 0.5)) - math.log(2)
    return reading, FAINT * (residual / bound).square().mean() + ALIKE * alike + MOVED * moved


def train(
    images: Tensor, bound: float, steps: int, generator: torch.Generator, device: torch.device
) -> tuple[Encoder, Decoder]:
    """Train both networks on batches of 64 images, each batch with other bits.

    Minimised is the cross entropy of the bits read from the rounded image, plus penalties: on the squared residual; on
    the squared cosine between residuals of two images that carry the same bits; and on what can be read where a residual
    is moved to another image (cross entropy against 1/2). Without the last two the residual is nearly the same for all images:
    on CIFAR-10 the mean cosine is about 0.9. The penalties count as far as bits are read at all (times 1 minus the cross
    entropy over ln 2); in full from the start they leave an encoder that writes nothing.

    Args:
        images: uint8 (N, 3, H, W) on the CPU, N at least 64. Sides above 32 are cut to 32 at a random place.
        bound: Largest absolute residual in grey levels.
        steps: Number of updates.
        generator: CPU generator of all draws.
        device: Where to train.
    """
    encoder, decoder = (new(network, generator, device) for network in (Encoder, Decoder))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    height, width = (min(SIDE, side) for side in images.shape[-2:])
    shape = tiled(torch.zeros(1, 1), height, width).shape
    with torch.enable_grad(), tqdm(range(steps), "Training the encoder", unit="batch") as bar:
        for _ in bar:
            rows = torch.randperm(len(images), generator=generator)[:BATCH]
            top, left = (
                torch.randint(side - part + 1, (), generator=generator)
                for side, part in zip(images.shape[-2:], (height, width), strict=True)
            )
            batch = images[rows, :, top : top + height, left : left + width].to(device).float()
            bits = torch.randint(2, shape, generator=generator).to(device)
            reading, penalties = losses(encoder, decoder, batch, bits, bound)
            confidence = (1 - reading.detach() / math.log(2)).clamp_min(0)
            optimizer.zero_grad()
            (reading + confidence * penalties).backward()
            optimizer.step()
            schedule.step()
    return encoder, decoder
