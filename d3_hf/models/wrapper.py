"""Any module that maps images to logits, or to features, as a transformers model.

``config.json`` names the module's class for the reader. It is never imported from there: whoever reloads the folder
passes the module, so that a folder can name what it likes and nothing of it runs.
"""

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from ..files import first_line
from .evaluating import evaluating
from .shared import state_to_save


@strict
class WrappedClassifierConfig(PreTrainedConfig):
    """Configuration of a `WrappedClassifier`.

    Args:
        module_class: Qualified name of the module's class, for the reader only.
        image_size: (height, width) in pixels.
        image_mean: Mean of each channel, on the scale where a pixel is in [0, 1].
        image_std: Standard deviation of each channel, on the same scale.
    """

    model_type = "d3_hf_module"

    module_class: str | None = None
    image_size: list[int] | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None


@strict
class WrappedEncoderConfig(WrappedClassifierConfig):
    """Configuration of a `WrappedEncoder`; see `WrappedClassifierConfig`, whose number of classes says nothing here."""

    model_type = "d3_hf_encoder_module"


class Wrapped(PreTrainedModel):
    """A module of one's own under the name ``network``.

    Args:
        config: Its configuration.
        module: The module with its weights; they are not initialised again.

    Raises:
        ValueError: ``module`` is missing, as when the folder is loaded with an Auto class.
    """

    loader = "load_classifier"
    base_model_prefix = "network"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False

    def __init__(self, config: WrappedClassifierConfig, module: nn.Module | None = None):
        if module is None:
            raise ValueError(
                f"the weights belong to a {config.module_class}, whose code is not stored here: make one and call "
                f"d3_hf.{self.loader}(folder, module=it)"
            )
        super().__init__(config)
        self.network = module
        self.post_init()

    def save_pretrained(self, save_directory, *, state_dict: dict[str, Tensor] | None = None, **kwargs) -> None:
        """As the base class, with a tensor that has several names under each of them."""
        super().save_pretrained(save_directory, state_dict=state_to_save(self, state_dict), **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """The module arrives with its weights."""


class WrappedClassifier(Wrapped):
    """A module that maps images (B, 3, h, w) to logits (B, C); see `Wrapped`."""

    config_class = WrappedClassifierConfig

    def __init__(self, config: WrappedClassifierConfig, module: nn.Module | None = None):
        super().__init__(config, module)
        self.num_labels = config.num_labels

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Map normalised images to logits.

        Args:
            pixel_values: float (B, 3, h, w).
            labels: int64 (B,); with them the mean cross-entropy in nats is returned too.
        """
        logits = self.network(pixel_values)
        if isinstance(logits, tuple) and hasattr(logits, "logits"):  # torchvision's, with auxiliary classifiers, in training
            logits = logits.logits
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class WrappedEncoder(Wrapped):
    """A module that maps images (B, 3, h, w) to features (B, width); see `Wrapped`."""

    config_class = WrappedEncoderConfig
    loader = "load_encoder"

    def forward(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Map normalised images, float (B, 3, h, w), to features."""
        return BaseModelOutputWithPooling(pooler_output=self.network(pixel_values))


AutoConfig.register(WrappedClassifierConfig.model_type, WrappedClassifierConfig)
AutoConfig.register(WrappedEncoderConfig.model_type, WrappedEncoderConfig)
AutoModel.register(WrappedEncoderConfig, WrappedEncoder)
AutoModelForImageClassification.register(WrappedClassifierConfig, WrappedClassifier)


def processor_of(config: WrappedClassifierConfig) -> ViTImageProcessor:
    """Return the image processor of a wrapped module: resize, rescale, normalise."""
    height, width = config.image_size
    return ViTImageProcessor(size={"height": height, "width": width}, image_mean=config.image_mean, image_std=config.image_std)


def class_name(module: nn.Module) -> str:
    """Qualified name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def count_classes(module: nn.Module, image_size: tuple[int, int], what: str = "logits (B, C)") -> int:
    """Pass one black image through the module, in evaluation mode, and count its logits, or features.

    Raises:
        ValueError: The module is inside another (DataParallel, torch.compile), has no weights, fails on the image, or returns
            something else than ``what``.
    """
    name = class_name(module)
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    if not names:
        raise ValueError(f"{name} has no parameters")
    for prefix in ("module.", "_orig_mod."):
        if all(n.startswith(prefix) for n in names):
            raise ValueError(f"{name} wraps the network: pass the network itself, module.{prefix[:-1]}")
    first = next(module.parameters())
    image = torch.zeros((1, 3, *image_size), device=first.device, dtype=first.dtype)
    try:
        with evaluating(module), torch.no_grad():
            logits = module(image)
    except Exception as error:  # foreign code can fail in any way; none of them is recovered from
        raise ValueError(
            f"{name} failed on an image of shape {tuple(image.shape)} ({first_line(error)}): is image_size= right, and does it "
            "take three channels?"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{name} must map images (B, 3, h, w) to {what}; for one image it returned {found}")
    return logits.shape[1]
