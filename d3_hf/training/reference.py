"""What a run began with: recognised when it is resumed, compared with when it ends."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

# Relative distance below which weights count as unmoved: a projection or a copy alone moves them by rounding.
UNMOVED = 1e-5


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over the tensors' bytes, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint_of(digests: Mapping[str, str]) -> str:
    """SHA-256 over names and digests, in order: one fingerprint for what `fingerprints` tells apart."""
    return hashlib.sha256(repr(list(digests.items())).encode()).hexdigest()


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """`fingerprint` of each tensor by its name: enough to tell later which have changed, without copies of them."""
    return {name: fingerprint([tensor]) for name, tensor in tensors.items()}
