"""Inversion in feature space: which class do the fewest replaced features turn all images into?

Neural Cleanse's search on what the head reads in place of pixels. With features z (D) of the images and, for each channel, the
range [low, high] of its values on them, for every class t

    min_{m, p}  mean_z CE(head((1 - m) z + m p), t) + cost ||m||_1,    m in (0, 1)^D,  p between low and high

fitted to 80 % of the images and checked on the others; `inversion` has the rest of the formula. The score is -||m||_1, a number
of channels. However large a trigger is in pixels, or how it warps them, what it does to the features is often confined to few
channels, which it sets alike in all images. Those of ordinary classes are won by many.

Source: the idea is that of FeatureRE (Wang et al., NeurIPS 2022), whose mask and pattern in feature space are driven by a
learned transformation of the input. Here they are free within what the images themselves do to each channel, which spares all
passes through the network but one. Written from published notes; range, start and batches are this project's.

Cost: one pass over the images; then at most C x 80 passes through the head alone, in batches of 32 features. Blind to: channels
that no image moves (a backdoor of its own channels); a head that was drawn anew; backdoors of all classes; triggers that set
many channels, or different ones in different images. No image need cause these features. The search starts at the middle of
every range, so that permuted features, and such as are rescaled against the head, change nothing; a vector added to all rows of
the head does not either.
"""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..data.fitting import BATCH
from ..data.images import RawImages
from ..models.features import HeadReading, read_head
from ..models.source import preprocessing_of
from .finding import Finding, check_comparable
from .inversion import Schedule, norm_scores, reverse_trigger, split_rows, stamp

SCHEDULE = Schedule()
STEP_FEATURES = 32
SEED = 0  # of the split


@torch.enable_grad()
def invert_features(reading: HeadReading, schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """Mask and pattern of all classes, the pattern as a share of each range, float64 (C, 2, D), and which work, bool (C,)."""
    low, high = reading.features.aminmax(dim=0)

    def attack(features, mask, pattern):
        return F.linear(stamp(features, mask, low + pattern * (high - low)), reading.weight, reading.bias)

    fit, validate = (reading.features[rows].split(STEP_FEATURES) for rows in split_rows(len(reading.features), SEED))
    start = torch.zeros(2, reading.features.shape[1])
    found = [reverse_trigger(attack, fit, validate, target, start, schedule) for target in range(len(reading.weight))]
    return np.stack([trigger.double().numpy() for trigger, _ in found]), np.array([works for _, works in found])


def feature_inversion(
    model: PreTrainedModel, images: RawImages, schedule: Schedule = SCHEDULE, batch_size: int = BATCH
) -> Finding:
    """Look for a class that few replaced features turn all images into.

    Args:
        model: A classifier of `load_classifier`; left as it was.
        images: Of every class, without triggers as far as is known; 500 to 2,500.
        schedule: How to search.
        batch_size: Images in the pass that reads the features, at least 1; halved while they do not fit into memory.

    Returns:
        Scores are -||m||_1 in channels; a class that nothing reaches is given the lowest. ``details`` has the norms of the
        masks that were found, ``norms``, and which of them work, ``reached``, (C,) each; and the ``mask`` of the most
        suspicious class, (D,).

    Raises:
        ValueError: See `check_comparable`, `preprocessing_of` and `read_head`.
    """
    check_comparable(model, images)
    triggers, reached = invert_features(read_head(model, images, preprocessing_of(model), batch_size), schedule)
    norms = triggers[:, 0].sum(1)
    scores = norm_scores(norms, reached)
    found = Finding.of("feature_inversion", scores, images.class_names, norms=norms, reached=reached)
    found.details["mask"] = triggers[found.suspect_class, 0]
    return found
