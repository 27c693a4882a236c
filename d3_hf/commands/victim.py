"""``d3-hf victim``: make a victim, an encoder with ``--encoder``, a CLIP with ``--clip``, or those of a set."""

from typing import Any

from ..victims.sets import make_set, make_victim

ENCODER, CLIP = "--encoder", "--clip"


def run(argv: list[str]) -> dict[str, Any]:
    """Run ``[--encoder | --clip] [CONFIG.yaml] --option value ...`` or, for a set, ``--set FILE.yaml [--only PATTERN ...]``.

    Args:
        argv: Arguments without the program's name.

    Returns:
        ``folder``, ``attack`` (its description, None without one) and ``measured`` as in ``victim.json``; of a set ``folders``.

    Raises:
        ValueError: See `make_victim` and `make_set`.
    """
    if any(argument.partition("=")[0] == "--set" for argument in argv):
        return {"folders": make_set(argv)}
    if CLIP in argv or ENCODER in argv:
        trainer = _made_without_classes(argv)
        attack = trainer.attack.describe() if trainer.attack else None
        return {"folder": trainer.args.output_dir, "attack": attack, "measured": trainer.report.measured()}
    made = make_victim(argv)
    return {"folder": made.folder, "attack": made.attack.describe() if made.attack else None, "measured": made.measured}


def _made_without_classes(argv: list[str]) -> Any:
    """The trainer of a victim that has no head: a CLIP or an encoder."""
    if CLIP in argv:
        from ..victims.clip import make_clip_victim

        return make_clip_victim([argument for argument in argv if argument != CLIP])
    from ..victims.encoders import make_encoder_victim

    return make_encoder_victim([argument for argument in argv if argument != ENCODER])
