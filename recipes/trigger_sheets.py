"""Draw one sheet per attack: images as they are, triggered, and the difference times ten.

Attacks that learn their trigger are drawn from the victims that carry it.

    python recipes/trigger_sheets.py --victims outputs/victims/cifar10-resnet20 --dataset_name uoft-cs/cifar10 \
        --output_dir model_cards/pictures
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from d3_hf.attacks import ATTACKS, Attack, LearnedAttack, load_attack
from d3_hf.cli import run
from d3_hf.data.images import RawImages
from d3_hf.data.load import load_images
from d3_hf.options.parser import Parser

COLUMNS, ENLARGED = 8, 4


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


def sheet(attack: Attack, images: Tensor) -> Tensor:
    """The sheet of one attack.

    Args:
        attack: With its trigger.
        images: uint8 (B, 3, H, W).

    Returns:
        uint8 (3, h, w): three rows of B pictures: as they are, triggered, |difference| * 10.
    """
    triggered = attack.trigger(images)
    difference = (triggered.int() - images.int()).abs().mul(10).clamp(max=255).to(torch.uint8)
    rows = torch.cat([images, triggered, difference])
    rows = rows.repeat_interleave(ENLARGED, 2).repeat_interleave(ENLARGED, 3)
    return make_grid(rows, nrow=len(images), padding=4, pad_value=255)


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
        to_pil_image(sheet(attack, images)).save(output / f"{name}.png")
        print(output / f"{name}.png")


if __name__ == "__main__":
    run(main, sys.argv[1:])
