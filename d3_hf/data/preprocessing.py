"""A checkpoint's own preprocessing on batches of uint8 tensors: first the geometry, then rescaling and normalisation.

The two halves are apart because training needs them apart: images are brought to the model's size once and kept as
uint8, augmented there, and normalised on the device. Every constant comes from the checkpoint's image processor.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from transformers import BaseImageProcessor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import PILImageResampling
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from ..files import first_line

# What timm.data.create_transform composes for evaluation: these move pixels, those only change their type and scale.
TIMM_GEOMETRY = ("Resize", "ResizeKeepRatio", "CenterCrop", "CenterCropOrPad")
TIMM_VALUES = ("MaybeToTensor", "Normalize")
# What torchvision does to pictures and not, or otherwise, to tensors: these filters, and padding with a colour.
FILTERS_OF_PICTURES = ("nearest", "lanczos", "box", "hamming")
PADDING_OF_PICTURES = "CenterCropOrPad"


@dataclass(frozen=True)
class Preprocessing:
    """What a checkpoint's image processor does to RGB images. Build it with ``Preprocessing.from_processor``.

    ``preprocessing(images)`` equals ``image_processor(images)["pixel_values"]``. With a timm processor that resizes,
    pixels may differ by rounding (one or two grey levels of 255): timm resizes PIL images or floats, this class uint8
    tensors, and PIL images only where its filter or its padding asks for them.

    Attributes:
        mean: Per channel, on the scale where a pixel is in [0, 1]; an unusual ``rescale_factor`` is folded in.
        std: Per channel, on the same scale, positive.
        size: (height, width) of the images that the model sees, in pixels.
        keeps_size: Whether images that already have ``size`` pass the geometry unchanged, so that it can be skipped.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: tuple[int, int]
    keeps_size: bool
    _geometry: Callable[[Tensor], Tensor] = field(repr=False, compare=False)

    @classmethod
    def from_processor(cls, image_processor: BaseImageProcessor) -> "Preprocessing":
        """Read off an image processor what it does, and check the result against the processor itself.

        Args:
            image_processor: A torchvision-backed processor of transformers (its default kind) or a
                ``TimmWrapperImageProcessor``.

        Raises:
            ValueError: The processor is of another kind (PIL-backed, for instance); its mean or standard deviation is
                not one positive number per RGB channel; it leaves images at sizes of their own; or it does more than
                resize, crop, rescale and normalise.
        """
        name = type(image_processor).__name__
        if isinstance(image_processor, TimmWrapperImageProcessor):
            geometry, mean, std = _read_timm(image_processor)
        elif isinstance(image_processor, TorchvisionBackend):
            geometry, mean, std = _read_torchvision(image_processor)
        else:
            raise ValueError(
                f"cannot preprocess tensors with a {name}: load the checkpoint's processor with "
                "AutoImageProcessor.from_pretrained(..., backend='torchvision'), or use a TimmWrapperImageProcessor"
            )
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"{name} needs a mean and a positive std for each of 3 channels; found {mean} and {std}")
        try:
            size = _output_size(geometry, name)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"{name} cannot resize uint8 tensors apart from rescaling them: {first_line(error)}") from error
        probe = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        preprocessing = cls(mean, std, size, bool(torch.equal(geometry(probe), probe)), geometry)
        preprocessing._check(image_processor, probe)
        return preprocessing

    def resize(self, images: Tensor) -> Tensor:
        """Bring images to the model's size as the processor would: its resize and crop, on uint8.

        Args:
            images: uint8 (B, 3, H, W), RGB, any size, any device.

        Returns:
            uint8 (B, 3, h, w) with ``(h, w) = size``; the argument itself where nothing is to be done.

        Raises:
            ValueError: ``images`` is not such a batch.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 (B, 3, H, W); got {images.dtype} {tuple(images.shape)}")
        if len(images) == 0:
            return images.new_empty((0, 3, *self.size))
        return images if self._keeps(images) else self._geometry(images)

    def resize_with_gradient(self, images: Tensor) -> Tensor:
        """As `resize`, for images that carry gradients: the pixels are those of the images rounded to grey levels, the gradient
        is that of the same resize and crop on floats. On floats alone a bicubic filter overshoots where on uint8 it is cut off.

        Args:
            images: float32 (B, 3, H, W) in [0, 255], any size, any device.

        Returns:
            float32 (B, 3, h, w) of grey levels; the argument itself, not rounded, where nothing is to be done.

        Raises:
            ValueError: The processor resizes pictures, through which no gradient passes.
        """
        if self._keeps(images):
            return images
        levels, linear = self.resize(images.detach().round().to(torch.uint8)), self._geometry(images)
        if images.requires_grad and not linear.requires_grad:
            raise ValueError(
                "no gradient passes the checkpoint's image processor, which resizes pictures: set interpolation to bilinear or "
                "bicubic and crop_mode to center on it, or resize the images to the model's size first"
            )
        return levels + (linear - linear.detach())

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 (B, 3, h, w), or float32 in [0, 255] with its gradient, to float32 ``(images / 255 - mean) / std``, on the
        images' device."""
        mean, std = _constants(self.mean, self.std, images.device)
        return images.to(torch.float32, copy=True).sub_(mean).div_(std)

    def __call__(self, images: Tensor) -> Tensor:
        """Map raw uint8 (B, 3, H, W) to the float32 (B, 3, h, w) that the model takes as ``pixel_values``."""
        return self.normalize(self.resize(images))

    def _keeps(self, images: Tensor) -> bool:
        return self.keeps_size and tuple(images.shape[-2:]) == self.size

    def _check(self, image_processor: BaseImageProcessor, probe: Tensor) -> None:
        if isinstance(image_processor, TimmWrapperImageProcessor):
            if not self.keeps_size:
                return  # float and uint8 resizing round differently; _read_timm has checked every step by its name
            expected = image_processor([to_pil_image(image) for image in probe])["pixel_values"]
        else:
            expected = image_processor(probe, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
        found = self(probe)
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
            raise ValueError(
                f"{type(image_processor).__name__} does more than resize, crop, rescale and normalise, which is all "
                f"that is supported here; its settings are {image_processor.to_dict()}"
            )


@functools.lru_cache(maxsize=16)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # Cached: making them anew for each batch would wait for the device each time.
    shape = (1, len(mean), 1, 1)
    return tuple(torch.tensor(values, device=device).mul_(255).view(shape) for values in (mean, std))


def _read_torchvision(processor: TorchvisionBackend) -> tuple[Callable, tuple[float, ...], tuple[float, ...]]:
    def geometry(images: Tensor) -> Tensor:
        return processor(
            images=images,
            do_rescale=False,
            do_normalize=False,
            return_tensors="pt",
            input_data_format="channels_first",
        )["pixel_values"]

    if processor.do_resize and processor.resample in (PILImageResampling.BOX, PILImageResampling.HAMMING):
        raise ValueError(
            f"{type(processor).__name__} has resample={int(processor.resample)}, which torchvision lacks for tensors: set 2 "
            "(bilinear) or 3 (bicubic) on it"
        )
    if processor.do_normalize and (processor.image_mean is None or processor.image_std is None):
        raise ValueError(
            f"{type(processor).__name__} normalises without image_mean or image_std: set both on it (in "
            "preprocessor_config.json), or do_normalize to false"
        )
    mean = _per_channel(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0)
    std = _per_channel(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0)
    # x * factor is what the processor normalises; expressed for x / 255 both constants shrink by the same ratio.
    ratio = 255 * (processor.rescale_factor if processor.do_rescale else 1.0)
    return geometry, tuple(m / ratio for m in mean), tuple(s / ratio for s in std)


def _read_timm(processor: TimmWrapperImageProcessor) -> tuple[Callable, tuple[float, ...], tuple[float, ...]]:
    # TensorFlow-style pipelines have no list of steps.
    steps = getattr(processor.val_transforms, "transforms", [])
    names = [type(step).__name__ for step in steps]
    if "Normalize" not in names or not set(names) <= {*TIMM_GEOMETRY, *TIMM_VALUES}:
        raise ValueError(
            f"cannot preprocess tensors with these timm transforms: {processor.val_transforms}; expected a sequence "
            f"of {', '.join(TIMM_GEOMETRY + TIMM_VALUES)}"
        )

    def geometry(images: Any) -> Any:
        for name, step in zip(names, steps, strict=True):
            images = step(images) if name in TIMM_GEOMETRY else images
        return images

    def on_pictures(images: Tensor) -> Tensor:
        return torch.stack([pil_to_tensor(geometry(to_pil_image(image))) for image in images.cpu()]).to(images.device)

    if processor.data_config["interpolation"] in FILTERS_OF_PICTURES or PADDING_OF_PICTURES in names:
        geometry_of_tensors = on_pictures
    else:
        geometry_of_tensors = geometry
    return geometry_of_tensors, _per_channel(processor.data_config["mean"]), _per_channel(processor.data_config["std"])


def _per_channel(values: float | list[float] | tuple[float, ...]) -> tuple[float, ...]:
    return (float(values),) * 3 if isinstance(values, int | float) else tuple(float(value) for value in values)


def _output_size(geometry: Callable[[Tensor], Tensor], name: str) -> tuple[int, int]:
    probes = (torch.zeros((2, 3, 40, 56), dtype=torch.uint8), torch.zeros((2, 3, 64, 48), dtype=torch.uint8))
    shapes = [tuple(geometry(probe).shape) for probe in probes]
    if wrong := [shape for shape in shapes if len(shape) != 4 or shape[:2] != (2, 3)]:
        raise ValueError(
            f"{name} makes {wrong[0]} of two RGB images and not (2, 3, h, w): networks that take patches (NaFlex) or another "
            "number of channels are not supported"
        )
    first, second = (shape[2:] for shape in shapes)
    if first != second:
        raise ValueError(
            f"{name} leaves images at sizes of their own ({first} and {second} for two test images): set "
            "do_resize=True with size={'height': ..., 'width': ...}, or do_center_crop=True with crop_size, on it"
        )
    return first
