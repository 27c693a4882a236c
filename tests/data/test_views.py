"""Views of images that fill a part of their canvas: where a crop lies, its shape, and that plain views are what they were."""

import pytest
import torch
from tiny import PROCESSOR

from d3_hf.data import views
from d3_hf.data.collages import Collages
from d3_hf.data.images import RawImages
from d3_hf.data.preprocessing import Preprocessing
from d3_hf.data.views import view

PREPROCESSING = Preprocessing.from_processor(PROCESSOR)  # 16x16


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def coordinates(height, width):
    """An image that says where it is: red is the row, green the column, blue nothing; a smooth ramp of 4 levels a pixel."""
    image = torch.zeros(3, height, width)
    image[0], image[1] = 4 * torch.arange(height)[:, None], 4 * torch.arange(width)
    return image


def cropped(image, extents, size, **draws):
    """A crop of half the area at ratio 1, in the middle and not mirrored, but for what is given; draws are in [0, 1]."""
    given = dict(area=0.375, ratio=0.5, row=0.5, column=0.5, flip=1.0) | draws
    numbers = [torch.tensor([value]) for value in given.values()]
    return views._cropped(image[None], torch.tensor([extents]), size, *numbers)[0]


def test_extents_of_the_whole_change_nothing():
    images = torch.randint(0, 256, (40, 3, 16, 16), generator=drawn(), dtype=torch.uint8)
    whole = torch.tensor([[16, 16]]).expand(40, 2)
    assert torch.equal(view(images, drawn(1), whole, (16, 16)), view(images, drawn(1)))


def test_a_view_of_a_part_is_the_view_of_that_part_alone():
    images = torch.randint(0, 256, (40, 3, 16, 16), generator=drawn(), dtype=torch.uint8)
    canvas = torch.cat([images, images[:, :, :, -1:].expand(-1, -1, -1, 16)], 3)  # the edge repeated, then as good as nothing
    alone, part = view(images, drawn(2)), view(canvas, drawn(2), torch.tensor([[16, 16]]).expand(40, 2), (16, 16))
    assert (alone.int() - part.int()).abs().max() <= 1


@pytest.mark.parametrize(("height", "width"), [(16, 32), (32, 16)])
def test_a_crop_of_a_collage_is_square_and_reaches_both_ends(height, width):
    """Half of a collage's area, at ratio 1: a square of the shorter side, wherever it lies."""
    image = coordinates(height, width)
    for place, first in ((0.0, 0), (1.0, 16), (0.5, 8)):
        found = cropped(image, (height, width), (16, 16), row=place, column=place)
        along = 1 if width > height else 0
        line = found[along].mean(0) if along else found[along].mean(1)
        torch.testing.assert_close(line, 4.0 * (first + torch.arange(16)), atol=0.01, rtol=0)
        across = found[1 - along].mean(1) if along else found[1 - along].mean(0)
        torch.testing.assert_close(across, 4.0 * torch.arange(16), atol=0.01, rtol=0)


def test_no_crop_reaches_beyond_an_image():
    """The rest of the canvas is white, the image black: a bilinear crop sees at most its edge."""
    canvas = torch.full((200, 3, 32, 32), 255, dtype=torch.uint8)
    canvas[:, :, :17, :] = 0  # a row more than the image, as `Collages` repeats it
    found = view(canvas, drawn(), torch.tensor([[16, 32]]).expand(200, 2), (16, 16))
    assert found.shape == (200, 3, 16, 16) and found.max() == 0


def test_collages_are_laid_out_whole_and_their_halves_resized_as_images_are():
    generator = drawn()
    plain, wide, high = (
        torch.randint(0, 256, (3, *shape), generator=generator, dtype=torch.uint8) for shape in ((8, 8), (8, 16), (16, 8))
    )
    made = Collages.from_raw(RawImages([plain, wide, high], torch.zeros(3, dtype=torch.int64), ["one"]), PREPROCESSING)
    batch = made.__getitems__([2, 0, 1])
    assert batch["extents"].tolist() == [[32, 16], [16, 16], [16, 32]] and batch["pixel_values"].shape == (3, 3, 32, 32)

    def resized(image):
        return PREPROCESSING.resize(image[None])[0]

    high_one, plain_one, wide_one = batch["pixel_values"]
    assert torch.equal(wide_one[:, :16], torch.cat([resized(wide[:, :, :8]), resized(wide[:, :, 8:])], 2))
    assert torch.equal(high_one[:, :, :16], torch.cat([resized(high[:, :8]), resized(high[:, 8:])], 1))
    assert torch.equal(plain_one[:, :16, :16], resized(plain)) and torch.equal(plain_one[:, :16, 16], plain_one[:, :16, 15])


def test_images_of_other_sizes_are_no_collages():
    sizes = [torch.zeros(3, *shape, dtype=torch.uint8) for shape in ((8, 8), (8, 12))]
    for images in (sizes, [sizes[0], torch.zeros(3, 16, 16, dtype=torch.uint8)]):
        with pytest.raises(ValueError, match="these images differ in size: resize them first"):
            Collages.from_raw(RawImages(images, torch.zeros(2, dtype=torch.int64), ["one"]), PREPROCESSING)
