"""i-BAU, Implicit Backdoor Adversarial Unlearning: unlearn one perturbation for all images, with the implicit gradient.

Zeng, Chen, Park, Mao, Jin, Jia: "Adversarial Unlearning of Backdoors via Implicit Hypergradient", ICLR 2022, arXiv 2110.03735.

    inner:  delta*(theta) = argmin_delta G(delta, theta),    G = -CE(f(x + delta), f(x)) + c ||delta||^2
    outer:  min_theta H(delta*(theta), theta),               H = CE(f(x + delta*), y)
    dH/dtheta = d_theta H - d_theta d_delta G  q,            (d^2_delta G) q = d_delta H

with one delta for all images, in pixels of [0, 1], and f(x) the class that the model gives x. q comes from K fixed-point
iterations ``q <- q + s (d_delta H - (d^2_delta G) q)`` from zero. (Conjugate gradients, the usual alternative, need a positive
definite d^2_delta G, which a maximised cross-entropy does not give.)

A round is an epoch: it begins with delta = 0 and ``inner_epochs`` passes of gradient descent over the retain set, one step a
batch, then takes one update a batch, in which delta is added to a share of the images. All of it runs in eval mode, without
dropout, so that every pass sees one function. x + delta is not clipped to [0, 1], as in the authors' code.

Cost per update: the forward and the backward pass of fine-tuning, one forward pass for f(x), one forward and backward pass for
d_delta G with its graph, K - 1 products with d^2_delta G and one with d_theta d_delta G, each about two backward passes: some
15 passes at K = 5 against two; per round one more forward pass and one forward and backward pass over the retain set. The
defender owns a few labelled images without triggers. It works on every network whose operations can be differentiated twice.

What differs from BackdoorBench's code: delta is in pixels and not in normalised units, and the constants are converted with
CIFAR-10's standard deviation, 0.247 (a step by its square, a squared norm by the inverse); G is that of the current
batch, where theirs is always that of the first batch with the true labels; at least one image of a batch is perturbed, where
a share of 1 % of fewer than 100 images is none in theirs and nothing is unlearned.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainerCallback

from ..data.retain import retain_batches
from ..training import reference
from ..training.config import PurifyConfig, check_options
from .shared.amsgrad import AMSGradTrainer

PERTURBATION = "perturbation.safetensors"
ATTENTIONS = (None, "eager", "sdpa")  # None: the model has no choice of attention


@dataclass
class IBAUConfig(PurifyConfig):
    """Arguments of i-BAU; defaults are BackdoorBench's (BB), converted from normalised units to pixels where needed.

    Args:
        inner_learning_rate: > 0, step of the descent to delta. 0.6 (BB: 10 in normalised units).
        inner_epochs: >= 1, passes over the retain set per descent. 1 (BB).
        penalty: c > 0, weight of ``||delta||^2``. 0.016 (BB: 0.001 in normalised units).
        fixed_point_step: s > 0. 0.006 (BB: 0.1 in normalised units).
        fixed_point_iterations: K >= 1. 5 (BB).
        perturbed_share: In (0, 1], share of a batch that carries delta in H; rounded, at least one image. 0.01 (BB; the
            paper's H has all).
        num_train_epochs: 5 rounds (BB).
        learning_rate: 1e-4 (BB), constant.
        optim: Adam (BB), as AdamW without weight decay, always with the AMSGrad maximum.
        batch_norm: ``"eval"`` (BB: running statistics kept, scale and shift trained) or ``"frozen"``.

    Raises:
        ValueError: A value is out of range; ``batch_norm`` is ``"train"``; fp16 is on.
    """

    output_dir: str | None = field(default="outputs/ibau", metadata={"help": "Folder for the purified model."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate."})
    num_train_epochs: float = field(default=5, metadata={"help": "Rounds: passes over the retain set."})
    optim: str = field(default="adamw_torch", metadata={"help": "Optimizer, any name of TrainingArguments."})
    optim_args: str | None = field(default=None, metadata={"help": "Arguments of the optimizer."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the learning rate."})
    batch_norm: str = field(
        default="eval", metadata={"help": "BatchNorm while training: eval or frozen.", "choices": ("eval", "frozen")}
    )
    inner_learning_rate: float = field(default=0.6, metadata={"help": "Step of the descent to the perturbation."})
    inner_epochs: int = field(default=1, metadata={"help": "Passes over the retain set per descent."})
    penalty: float = field(default=0.016, metadata={"help": "c: weight of the perturbation's squared norm."})
    fixed_point_step: float = field(default=0.006, metadata={"help": "s: step of the fixed-point iteration."})
    fixed_point_iterations: int = field(default=5, metadata={"help": "K: number of fixed-point iterations."})
    perturbed_share: float = field(default=0.01, metadata={"help": "Share of a batch that carries the perturbation."})

    def __post_init__(self):
        super().__post_init__()
        check_options(self, "> 0 and finite", "inner_learning_rate", "penalty", "fixed_point_step")
        check_options(self, ">= 1", "inner_epochs", "fixed_point_iterations")
        check_options(self, "in (0, 1]", "perturbed_share")
        if self.batch_norm == "train":
            raise ValueError("batch_norm must be eval or frozen: with batch statistics the images of a batch are not apart")
        if self.fp16:
            raise ValueError("fp16 rounds second derivatives to zero; use bf16 or float32")


# The mathematics -------------------------------------------------------------------------------------------------------


def inner_objective(logits: Tensor, classes: Tensor, delta: Tensor, penalty: float) -> Tensor:
    """``G = -CE(logits, classes) + penalty * ||delta||^2``, a scalar, from logits (B, C) on x + delta and classes (B,)."""
    return -F.cross_entropy(logits.float(), classes) + penalty * delta.square().sum()


def fixed_point(product: Callable[[Tensor], Tensor], target: Tensor, step: float, iterations: int) -> Tensor:
    """Solve ``A q = target`` by ``q <- q + step * (target - A q)`` from zero.

    It converges for symmetric A with eigenvalues in (0, 2 / step).

    Args:
        product: Maps v to ``A v``.
        target: Right-hand side, any shape.
        step: s.
        iterations: K >= 1; K - 1 products are formed, since the first would be with zero.

    Returns:
        q, of the shape of ``target``.
    """
    solution = step * target
    for _ in range(iterations - 1):
        solution = solution + step * (target - product(solution))
    return solution


def implicit_gradient(
    inner: Tensor,
    delta: Tensor,
    outer_gradient: Tensor,
    parameters: list[Tensor],
    solve: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor],
    mean: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> list[Tensor]:
    """What reaches theta through delta*(theta): ``-d_theta d_delta G  (d^2_delta G)^-1  d_delta H``.

    Args:
        inner: G, a scalar with its graph to ``delta`` and ``parameters``.
        delta: The perturbation, requiring a gradient.
        outer_gradient: ``d_delta H``, of the shape of ``delta``.
        parameters: theta.
        solve: From the product with ``d^2_delta G`` and the right-hand side to q.
        mean: Mean of a tensor over the processes that share the batch.

    Returns:
        One tensor per parameter, zero where G does not depend on it.
    """
    (gradient,) = torch.autograd.grad(inner, delta, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        return mean(torch.autograd.grad(gradient, delta, vector, retain_graph=True)[0])

    solution = solve(product, outer_gradient)
    terms = torch.autograd.grad(gradient, parameters, solution, allow_unused=True, materialize_grads=True)
    return [-mean(term) for term in terms]


# The trainer -----------------------------------------------------------------------------------------------------------


class _Rounds(TrainerCallback):
    """Tells the trainer that a round begins; added after the base class's, which sets the data's epoch."""

    def __init__(self, trainer: "IBAUTrainer"):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.begin_round(int(state.epoch or 0))


class IBAUTrainer(AMSGradTrainer):
    """Trainer of i-BAU; see `PurifyTrainer` for the arguments and `IBAUConfig` for the objective.

    With several processes delta and q are common to all. The log's ``loss`` and ``clean_loss`` are H: a share of its images
    carries delta; ``perturbation`` is the L2 norm of delta in pixels of [0, 1]. Checkpoints and the final folder hold delta.

    Raises:
        ValueError: The model's attention cannot be differentiated twice.
        RuntimeError: After training, when no weight has changed.
    """

    method = "i-BAU"
    paper = "https://arxiv.org/abs/2110.03735"

    def __init__(self, model, args: IBAUConfig, *arguments, **kwargs):
        super().__init__(model, args, *arguments, **kwargs)
        if (attention := model.config._attn_implementation) not in ATTENTIONS:
            raise ValueError(f"{attention} has no second derivative: load the model with attn_implementation='sdpa' or 'eager'")
        self._std = torch.tensor(self.preprocessing.std, device=args.device).view(1, 3, 1, 1)
        self._start = reference.remembered(model)
        self.delta = torch.zeros((1, 3, *self.preprocessing.size), device=args.device, requires_grad=True)
        self.round = -1
        self.add_callback(_Rounds(self))

    def _mean(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "mean")

    def begin_purification(self, resumed: bool) -> None:
        """Forget the delta of an earlier run of `train`, unless one came with the checkpoint."""
        if not resumed:
            self.round = -1

    # The inner problem, once a round -----------------------------------------------------------------------------------

    def begin_round(self, number: int) -> None:
        """Find this round's delta, unless it came with the checkpoint."""
        if number == self.round:
            return
        self.model.eval()
        delta, changed = self.find_perturbation()
        self.delta, self.round = broadcast(delta).requires_grad_(), number
        self.accelerator.print(
            f"i-BAU, round {number + 1}: a perturbation of L2 norm {delta.norm():.3f} (pixels in [0, 1]) changes "
            f"{100 * changed:.1f} % of the predictions on the retain set"
        )

    def find_perturbation(self) -> tuple[Tensor, float]:
        """Descend to delta* over the retain set, unaugmented, in its order.

        Returns:
            delta (1, 3, h, w) in pixels of [0, 1], and the share of predictions that it changed in the last pass, each
            counted before the batch's own step.
        """
        delta, changed = torch.zeros_like(self.delta), 0
        for _ in range(self.args.inner_epochs):
            changed = 0
            for batch in retain_batches(self, "i-BAU: perturbation", augmented=False):
                delta.requires_grad_()
                inner, flipped = self._inner(batch["pixel_values"], delta)
                (gradient,) = torch.autograd.grad(inner, delta)
                delta = (delta - self.args.inner_learning_rate * gradient).detach()
                changed += flipped
        return delta, float(changed) / len(self.train_dataset)

    def _inner(self, pixel_values: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """G on a batch, and how many of its predictions delta changes."""
        with torch.no_grad():
            classes = self.model(pixel_values=pixel_values).logits.argmax(1)
        logits = self.model(pixel_values=pixel_values + delta / self._std).logits
        return inner_objective(logits, classes, delta, self.args.penalty), (logits.argmax(1) != classes).sum()

    # The outer problem, every update -----------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """While training a share of the images carries delta."""
        if self.model.training:
            for child in self.model.children():  # the base class reads the mode of the model itself
                child.eval()
            self._pixel_values = inputs["pixel_values"]
            carries = self._chosen(len(self._pixel_values)) / self._std
            inputs = {**inputs, "pixel_values": self._pixel_values + carries * self.delta}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _chosen(self, count: int) -> Tensor:
        """Which images carry delta, as 0 or 1, (count, 1, 1, 1); drawn by seed, step and process."""
        generator = np.random.default_rng([self.args.seed, self.state.global_step, self.args.process_index])
        rows = generator.permutation(count)[: max(1, round(self.args.perturbed_share * count))]
        return torch.zeros(count).index_fill(0, torch.from_numpy(rows), 1.0).view(-1, 1, 1, 1).to(self._std.device)

    def finish_gradient(self, window_loss: Tensor) -> Tensor:
        """Add the implicit term, with G on the window's last micro-batch."""
        outer_gradient = self._mean(self.delta.grad)
        self.delta.grad = None
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        step, iterations = self.args.fixed_point_step, self.args.fixed_point_iterations
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            inner, _ = self._inner(self._pixel_values, self.delta)
            terms = implicit_gradient(
                inner,
                self.delta,
                outer_gradient,
                parameters,
                lambda product, target: fixed_point(product, target, step, iterations),
                self._mean,
            )
        torch._foreach_add_([p.grad for p in parameters], terms)
        return window_loss

    # What the log and the manifest say, what the checkpoint holds ------------------------------------------------------

    def end_purification(self) -> None:
        """Raise if no weight changed."""
        reference.check_changed(self.model, self._start)

    def step_statistics(self) -> dict[str, float]:
        """``perturbation``: the L2 norm of delta in pixels of [0, 1]."""
        return {"perturbation": self.delta.norm().item()}

    def facts(self) -> dict[str, Any]:
        """Adds the norms of the last delta, in pixels of [0, 1], and its file."""
        norms = {"l2": self.delta.norm().item(), "linf": self.delta.abs().max().item()}
        return super().facts() | {"perturbation": norms | {"rounds": self.round + 1, "file": PERTURBATION}}

    def write_files(self, folder: Path, state_dict: dict | None = None) -> None:
        """Adds the perturbation."""
        super().write_files(folder, state_dict)
        state = {"delta": self.delta.detach().cpu(), "round": torch.tensor(self.round)}
        save_file(state, folder / PERTURBATION)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = load_file(Path(resume_from_checkpoint) / PERTURBATION)
        self.delta = state["delta"].to(self.args.device).requires_grad_()
        self.round = int(state["round"])
