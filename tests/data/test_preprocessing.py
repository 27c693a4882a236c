"""Preprocessing against the image processors themselves."""

import pytest
import torch
from PIL import Image
from timm.data.transforms import TrimBorder
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    PPLCNetImageProcessor,
    Siglip2ImageProcessor,
    TextNetImageProcessor,
    ViTImageProcessor,
)
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from d3_hf.data.preprocessing import Preprocessing

VIT = {"height": 24, "width": 20}
CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.247, 0.243, 0.261)}


def images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def timm_processor(**cfg) -> TimmWrapperImageProcessor:
    return TimmWrapperImageProcessor({"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 1.0, **cfg})


def with_border_trimmed(processor):
    processor.val_transforms.transforms.insert(0, TrimBorder(2))
    return processor


@pytest.mark.parametrize("shape", [(24, 20), (32, 32), (17, 40)])
@pytest.mark.parametrize(
    ("processor", "size", "keeps_size"),
    [
        (ViTImageProcessor(size=VIT), (24, 20), True),
        (
            ViTImageProcessor(size=VIT, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=3),
            (24, 20),
            True,
        ),
        (ViTImageProcessor(size=VIT, do_normalize=False), (24, 20), True),
        (ViTImageProcessor(size=VIT, rescale_factor=1 / 127.5), (24, 20), True),
        (
            ViTImageProcessor(size=VIT, do_rescale=False, image_mean=[120, 110, 100], image_std=[50, 60, 70]),
            (24, 20),
            True,
        ),
        (ConvNextImageProcessor(size={"shortest_edge": 24}, crop_pct=0.875), (24, 24), False),
        (ConvNextImageProcessor(size={"shortest_edge": 384}), (384, 384), True),
        (BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 24, "width": 24}), (24, 24), False),
        (BitImageProcessor(do_resize=False, crop_size={"height": 24, "width": 20}), (24, 20), True),
        (CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}), (24, 24), True),
        (MobileViTImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}), (24, 24), False),
    ],
)
def test_equals_the_processor(processor, size, keeps_size, shape):
    preprocessing = Preprocessing.from_processor(processor)
    batch = images(3, 3, *shape)
    untouched = batch.clone()
    expected = processor(images=batch, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    resized = preprocessing.resize(batch)
    assert (preprocessing.size, preprocessing.keeps_size) == (size, keeps_size)
    assert resized.dtype == torch.uint8 and resized.shape == (3, 3, *size)
    assert preprocessing(batch).dtype == torch.float32
    torch.testing.assert_close(preprocessing(batch), expected.to(torch.float32), rtol=1e-5, atol=1e-5)
    assert torch.equal(batch, untouched)


def test_normalisation_is_the_formula():
    preprocessing = Preprocessing.from_processor(ViTImageProcessor(size=VIT, image_mean=[0.1, 0.2, 0.3], image_std=[0.4] * 3))
    batch = images(2, 3, 24, 20)
    mean = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64).view(3, 1, 1)
    expected = (batch.double() / 255 - mean) / 0.4
    torch.testing.assert_close(preprocessing.normalize(batch).double(), expected, rtol=0, atol=1e-6)


def test_constants_come_out_as_the_checkpoint_states_them():
    preprocessing = Preprocessing.from_processor(ViTImageProcessor(size=VIT, image_mean=[0.1, 0.2, 0.3], image_std=[0.4] * 3))
    assert preprocessing.mean == (0.1, 0.2, 0.3) and preprocessing.std == (0.4, 0.4, 0.4)


def test_images_of_the_models_size_are_not_touched():
    batch = images(2, 3, 24, 20)
    assert Preprocessing.from_processor(ViTImageProcessor(size=VIT)).resize(batch) is batch


def test_an_empty_batch_keeps_the_models_shape():
    empty = torch.empty((0, 3, 32, 32), dtype=torch.uint8)
    assert Preprocessing.from_processor(ViTImageProcessor(size=VIT))(empty).shape == (0, 3, 24, 20)


def test_timm_at_its_own_size_equals_the_processor():
    processor = timm_processor(**CIFAR)
    preprocessing = Preprocessing.from_processor(processor)
    batch = images(3, 3, 32, 32)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in batch]
    assert preprocessing.keeps_size and preprocessing.size == (32, 32) and preprocessing.mean == CIFAR["mean"]
    for expected in (processor(batch / 255)["pixel_values"], processor(pictures)["pixel_values"]):
        torch.testing.assert_close(preprocessing(batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_timm_resize_and_crop_equal_the_processor_but_for_rounding(crop_mode, interpolation):
    processor = timm_processor(crop_pct=0.875, crop_mode=crop_mode, interpolation=interpolation, std=(1.0, 1.0, 1.0))
    preprocessing = Preprocessing.from_processor(processor)
    smooth = torch.nn.functional.interpolate(images(4, 3, 9, 12).float(), (45, 60), mode="bilinear").byte()
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in smooth]
    assert preprocessing.size == (32, 32) and not preprocessing.keeps_size
    for expected in (processor(smooth / 255)["pixel_values"], processor(pictures)["pixel_values"]):
        assert (preprocessing(smooth) - expected).abs().max() * 255 < 1.6


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"])
@pytest.mark.parametrize("input_size", [(3, 32, 32), (3, 40, 24)])
def test_timm_filters_and_shapes_equal_what_timm_does_to_pictures(input_size, interpolation, crop_mode):
    cfg = dict(crop_pct=0.875, crop_mode=crop_mode, interpolation=interpolation, input_size=input_size, std=(1.0, 1.0, 1.0))
    processor = timm_processor(**cfg)
    preprocessing = Preprocessing.from_processor(processor)
    smooth = torch.nn.functional.interpolate(images(4, 3, 9, 12).float(), (45, 60), mode="bilinear").byte()
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in smooth]
    off = (preprocessing(smooth) - processor(pictures)["pixel_values"]).abs().max() * 255
    on_pictures = crop_mode == "border" or interpolation not in ("bilinear", "bicubic")
    assert preprocessing.size == input_size[1:] and off < (1e-3 if on_pictures else 2.1)


def test_a_trigger_pixel_survives_when_the_size_matches():
    batch = images(1, 3, 32, 32)
    batch[..., 29:, 29:] = 255
    preprocessing = Preprocessing.from_processor(timm_processor())
    white = (1 - torch.tensor(preprocessing.mean)) / torch.tensor(preprocessing.std)
    torch.testing.assert_close(preprocessing(batch)[0, :, 29:, 29:], white.view(3, 1, 1).expand(3, 3, 3))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ViTImageProcessorPil(size=VIT), "ViTImageProcessorPil.*backend='torchvision'"),
        (lambda: ViTImageProcessor(do_resize=False), "sizes of their own.*do_resize=True"),
        (lambda: TextNetImageProcessor(), "sizes of their own"),
        (lambda: ViTImageProcessor(size=VIT, image_mean=[0.5], image_std=[0.5]), "each of 3 channels"),
        (lambda: ViTImageProcessor(size=VIT, image_std=[0.5, 0.5, 0.0]), "positive std"),
        (lambda: EfficientNetImageProcessor(), "EfficientNetImageProcessor cannot resize uint8"),
        (lambda: PPLCNetImageProcessor(), "does more than"),
        (lambda: with_border_trimmed(timm_processor()), "these timm transforms"),
        (lambda: ViTImageProcessor(size=VIT, image_mean=None), "normalises without image_mean or image_std: set both"),
        (lambda: ViTImageProcessor(size=VIT, image_std=None), "normalises without image_mean or image_std: set both"),
        (lambda: ViTImageProcessor(size=VIT, resample=4), r"resample=4, which torchvision lacks.* set 2 \(bilinear\)"),
        (lambda: ViTImageProcessor(size=VIT, resample=5), r"resample=5, which torchvision lacks.* set 2 \(bilinear\)"),
        (lambda: Siglip2ImageProcessor(patch_size=8, max_num_patches=16), r"makes \(2, 16, 192\) of two RGB images.*NaFlex"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_processor(build())


@pytest.mark.parametrize(
    "batch",
    [torch.zeros(2, 3, 8, 8), images(3, 8, 8), images(2, 1, 8, 8), torch.zeros((2, 3, 8, 8), dtype=torch.int64)],
)
def test_only_batches_of_rgb_uint8_are_resized(batch):
    with pytest.raises(ValueError, match=r"uint8 \(B, 3, H, W\)"):
        Preprocessing.from_processor(ViTImageProcessor(size=VIT)).resize(batch)


@pytest.mark.parametrize(
    "processor",
    [
        *(ViTImageProcessor(size=VIT, resample=filter) for filter in (0, 1, 2, 3)),
        CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
        timm_processor(crop_pct=0.875),
    ],
)
def test_a_resize_with_gradient_gives_the_pixels_of_the_plain_one(processor):
    preprocessing, batch = Preprocessing.from_processor(processor), images(3, 3, 10, 9)
    floats = (batch + 0.4).clamp(max=255).requires_grad_()
    found = preprocessing.resize_with_gradient(floats)
    assert torch.equal(found, preprocessing.resize(batch).float()) and found.requires_grad


@pytest.mark.parametrize(("resample", "mode"), [(2, "bilinear"), (3, "bicubic")])
@pytest.mark.parametrize("shape", [(10, 9), (40, 33)])
def test_the_gradient_of_a_resize_is_that_of_its_weights(resample, mode, shape):
    preprocessing = Preprocessing.from_processor(ViTImageProcessor(size=VIT, resample=resample))
    floats, weights = images(2, 3, *shape).float().requires_grad_(), images(2, 3, 24, 20).float() / 255
    (found,) = torch.autograd.grad((weights * preprocessing.resize_with_gradient(floats)).sum(), floats)
    height, width = shape
    # What each row and column of the image gives to each of the result: the resize of single rows and columns of ones.
    ones = torch.eye(height)[None, None], torch.eye(width)[None, None]
    down = torch.nn.functional.interpolate(ones[0], (24, height), mode=mode, antialias=True)[0, 0]
    across = torch.nn.functional.interpolate(ones[1], (20, width), mode=mode, antialias=True)[0, 0]
    torch.testing.assert_close(found, torch.einsum("yh,bcyx,xw->bchw", down, weights, across), rtol=1e-4, atol=1e-5)


def test_images_of_the_models_size_keep_their_fractions():
    floats = images(2, 3, 24, 20).float() + 0.25
    assert Preprocessing.from_processor(ViTImageProcessor(size=VIT)).resize_with_gradient(floats) is floats


def test_no_gradient_passes_pictures():
    preprocessing = Preprocessing.from_processor(timm_processor(interpolation="lanczos"))
    with pytest.raises(ValueError, match="no gradient passes .* set interpolation to bilinear or bicubic"):
        preprocessing.resize_with_gradient(images(2, 3, 10, 10).float().requires_grad_())


def test_the_way_out_for_pil_processors_works(tmp_path):
    ViTImageProcessorPil(size=VIT).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="torchvision")
    assert Preprocessing.from_processor(processor).size == (24, 20)
