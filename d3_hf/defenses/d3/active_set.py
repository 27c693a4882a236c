"""The active set of a hinge: graph and gradient only for the images that have one.

With the loss ``max(0, CE - epsilon)`` an image whose ``CE <= epsilon`` adds nothing to the gradient. A pass without graph
finds the others in a micro-batch, and only they go forward again and backward. Forward and backward cost about three forward
passes: with a share a of active images that is ``1 + 3 a`` passes against 3 of the dense step, and pays below a = 2/3. Both
give the same gradient, up to rounding, where a network treats each image for itself and draws no random numbers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.evaluating import modes_kept

BREAK_EVEN = 2 / 3
SAME = 1e-2  # of the largest logit: more than bfloat16 makes of another batch size, far less than a coupling


def forward_active(model: nn.Module, plain: nn.Module, labels: Tensor, epsilon: float, pixel_values: Tensor, **options) -> Any:
    """Logits of all images, with a graph to those of the images above epsilon only.

    Waits for the device once, for the number of those images. Where there are none and ``model`` is a wrapper, as in DDP, whose
    processes must take the same steps, one image goes through it all the same; its hinge is zero, and so are the gradients.

    Args:
        model: The network as it is trained, perhaps wrapped.
        plain: The network itself, for the pass without graph.
        labels: int64 (B,).
        epsilon: In nats.
        pixel_values: float (B, 3, h, w).
        options: Further arguments of either.

    Returns:
        The output of ``plain`` with those ``logits`` (B, C).
    """
    with torch.no_grad():
        outputs = plain(pixel_values=pixel_values, **options)
        rows = (F.cross_entropy(outputs.logits.float(), labels, reduction="none") > epsilon).nonzero().squeeze(1)
    if not len(rows):
        if model is plain:
            outputs.logits.requires_grad_()  # the backward pass ends here; `ActiveSet.end_window` makes the gradients
            return outputs
        rows = rows.new_zeros(1)
    logits = model(pixel_values=pixel_values[rows], **options).logits
    outputs.logits = outputs.logits.index_copy(0, rows, logits)
    return outputs


class Inexact(ValueError):
    """Why an active set would change the gradient, or cost more than it saves."""


class ActiveSet:
    """Decides by the share of active images in the last window, of all processes: one number of a checkpoint restores it."""

    def __init__(self, trained: list[nn.Parameter], device: torch.device):
        self._trained, self._device = trained, device
        self.begin(1.0)

    def begin(self, share: float) -> None:
        """Go on from a share; 1, a dense step, where nothing is known."""
        self.share = share
        self._seen = torch.zeros(2, device=self._device)  # active images, images

    def pays(self) -> bool:
        """Whether to look for active images."""
        return self.share < BREAK_EVEN

    def see(self, active: Tensor) -> None:
        """Count a micro-batch: bool (B,)."""
        self._seen += torch.stack([active.sum(), torch.full_like(active[0], len(active), dtype=torch.int64)])

    def end_window(self, accelerator: Any) -> None:
        """Learn the share; make a window's missing gradients zeros, since None would stop momentum and weight decay."""
        active, count = accelerator.reduce(self._seen, "sum").tolist()
        self.begin(active / count)
        for parameter in self._trained:
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)


def trained_apart(model: nn.Module, kept: list[nn.Module], size: tuple[int, int]) -> list[nn.Parameter]:
    """The parameters that get a gradient, of a network that treats each image for itself when it trains.

    Two images of noise go through it together, one alone; modes, buffers and random numbers stay as they are, also when the
    network fails.

    Args:
        model: Takes ``pixel_values`` (B, 3, H, W).
        kept: Modules that stay in evaluation mode while it trains.
        size: (H, W) that it accepts.

    Raises:
        Inexact: The network draws random numbers, or an image's logits or the buffers depend on what else is in the batch.
    """
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
    sources = [torch.random] if images.device.type == "cpu" else [torch.random, torch.get_device_module(images.device)]
    states = [(source, source.get_rng_state()) for source in sources]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with modes_kept(model):
        model.train()
        for module in kept:
            module.eval()
        try:
            together = model(pixel_values=images).logits
            gradients = torch.autograd.grad(together.sum(), parameters, allow_unused=True)
            alone = model(pixel_values=images[:1]).logits
        finally:
            drawn = [(source, state) for source, state in states if not torch.equal(source.get_rng_state(), state)]
            changed = [(buffer, value) for buffer, value in buffers if not torch.equal(buffer, value)]
            for source, state in drawn:
                source.set_rng_state(state)
            for buffer, value in changed:
                buffer.copy_(value)
    if drawn:
        raise Inexact("the network draws random numbers in training (dropout, stochastic depth)")
    if changed or not (together[:1] - alone).abs().max() <= SAME * together.abs().max():
        raise Inexact("layers of the network couple the images of a batch or keep statistics of them")
    return [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
