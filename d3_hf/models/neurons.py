"""The layers whose output channels or units are a network's neurons."""

from torch import nn

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
        ValueError: The head cannot be found (see `find_head`), or there is no other layer.
    """
    head = find_head(model, image_size)
    modules = {name: module for name, module in model.named_modules() if name != head}
    kinds = [{name: m for name, m in modules.items() if isinstance(m, kind)} for kind in (nn.Conv2d, nn.Linear)]
    layers = max(kinds, key=len)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer besides its head: no neurons")
    return head, layers
