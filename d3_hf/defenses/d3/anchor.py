"""D3 towards the public base that the suspicious model was fine-tuned from: where the selected weights that it has are kept.

With ``W_k^0`` the suspicious weight and ``B_k`` the base's, ``W_k`` starts at ``B_k`` and is projected onto the ball
``||W_k - B_k|| <= ||W_k^0 - B_k||``: it may go as far from the base as the fine-tuning went, and the distance pushes it to the
side on which the suspicious weight does not lie.
"""

from typing import Any

from torch import Tensor, nn

from ...models.base import Base
from ...publishing.manifest import public_source
from ...training.reference import fingerprint
from ..shared import geometry
from ..shared.selection import Segment


class Anchor:
    """The base's part of the selected weights.

    Args:
        base: The base.
        model: The plain model.
        segments: The selected weights.
        references: Their values in the suspicious model.

    Raises:
        ValueError: The base has none of them.

    Attributes:
        centres: ``B_k`` by its number among the selected weights.
        sha256: Fingerprint of the base.
    """

    def __init__(self, base: Base, model: nn.Module, segments: list[Segment], references: list[Tensor]):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        owned = [(k, segment, names[id(segment.parameter)]) for k, segment in enumerate(segments)]
        self.base, self.sha256 = base, fingerprint(base.weights.values())
        self.centres = {k: s.of(base.weights[name]).to(references[k]) for k, s, name in owned if name in base.weights}
        if not self.centres:
            raise ValueError(
                f"{base.source.name} has none of the selected weights ({', '.join(s.name for s in segments)}): with base_model "
                "select weights of the body, as target_modules=all-linear does"
            )
        offsets = [references[k] - centre for k, centre in self.centres.items()]
        self._radii = geometry.norms(offsets)

    def project(self, weights: list[Tensor]) -> None:
        """Project those of the base's part onto their balls, in place."""
        geometry.project_around([weights[k] for k in self.centres], list(self.centres.values()), self._radii)

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return public_source(self.base.source) | {"relative_distance": self.base.relative_distance}
