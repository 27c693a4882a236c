"""BatchNorm layers: which they are, and their running statistics, estimated again for weights not trained as they are."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers of a model, of any number of dimensions and synchronised ones too, in its order."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of all BatchNorm layers by the mean of the batches' own, each weighed by its images.

    All other layers run in evaluation mode; so does the whole model afterwards, and momenta are as before, also when a batch
    fails. `torch.optim.swa_utils.update_bn` would leave dropout on and weigh a small last batch like the others.

    Args:
        model: Takes ``pixel_values`` (B, 3, h, w).
        batches: Such tensors. Without a BatchNorm layer in the model none is asked for.
    """
    modules = batch_norms(model)
    momenta = [module.momentum for module in modules]
    model.eval()
    for module in modules:
        module.reset_running_stats()
        module.train()
    seen = 0
    try:
        for pixels in batches if modules else ():
            seen += len(pixels)
            for module in modules:
                module.momentum = len(pixels) / seen
            model(pixel_values=pixels)
    finally:
        for module, momentum in zip(modules, momenta, strict=True):
            module.momentum = momentum
        model.eval()
