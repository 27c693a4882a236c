"""One probe image through image processor, network and loss: what does not fit is said in one line, before any work.

Of a classifier logits are looked at, of an encoder features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..data.preprocessing import Preprocessing
from ..files import first_line
from .batch_norm import batch_norms
from .evaluating import evaluating, modes_kept
from .kinds import features_in, is_clip, is_encoder

TOO_FEW = "Expected more than 1 value per channel"  # torch's words for a batch that BatchNorm cannot normalise


def probe(model: PreTrainedModel, preprocessing: Preprocessing, where: str) -> None:
    """Classify or encode one grey picture.

    Args:
        model: The classifier or encoder.
        preprocessing: Of its image processor.
        where: What to call it in messages.

    Raises:
        ValueError: The network fails on what the processor gives, or returns other things than logits (1, classes) or
            features (1, width); an encoder draws its features at random.
    """
    picture = torch.full((1, 3, *preprocessing.size), 128, dtype=torch.uint8)
    parameter = next(model.parameters())
    pixels = preprocessing(picture).to(parameter)
    with evaluating(model), torch.no_grad():
        found = run(model, pixels, where)
        _check(found, 1, model, where)
        if is_encoder(model) and not torch.equal(found, run(model, pixels, where)):
            raise ValueError(
                f"{where}: {type(model).__name__} gives one picture other features each time: it is no encoder to use"
            )


def refuse_unseen_edges(model: PreTrainedModel, image_size: tuple[int, int], where: str) -> None:
    """Raise a ValueError if the last row or column of an image moves no logit or feature, as where patches do not fill it: a
    trigger in a corner would be invisible.

    Args:
        model: The classifier.
        image_size: (H, W) of what it takes.
        where: What to call the classifier in the message.
    """
    pixels = torch.randn(1, 3, *image_size, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()))
    with evaluating(model), torch.enable_grad():
        logits = run(model, pixels.requires_grad_(), where)
        (gradient,) = torch.autograd.grad(logits.square().sum(), pixels)
    if not (gradient[..., -1, :].any() and gradient[..., -1].any()):
        raise ValueError(
            f"{where}: {type(model).__name__} does not see the edge of images of {image_size[0]} x {image_size[1]} pixels: "
            "choose an image_size that is a multiple of its patches"
        )


def smallest_training_batch(model: PreTrainedModel, image_size: tuple[int, int], batch_norm: str = "train") -> int:
    """Train on black images, without a step, to find how many a batch must hold at least; the model is left as it was.

    Args:
        model: The classifier.
        image_size: (H, W) of what it takes.
        batch_norm: ``"train"`` if BatchNorm layers use the statistics of the batch.

    Returns:
        1; or 2 where a BatchNorm layer is left with one number of each channel (a feature map of 1x1 pixels).

    Raises:
        ValueError: In training mode the network fails, or returns other things than logits (B, classes).
    """
    parameter = next(model.parameters())
    devices = [parameter.device] if parameter.device.type == "cuda" else []
    with modes_kept(model), torch.random.fork_rng(devices), torch.no_grad():
        model.train()
        if batch_norm != "train":
            nn.ModuleList(batch_norms(model)).eval()
        for count in (1, 2):
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # running statistics, for one
            pixels = parameter.new_zeros(count, 3, *image_size)
            try:
                logits = run(model, pixels, type(model).__name__, buffers)
                _check(logits, count, model, type(model).__name__)
                if not is_encoder(model):
                    F.cross_entropy(logits.float(), torch.zeros(count, dtype=torch.int64, device=logits.device))
                return count
            except ValueError as error:
                if count == 2 or TOO_FEW not in str(error):
                    raise
    raise AssertionError("two images either pass or raise")


def logits_reach_all(model: nn.Module, image_size: tuple[int, int]) -> bool:
    """Whether the logits, or features, depend on every parameter that is trained, by one black image.

    On auxiliary classifiers they do not, nor on the layer after the last block of CLIP's image tower.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pixels = trained[0].new_zeros(1, 3, *image_size)
    with evaluating(model), torch.enable_grad():
        logits = run(model, pixels, type(model).__name__)
        return all(gradient is not None for gradient in torch.autograd.grad(logits.sum(), trained, allow_unused=True))


def run(model: nn.Module, pixels: Tensor, where: str, buffers: dict[str, Tensor] | None = None) -> Any:
    """Run a classifier on images and return its logits, or an encoder and return its features.

    Of a CLIP the likeness (B, 1) to a text of one word is returned, on which both towers have a part.

    Args:
        model: The classifier.
        pixels: (B, 3, h, w).
        where: What to call it in messages.
        buffers: In place of its own, by name.

    Raises:
        ValueError: It fails, or returns no logits, or no features.
    """
    kind, mode = type(model).__name__, " in training mode" if model.training else ""
    network = kind if where == kind else f"{where}: {kind}"
    inputs = {"pixel_values": pixels}
    if is_clip(model):
        inputs["input_ids"] = torch.full((1, 1), model.config.text_config.eos_token_id, device=pixels.device)
    try:
        output = functional_call(model, buffers or {}, args=(), kwargs=inputs)
    except Exception as error:  # foreign code can fail in any way; none of them is recovered from
        raise ValueError(
            f"{network} fails{mode} on RGB images of shape {tuple(pixels.shape)} ({first_line(error)}): only networks "
            "that take three channels at the size of their image processor are supported"
        ) from error
    if is_clip(model):
        return output.logits_per_image
    if is_encoder(model):
        return features_in(model, output)
    try:
        return output.logits
    except AttributeError as error:
        raise ValueError(f"{network} returns{mode} a {type(output).__name__} without logits: it is no classifier") from error


def _check(logits: Any, count: int, model: PreTrainedModel, where: str) -> None:
    if is_encoder(model):
        return _check_features(logits, count, model, where)
    wanted = (count, model.config.num_labels)
    if isinstance(logits, Tensor) and tuple(logits.shape) == wanted:
        return
    found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__} of {len(logits)}"
    raise ValueError(
        f"{where}: {type(model).__name__} returns {found} instead of logits {wanted}"
        + (" in training mode: switch its auxiliary or distillation classifiers off" if model.training else "")
    )


def _check_features(features: Tensor, count: int, model: PreTrainedModel, where: str) -> None:
    if features.ndim != 2 or len(features) != count or not features.isfinite().all():
        raise ValueError(
            f"{where}: {type(model).__name__} returns {tuple(features.shape)} instead of finite features ({count}, width)"
        )
