"""Evidence without the trigger at the end of a purification: `audit` by the signals that take one pass over few images."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from ..assurance.signals import SIGNALS
from ..data.images import RawImages
from ..files import first_line
from .audit import AUDIT_LIMITS, audit

logger = logging.getLogger(__name__)

ONE_PASS = ("head_rows", "latent_shift")
MOST_IMAGES = 300  # six passes over them, three for each model
KEPT = ("signals", "accuracy", "recall", "flips", "outcome")  # of `Audit.as_dict`


def evidence_of(purified: PreTrainedModel, load_suspicious: Callable[[], PreTrainedModel], images: RawImages) -> dict[str, Any]:
    """What is evident of a purified model beside the suspicious one; for manifest and card.

    Args:
        purified: The purified model; not changed.
        load_suspicious: Loads what it was purified from: called here, so that only one of the two is held until then.
        images: Of their classes, without triggers; of more than 300 so many are drawn, with a seed of their own.

    Returns:
        ``images``, how many; of `Audit.as_dict` its ``signals``, ``accuracy``, ``recall``, ``flips`` and ``outcome``; and
        ``limits``. Where the two cannot be compared ``not_applicable``, why not: evidence is no condition of a purification.
    """
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:MOST_IMAGES].sort().values
    try:
        suspicious = load_suspicious().to(next(purified.parameters()).device)
        found = audit(purified, suspicious, images.select(rows), signals={name: SIGNALS[name] for name in ONE_PASS}).as_dict()
    except (OSError, ValueError, RuntimeError) as reason:  # a source that is gone, no images of a class, memory
        logger.warning("no evidence without the trigger: %s", first_line(reason))
        return {"not_applicable": first_line(reason)}
    return {"images": len(rows)} | {name: found[name] for name in KEPT} | {"limits": list(AUDIT_LIMITS)}
