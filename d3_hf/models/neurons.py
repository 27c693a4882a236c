"""The layers whose output channels or units are a network's neurons."""

from torch import nn

from .computed import refuse_computed
from .head import find_head


def neuron_layers(model: nn.Module, image_size: tuple[int, int]) -> tuple[str, dict[str, nn.Conv2d | nn.Linear]]:
    """The layers whose output channels or units are the network's neurons, without its head.

    A convolutional network's are its ``nn.Conv2d``, a transformer's its ``nn.Linear`` layers: whichever kind the network has
    more of, so that a ViT's patch embedding does not make it convolutional, nor VGG's hidden linear layers VGG a transformer.

    Args:
        model: The classifier.
        image_size: (H, W) that it accepts.

    Returns:
        The head's name and the layers by name, all of one kind, in the model's order.

    Raises:
        ValueError: The head cannot be found (see `find_head`), there is no other layer, or the weight of one is computed from
            others.
    """
    head = find_head(model, image_size)
    matrices = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for name, module in matrices.items():
        refuse_computed(name, module)
    # A weight that two layers share is the neurons of the first.
    first = {module.weight: name for name, module in reversed(matrices.items())}
    own = {name: module for name, module in matrices.items() if first[module.weight] == name != head}
    kinds = [{name: m for name, m in own.items() if isinstance(m, kind)} for kind in (nn.Conv2d, nn.Linear)]
    layers = max(kinds, key=len)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer besides its head: no neurons")
    return head, layers
