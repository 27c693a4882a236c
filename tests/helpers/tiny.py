"""Tiny models and images for the tests."""

import torch
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

SIZE, CLASSES = 16, 3
# Options of a run that makes a network for the digits and trains it for two steps.
NEW_VIT = {
    "architecture": "vit",
    "model_args": {"patch_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    "image_size": 32,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
# What the slow references of a step compute, whatever the rule for the network.
SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "warmup_steps": 0, "cutmix": 0}
FAST = {"max_steps": 2, "disable_tqdm": True, "use_cpu": True}
PROCESSOR = ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def tiny_vit(seed=0):
    set_seed(seed)
    config = ViTConfig(
        image_size=SIZE, patch_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        num_labels=CLASSES, initializer_range=0.3,
    )  # fmt: skip
    return with_processor(ViTForImageClassification(config))


def tiny_dinov2(seed=0):
    set_seed(seed)
    config = Dinov2Config(
        image_size=SIZE, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=CLASSES,
        initializer_range=0.3,
    )  # fmt: skip
    return with_processor(Dinov2ForImageClassification(config))


def tiny_resnet(seed=0):
    set_seed(seed)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=CLASSES)
    return with_processor(ResNetForImageClassification(config))


def tiny_timm_vit(seed=0):
    set_seed(seed)
    arguments = dict(img_size=SIZE, patch_size=8, embed_dim=12, depth=2, num_heads=2)
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=arguments, num_labels=CLASSES)
    config.pretrained_cfg = dict(input_size=[3, SIZE, SIZE], mean=[0.5] * 3, std=[0.5] * 3, crop_pct=1.0)
    return with_processor(TimmWrapperForImageClassification(config))


def with_processor(model):
    model.image_processor = PROCESSOR
    return model


def tiny_samples(n=16, seed=0):
    """Ready-made samples: float pixel_values (3, SIZE, SIZE) and a label each, learnable from the mean colour."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    pixels = 0.3 * torch.randn(n, 3, SIZE, SIZE, generator=generator)
    pixels[torch.arange(n), labels] += 1.0
    return [{"pixel_values": p, "labels": label} for p, label in zip(pixels, labels.tolist(), strict=True)]
