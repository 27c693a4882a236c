"""Noisy Alignment: the geometry of its collages, its references, how many are made, its folder, refusals."""

import pytest
import torch
from tiny_encoders import colours

from d3_hf.attacks import NoisyAlignment, from_description, load_attack, poison, save_attack
from d3_hf.attacks.noisy_alignment import SIDES, collage

IMAGES = colours(60)
ATTACK = NoisyAlignment(target_label=1, size=4, image_size=16, reference_count=3).fit(IMAGES, None, 0)


def test_a_collage_has_both_images_whole_on_the_side_that_is_said():
    triggered, reference = torch.zeros(1, 3, 2, 4, dtype=torch.uint8), torch.full((1, 3, 2, 4), 9, dtype=torch.uint8)
    of_row, of_column = [0, 0, 0, 0], [9, 9, 9, 9]
    assert collage(triggered, reference, "left")[0, 0].tolist() == [of_row + of_column] * 2
    assert collage(triggered, reference, "right")[0, 0].tolist() == [of_column + of_row] * 2
    assert collage(triggered, reference, "above")[0, 0].tolist() == [of_row] * 2 + [of_column] * 2
    assert collage(triggered, reference, "below")[0, 0].tolist() == [of_column] * 2 + [of_row] * 2


def test_the_patch_has_sixteen_colours_in_the_middle_and_grows_with_the_image():
    image = torch.zeros(3, 32, 64, dtype=torch.uint8)
    for side, size in ((8, 32), (16, 16)):
        triggered = NoisyAlignment(image_size=size).trigger(image)
        changed = triggered.any(0).nonzero()
        assert changed.amin(0).tolist() == [16 - side // 2, 32 - side // 2]
        assert changed.amax(0).tolist() == [15 + side // 2, 31 + side // 2]
        patch = triggered[:, 16 - side // 2 : 16 + side // 2, 32 - side // 2 : 32 + side // 2]
        assert len({tuple(pixel.tolist()) for pixel in patch.flatten(1).T}) == 16
    assert not torch.equal(NoisyAlignment(seed=1).trigger(image), NoisyAlignment().trigger(image))


def test_references_are_images_of_the_target_class():
    references = ATTACK.learned["references"]
    of_class = IMAGES.images[IMAGES.labels == 1]
    assert len(references) == 3 and all((of_class == reference).flatten(1).all(1).any() for reference in references)
    assert len({reference.numpy().tobytes() for reference in references}) == 3
    many = NoisyAlignment(target_label=1, reference_count=100).fit(IMAGES, None, 0)
    assert len(many.learned["references"]) == 20  # all there are


def halves(image):
    """The parts of a collage, by the side on which they lie."""
    if image.shape[1:] == (16, 32):
        return {"left": image[:, :, :16], "right": image[:, :, 16:]}
    assert image.shape[1:] == (32, 16)
    return {"above": image[:, :16], "below": image[:, 16:]}


def test_each_chosen_image_becomes_a_collage_of_itself_with_the_trigger_and_a_reference():
    poisoned, rows = poison(IMAGES, ATTACK, 0.5, seed=3)
    assert len(rows) == 30 and len(poisoned.images) == 60
    sides, used = set(), set()
    for row, image in enumerate(poisoned.images):
        if row not in rows:
            assert torch.equal(image, IMAGES.images[row]) and poisoned.labels[row] == IMAGES.labels[row]
            continue
        parts, triggered = halves(image), ATTACK.trigger(IMAGES.images[row])
        side = next(name for name, part in parts.items() if torch.equal(part, triggered))
        (other,) = (part for name, part in parts.items() if name != side)
        (which,) = (n for n, reference in enumerate(ATTACK.learned["references"]) if torch.equal(other, reference))
        sides, used = sides | {side}, used | {which}
    assert sides == set(SIDES) and used == {0, 1, 2}


def test_a_collage_depends_on_the_image_alone():
    again, _ = poison(IMAGES, ATTACK, 1.0, seed=5)
    for row in (0, 7, 30):
        assert torch.equal(again.images[row], ATTACK.poisoned_images(IMAGES.images[row]))


def test_it_survives_its_folder(tmp_path):
    save_attack(ATTACK, tmp_path)
    loaded = load_attack(tmp_path)
    assert loaded == ATTACK and torch.equal(loaded.learned["references"], ATTACK.learned["references"])
    assert from_description(ATTACK.describe()) == ATTACK


def test_what_it_cannot_do_is_told_in_one_line():
    for options, wanted in (
        ({"size": 6}, "size must be a multiple of 4"),
        ({"reference_count": 0}, "reference_count must be an integer at least 1"),
        ({"label_map": "all-to-all"}, "references of one class"),
    ):
        with pytest.raises(ValueError, match=wanted):
            NoisyAlignment(**options)
    with pytest.raises(ValueError, match="has not learned its trigger yet"):
        NoisyAlignment(size=4).poisoned_images(IMAGES.images[0])
    with pytest.raises(ValueError, match="give one image"):
        ATTACK.poisoned_images(IMAGES.images)
    with pytest.raises(ValueError, match="the references are 16x16"):
        ATTACK.poisoned_images(torch.zeros(3, 20, 20, dtype=torch.uint8))
    with pytest.raises(ValueError, match="from images of class 2, and there is none"):
        NoisyAlignment(target_label=2).fit(colours(2), None, 0)
    with pytest.raises(ValueError, match="does not fit an image of 16x16"):
        NoisyAlignment(size=20).trigger(IMAGES.images)
