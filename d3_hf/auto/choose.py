"""The rule: which recipe to try next, and which of those that were tried to take. Counts and scores in, a recipe out."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.paired import PairedTable
from .floor import keeps_floor


@dataclass(frozen=True)
class Tried:
    """What trying a recipe found; JSON-able by `dataclasses.asdict`.

    Attributes:
        name: The recipe's.
        place: Its rung, 1 the gentlest.
        seconds: Of training and measuring.
        pair: Validation images, before and after; None where it raised or diverged.
        scores: By their names in `thoroughness.SCORES`; one that the network has not is missing.
        updates: That it took.
        error: Why it is broken, if it raised.
        stopped_at: The share of its updates after which it was given up, see `early`; ``pair`` is of that moment. None of one
            that ran to its end.
    """

    name: str
    place: int
    seconds: float
    pair: PairedTable | None = None
    scores: Mapping[str, float] | None = None
    updates: int | None = None
    error: str | None = None
    stopped_at: float | None = None

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Tried":
        """What ``asdict`` made."""
        return cls(**found | {"pair": found["pair"] and PairedTable(**found["pair"])})

    def holds(self, max_accuracy_drop: float) -> bool:
        """Whether it keeps the floor; one that raised or was given up does not."""
        return self.pair is not None and self.stopped_at is None and keeps_floor(self.pair, max_accuracy_drop)


def next_place(start: int, held: Mapping[int, bool], available: Collection[int]) -> int | None:
    """The rung to try next: one more severe than the last where the floor held, one gentler where it broke.

    Args:
        start: Where to begin; where that is not available, the next gentler one that is, or else the gentlest.
        held: The rungs that were tried, and whether each kept the floor.
        available: All rungs that can be tried, the tried ones among them.

    Returns:
        None where the ladder ends or the next one was tried already.
    """
    places = sorted(available)
    at, visited = sum(place <= start for place in places) - 1, set()
    at = max(at, 0)
    while 0 <= at < len(places) and at not in visited:
        if places[at] not in held:
            return places[at]
        visited.add(at)
        at += 1 if held[places[at]] else -1
    return None


def walked(start: int, budget: int, available: Collection[int], holds: Callable[[int], bool]) -> list[int]:
    """The rungs that a walk tries, in their order, if ``holds`` says which of them keep the floor; see `next_place`."""
    held: dict[int, bool] = {}
    while len(held) < budget and (place := next_place(start, held, available)) is not None:
        held[place] = holds(place)
    return list(held)


def choose(tried: Sequence[Tried], max_accuracy_drop: float, score: str) -> tuple[Tried, bool]:
    """The most thorough recipe above the floor; where there is none, the gentlest that ran, and the guard rails say the rest.

    One that was given up on the way is taken only where no other ran.

    Args:
        tried: What was tried.
        max_accuracy_drop: See `keeps_floor`.
        score: The name in `thoroughness.SCORES` that decides; of equal ones the gentler is taken, one without it comes last.

    Returns:
        The recipe, and whether it is above the floor.

    Raises:
        RuntimeError: None of them ran.
    """
    ran = sorted((one for one in tried if one.pair is not None), key=lambda one: (one.stopped_at is not None, one.place))
    if not ran:
        raise RuntimeError(f"no recipe could be tried: {'; '.join(f'{one.name}: {one.error}' for one in tried)}")
    above = [one for one in ran if one.holds(max_accuracy_drop)]
    if not above:
        return ran[0], False
    return max(above, key=lambda one: (one.scores or {}).get(score, float("-inf"))), True
