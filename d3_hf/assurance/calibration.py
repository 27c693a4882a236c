"""Calibration: how often would a trusted model of the same kind score as high as the suspect?

Let x_ms be the statistic of signal s on model m: on the suspect (m = 0) and on its N twins, trusted models of the same kind,
read on the same images. For one signal, the conformal p is

    p_s = (1 + #{m >= 1 : x_ms >= x_0s}) / (1 + N)

and for all signals together that of one number for each model, how far it stands out where it stands out most:

    r_ms = #{m' : x_m's <= x_ms},    z_ms = (x_ms - median_m' x_m's) / (1.4826 MAD_m' x_m's)
    t_m  = (max_s r_ms, max_s z_ms),    p = #{m : t_m >= t_0} / (1 + N)

with pairs compared by their first entry, then by their second. Ranks do not care how a signal is distributed. Among models that
are all the highest of some signal, of which there may be one for each, z says which is so by far. Ranks and z are taken over
suspect and twins alike, so that t treats all models in the same way: if the suspect is exchangeable with its twins, then
P(p <= a) <= a, whatever the signals are and however they depend on each other (Vovk, Gammerman and Shafer, Algorithmic Learning
in a Random World, 2005). Conformal p of statistics of whole models, with trusted models for a null: CBD (Xiang et al., NeurIPS
2023). The one p for several signals is this project's.

A second null is in the suspect itself: its other classes, which hardly are all targets. Of one signal's scores s of K classes,
k that of the highest, with mean m and standard deviation d (of K - 2 degrees of freedom) of the K - 1 others,

    t = (s_k - m) / (d sqrt(1 + 1 / (K - 1))),    p_own = min(1, K P(T > t)),    T of Student's t with K - 2 degrees

Grubbs' test for one outlier (Annals of Mathematical Statistics 21, 1950), by the bound for the highest of K. It takes no twins,
but takes scores to be normal, which those of networks are not: a ResNet-20 without one has p_own = 0.01 by its head's rows. It
is said beside p and raises no alarm. Of five classes or fewer the others say nothing: there are twins only.

No p is below 1 / (1 + N): how many twins there are says how small it can get, and with too few no alarm is possible.

Where it fails: twins are exchangeable with the suspect only as far as they were made as it was. Of fewer images, another
schedule or another base they may score lower or higher for reasons of their own, and the p says that instead.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from .finding import LEAST_SPREAD

ALARM_AT = 0.05  # the field's usual level
FEWEST_OWN_CLASSES = 6  # this project's


def conformal_p(suspect: float, twins: ArrayLike) -> float:
    """``p_s`` of one signal, in (0, 1], of the suspect's statistic and those of its twins, (N,)."""
    twins = np.asarray(twins, np.float64)
    return float((1 + np.sum(twins >= suspect)) / (1 + len(twins)))


def combined_p(suspect: ArrayLike, twins: ArrayLike) -> float:
    """``p`` of all signals together, in (0, 1].

    Args:
        suspect: A statistic for each signal, (S,), S >= 1.
        twins: The same of each twin, (N, S).
    """
    highest, farthest = (values.max(1) for values in standing(suspect, twins))
    as_far = (highest > highest[0]) | ((highest == highest[0]) & (farthest >= farthest[0]))
    return float(as_far.sum() / len(highest))


def standing(suspect: ArrayLike, twins: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """``r_ms`` and ``z_ms`` of all models, (1 + N, S) each, the suspect's first; arguments as `combined_p`."""
    suspect = np.asarray(suspect, np.float64)
    values = np.vstack([suspect, np.asarray(twins, np.float64).reshape(-1, len(suspect))])
    return _ranks(values), _robust_z(values)


def own_classes_p(scores: ArrayLike) -> float | None:
    """``p_own`` of one signal, in [0, 1], from its scores of a model's classes, (K,); None of fewer than six."""
    values = np.sort(np.asarray(scores, np.float64))
    if len(values) < FEWEST_OWN_CLASSES:
        return None
    others, highest = values[:-1], values[-1]
    spread = max(others.std(ddof=1), LEAST_SPREAD * np.abs(values).max(), np.finfo(np.float64).tiny)
    t = (highest - others.mean()) / (spread * math.sqrt(1 + 1 / len(others)))
    return min(1.0, float(len(values) * stats.t.sf(t, len(values) - 2)))


def _ranks(values: np.ndarray) -> np.ndarray:
    """``r_ms``, (M, S): how many models score at most as high, the model itself among them."""
    return np.stack([np.searchsorted(np.sort(column), column, side="right") for column in values.T], 1)


def _robust_z(values: np.ndarray) -> np.ndarray:
    """``z_ms``, (M, S), never infinite: 0 for all models where they score alike."""
    deviations = values - np.median(values, 0)
    floor = np.maximum(LEAST_SPREAD * np.abs(values).max(0), np.finfo(np.float64).tiny)
    return deviations / np.maximum(1.4826 * np.median(np.abs(deviations), 0), floor)


def least_p(twins: int) -> float:
    """The smallest p that so many twins can give."""
    return 1 / (1 + twins)


def twins_needed(alarm_at: float) -> int:
    """The fewest twins with which a p of ``alarm_at``, in (0, 1), is possible."""
    count = max(1, math.floor(1 / alarm_at) - 1)
    return count if least_p(count) <= alarm_at else count + 1


@dataclass(frozen=True)
class Verdict:
    """What follows from a p, in words that say no more than it does.

    Args:
        alarm: Whether p is at most what an alarm was asked for at.
        words: A sentence.
    """

    alarm: bool
    words: str


WITHOUT_TWINS = (
    "no p and no alarm without twins: nothing can be concluded from these statistics, because networks without backdoors score "
    "as high (measured: by the rows of its head a ResNet-20 without one stands out farther than NAD's backdoored WideResNet)"
)


def verdict(p: float | None, twins: int, alarm_at: float = ALARM_AT) -> Verdict:
    """Say what a p means.

    Args:
        p: Of all signals together; None where no signal could be compared.
        twins: How many it is from.
        alarm_at: In (0, 1).

    Raises:
        ValueError: ``alarm_at`` is not in (0, 1).
    """
    check_alarm_at(alarm_at)
    if not twins:
        return Verdict(False, WITHOUT_TWINS)
    if p is None:
        return Verdict(False, "no alarm possible: no signal could be read on the model and on all its twins")
    if least_p(twins) > alarm_at:
        count, needed = f"{twins} twin{'s give' if twins > 1 else ' gives'}", twins_needed(alarm_at)
        words = f"{count} p >= {least_p(twins):.3g}; {needed} are needed for {alarm_at:g}"
        return Verdict(False, f"no alarm possible at this power: {words}")
    if p <= alarm_at:
        return Verdict(True, f"alarm at p = {p:.3g} ({twins} twins)")
    return Verdict(False, f"no alarm at this power: p = {p:.3g} ({twins} twins)")


def check_alarm_at(alarm_at: float) -> None:
    """Raise a ValueError unless a level is in (0, 1)."""
    if not 0 < alarm_at < 1:
        raise ValueError(f"alarm_at must be in (0, 1), as 0.05; got {alarm_at}")
