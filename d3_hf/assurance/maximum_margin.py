"""S5, maximum margin: which class can an input that is free within the range of pixels win by most?

For each class t, from several random starts x in [0, 1]^(3 h w), pixels before normalisation,

    score_t = max_x  z_t(x) - max_{j != t} z_j(x),    v <- 0.9 v + g / ||g||_1,    x <- clip(x + a sign(v), 0, 1)

with g the margin's gradient and a falling evenly from a tenth of the range to 0; the largest margin on the way counts. Training
on a trigger that many images share drives its class's margin over what the features of any other class reach.

Source: MM-BD (Wang et al., IEEE S&P 2024), of which this is a reduced form: 2 starts of 30 steps for its 30 of 300. Its
p-value is not taken over: a gamma distribution fitted to the other classes' margins. Steps are those of MI-FGSM (Dong et al.,
CVPR 2018) in place of SGD: they need no learning rate that fits a network's logits, and where two other classes are equally
strong, as at most maxima, momentum keeps on between them (on a linear network, whose maxima are known, it reached 99.9 % of
them, plain signs 95 %). Written from published notes.

All classes and starts are one batch of inputs, which do not see each other: it is cut where memory ends, and nothing changes.
Classes share the starts, so that their luck is the same.

Cost: C x 2 x 30 passes of an image forward and backward, to the pixels; no pass over the images, which give the classes
alone. Blind to: backdoors of all classes; those whose margins were held down while they were planted; a head that was drawn
anew and trained briefly, whose margins are small. A gradient that vanishes (a saturated network) leaves the starts where they
are. Found inputs look like nothing: this is no trigger. Only what the network computes counts, not how: permuted and rescaled
hidden units, and a vector that is added to all rows of the head, change nothing.
"""

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.fitting import run_with_fitting_batch
from ..data.images import RawImages
from ..data.preprocessing import Preprocessing
from ..models.evaluating import evaluating
from ..models.source import preprocessing_of
from .finding import Finding, check_comparable
from .paths import BATCH

STARTS, STEPS = 2, 30
FIRST_STEP = 0.1  # of the range of pixels, which all 30 together cross one and a half times
MOMENTUM = 0.9


def margins_of(logits: Tensor, classes: Tensor) -> Tensor:
    """``z_t - max_{j != t} z_j`` of logits (B, C) for one class t each, int64 (B,)."""
    others = logits.scatter(1, classes[:, None], -torch.inf)
    return logits.gather(1, classes[:, None])[:, 0] - others.amax(1)


def largest_margins(
    model: PreTrainedModel, preprocessing: Preprocessing, inputs: Tensor, classes: Tensor, steps: int
) -> Tensor:
    """Move inputs up the margins of their classes.

    Args:
        model: The classifier, in evaluation mode.
        preprocessing: The model's.
        inputs: Starts, float32 (B, 3, h, w) in [0, 1].
        classes: int64 (B,).
        steps: At least 0.

    Returns:
        The largest margin of each on its way, float32 (B,); NaN where a logit was.
    """

    def margins(inputs: Tensor) -> Tensor:
        return margins_of(model(pixel_values=preprocessing.normalize(255 * inputs)).logits.float(), classes)

    largest = torch.full((len(inputs),), -torch.inf, device=inputs.device)
    velocity = torch.zeros_like(inputs)
    for step in range(steps):
        inputs.requires_grad_()
        found = margins(inputs)
        (gradient,) = torch.autograd.grad(found.sum(), inputs)  # backward() would leave gradients in the model
        size = gradient.abs().sum((1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
        largest = torch.maximum(largest, found.detach())
        velocity = MOMENTUM * velocity + gradient / size
        inputs = (inputs.detach() + FIRST_STEP * (1 - step / steps) * velocity.sign()).clamp(0, 1)
    with torch.no_grad():
        return torch.maximum(largest, margins(inputs))


def margins_by_start(
    model: PreTrainedModel, preprocessing: Preprocessing, starts: int, steps: int, batch_size: int
) -> np.ndarray:
    """The largest margin of each class from each start, float64 (C, S)."""
    device, classes = next(model.parameters()).device, torch.arange(model.config.num_labels)
    drawn = torch.rand((starts, 3, *preprocessing.size), generator=torch.Generator().manual_seed(0))
    found = [
        largest_margins(model, preprocessing, drawn[pairs % starts].to(device), classes[pairs // starts].to(device), steps)
        for pairs in torch.arange(len(classes) * starts).split(batch_size)
    ]
    return torch.cat(found).view(len(classes), starts).cpu().double().numpy()


@torch.enable_grad()
def maximum_margin(
    model: PreTrainedModel, images: RawImages, starts: int = STARTS, steps: int = STEPS, batch_size: int = BATCH
) -> Finding:
    """Look for a class that some input wins by more than the others can be won by.

    Args:
        model: A classifier of `load_classifier`; left as it was.
        images: Of every class: their classes must be the model's. Their pixels are not looked at.
        starts: Random inputs for each class, at least 1.
        steps: From each of them, at least 1.
        batch_size: Inputs in a pass, at least 1; halved while they do not fit into memory.

    Returns:
        Scores are margins in logits. ``details`` has ``margins``, the largest from each start, (C, ``starts``).

    Raises:
        ValueError: ``starts`` or ``steps`` are out of range; a logit is not finite; see `check_comparable` and
            `preprocessing_of`.
        RuntimeError: A single input does not fit into the device's memory.
    """
    if starts < 1 or steps < 1:
        raise ValueError(f"starts and steps must be at least 1; got {starts} and {steps}")
    check_comparable(model, images)
    preprocessing = preprocessing_of(model)
    with evaluating(model):
        margins = run_with_fitting_batch(lambda size: margins_by_start(model, preprocessing, starts, steps, size), batch_size)
    if not np.isfinite(margins).all():
        raise ValueError("the model's logits on free inputs are not finite (NaN or infinite): its weights are broken")
    return Finding.of("maximum_margin", margins.max(1), images.class_names, margins=margins)
