"""D3, Distance-Driven Detoxification."""

from .trainer import D3Config, D3Trainer

__all__ = ["D3Config", "D3Trainer"]
