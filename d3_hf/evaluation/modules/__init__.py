"""ACC, ASR, RA and PACC as ``evaluate`` modules that need no network.

Instantiate a class (``AttackSuccessRate()``) or load one by path:
``evaluate.load(f"{METRICS_FOLDER}/attack_success_rate")``.
"""

from pathlib import Path

from .accuracy.accuracy import Accuracy
from .attack_success_rate.attack_success_rate import AttackSuccessRate
from .poisoned_accuracy.poisoned_accuracy import PoisonedAccuracy
from .robust_accuracy.robust_accuracy import RobustAccuracy

METRICS_FOLDER = Path(__file__).parent

__all__ = ["METRICS_FOLDER", "Accuracy", "AttackSuccessRate", "PoisonedAccuracy", "RobustAccuracy"]
