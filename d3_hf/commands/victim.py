"""``d3-hf victim``: make a victim, an encoder with ``--encoder``, or those of a set."""

from typing import Any

from ..victims.sets import make_set, make_victim

ENCODER = "--encoder"


def run(argv: list[str]) -> dict[str, Any]:
    """Run ``[--encoder] [CONFIG.yaml] --option value ...`` or, for a set, ``--set FILE.yaml [--only PATTERN ...] ...``.

    Args:
        argv: Arguments without the program's name.

    Returns:
        ``folder``, ``attack`` (its description, None without one) and ``measured`` as in ``victim.json``; of a set ``folders``.

    Raises:
        ValueError: See `make_victim` and `make_set`.
    """
    if any(argument.partition("=")[0] == "--set" for argument in argv):
        return {"folders": make_set(argv)}
    if ENCODER in argv:
        from ..victims.encoders import make_encoder_victim

        trainer = make_encoder_victim([argument for argument in argv if argument != ENCODER])
        attack = trainer.attack.describe() if trainer.attack else None
        return {"folder": trainer.args.output_dir, "attack": attack, "measured": trainer.report.measured()}
    made = make_victim(argv)
    return {"folder": made.folder, "attack": made.attack.describe() if made.attack else None, "measured": made.measured}
