"""D3, Distance-Driven Detoxification: move selected weights as far from their poisoned start as the clean loss allows.

Wei, Liu, Zha: "Backdoor Mitigation by Distance-Driven Detoxification", ICCV 2025, arXiv 2411.09585. The paper and the
authors' released ``defense/d3.py`` differ; each option below says which of the two it follows.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .. import geometry, reference
from ..config import PurifyConfig
from ..selection import select_weights
from ..trainer import MANIFEST, PurifyTrainer

HINGES = ("sample", "batch")
# Relative distance below which a weight counts as unmoved: the projection alone moves it by rounding.
UNMOVED = 1e-5


@dataclass
class D3Config(PurifyConfig):
    """Arguments of D3: `PurifyConfig` and the symbols of the objective ``-d(theta_s, theta_init_s) + lambda * hinge``.

    Args:
        lambda_clean: lambda > 0, weight of the clean loss against the distance (unit: weight norm per nat). Paper 10 (as
            readers of it note), code 0.5. 4 here: with the shared schedule 10 left more of the backdoor and 2 cost more ACC
            (model_cards/proof.md).
        epsilon: epsilon >= 0, clean loss in nats that costs nothing. 0.1 in paper and code.
        hinge: ``"sample"``: mean over images of max(0, CE_i - epsilon) (code). ``"batch"``: max(0, mean CE - epsilon), the mean
            over the whole window of micro-batches and processes (paper).
        scale_objective: Divide the objective by lambda + 1 when lambda > 1, so that lambda does not also set the step size
            (code).
        target_modules: The weights theta_s: ``"head"``, ``"all-linear"``, a list of name suffixes or a regular expression; see
            `select_weights`. The code selects the head of PreAct-ResNet18.
        warm_start: Where theta_s starts: ``"near"``, ``"middle"``, ``"far"``, ``"noise"`` or ``"random"`` (code); see
            `geometry.warm_start`. Seeded by ``seed``.
        projection: S, applied to each weight after each step: ``"sphere"`` ||W_k|| = ||W_k^0|| (code), ``"ball"`` (<=; the
            other reading of the paper) or ``"none"``.

    Raises:
        ValueError: ``lambda_clean`` <= 0, ``epsilon`` < 0, ``target_modules`` empty, or a choice that is not listed.
    """

    lambda_clean: float = field(default=4.0, metadata={"help": "lambda: weight of the clean loss against the distance."})
    epsilon: float = field(default=0.1, metadata={"help": "epsilon: clean loss in nats that costs nothing."})
    hinge: str = field(
        default="sample",
        metadata={"help": "max(0, CE - epsilon) per sample or for the batch mean.", "choices": HINGES},
    )
    scale_objective: bool = field(default=True, metadata={"help": "Divide by lambda + 1 when lambda > 1."})
    target_modules: list[str] | str = field(
        default_factory=lambda: "head",  # HfArgumentParser overlooks a plain default of a list
        metadata={"help": "head, all-linear or module name suffixes (in YAML also a regular expression)."},
    )
    warm_start: str = field(
        default="random", metadata={"help": "Where the selected weights start.", "choices": geometry.WARM_STARTS}
    )
    projection: str = field(
        default="sphere",
        metadata={"help": "Norm constraint on each selected weight.", "choices": geometry.PROJECTIONS},
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.target_modules, list) and self.target_modules in (["head"], ["all-linear"]):
            self.target_modules = self.target_modules[0]  # how the command line hands over a keyword
        if not self.target_modules:
            raise ValueError(
                "target_modules is empty; use 'head', 'all-linear', a list of module names or a regular expression"
            )
        if not self.lambda_clean > 0:
            raise ValueError(f"lambda_clean must be > 0; got {self.lambda_clean}")
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must be >= 0 nats; got {self.epsilon}")
        for name, choices in (
            ("hinge", HINGES),
            ("warm_start", geometry.WARM_STARTS),
            ("projection", geometry.PROJECTIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")


class D3Trainer(PurifyTrainer):
    """Trainer of D3; see `PurifyTrainer` for the arguments and `D3Config` for the objective.

    The reference theta_init is the model as it is handed over: build the trainer from the suspicious model, also when
    resuming from a checkpoint of an interrupted run.

    Raises:
        ValueError: The selection fails (see `select_weights`), or a checkpoint belongs to another reference.
        RuntimeError: After training, when no selected weight has moved.
    """

    method = "D3"
    paper = "https://arxiv.org/abs/2411.09585"
    log_names = ("clean_loss", "active_fraction")

    def __init__(self, model, args: D3Config, *arguments, **kwargs):
        super().__init__(model, args, *arguments, **kwargs)
        self.segments = select_weights(model, args.target_modules, self.preprocessing.size)
        with torch.no_grad():
            self.references = [weight.clone() for weight in self.weights()]
            self.radii = geometry.norms(self.references)
        scale = args.lambda_clean + 1 if args.scale_objective and args.lambda_clean > 1 else 1.0
        self.clean_weight, self.distance_weight = args.lambda_clean / scale, 1 / scale

    def weights(self) -> list[Tensor]:
        """The selected weights ``W_k`` as detached views that share memory with the model."""
        return [segment.of(segment.parameter.detach()) for segment in self.segments]

    # Before, during and after the steps --------------------------------------------------------------------------------

    def begin_purification(self, resumed: bool) -> None:
        """Warm start, unless the weights come from a checkpoint, and say what will move."""
        if not resumed:
            for weight, start in zip(self.weights(), self._warm_starts(), strict=True):
                weight.copy_(start)
        relative = self.relative_distances()
        names = ", ".join(segment.name for segment in self.segments)
        self.accelerator.print(
            f"D3 moves {len(self.segments)} weight{'s' * (len(relative) > 1)} ({names}); "
            f"{'resumed' if resumed else self.args.warm_start + ' start'} at relative distance "
            f"{sum(relative.values()) / len(relative):.3f} of at most 2 on the sphere"
        )

    def _warm_starts(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.args.seed)
        return [geometry.warm_start(w.cpu(), self.args.warm_start, generator).to(w) for w in self.references]

    def sample_loss(self, cross_entropy: Tensor) -> Tensor:
        """lambda times the hinge per sample; for the batch hinge lambda times the loss, which `finish_gradient` gates."""
        if self.args.hinge == "sample":
            cross_entropy = torch.relu(cross_entropy - self.args.epsilon)
        return self.clean_weight * cross_entropy

    def finish_gradient(self, window_loss: Tensor) -> Tensor:
        """Gate the clean gradient (batch hinge), subtract the gradient of the distance, return the objective.

        The gradient of D is known in closed form, so autograd never sees the distance and the backward pass is that of
        plain fine-tuning.
        """
        if self.args.hinge == "batch":
            window_loss = torch.relu(self.accelerator.reduce(window_loss, "mean") - self.clean_weight * self.args.epsilon)
            if not window_loss > 0:  # every process sees the same number, so all take the same branch
                torch._foreach_zero_([p.grad for p in self.model.parameters() if p.grad is not None])
        weights = self.weights()
        scaler = self.accelerator.scaler
        loss_scale = scaler.get_scale() if scaler is not None else 1.0  # gradients are unscaled after this
        gradients = [segment.of(segment.parameter.grad) for segment in self.segments]
        coefficient = -self.distance_weight * loss_scale
        lengths = geometry.add_distance_gradient(gradients, weights, self.references, coefficient)
        return window_loss - self.distance_weight * sum(lengths)

    def optimizer_step(self, step):
        """The optimizer's step, then the projection onto S."""
        result = step()
        geometry.project(self.weights(), self.radii, self.args.projection)
        return result

    def end_purification(self) -> None:
        """Say how far the weights moved; raise if none did."""
        moved = [(w - s).norm() / r for w, s, r in zip(self.weights(), self._warm_starts(), self.radii, strict=True)]
        relative = self.relative_distances()
        if not min(max(moved), max(relative.values())) > UNMOVED:
            raise RuntimeError(
                "no selected weight moved: the model is not purified. Check learning_rate, num_train_epochs and warm_start"
            )
        for name, distance in relative.items():
            self.accelerator.print(f"D3 moved {name} to relative distance {distance:.3f}")

    # What the log, the manifest and the card say -----------------------------------------------------------------------

    def relative_distances(self) -> dict[str, float]:
        """``||W_k - W_k^0|| / ||W_k^0||`` per selected weight: 0 at the start, at most 2 on the sphere."""
        lengths = geometry.distances(self.weights(), self.references)
        ratios = torch.stack(lengths) / torch.stack(self.radii)
        return {segment.name: ratio for segment, ratio in zip(self.segments, ratios.tolist(), strict=True)}

    def sample_statistics(self, cross_entropy: Tensor) -> list[Tensor]:
        """Sums for ``clean_loss`` and ``active_fraction``, the share of images above epsilon."""
        return [cross_entropy.sum(), (cross_entropy > self.args.epsilon).sum()]

    def step_statistics(self) -> dict[str, float]:
        """``distance``: mean relative distance of the selected weights."""
        relative = self.relative_distances()
        return {"distance": sum(relative.values()) / len(relative)}

    def facts(self) -> dict:
        """Adds the selected weights with radius and relative distance, and the reference's fingerprint."""
        radii = {segment.name: radius.item() for segment, radius in zip(self.segments, self.radii, strict=True)}
        distances = self.relative_distances()
        selected = [{"name": n, "initial_norm": radii[n], "relative_distance": distances[n]} for n in radii]
        return super().facts() | {"selected_weights": selected, "reference_sha256": self.reference_fingerprint()}

    def reference_fingerprint(self) -> str:
        """SHA-256 over the bytes of the reference weights, in order."""
        return reference.fingerprint(self.references)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        reference.check_fingerprint(
            Path(resume_from_checkpoint) / MANIFEST,
            self.reference_fingerprint(),
            origin="with other initial weights or another selection",
            needed="the suspicious model and the target_modules that the run began with",
        )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
