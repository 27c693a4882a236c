"""``d3-hf drill``: the fire drill, which ``recipes/d3_vit.py`` is without arguments."""

from typing import Any

from . import purify

CNN = "--cnn"


def run(argv: list[str]) -> dict[str, Any]:
    """Run ``[--cnn] --option value ...``: make a small victim on handwritten digits, purify it, print the table.

    Args:
        argv: Arguments without the program's name: ``--cnn`` for a ResNet in place of a ViT, and options of the purification.

    Returns:
        As `purify.run`.

    Raises:
        GuardRailBroken: See `purify.run`.
        ValueError: See `purify.run`.
    """
    name = "fire_drill_resnet" if CNN in argv else "fire_drill_vit"
    return purify.run([name, "--victim_config", f"{name}_victim", *(argument for argument in argv if argument != CNN)])
