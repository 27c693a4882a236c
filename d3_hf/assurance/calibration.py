"""Calibration: how often would a trusted model of the same kind stand out as far as the suspect?

Let s_msk be the score of class k by signal s on model m: on the suspect (m = 0) and on its N twins, trusted models of the same
kind, read on the same images. Classes differ by themselves: in networks without a backdoor one class may lead by much, in most
of them the same. So each class is compared with the same class of the other models, and not with the model's other classes:

    z_msk = (s_msk - mean_{m' != m} s_m'sk) / sd_{m' != m} s_m'sk

How far a model stands out is that of one class, by one signal (x) and by all signals together (t), whose z add up; and p is the
share of models, suspect and twins, that stand out as far:

    x_ms = max_k z_msk,    p_s = #{m : x_ms >= x_0s} / (1 + N)
    t_m = max_k sum_s z_msk,    p = #{m : t_m >= t_0} / (1 + N)

Each model is compared with all others, suspect and twins alike, so that x and t treat all models in the same way: if the
suspect is exchangeable with its twins, then P(p <= a) <= a, whatever the signals are and however they depend on each other
(Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2005). Conformal p of statistics of whole models, with
trusted models for a null: CBD (Xiang et al., NeurIPS 2023). z by class, and the sum over signals, are this project's, chosen
on the half `calibrate` of recipes/zoo.yaml.

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
FEWEST_TWINS = 3  # of whose scores a standard deviation is a unit to print; this project's


def conformal_p(suspect: float, twins: ArrayLike) -> float:
    """The share, in (0, 1], of models, the suspect among them, whose statistic is at least the suspect's; twins' (N,)."""
    twins = np.asarray(twins, np.float64)
    return float((1 + np.sum(twins >= suspect)) / (1 + len(twins)))


def combined_p(suspect: ArrayLike, twins: ArrayLike) -> float:
    """``p`` of all signals together, in (0, 1].

    Args:
        suspect: Scores of each signal and class, (S, K), S and K >= 1.
        twins: The same of each twin, (N, S, K), N >= 1.
    """
    farthest = class_z(suspect, twins).sum(1).max(1)
    return conformal_p(farthest[0], farthest[1:])


def signal_p(suspect: ArrayLike, twins: ArrayLike) -> float:
    """``p_s`` of one signal, in (0, 1], of the suspect's scores, (K,), and those of its twins, (N, K)."""
    return combined_p(np.asarray(suspect)[None], np.asarray(twins)[:, None])


def class_z(suspect: ArrayLike, twins: ArrayLike) -> np.ndarray:
    """``z_msk`` of all models, (1 + N, S, K), the suspect's first; finite. Arguments as `combined_p`.

    Where the others score a class alike, or are one, a difference is measured in a ten-thousandth of the class's largest score.
    The others are summed in the order of their scores, so that models that tie do so to the last bit, whichever is the suspect.
    """
    values = np.concatenate([np.asarray(suspect, np.float64)[None], np.asarray(twins, np.float64)])
    floor = np.maximum(LEAST_SPREAD * np.abs(values).max(0), np.finfo(np.float64).tiny)
    found = np.empty_like(values)
    for m, scores in enumerate(values):
        others = np.sort(np.delete(values, m, 0), 0)
        spread = others.std(0, ddof=1) if len(others) > 1 else floor
        found[m] = (scores - others.mean(0)) / np.maximum(spread, floor)
    return found


def own_classes_p(scores: ArrayLike) -> float | None:
    """``p_own`` of one signal, in [0, 1], from its scores of a model's classes, (K,); None of fewer than six."""
    values = np.sort(np.asarray(scores, np.float64))
    if len(values) < FEWEST_OWN_CLASSES:
        return None
    others, highest = values[:-1], values[-1]
    spread = max(others.std(ddof=1), LEAST_SPREAD * np.abs(values).max(), np.finfo(np.float64).tiny)
    t = (highest - others.mean()) / (spread * math.sqrt(1 + 1 / len(others)))
    return min(1.0, float(len(values) * stats.t.sf(t, len(values) - 2)))


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
