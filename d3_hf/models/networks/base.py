"""What the networks for 32x32 images share: their head and stages, and how timm describes them."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn


class CifarNetwork(nn.Module):
    """Maps images (B, in_chans, h, w) to logits (B, num_classes): a linear layer on the average of the last feature map.

    A subclass makes its layers, then the classifier by `reset_classifier`, and defines `forward_features`. Names and order of
    the layers are part of the format of checkpoints.

    Args:
        num_features: Channels of the last feature map.

    Attributes:
        classifier_name: Name of the layer that makes the logits in the checkpoints in circulation.
        num_classes: Number of classes; 0 where the classifier is left out.
    """

    classifier_name: ClassVar[str]

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = self.head_hidden_size = num_features
        self.num_classes = 0

    def get_classifier(self) -> nn.Module:
        """Return the layer that makes the logits."""
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new, random classifier of ``num_classes`` classes in place; 0 leaves it out."""
        self.num_classes = num_classes
        classifier = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.add_module(self.classifier_name, classifier)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images to the last feature map (B, num_features, h', w')."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Average the feature map over its pixels and classify it."""
        x = x.mean((2, 3))
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        return self.forward_head(self.forward_features(x))


def stage(
    block: Callable[[int, int, int], nn.Module], in_channels: int, channels: int, stride: int, count: int
) -> nn.Sequential:
    """``count`` blocks of one width in a row, the first with the stride; ``block`` takes in_channels, channels and stride."""
    return nn.Sequential(block(in_channels, channels, stride), *[block(channels, channels, 1) for _ in range(count - 1)])


def description(classifier: str, pool_size: int) -> dict[str, Any]:
    """What timm is told of a network: the classifier's name, and how many pixels a side its last feature map has.

    Checkpoints in circulation were trained with different normalisations: none is right by default, so none is given.
    """
    return {
        "input_size": (3, 32, 32),
        "pool_size": (pool_size, pool_size),
        "num_classes": 10,
        "mean": None,
        "std": None,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "first_conv": "conv1",
        "classifier": classifier,
    }
