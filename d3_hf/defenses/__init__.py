"""The defences: one file each, one Config and one Trainer each; `defence` loads one.

`DEFENCES` names those of classifiers, which need labels, `ENCODER_DEFENCES` those of encoders, which need none, `CLIP_DEFENCES`
those of a whole CLIP, which need captions. A name in the first two has a form for each of both kinds of model.
"""

import importlib

# Module, and what its Config's and Trainer's names begin with.
DEFENCES: dict[str, tuple[str, str]] = {
    "d3": ("d3", "D3"),
    "fine_tuning": ("fine_tuning", "FineTuning"),
    "base_tuning": ("base_tuning", "BaseTuning"),
    "linear_probing": ("linear_probing", "LinearProbing"),
    "ft_sam": ("ft_sam", "FTSAM"),
    "fst": ("fst", "FST"),
    "sau": ("sau", "SAU"),
    "tsbd": ("tsbd", "TSBD"),
    "tsc": ("tsc", "TSC"),
    "anp": ("anp", "ANP"),
    "fine_pruning": ("fine_pruning", "FinePruning"),
    "nad": ("nad", "NAD"),
    "neural_cleanse": ("neural_cleanse", "NeuralCleanse"),
    "ibau": ("ibau", "IBAU"),
    "rnp": ("rnp", "RNP"),
    "lmr": ("lmr", "LMR"),
}
ENCODER_DEFENCES: dict[str, tuple[str, str]] = {
    "par": ("encoders.par", "PAR"),
    "encoder_d3": ("encoders.encoder_d3", "EncoderD3"),
    "mimic": ("encoders.mimic", "Mimic"),
    "tsc": ("encoders.encoder_tsc", "EncoderTSC"),
}
CLIP_DEFENCES: dict[str, tuple[str, str]] = {
    "clip_fine_tuning": ("clip.fine_tuning", "CLIPFineTuning"),
    "clean_clip": ("clip.clean_clip", "CleanCLIP"),
    "clip_par": ("clip.par", "CLIPPAR"),
}


def defence(name: str, of_encoders: bool = False) -> tuple[type, type]:
    """The Config and the Trainer of a defence.

    Args:
        name: A key of `DEFENCES`, `ENCODER_DEFENCES` or `CLIP_DEFENCES`.
        of_encoders: Which form of a name in the first two is meant.

    Raises:
        ValueError: There is no such defence; the message lists them.
    """
    return _part(name, "Config", of_encoders), _part(name, "Trainer", of_encoders)


def configuration(name: str, of_encoders: bool = False) -> type:
    """The Config of a defence, as `defence`: D3's comes without its Trainer, which takes seconds to load."""
    return _part(name, "Config", of_encoders)


def _part(name: str, ending: str, of_encoders: bool) -> type:
    known = CLIP_DEFENCES | (DEFENCES | ENCODER_DEFENCES if of_encoders else ENCODER_DEFENCES | DEFENCES)
    if name not in known:
        others = f"for encoders {', '.join(ENCODER_DEFENCES)}; for a whole CLIP {', '.join(CLIP_DEFENCES)}"
        raise ValueError(f"unknown defence {name!r}; known: {', '.join(DEFENCES)}; {others}")
    module, prefix = known[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), prefix + ending)
