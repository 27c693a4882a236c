"""NAD, Neural Attention Distillation."""

from .trainer import NADConfig, NADTrainer

__all__ = ["NADConfig", "NADTrainer"]
