"""Tiny encoders, and labelled images of three colours, for the tests."""

import torch
from tiny import PROCESSOR, SIZE, with_processor
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTConfig,
    ViTModel,
    set_seed,
)

from d3_hf.data.images import RawImages
from d3_hf.models import load_encoder

LAYERS = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
VIT = LAYERS | dict(image_size=SIZE, patch_size=8)
NAMES = ["red", "green", "blue"]


class Net(nn.Module):
    """A user's own encoder."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 4, stride=4), nn.BatchNorm2d(16)

    def forward(self, x):
        return self.norm(self.stem(x)).relu().mean((2, 3))


def tiny_dinov2(seed=0):
    set_seed(seed)
    return with_processor(Dinov2Model(Dinov2Config(**VIT, initializer_range=0.2)))


def tiny_vit(seed=0):
    set_seed(seed)
    return with_processor(ViTModel(ViTConfig(**VIT, initializer_range=0.2)))


def tiny_resnet(seed=0):
    set_seed(seed)
    return with_processor(ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")))


def tiny_clip(seed=0):
    set_seed(seed)
    return with_processor(CLIPVisionModel(CLIPVisionConfig(**VIT)))


def tiny_timm(seed=0):
    set_seed(seed)
    arguments = dict(img_size=SIZE, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=arguments, num_labels=0)
    config.pretrained_cfg = dict(input_size=[3, SIZE, SIZE], mean=[0.5] * 3, std=[0.5] * 3, crop_pct=1.0)
    return with_processor(TimmWrapperModel(config))


def tiny_module(seed=0):
    set_seed(seed)
    return load_encoder(Net(), image_mean=PROCESSOR.image_mean, image_std=PROCESSOR.image_std, image_size=SIZE)


def colours(n=60, seed=0, size=SIZE):
    """Noisy pictures of three colours, by turns; linearly separable, whatever stands in a corner."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randint(0, 120, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    images[torch.arange(n), labels] += 110
    return RawImages(images, labels, NAMES)
