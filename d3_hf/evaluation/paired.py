"""The drop of ACC between two models that saw the same images, from their paired table: interval and McNemar's exact test.

The interval is Newcombe's (Statistics in Medicine 17, 1998, method 10): Wilson's intervals of the two ACC, squared and added,
less what the correlation of the pairs explains. Not the exact conditional one, McNemar's test inverted: Clopper and Pearson's
for b / (b + c), times (b + c) / n. That one takes the number of discordant images as known: it is [0, 0] where the models never
differ, and ends at the drop that was measured where b or c is 0. Where 5 % of all images are lost and none gained, it holds the
true drop in 56 % of simulated samples of 100 images and in 14 % of those of 10,000; Newcombe's held it in 94 % at least, over
30 to 10,000 images and ACC of 70 to 98 %.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .metrics import Proportion, accuracy


@dataclass(frozen=True)
class PairedTable:
    """On how many of the same images two models were right.

    Args:
        both_right: Images that both classify as their label says.
        lost: Right before and wrong after, McNemar's b.
        gained: Wrong before and right after, McNemar's c.
        both_wrong: Images that neither classifies rightly.

    Raises:
        ValueError: A count is negative, or all are 0.
    """

    both_right: int
    lost: int
    gained: int
    both_wrong: int

    def __post_init__(self) -> None:
        counts = (self.both_right, self.lost, self.gained, self.both_wrong)
        if min(counts) < 0 or not any(counts):
            raise ValueError(f"a paired table needs four counts, at least one of them over 0; got {counts}")

    @property
    def n(self) -> int:
        """All images."""
        return self.both_right + self.lost + self.gained + self.both_wrong

    @property
    def before(self) -> Proportion:
        """ACC of the first model."""
        return Proportion(self.both_right + self.lost, self.n)

    @property
    def after(self) -> Proportion:
        """ACC of the second model."""
        return Proportion(self.both_right + self.gained, self.n)

    @property
    def drop(self) -> float:
        """ACC before minus ACC after, in [-1, 1]."""
        return (self.lost - self.gained) / self.n

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Newcombe's interval (low, high) of the drop, in [-1, 1]; ``confidence`` in (0, 1)."""
        (low, high), (low_after, high_after) = (_wilson(rate, confidence) for rate in (self.before, self.after))
        below, above = self.before.value - low, high - self.before.value
        below_after, above_after = self.after.value - low_after, high_after - self.after.value
        phi = self._correlation()
        down = math.sqrt(below**2 - 2 * phi * below * above_after + above_after**2)
        up = math.sqrt(above**2 - 2 * phi * above * below_after + below_after**2)
        return max(-1.0, self.drop - down), min(1.0, self.drop + up)

    def _correlation(self) -> float:
        """Phi of the table, a positive one moved towards 0 for continuity; 0 where a model is always right or always wrong."""
        of_each = [k * (self.n - k) for k in (self.before.successes, self.after.successes)]
        if 0 in of_each:
            return 0.0
        covariance = self.both_right * self.both_wrong - self.lost * self.gained
        return (covariance if covariance < 0 else max(0.0, covariance - self.n / 2)) / math.sqrt(math.prod(of_each))

    @property
    def p_value(self) -> float:
        """McNemar's exact test, two-sided: how surprising the lost and the gained images are if ACC has not changed."""
        from scipy.stats import binomtest

        discordant = self.lost + self.gained
        return float(binomtest(self.lost, discordant).pvalue) if discordant else 1.0

    def as_dict(self, key: str) -> dict[str, Any]:
        """``{key: drop, key_ci95: [low, high], key_n: n, key_p: p_value}``, the form in which result files carry it."""
        return {key: self.drop, f"{key}_ci95": list(self.interval()), f"{key}_n": self.n, f"{key}_p": self.p_value}


def _wilson(rate: Proportion, confidence: float) -> tuple[float, float]:
    from scipy.stats import binomtest

    interval = binomtest(rate.successes, rate.n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def paired_table(before: ArrayLike, after: ArrayLike, labels: ArrayLike) -> PairedTable:
    """Count on which of the same images two models were right.

    Args:
        before: Predicted classes (N,) of the first model, integers.
        after: Those of the second one.
        labels: True classes (N,), integers.

    Raises:
        ValueError: The shapes differ or are not (N,), or N is 0.
    """
    first, second = accuracy(before, labels), accuracy(after, labels)
    both_right = int(((np.asarray(before) == np.asarray(labels)) & (np.asarray(after) == np.asarray(labels))).sum())
    lost, gained = first.successes - both_right, second.successes - both_right
    return PairedTable(both_right, lost, gained, first.n - both_right - lost - gained)
