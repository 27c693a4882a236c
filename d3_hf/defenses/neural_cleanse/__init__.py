"""Neural Cleanse."""

from .trainer import NeuralCleanseConfig, NeuralCleanseTrainer

__all__ = ["NeuralCleanseConfig", "NeuralCleanseTrainer"]
