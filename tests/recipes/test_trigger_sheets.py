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
        assert read(file).shape == (3, GAP + 3 * side, GAP + recipe["COLUMNS"] * side), name
    # Of the victim, not of the attack's defaults: the white patch is 8 pixels wide.
    first = read(files["badnets"])[:, GAP:side, GAP:side]
    patched = read(files["badnets"])[:, side + GAP : 2 * side, GAP:side]
    assert ((patched != first).any(0).sum() / recipe["ENLARGED"] ** 2).item() == 64


def test_rows_are_images_triggered_and_ten_times_the_difference(recipe):
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    attack = from_description({"name": "lf_noise"})
    found = recipe["sheet"](attack, images)
    triggered = attack.trigger(images)
    difference = (10 * (triggered.int() - images.int()).abs()).clamp(max=255)
    scale = recipe["ENLARGED"]
    for row, pictures in enumerate((images, triggered, difference)):
        for column, picture in enumerate(pictures):
            top, left = (GAP + place * (GAP + 8 * scale) for place in (row, column))
            shown = found[:, top : top + 8 * scale, left : left + 8 * scale]
            assert torch.equal(shown, picture.to(torch.uint8).repeat_interleave(scale, 1).repeat_interleave(scale, 2))
