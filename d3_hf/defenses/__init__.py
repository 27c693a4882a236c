"""The defences: one file each, one Config and one Trainer each; `DEFENCES` names them, `defence` loads one."""

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


def defence(name: str) -> tuple[type, type]:
    """The Config and the Trainer of a defence.

    Args:
        name: A key of `DEFENCES`.

    Raises:
        ValueError: There is no such defence; the message lists them.
    """
    return _part(name, "Config"), _part(name, "Trainer")


def configuration(name: str) -> type:
    """The Config of a defence, as `defence`: D3's comes without its Trainer, which takes seconds to load."""
    return _part(name, "Config")


def _part(name: str, ending: str) -> type:
    if name not in DEFENCES:
        raise ValueError(f"unknown defence {name!r}; known: {', '.join(DEFENCES)}")
    module, prefix = DEFENCES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), prefix + ending)
