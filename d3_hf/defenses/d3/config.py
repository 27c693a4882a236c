"""`D3Config`: the symbols of D3's objective as options."""

from dataclasses import dataclass, field
from typing import Any

from ...training.config import PurifyConfig, two_digits
from ..shared import geometry

HINGES = ("sample", "batch")


MANY = 2500  # images, 5 % of CIFAR-10


def rate_on_cnns(count: int | None) -> float:
    """D3's learning rate on a network with BatchNorm: 0.1 from 2,500 images on, of fewer by their root.

    With 500 images 0.1 costs three points of ACC more than 0.05, with 2,500 images 0.05 leaves a quarter of SSBA-lite
    (model_cards/few_images.md). Of an unknown number: 0.1.
    """
    return two_digits(0.1 * min(1, (count or MANY) / MANY) ** 0.5)


# By the name of the network's rule, see `training.schedule`. As published, with a random head and lambda 4, D3 on a CNN with a
# few hundred images ends at an ACC that no guard rail takes; SAM, the near start and 40 bring most of it back.
BY_NETWORK: dict[str, dict[str, Any]] = {
    "LayerNorm": {"warm_start": "near", "lambda_clean": 4.0, "sam_rho": 0.0},
    "BatchNorm": {"warm_start": "near", "lambda_clean": 40.0, "sam_rho": 2.0, "learning_rate": rate_on_cnns},
    "no normalisation": {"warm_start": "random", "lambda_clean": 4.0, "sam_rho": 0.0},
}
DISTANCES = ("weights", "features", "both")


@dataclass
class D3Config(PurifyConfig):
    """Arguments of D3: `PurifyConfig` and the symbols of the objective ``-d(theta_s, theta_init_s) + lambda * hinge``.

    With ``distillation`` the objective is ``-d + lambda * (hinge + distillation * T^2 KL)``: lambda weighs all that holds the
    model to its task, and the divergence is not gated by the hinge. So it is with the distance of features, ``-d + lambda *
    (hinge - feature_weight * h(P))``, where ``distance`` asks for it.

    Args:
        lambda_clean: lambda > 0, weight of the clean loss against the distance (unit: weight norm per nat). Paper 10 (as
            readers of it note), code 0.5. None: by `BY_NETWORK`.
        epsilon: epsilon >= 0, clean loss in nats that costs nothing. 0.1 in paper and code. ``None`` (``null`` in YAML; not on
            the command line): the suspicious model's own mean cross-entropy on the retain set, evaluation mode, not augmented,
            measured once when training begins; the manifest holds it.
        dual_rate: >= 0. 0: lambda stays (paper, code). Above 0: dual ascent on ``max d subject to mean CE <= epsilon``: after
            each update ``lambda <- max(0, lambda + dual_rate * (mean CE of the window - epsilon))`` from ``lambda_clean`` on
            (Platt and Barr, "Constrained Differential Optimization", 1987; its value is to be tried), while the weights
            descend the Lagrangian ``-d + lambda * (mean CE - epsilon)``, which has no hinge. The objective is then always
            divided by lambda + 1.
        hinge: ``"sample"``: mean over images of max(0, CE_i - epsilon) (code). ``"batch"``: max(0, mean CE - epsilon), the mean
            over the whole window of micro-batches and processes (paper).
        scale_objective: Divide the objective by lambda + 1 when lambda > 1, so that lambda does not also set the step size
            (code).
        target_modules: The weights theta_s: ``"head"``, ``"all-linear"``, a list of name suffixes or a regular expression; see
            `select_weights`. The code selects the head of PreAct-ResNet18.
        warm_start: Where theta_s starts: ``"near"``, ``"middle"``, ``"far"``, ``"noise"`` or ``"random"`` (code); see
            `geometry.warm_start`. Seeded by ``seed``. None: by `BY_NETWORK`. On a pretrained ViT with 1,000 images random costs
            eight points of ACC and near three (model_cards/vit.md).
        sam_rho: See `PurifyConfig`; it doubles the passes. None: by `BY_NETWORK`, and 0 with ``dual_rate``.
        projection: S, applied to each weight after each step: ``"sphere"`` ||W_k|| = ||W_k^0|| (code), ``"ball"`` (<=; the
            other reading of the paper) or ``"none"``.
        base_model: Hub id, folder or weights file of the public model that the suspicious one was fine-tuned from, or ``auto``
            to look among those of its architecture (see `likely_bases.find_base`): the body, all that the base has, starts
            between the two (see `BaseStart`; theta_s of it in place of ``warm_start``). Whoever names it vouches for it.
        base_revision: Branch, tag or commit of a Hub id.
        keep: Share in [0, 1] of the way from the base to the suspicious model that the start keeps. 0.25 (here): what base
            tuning left no backdoor with on a pretrained ViT (model_cards/vit.md); twice the usual updates cost less ACC.
        distance: What is to be moved away from the suspicious model. ``"weights"``: theta_s (paper). ``"features"``: what the
            head reads of each training image, ``P = ||f / ||f|| - f_0 / ||f_0|| ||^2`` against the suspicious model on the
            same augmented image, since a body can follow a head that only turns (Croce et al., "PAR", arXiv 2412.00727, for
            encoders); one more forward pass. ``"both"``. With ``"features"`` theta_s still has its warm start and projection:
            ``warm_start="near"`` and ``projection="none"`` leave PAR's form.
        feature_weight: > 0, weight of the distance of features per unit of clean loss. 0.5 (PAR).
        feature_threshold: In (0, 4]. ``h(P) = P`` up to it and 0 above, by image (PAR: by batch). 2: orthogonal features (PAR:
            2.15).
        active_set: Build graph and gradient only for the images above epsilon, which a pass without graph finds, while they
            were less than two thirds of the last window (here; see `active_set`). The weights are those of the dense step up
            to rounding; a micro-batch then waits for the device once. ``None``: where that holds, else dense: with the
            per-sample hinge, without FSDP, distillation, SAM, activation checkpointing and torch.compile, for networks in
            which training neither couples images (BatchNorm, unless ``batch_norm`` says otherwise) nor draws random numbers
            (dropout, stochastic depth), which two images of noise tell. ``True``: raise where it does not. ``False``: dense.

    Raises:
        ValueError: ``lambda_clean`` <= 0, ``epsilon`` < 0, ``dual_rate`` < 0, one of the three not finite, ``target_modules``
            empty, or a choice that is not listed; ``dual_rate`` without ``scale_objective``, or with the batch hinge, which
            it does not use; ``distillation`` or a distance of features with the batch hinge, which gates the gradient as a
            whole.
    """

    lambda_clean: float | None = field(
        default=None,
        metadata={
            "help": "lambda: weight of the clean loss against the distance; 40 with BatchNorm, else 4.",
            "range": "> 0 and finite",
        },
    )
    epsilon: float | None = field(
        default=0.1,
        metadata={
            "help": "epsilon: clean loss in nats that costs nothing; null in YAML: the suspicious model's.",
            "range": ">= 0 and finite",
        },
    )
    dual_rate: float = field(
        default=0.0, metadata={"help": "Step of the dual ascent on lambda; 0: lambda stays.", "range": ">= 0 and finite"}
    )
    hinge: str = field(
        default="sample",
        metadata={"help": "max(0, CE - epsilon) per sample or for the batch mean.", "choices": HINGES},
    )
    scale_objective: bool = field(default=True, metadata={"help": "Divide by lambda + 1 when lambda > 1."})
    target_modules: list[str] | str = field(
        default_factory=lambda: "head",  # HfArgumentParser overlooks a plain default of a list
        metadata={"help": "head, all-linear or module name suffixes (in YAML also a regular expression)."},
    )
    warm_start: str | None = field(
        default=None,
        metadata={
            "help": "Start of the selected weights; near, or random without normalisation.",
            "choices": geometry.WARM_STARTS,
        },
    )
    sam_rho: float | None = field(
        default=None,
        metadata={
            "help": "Minimise the highest loss within this size (adaptive SAM); 0: off; 2 with BatchNorm.",
            "range": ">= 0 and finite",
        },
    )
    projection: str = field(
        default="sphere",
        metadata={"help": "Norm constraint on each selected weight.", "choices": geometry.PROJECTIONS},
    )
    base_model: str | None = field(
        default=None,
        metadata={"help": "Public model that the suspicious one was fine-tuned from, to start near; auto: look for it."},
    )
    base_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base."})
    keep: float = field(
        default=0.25, metadata={"help": "Share of the fine-tuning that the start keeps, with a base.", "range": "in [0, 1]"}
    )
    distance: str = field(
        default="weights", metadata={"help": "What is moved away: weights, features or both.", "choices": DISTANCES}
    )
    feature_weight: float = field(
        default=0.5,
        metadata={"help": "Weight of the distance of features per unit of clean loss.", "range": "> 0 and finite"},
    )
    feature_threshold: float = field(
        default=2.0, metadata={"help": "Distance of features above which an image is far enough.", "range": "in (0, 4]"}
    )
    active_set: bool | None = field(
        default=None, metadata={"help": "Gradients of the images above epsilon only; default: where that is exact."}
    )

    by_network = BY_NETWORK

    def __post_init__(self):
        super().__post_init__()
        if self.dual_rate and self.sam_rho is None:
            self.sam_rho = 0.0
        if isinstance(self.target_modules, list) and self.target_modules in (["head"], ["all-linear"]):
            self.target_modules = self.target_modules[0]  # how the command line hands over a keyword
        if not self.target_modules:
            raise ValueError(
                "target_modules is empty; use 'head', 'all-linear', a list of module names or a regular expression"
            )
        if self.dual_rate and not self.scale_objective:
            raise ValueError("dual_rate needs scale_objective: a growing lambda would also set the step size")
        if self.dual_rate and self.hinge == "batch":
            raise ValueError("dual_rate minimises the Lagrangian, which has no hinge: leave hinge at its default")
        if self.dual_rate and self.sam_rho:
            raise ValueError("dual_rate does not go with sam_rho: SAM looks at each image twice")
        if self.hinge == "batch" and (self.distillation or self.distance != "weights"):
            raise ValueError("the batch hinge gates the gradient as a whole: with distillation or features use hinge='sample'")
