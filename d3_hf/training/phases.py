"""What a run is doing: each of its phases with number and name, as ``2/4 purifying by D3``."""

from accelerate import PartialState

VICTIM, PURIFICATION = 4, 4  # how many phases each of them has


class Phases:
    """Says the phases of a run, those of a victim, a choice and a purification in one count; on the main process alone.

    Args:
        count: How many there are in the whole run.

    Attributes:
        number: Of the phase that is under way; 0 before the first.
    """

    def __init__(self, count: int):
        self.count, self.number = count, 0

    def begin(self, what: str, number: int | None = None) -> None:
        """Say that a phase begins: the next one, or the one of that number, where some were not needed."""
        self.number = self.number + 1 if number is None else number
        if PartialState().is_main_process:
            print(f"{self.number}/{self.count} {what}", flush=True)
