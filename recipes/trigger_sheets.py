"""Draw one sheet per victim of a set: images as they are, triggered, and the difference times ten.

    python recipes/trigger_sheets.py --victims outputs/victims/cifar10-resnet20 --dataset_name uoft-cs/cifar10 \
        --output_dir model_cards/pictures
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import write_png
from torchvision.utils import make_grid
from transformers import HfArgumentParser

from d3_hf.attacks import Attack, load_attack
from d3_hf.data import RawImages, load_images

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


def main() -> None:
    """Draw the sheets of all victims that carry an attack."""
    (options,) = HfArgumentParser(SheetArguments).parse_args_into_dataclasses()
    images = RawImages.from_dataset(load_images(options.dataset_name)["test"].select(range(COLUMNS))).images
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    for file in sorted(Path(options.victims).glob("*/attack.json")):
        write_png(sheet(load_attack(file.parent), images), str(output / f"{file.parent.name}.png"))
        print(output / f"{file.parent.name}.png")


if __name__ == "__main__":
    main()
