"""What a purification did to a model, for figures: losses along the line through both, weight changes, features, classes.

The line is ``theta(t) = theta_init + t (theta_end - theta_init)``: t = 0 is the victim, t = 1 the purified model, t > 1 goes on
in the same direction (D3, Wei, Liu and Zha, ICCV 2025, arXiv 2411.09585). Where the backdoor loss stays low up to t = 1 the
purification did not leave the region of the backdoor. Nothing here changes a model that it is given.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.fitting import BATCH, run_with_fitting_batch
from ..data.images import RawImages
from ..data.preprocessing import Preprocessing
from ..models.batch_norm import reestimate_batch_norm
from ..models.features import read_head
from .measure import Measurement, Trigger, measure
from .metrics import Proportion, accuracy

STEPS = tuple(quarter / 4 for quarter in range(-2, 17))
BATCH_NORMS = ("interpolated", "re-estimated")
NO_CLASS = -1  # what an image without finite logits is given

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class PathPoint:
    """One point of the line.

    Args:
        t: Position; 0 is the victim, 1 the purified model.
        clean_loss: Mean cross-entropy of the images as they are, nats; inf where the network overflows.
        backdoor_loss: Mean cross-entropy of the triggered images against the label that the attacker wants, nats; inf where
            the network overflows.
        accuracy: ACC.
        asr: ASR.
    """

    t: float
    clean_loss: float
    backdoor_loss: float
    accuracy: Proportion
    asr: Proportion


def path(
    initial: PreTrainedModel,
    final: PreTrainedModel,
    images: RawImages,
    preprocessing: Preprocessing,
    attack: Trigger,
    steps: Sequence[float] = STEPS,
    batch_norm: str = "interpolated",
    retain: RawImages | None = None,
    progress: bool = True,
) -> list[PathPoint]:
    """Measure the models along the line from the victim through the purified model.

    Computes on a float32 copy, on the victim's device. A network whose logits are NaN or infinite is no error here, unlike
    in `measure`: far out on the line are weights that nobody trained, and where they break is part of the picture. Its loss
    is inf, and an image without finite logits counts as given no class at all.

    Args:
        initial: The victim.
        final: The purified model, of the same architecture.
        images: Test images with true labels.
        preprocessing: That of both models.
        attack: The trigger and its rule for labels.
        steps: The values of t. Default: -0.5 to 4 in steps of 0.25, the range of the paper's figure.
        batch_norm: Where BatchNorm's running statistics come from: ``"interpolated"``, on the line like the weights (a
            variance that would fall below zero is zero), or ``"re-estimated"`` from ``retain`` at every point, t = 0 and
            t = 1 included, which then differ a little from the models as they are deployed.
        retain: Clean images for ``"re-estimated"``; not read otherwise.
        progress: Show a progress bar.

    Returns:
        One point per step, in the order of ``steps``.

    Raises:
        ValueError: The models' weights differ in name, shape or kind; ``batch_norm`` is unknown, or ``"re-estimated"`` for a
            model without running statistics or without ``retain``; the attack's label is no class of the
            model, or there is no image that the attack counts.
    """
    start, end = initial.state_dict(), final.state_dict()
    check_same_weights(start, end)
    if batch_norm not in BATCH_NORMS:
        raise ValueError(f"batch_norm must be one of {', '.join(BATCH_NORMS)}; got {batch_norm!r}")
    if batch_norm == "re-estimated" and (retain is None or not any(name.endswith("running_var") for name in start)):
        raise ValueError("batch_norm='re-estimated' needs BatchNorm and clean images to estimate it from: pass retain")
    triggered = triggered_images(images, attack, initial.config.num_labels)
    wanted = attack.poisoned_labels(triggered.labels, initial.config.num_labels)
    triggered = RawImages(triggered.images, wanted, triggered.class_names)
    model = copy.deepcopy(initial).float().eval()
    points = []
    for t in tqdm(steps, desc="Walking the path", unit="point", disable=not progress):
        model.load_state_dict(interpolate(start, end, t))
        if batch_norm == "re-estimated":
            run_with_fitting_batch(lambda size: reestimate_batch_norm(model, _inputs(model, retain, preprocessing, size)))
        clean_loss, acc = run_with_fitting_batch(lambda size: _loss_and_share(model, images, preprocessing, size))
        backdoor_loss, asr = run_with_fitting_batch(lambda size: _loss_and_share(model, triggered, preprocessing, size))
        points.append(PathPoint(float(t), clean_loss, backdoor_loss, acc, asr))
    return points


def t50(points: Sequence[PathPoint]) -> float | None:
    """How far back from the purified model to the victim the backdoor works again, as a share of the way, in [0, 1].

    The least share at which ASR is 0.5, by straight lines between the points; 0 where the purified model's own is, None where
    none is up to the victim. Source: Min et al. (NeurIPS 2024), who draw the path backwards; the number is this project's.

    Args:
        points: Of `path`, with t = 0 and t = 1 among them.
    """
    back = sorted((1 - point.t, point.asr.value) for point in points if 0 <= point.t <= 1)
    if back[0][1] >= 0.5:
        return 0.0
    for (near, low), (far, high) in itertools.pairwise(back):
        if high >= 0.5:
            return near + (0.5 - low) / (high - low) * (far - near)
    return None


def _inputs(model: PreTrainedModel, images: RawImages, preprocessing: Preprocessing, batch_size: int) -> Iterator[Tensor]:
    """Batches as the model takes them, on its device."""
    for _, raw, _ in images.batches(batch_size):
        yield preprocessing(raw.to(model.device))


def interpolate(start: StateDict, end: StateDict, t: float) -> StateDict:
    """The weights ``start + t (end - start)`` in float32.

    Floating tensors are on the line, exactly ``start`` at t = 0 and ``end`` at t = 1. BatchNorm's ``running_var`` is kept
    from falling below zero, where t > 1 or t < 0 would take a variance that has shrunk or grown: the square root of a
    negative one is NaN and would end the line. Integers (``num_batches_tracked``, position ids) are those of ``start``.

    Args:
        start: State dict of the victim.
        end: State dict of the purified model, on any device.
        t: Position.

    Raises:
        ValueError: See `check_same_weights`.
    """
    check_same_weights(start, end)
    point: StateDict = {}
    for name, tensor in start.items():
        if not tensor.is_floating_point():
            point[name] = tensor.clone()
            continue
        # torch.lerp is exact at both ends, which start + t * (end - start) is not at t = 1.
        value = torch.lerp(tensor.float(), end[name].to(tensor.device).float(), float(t))
        point[name] = value.clamp_(min=0) if name.rpartition(".")[2] == "running_var" else value
    return point


def check_same_weights(first: StateDict, second: StateDict) -> None:
    """Raise a ValueError that names the first weight in which two state dicts differ by name, shape or kind of number."""
    if odd := sorted(first.keys() ^ second.keys()):
        side = "first" if odd[0] in first else "second"
        raise ValueError(f"the models have different architectures: {odd[0]} ({len(odd)} in all) is only in the {side}")
    for name, tensor in first.items():
        other = second[name]
        if tensor.shape != other.shape or tensor.is_floating_point() != other.is_floating_point():
            raise ValueError(
                f"the models have different architectures: {name} is {tensor.dtype} {tuple(tensor.shape)} in the first, "
                f"{other.dtype} {tuple(other.shape)} in the second"
            )


def triggered_images(images: RawImages, attack: Trigger, num_classes: int) -> RawImages:
    """The images that the attack counts, with the trigger and their true labels.

    Args:
        images: Raw images with true labels.
        attack: The trigger and its rule for labels.
        num_classes: Classes of the model.

    Raises:
        ValueError: The attack's label is no class of the model, or no image is of a class that the attack counts.
    """
    attack.check_classes(num_classes)
    rows = attack.counted(images.labels).nonzero().flatten()
    if len(rows) == 0:
        raise ValueError("no image is of a class that the attack counts (all-to-one: any but the target)")
    counted = images.select(rows)
    pictures: list[Tensor] = [torch.empty(0)] * len(counted)
    for rows, raw, _ in counted.batches(BATCH):
        for row, picture in zip(rows.tolist(), attack.trigger(raw), strict=True):
            pictures[row] = picture
    uniform = isinstance(counted.images, Tensor)
    pictures = torch.stack(pictures) if uniform else pictures
    return RawImages(pictures, counted.labels, counted.class_names, counted.index)


@torch.inference_mode()
def _loss_and_share(
    model: PreTrainedModel, images: RawImages, preprocessing: Callable[[Tensor], Tensor], batch_size: int
) -> tuple[float, Proportion]:
    """Mean cross-entropy against ``images.labels`` and the share classified so."""
    device = next(model.parameters()).device
    total, predicted, truth = 0.0, [], []
    for _, raw, labels in images.batches(batch_size):
        labels = labels.to(device)
        logits = model(pixel_values=preprocessing(raw.to(device))).logits
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        predicted.append(torch.where(logits.isfinite().all(1), logits.argmax(1), NO_CLASS).cpu())
        truth.append(labels.cpu())
    loss = total / len(images)
    return loss if math.isfinite(loss) else math.inf, accuracy(torch.cat(predicted), torch.cat(truth))


def weight_changes(before: PreTrainedModel, after: PreTrainedModel, relative: bool = True) -> dict[str, Tensor]:
    """By how much each weight changed: matrices, kernels and embeddings; no biases, no normalisation.

    Args:
        before: The victim.
        after: The purified model, of the same architecture.
        relative: Divide by the root mean square that the weight's tensor had before. Dividing each number by its own old value
            would let the numbers that were near zero by chance fill the histogram's tail.

    Returns:
        Parameter name -> ``after - before`` flattened, signed, float32, on the CPU.

    Raises:
        ValueError: The architectures differ; with ``relative``, a weight was zero throughout, so that nothing is relative to
            it.
    """
    check_same_weights(before.state_dict(), after.state_dict())
    new = dict(after.named_parameters())
    changes = {}
    for name, parameter in before.named_parameters():
        if parameter.ndim < 2:
            continue
        old = parameter.detach().cpu().float().flatten()
        change = new[name].detach().cpu().float().flatten() - old
        scale = old.square().mean().sqrt() if relative else torch.ones(())
        if scale == 0:
            raise ValueError(f"{name} was zero throughout, so that no change is relative to it; use relative=False")
        changes[name] = change / scale
    return changes


def penultimate_features(model: PreTrainedModel, images: RawImages, preprocessing: Preprocessing) -> Tensor:
    """What the head sees: the input of the linear layer that gives the logits, in eval mode.

    Args:
        model: The classifier; its head is found by `find_head`.
        images: Raw images.
        preprocessing: The model's.

    Returns:
        float32 (N, D) on the CPU, in the order of the images.

    Raises:
        ValueError: The model has no single head, or a logit is not finite.
    """
    return read_head(model, images, preprocessing).features


def silhouette(clean: Tensor, labels: Tensor, triggered: Tensor) -> float:
    """Do triggered images sit together, or each among the clean images of its own class?

    Clusters: the clean images of each true class, and one more of all triggered images, whatever their true class. For a
    triggered image let a be its mean distance to the other triggered ones and b that to the nearest class of clean ones; its
    silhouette is (b - a) / max(a, b), and the result is the mean over the triggered images (Euclidean, in feature space,
    never on a t-SNE picture, which keeps no distances). Near 1: they form a cluster of their own, the backdoor is alive. Near
    0: they are together, but inside one class of clean images, as a rule the target's; alive as well. Below 0: they are spread
    over the classes; repaired if those are their own, which RA tells and this number does not.

    Args:
        clean: Features of clean images, float (N, D).
        labels: Their true classes, integers (N,).
        triggered: Features of triggered images of several true classes, float (M, D).

    Returns:
        The mean silhouette of the triggered images, in [-1, 1].

    Raises:
        ValueError: Shapes disagree, there is no clean image, or fewer than 2 are triggered.
    """
    from sklearn.metrics import silhouette_samples

    if clean.ndim != 2 or clean.shape[1:] != triggered.shape[1:] or labels.shape != clean.shape[:1]:
        raise ValueError(
            "silhouette needs features (N, D), labels (N,) and triggered features (M, D); got shapes "
            f"{tuple(clean.shape)}, {tuple(labels.shape)} and {tuple(triggered.shape)}"
        )
    if len(clean) < 1 or len(triggered) < 2:
        raise ValueError(f"silhouette needs 1 clean and 2 triggered images; got {len(clean)} and {len(triggered)}")
    own = torch.full((len(triggered),), int(labels.max()) + 1)
    values = silhouette_samples(torch.cat([clean, triggered]).numpy(), torch.cat([labels, own]).numpy())
    return float(values[len(clean) :].mean())


def per_class(
    model: PreTrainedModel, images: RawImages, preprocessing: Preprocessing, attack: Trigger
) -> dict[str, Measurement]:
    """`measure` each true class by itself: ACC, ASR, RA and PACC with their counts.

    Args:
        model: The classifier.
        images: Raw images with true labels.
        preprocessing: The model's.
        attack: The trigger and its rule for labels.

    Returns:
        Class name -> measurement, for the classes that the attack counts and that have an image, in the order of the labels.

    Raises:
        ValueError: No image is of a class that the attack counts; see also `measure`.
    """
    counted = images.labels[attack.counted(images.labels)].unique().tolist()
    if not counted:
        raise ValueError("no image is of a class that the attack counts (all-to-one: any but the target)")
    found = {}
    for label in counted:
        rows = (images.labels == label).nonzero().flatten()
        found[images.class_names[label]] = measure(model, images.select(rows), preprocessing, attack, progress=False)
    return found
