"""Purify image classifiers that may carry a backdoor.

Importing this package is cheap: the public names load on first use, and its networks register with timm when timm is loaded.
"""

import importlib
from typing import Any

from .models.networks import registration

_HOMES = {
    "ANPConfig": "defenses.anp",
    "ANPTrainer": "defenses.anp",
    "D3Config": "defenses.d3",
    "D3Trainer": "defenses.d3",
    "FSTConfig": "defenses.fst",
    "FSTTrainer": "defenses.fst",
    "FTSAMConfig": "defenses.ft_sam",
    "FTSAMTrainer": "defenses.ft_sam",
    "FinePruningConfig": "defenses.fine_pruning",
    "FinePruningTrainer": "defenses.fine_pruning",
    "FineTuningConfig": "defenses.fine_tuning",
    "FineTuningTrainer": "defenses.fine_tuning",
    "GuardArguments": "evaluation.guard",
    "IBAUConfig": "defenses.ibau",
    "IBAUTrainer": "defenses.ibau",
    "LinearProbingConfig": "defenses.linear_probing",
    "LinearProbingTrainer": "defenses.linear_probing",
    "NADConfig": "defenses.nad",
    "NADTrainer": "defenses.nad",
    "NeuralCleanseConfig": "defenses.neural_cleanse",
    "NeuralCleanseTrainer": "defenses.neural_cleanse",
    "Preprocessing": "data.preprocessing",
    "PurifyConfig": "training.config",
    "PurifyTrainer": "training.trainer",
    "RNPConfig": "defenses.rnp",
    "RNPTrainer": "defenses.rnp",
    "RawImages": "data.images",
    "SAUConfig": "defenses.sau",
    "SAUTrainer": "defenses.sau",
    "TSBDConfig": "defenses.tsbd",
    "TSBDTrainer": "defenses.tsbd",
    "TSCConfig": "defenses.tsc",
    "TSCTrainer": "defenses.tsc",
    "from_description": "attacks",
    "load_classifier": "models",
    "load_images": "data.load",
    "measure": "evaluation.measure",
    "purify": "workflow",
    "retain_split": "data.load",
}

__all__ = [*_HOMES]  # noqa: PLE0604
__version__ = "0.1.0"

registration.install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'd3_hf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"d3_hf.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
