"""Purify image classifiers that may carry a backdoor.

Importing this package is cheap: the public names load on first use, and its networks register with timm when timm is loaded.
"""

import importlib
from typing import TYPE_CHECKING

from .models.networks import registration

__version__ = "0.1.0"

# The public names and where they live; the types below repeat it, and a test compares the two.
_HOMES = {
    "ANPConfig": "defenses.anp",
    "ANPTrainer": "defenses.anp",
    "BaseTuningConfig": "defenses.base_tuning",
    "BaseTuningTrainer": "defenses.base_tuning",
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
    "GuardArguments": "evaluation.guard_arguments",
    "IBAUConfig": "defenses.ibau",
    "IBAUTrainer": "defenses.ibau",
    "LMRConfig": "defenses.lmr",
    "LMRTrainer": "defenses.lmr",
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
    "audit": "inspection.audit",
    "check": "inspection.check",
    "from_description": "attacks",
    "load_classifier": "models.load",
    "load_encoder": "models.encoders",
    "load_images": "data.load",
    "map_classes": "data.labels",
    "measure": "evaluation.measure",
    "purify": "workflow",
    "retain_split": "data.load",
}

__all__ = [*_HOMES]  # noqa: PLE0604

registration.install()

if TYPE_CHECKING:
    from .attacks import from_description as from_description
    from .data.images import RawImages as RawImages
    from .data.labels import map_classes as map_classes
    from .data.load import load_images as load_images
    from .data.load import retain_split as retain_split
    from .data.preprocessing import Preprocessing as Preprocessing
    from .defenses.anp import ANPConfig as ANPConfig
    from .defenses.anp import ANPTrainer as ANPTrainer
    from .defenses.base_tuning import BaseTuningConfig as BaseTuningConfig
    from .defenses.base_tuning import BaseTuningTrainer as BaseTuningTrainer
    from .defenses.d3 import D3Config as D3Config
    from .defenses.d3 import D3Trainer as D3Trainer
    from .defenses.fine_pruning import FinePruningConfig as FinePruningConfig
    from .defenses.fine_pruning import FinePruningTrainer as FinePruningTrainer
    from .defenses.fine_tuning import FineTuningConfig as FineTuningConfig
    from .defenses.fine_tuning import FineTuningTrainer as FineTuningTrainer
    from .defenses.fst import FSTConfig as FSTConfig
    from .defenses.fst import FSTTrainer as FSTTrainer
    from .defenses.ft_sam import FTSAMConfig as FTSAMConfig
    from .defenses.ft_sam import FTSAMTrainer as FTSAMTrainer
    from .defenses.ibau import IBAUConfig as IBAUConfig
    from .defenses.ibau import IBAUTrainer as IBAUTrainer
    from .defenses.linear_probing import LinearProbingConfig as LinearProbingConfig
    from .defenses.linear_probing import LinearProbingTrainer as LinearProbingTrainer
    from .defenses.lmr import LMRConfig as LMRConfig
    from .defenses.lmr import LMRTrainer as LMRTrainer
    from .defenses.nad import NADConfig as NADConfig
    from .defenses.nad import NADTrainer as NADTrainer
    from .defenses.neural_cleanse import NeuralCleanseConfig as NeuralCleanseConfig
    from .defenses.neural_cleanse import NeuralCleanseTrainer as NeuralCleanseTrainer
    from .defenses.rnp import RNPConfig as RNPConfig
    from .defenses.rnp import RNPTrainer as RNPTrainer
    from .defenses.sau import SAUConfig as SAUConfig
    from .defenses.sau import SAUTrainer as SAUTrainer
    from .defenses.tsbd import TSBDConfig as TSBDConfig
    from .defenses.tsbd import TSBDTrainer as TSBDTrainer
    from .defenses.tsc import TSCConfig as TSCConfig
    from .defenses.tsc import TSCTrainer as TSCTrainer
    from .evaluation.guard_arguments import GuardArguments as GuardArguments
    from .evaluation.measure import measure as measure
    from .inspection.audit import audit as audit
    from .inspection.check import check as check
    from .models.encoders import load_encoder as load_encoder
    from .models.load import load_classifier as load_classifier
    from .training.config import PurifyConfig as PurifyConfig
    from .training.trainer import PurifyTrainer as PurifyTrainer
    from .workflow import purify as purify
else:  # hidden from type checkers, which would take every misspelt name for one that is here

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module 'd3_hf' has no attribute {name!r}")
        return getattr(importlib.import_module(f"d3_hf.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
