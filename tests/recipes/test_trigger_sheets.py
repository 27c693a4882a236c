"""Sheets of triggers: the right size, and what their three rows show."""

import runpy

import pytest
import torch
from PIL import Image
from places import RECIPES
from torchvision.transforms.functional import pil_to_tensor

from d3_hf.attacks import ATTACKS, BadNets, LearnedAttack, from_description, save_attack
from d3_hf.data.images import RawImages

FILE = RECIPES / "trigger_sheets.py"
GAP = 4  # between two pictures, and around all of them


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(FILE))


def read(file):
    with Image.open(file) as picture:
        return pil_to_tensor(picture)


def test_a_sheet_for_each_victim_and_each_attack_with_nothing_to_learn(recipe, tmp_path):
    images = RawImages(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.arange(4), list("abcd"))
    learned = from_description({"name": "input_aware", "mask_steps": 1}).fit(images, None, 0)
    for name, attack in (("input_aware", learned), ("badnets", BadNets(size=8)), ("badnets-1percent", BadNets())):
        (tmp_path / "victims" / name).mkdir(parents=True)
        save_attack(attack, tmp_path / "victims" / name)
    recipe["main"](
        ["--victims", str(tmp_path / "victims"), "--dataset_name", "digits", "--output_dir", str(tmp_path / "sheets")]
    )
    plain = {name for name, kind in ATTACKS.items() if not issubclass(kind, LearnedAttack)}
    files = {file.stem: file for file in (tmp_path / "sheets").glob("*.png")}
    assert files.keys() == plain | {"input_aware"}
    side = GAP + 32 * recipe["ENLARGED"]
    for name, file in files.items():
        assert read(file).shape == (3, GAP + 3 * side, recipe["MARGIN"] + GAP + recipe["COLUMNS"] * side), name
    # Of the victim, not of the attack's defaults: the white patch is 8 pixels wide.
    pictures = read(files["badnets"])[:, :, recipe["MARGIN"] :]
    first, patched = pictures[:, GAP:side, GAP:side], pictures[:, side + GAP : 2 * side, GAP:side]
    assert ((patched != first).any(0).sum() / recipe["ENLARGED"] ** 2).item() == 64


@pytest.mark.parametrize(("largest", "scale"), [(1, 255), (25, 10), (255, 1)])
def test_rows_are_images_triggered_and_the_difference_as_far_as_it_can_be_enlarged(largest, scale, recipe, monkeypatch):
    said = []

    def note(self, place, text, *style, **more):
        said.append(text)

    monkeypatch.setattr("PIL.ImageDraw.ImageDraw.multiline_text", note)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256 - largest, (2, 3, 8, 8), dtype=torch.uint8, generator=generator)
    triggered = images.clone()
    triggered[0, 0, 0, 0] += largest
    triggered[1, :, 3:5] += largest // 2
    found = pil_to_tensor(recipe["sheet"](images, triggered))[:, :, recipe["MARGIN"] :]
    difference = scale * (triggered.int() - images.int()).abs()
    assert 128 <= difference.max() <= 255 and said[2] == ("difference" if scale == 1 else f"difference\nx {scale}")
    enlarged = recipe["ENLARGED"]
    for row, pictures in enumerate((images, triggered, difference)):
        for column, picture in enumerate(pictures):
            top, left = (GAP + place * (GAP + 8 * enlarged) for place in (row, column))
            shown = found[:, top : top + 8 * enlarged, left : left + 8 * enlarged]
            assert torch.equal(shown, picture.to(torch.uint8).repeat_interleave(enlarged, 1).repeat_interleave(enlarged, 2))


def test_names_stand_beside_their_rows_and_do_not_reach_the_pictures(recipe):
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    margin = pil_to_tensor(recipe["sheet"](images, images))[:, :, : recipe["MARGIN"]]
    dark = (margin < 128).any(0)
    side = GAP + 32 * recipe["ENLARGED"]
    assert (
        all(dark[row * side : (row + 1) * side].any() for row in range(3)) and not dark[:, -GAP:].any() and not dark[:, 0].any()
    )
    widest = recipe["sheet"](images, images + 1)  # times 255
    assert not (pil_to_tensor(widest)[:, :, 0] < 128).any()


def test_without_a_difference_nothing_is_enlarged(recipe):
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert recipe["scale_of"](images, images) == 1
