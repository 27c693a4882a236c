"""What a signal finds, the one statistic that all signals share, and what a model and images need for it.

A signal gives each class a score, higher where it is more suspicious, and asks how far the highest stands out of the others:

    z_k = (s_k - median(s)) / (1.4826 MAD(s)),    MAD(s) = median |s - median(s)|,    statistic = max_k z_k

1.4826 makes the MAD of normal scores their standard deviation. Source of the statistic: Neural Cleanse (Wang et al., IEEE
S&P 2019), whose threshold of 2 is not taken over: the maximum of many classes exceeds it by chance, how often depends on the
network. `calibration` does not use it: it compares scores, class by class, with those of twins, trusted models of the same
kind. Blind spots: a backdoor from each class to the next (all-to-all) raises all scores alike, and one with targets in half of
the classes moves the median; of three classes the middle score is the median and one of the others sets the scale, which says
little without twins.

Of two classes neither stands out of others. There the statistic is by how much one leads, in the unit of the scores, and says
nothing at all without twins:

    z_k = s_k - s_l,    l the other class
"""

from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedModel

from ..data.images import RawImages
from ..errors import join_names
from ..labels import check_labels

FEWEST_CLASSES = 2
FEWEST_IMAGES = 20  # of fewer, 95 % are all
# A MAD below this share of what scores are measured in is not told from none: float32 features round to a hundredth of it.
LEAST_SPREAD = 1e-4


@dataclass(frozen=True, eq=False)
class Finding:
    """What one signal says of a model. Make it with `Finding.of`.

    Args:
        signal: Its name.
        scores: For each class, higher where it is more suspicious, float64 (C,), in a unit of the signal's own.
        statistic: How far the most suspicious class stands out, see `outlier_scores`, where the signal has no other; >= 0.
        suspect_class: That class, the first of several.
        class_names: In the order of the scores.
        details: What the scores were made of, by name; see the signal.
    """

    signal: str
    scores: np.ndarray
    statistic: float
    suspect_class: int
    class_names: list[str]
    details: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, signal: str, scores: np.ndarray, class_names: list[str], **details: np.ndarray) -> "Finding":
        """Make a finding of the scores of a signal.

        Raises:
            ValueError: See `outlier_scores`.
        """
        outliers = outlier_scores(scores)
        suspect = int(outliers.argmax())
        return cls(signal, scores, float(outliers[suspect]), suspect, list(class_names), details)


def outlier_scores(scores: np.ndarray, unit: float = 0.0) -> np.ndarray:
    """``z_k`` of each score, float64 (C,): 0 for all where they are equal, and never infinite; of two the lead.

    Args:
        scores: float64 (C,).
        unit: What differences are small or large beside; the largest score is, if it is larger.

    Raises:
        ValueError: There are fewer than two scores, or one is not finite.
    """
    check_classes(len(scores))
    if not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite; got {scores}")
    if len(scores) == 2:
        return scores - scores[::-1]
    deviations = scores - np.median(scores)
    floor = max(LEAST_SPREAD * max(unit, np.abs(scores).max()), np.finfo(np.float64).tiny)
    return deviations / max(1.4826 * np.median(np.abs(deviations)), floor)


def check_classes(count: int) -> None:
    """Refuse a model that has no classes to compare.

    Raises:
        ValueError: It has fewer than two.
    """
    if count < FEWEST_CLASSES:
        raise ValueError(f"no class can stand out where there are {count}, fewer than {FEWEST_CLASSES}")


def check_comparable(model: PreTrainedModel, images: RawImages) -> None:
    """Refuse a model and images of which no signal can be read.

    Raises:
        ValueError: The model has fewer than two classes; there are fewer than twenty images; the classes of the images are
            not the model's; a class has no image, and could neither stand out nor be compared with.
    """
    check_classes(model.config.num_labels)
    check_labels(images.class_names, model.config)
    if len(images) < FEWEST_IMAGES:
        raise ValueError(f"the signals need at least {FEWEST_IMAGES} images, better 500; got {len(images)}")
    counts = images.labels.bincount(minlength=len(images.class_names))
    if missing := [name for name, count in zip(images.class_names, counts.tolist(), strict=True) if not count]:
        raise ValueError(f"the signals need images of every class; there are none of {join_names(missing)}")
