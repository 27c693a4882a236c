"""Decoding: every kind of picture becomes RGB at its own size, or is named."""

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from pictures import encoded, noise
from PIL import Image
from transformers import ViTImageProcessor

from d3_hf.data.images import RawImages
from d3_hf.data.load import load_images
from d3_hf.data.preprocessing import Preprocessing
from d3_hf.data.training_images import TrainingImages

NAMES = ["cat", "dog", "frog"]


def pictures(*encodings: bytes | None) -> Dataset:
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=NAMES)})
    rows = [None if picture is None else {"bytes": picture, "path": None} for picture in encodings]
    return Dataset.from_dict({"image": rows, "label": [0] * len(rows)}, features=features, split="test")


def rotated() -> tuple[bytes, np.ndarray]:
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright: turn by 90 degrees clockwise to show
    pixels = noise(4, 6, 3)
    return encoded(pixels, exif=exif), np.rot90(pixels, -1)


def colour_modes() -> list[tuple[str, bytes, np.ndarray]]:
    grey, colour, alpha = noise(4, 6), noise(4, 6, 3), noise(4, 6, 4)
    palette = Image.fromarray(colour).quantize(16)
    deep = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2849
    cmyk = Image.frombytes("CMYK", (6, 4), alpha.tobytes())
    return [
        ("grey", encoded(grey), np.stack([grey] * 3, 2)),
        (
            "grey and alpha",
            encoded(Image.frombytes("LA", (6, 4), noise(4, 6, 2).tobytes())),
            np.stack([noise(4, 6, 2)[..., 0]] * 3, 2),
        ),
        ("black and white", encoded(Image.fromarray(grey > 127)), np.stack([(grey > 127) * 255] * 3, 2)),
        ("palette", encoded(palette), np.array(palette.getpalette()).reshape(-1, 3)[np.array(palette)]),
        ("RGBA, alpha dropped", encoded(alpha), alpha[..., :3]),
        ("CMYK", encoded(cmyk, "TIFF"), np.array(cmyk.convert("RGB"))),
        ("16-bit grey", encoded(Image.fromarray(deep)), np.stack([np.rint(deep / 257)] * 3, 2)),
        ("EXIF orientation", *rotated()),
    ]


def test_every_colour_mode_becomes_rgb():
    for name, picture, expected in colour_modes():
        raw = RawImages.from_dataset(pictures(picture))
        assert raw.images.dtype == torch.uint8, name
        assert np.array_equal(raw.images[0].permute(1, 2, 0), expected), name
        shown = load_images(pictures(picture))["test"]["image"][0]
        assert shown.mode == "RGB" and (name == "16-bit grey" or np.array_equal(np.array(shown), expected)), name


def test_pictures_of_several_sizes_are_kept_as_a_list():
    sizes = [(4, 6), (5, 3), (4, 6)]
    raw = RawImages.from_dataset(pictures(*(encoded(noise(*size, 3, seed=i)) for i, size in enumerate(sizes))))
    assert isinstance(raw.images, list) and len(raw) == 3
    batches = [(rows.tolist(), tuple(images.shape)) for rows, images, _ in raw.batches(2)]
    assert batches == [([0, 2], (2, 3, 4, 6)), ([1], (1, 3, 5, 3))]
    assert np.array_equal(raw.select([2, 1]).images[0].permute(1, 2, 0), noise(4, 6, 3, seed=2))
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    training = TrainingImages.from_raw(raw, Preprocessing.from_processor(processor))
    expected = processor(images=raw.images, return_tensors="pt", do_rescale=False, do_normalize=False)["pixel_values"]
    assert torch.equal(training.images, expected)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (encoded(noise(40, 40, 3))[:-500], "cannot decode row 1 of split 'test': .*truncated"),
        (encoded(noise(40, 40, 3), "JPEG")[:900], "cannot decode row 1 of split 'test': .*truncated"),
        (b"no picture", "cannot decode row 1 of split 'test': UnidentifiedImageError"),
        (None, "cannot decode row 1 of split 'test': .*the row holds no picture"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "row 1 .*mode 'F' has no fixed range"),
    ],
)
def test_pictures_that_cannot_be_decoded_are_named(picture, message):
    with pytest.raises(ValueError, match=message):
        RawImages.from_dataset(pictures(encoded(noise(4, 4, 3)), picture))
