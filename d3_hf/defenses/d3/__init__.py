"""D3, Distance-Driven Detoxification. Its options come without its trainer, which takes seconds to load."""

from typing import TYPE_CHECKING

from .config import D3Config

__all__ = ["D3Config", "D3Trainer"]

if TYPE_CHECKING:
    from .trainer import D3Trainer
else:  # hidden from type checkers, which would take every misspelt name for one that is here

    def __getattr__(name):
        if name != "D3Trainer":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .trainer import D3Trainer

        return D3Trainer
