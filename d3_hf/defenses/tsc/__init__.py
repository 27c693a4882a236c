"""TSC, Two-stage Symmetry Connectivity."""

from .trainer import TSCConfig, TSCTrainer

__all__ = ["TSCConfig", "TSCTrainer"]
