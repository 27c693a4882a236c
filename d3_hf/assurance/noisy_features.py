"""Noise on BatchNorm and the features that classify: where do all other features lean? For networks with BatchNorm.

1. With gamma and beta of all BatchNorm channels, relative noise that raises the cross-entropy of the images most:
       max_{delta, xi}  L((1 + delta) gamma, (1 + xi) beta),    |delta|, |xi| <= 0.3
   in 30 steps by the sign, the running statistics kept. It stirs the channels that a backdoor lives on more than others.
2. With the features z that the head reads of the noisy network, a mask of those that classify, in (0, 1) by (tanh + 1) / 2:
       min_m  CE(head(m z), y) - CE(head((1 - m) z), y) + weight ||m||_1 / D
3. The other features, (1 - m) z, classify images without a backdoor nearly as well, since features are redundant; a backdoor's
   lie among them and take over. The score of a class is its mean log-probability there over the images of other classes.

Source: BAN (Xu et al., NeurIPS 2024), after the mask of BTI-DBF (Xu et al., ICLR 2024), written from published notes: size and
steps of the noise and 20 epochs of the mask are theirs. They look at the accuracy of (1 - m) z; the score by class, that the
noise is relative, the weight of the mask, its start, Adam and its rate are this project's.

Cost: 30 passes over the images forward and backward, one forward; the mask is found on the features alone. Blind to: networks
without BatchNorm, which are refused; backdoors of all classes; a head that was drawn anew and tuned. The noise is relative and
steps by its sign, so that rescaled channels change nothing, nor do permuted ones.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..data.fitting import run_with_fitting_batch
from ..data.images import RawImages
from ..data.preprocessing import Preprocessing
from ..models.batch_norm import batch_norms
from ..models.computed import refuse_hooked
from ..models.evaluating import evaluating
from ..models.features import HeadReading, read_head
from ..models.source import preprocessing_of
from .finding import Finding, check_comparable

MOST_NOISE, NOISE_STEPS = 0.3, 30
STEP = 0.1  # of the largest noise
MASK_EPOCHS, MASK_BATCH, MASK_RATE = 20, 32, 0.1
SPARSITY = 1.0  # weight of the mask's mean
BATCH = 32  # images in a pass that keeps its graph


def scales_of(model: nn.Module) -> dict[str, Tensor]:
    """gamma and beta of all BatchNorm layers by name; a ValueError if there are none."""
    layers = set(batch_norms(model))
    scales = {
        f"{name}.{part}": parameter.detach()
        for name, layer in model.named_modules()
        if layer in layers
        for part, parameter in layer.named_parameters(recurse=False)
    }
    if not scales:
        raise ValueError(f"this signal stirs the scales of BatchNorm layers, and {type(model).__name__} has none")
    return scales


@torch.enable_grad()
def noisy_scales(
    model: PreTrainedModel, images: RawImages, preprocessing: Preprocessing, steps: int, batch_size: int
) -> dict[str, Tensor]:
    """gamma and beta under the noise that raises the cross-entropy most, by name; the model is in evaluation mode."""
    scales, device = scales_of(model), next(model.parameters()).device
    values, noise = list(scales.values()), [torch.zeros_like(scale) for scale in scales.values()]

    def noisy() -> dict[str, Tensor]:
        return dict(zip(scales, torch._foreach_mul(values, torch._foreach_add(noise, 1.0)), strict=True))

    for _ in range(steps):
        total = [torch.zeros_like(scale) for scale in values]
        for tensor in noise:
            tensor.requires_grad_()
        for _, raw, labels in images.batches(batch_size):
            inputs = {"pixel_values": preprocessing(raw.to(device))}
            logits = functional_call(model, noisy(), kwargs=inputs).logits.float()
            loss = F.cross_entropy(logits, labels.to(device), reduction="sum") / len(images)
            torch._foreach_add_(total, torch.autograd.grad(loss, noise))
        with torch.no_grad():
            noise = torch._foreach_add(noise, torch._foreach_sign(total), alpha=STEP * MOST_NOISE)
            noise = torch._foreach_clamp_max(torch._foreach_clamp_min(noise, -MOST_NOISE), MOST_NOISE)
    return noisy()


@torch.enable_grad()
def classifying_mask(reading: HeadReading, labels: Tensor) -> Tensor:
    """The mask of the features that classify, (D,) in (0, 1)."""
    raw = torch.zeros(reading.features.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([raw], MASK_RATE)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    for _ in range(MASK_EPOCHS):
        for rows in order.split(MASK_BATCH):
            mask, features = (raw.tanh() + 1) / 2, reading.features[rows]
            kept, others = (F.linear(part * features, reading.weight, reading.bias) for part in (mask, 1 - mask))
            loss = F.cross_entropy(kept, labels[rows]) - F.cross_entropy(others, labels[rows]) + SPARSITY * mask.mean()
            (raw.grad,) = torch.autograd.grad(loss, raw)
            optimizer.step()
    return (raw.detach().tanh() + 1) / 2


def lean_of_the_others(reading: HeadReading, mask: Tensor, labels: Tensor) -> tuple[np.ndarray, float]:
    """Under ``(1 - m) z``: each class's mean log-probability over the images of others, float64 (C,), and the accuracy."""
    logits = F.linear((1 - mask) * reading.features, reading.weight, reading.bias).double()
    chances, is_right = logits.log_softmax(1), (logits.argmax(1) == labels).double().mean().item()
    return np.array([chances[labels != k, k].mean().item() for k in range(logits.shape[1])]), is_right


def noisy_features(model: PreTrainedModel, images: RawImages, steps: int = NOISE_STEPS, batch_size: int = BATCH) -> Finding:
    """Look for a class that the features lean to which do not classify, once noise has stirred the network.

    Args:
        model: A classifier of `load_classifier` with BatchNorm layers; left as it was.
        images: Of every class, without triggers as far as is known; 500 to 2,500.
        steps: Of the noise, at least 0.
        batch_size: Images in a pass, at least 1; halved while they do not fit into memory.

    Returns:
        Scores are in nats. ``details`` has the ``mask`` of the features that classify, (D,), and the others' ``accuracy``.

    Raises:
        ValueError: The model has no BatchNorm layer with a scale; a logit is not finite; a weight is computed by a hook, so
            that the model cannot be copied; see `check_comparable`, `preprocessing_of` and `read_head`.
        RuntimeError: A single image does not fit into the device's memory.
    """
    check_comparable(model, images)
    refuse_hooked(model)
    preprocessing, noisy = preprocessing_of(model), copy.deepcopy(model)
    with evaluating(model):
        found = run_with_fitting_batch(lambda size: noisy_scales(model, images, preprocessing, steps, size), batch_size)
    noisy.load_state_dict(found, strict=False)
    reading = read_head(noisy, images, preprocessing, batch_size)
    mask = classifying_mask(reading, images.labels)
    scores, accuracy = lean_of_the_others(reading, mask, images.labels)
    details = {"mask": mask.double().numpy(), "accuracy": np.array(accuracy)}
    return Finding.of("noisy_features", scores, images.class_names, **details)
