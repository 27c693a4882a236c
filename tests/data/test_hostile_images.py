"""Pictures and tables that are broken, enormous or strange; strange ones are legal and are decoded."""

import struct
import zlib

import pytest
from hostile import content, good_images, picture
from pictures import encoded, noise
from PIL import Image

from d3_hf.data.images import RawImages
from d3_hf.data.load import load_images


@pytest.fixture
def here(tmp_path, monkeypatch):
    good_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def header(width, height):
    """A PNG of so many pixels and hardly any bytes."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(64))),
        (b"IEND", b""),
    )
    packed = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def animation():
    frames = [Image.fromarray(noise(16, 16, 3, seed=seed)) for seed in range(3)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def decoded():
    return RawImages.from_dataset(load_images("images")["train"])


def test_a_table_that_is_none(here):
    content(b"PAR1 not really", "t.parquet")(here)
    with pytest.raises(ValueError, match="^t.parquet cannot be read as a data set .*: it is damaged "):
        load_images("t.parquet")


UNREADABLE = r"^cannot decode row \d+ of split 'train' \(.*strange\.\w+\): .*replace the picture or leave it out"


@pytest.mark.parametrize(
    ("data", "suffix"),
    [(b"", "png"), (encoded(noise(40, 40, 3), "JPEG")[:900], "jpg"), (header(60_000, 60_000), "png")],
    ids=["of no bytes", "truncated", "bomb"],
)
def test_pictures_that_cannot_be_decoded(here, data, suffix):
    picture(data, suffix)(here)
    with pytest.raises(ValueError, match=UNREADABLE):
        decoded()


def test_half_a_bomb_is_warned_about(here):
    picture(header(30_000, 4_000))(here)
    with pytest.raises(ValueError, match=UNREADABLE), pytest.warns(Image.DecompressionBombWarning):
        decoded()


@pytest.mark.parametrize(
    ("data", "suffix", "size"),
    [
        (encoded(noise(1, 1, 3)), "png", (1, 1)),
        (encoded(noise(10, 20_000, 3)), "png", (10, 20_000)),
        (encoded(noise(20_000, 10, 3)), "png", (20_000, 10)),
        (encoded(Image.frombytes("CMYK", (16, 16), noise(16, 16, 4).tobytes()), "JPEG"), "jpg", (16, 16)),
        (animation(), "gif", (16, 16)),
    ],
    ids=["1x1", "wide", "high", "CMYK", "animated"],
)
def test_strange_pictures_are_decoded(here, data, suffix, size):
    picture(data, suffix)(here)
    shapes = [tuple(image.shape) for image in decoded().images]
    assert len(shapes) == 13 and set(shapes) == {(3, 16, 16), (3, *size)}
