"""Draw one sheet per attack: images as they are, triggered, and the difference, enlarged as far as it goes.

Attacks that learn their trigger are drawn from the victims that carry it.

    python recipes/trigger_sheets.py --victims outputs/victims/cifar10-resnet20 --dataset_name uoft-cs/cifar10 \
        --output_dir model_cards/pictures
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from d3_hf.attacks import ATTACKS, LearnedAttack, load_attack
from d3_hf.cli import run
from d3_hf.data.images import RawImages
from d3_hf.data.load import load_images
from d3_hf.options.parser import Parser

COLUMNS, ENLARGED, GAP = 8, 4, 4
MARGIN, FONT = 118, 16  # pixels: what the names of the rows stand in, and their height


@dataclass
class SheetArguments:
    """What to draw.

    Args:
        victims: Folder of victims, as ``make_victim.py --set`` fills it.
        dataset_name: Images; the first of its test split are drawn.
        output_dir: Where ``NAME.png`` go.
    """

    victims: str = field(metadata={"help": "Folder of victims."})
    dataset_name: str = field(metadata={"help": "Images to draw on."})
    output_dir: str = field(default="model_cards/pictures", metadata={"help": "Folder for the sheets."})


def scale_of(images: Tensor, triggered: Tensor) -> int:
    """The largest whole number by which every difference can be multiplied without exceeding 255; 1 where there is none."""
    largest = int((triggered.int() - images.int()).abs().max())
    return 255 // largest if largest else 1


def sheet(images: Tensor, triggered: Tensor) -> Image.Image:
    """The sheet of one attack.

    Args:
        images: As they are, uint8 (B, 3, H, W).
        triggered: The same with the trigger.

    Returns:
        Three named rows of B pictures: as they are, triggered, and |difference| times `scale_of`, which the name says.
    """
    scale = scale_of(images, triggered)
    difference = (triggered.int() - images.int()).abs().mul(scale).to(torch.uint8)
    rows = torch.cat([images, triggered, difference])
    rows = rows.repeat_interleave(ENLARGED, 2).repeat_interleave(ENLARGED, 3)
    pictures = to_pil_image(make_grid(rows, nrow=len(images), padding=GAP, pad_value=255))
    whole = Image.new("RGB", (MARGIN + pictures.width, pictures.height), "white")
    whole.paste(pictures, (MARGIN, 0))
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(FONT)
    names = ("as they are", "triggered", "difference" if scale == 1 else f"difference\nx {scale}")
    for row, name in enumerate(names):
        middle = GAP / 2 + (row + 0.5) * (pictures.height - GAP) / len(names)
        draw.multiline_text((MARGIN - 2 * GAP, middle), name, "black", font, anchor="rm", align="right")
    return whole


def main(argv: list[str]) -> None:
    """Draw the sheets of the victims, and of every other attack that has nothing to learn."""
    (options,) = Parser([SheetArguments]).read(argv)
    images = RawImages.from_dataset(load_images(options.dataset_name)["test"].select(range(COLUMNS))).images
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    attacks = {name: kind() for name, kind in ATTACKS.items() if not issubclass(kind, LearnedAttack)}
    victims = [file.parent for file in Path(options.victims).glob("*/attack.json") if file.parent.name in ATTACKS]
    attacks |= {folder.name: load_attack(folder) for folder in victims}
    for name, attack in sorted(attacks.items()):
        sheet(images, attack.trigger(images)).save(output / f"{name}.png")
        print(output / f"{name}.png")


if __name__ == "__main__":
    run(main, sys.argv[1:])
