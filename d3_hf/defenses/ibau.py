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
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..training.config import PurifyConfig
from ..training.trainer import PurifyTrainer

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
        batch_norm: ``"eval"`` (BB: running statistics kept, scale and shift trained) or ``"frozen"``: with batch statistics the
            images of a batch would not be apart.

    Raises:
        ValueError: fp16 is on; see `PurifyConfig`.
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
    inner_learning_rate: float = field(
        default=0.6, metadata={"help": "Step of the descent to the perturbation.", "range": "> 0 and finite"}
    )
    inner_epochs: int = field(default=1, metadata={"help": "Passes over the retain set per descent.", "range": ">= 1"})
    penalty: float = field(
        default=0.016, metadata={"help": "c: weight of the perturbation's squared norm.", "range": "> 0 and finite"}
    )
    fixed_point_step: float = field(
        default=0.006, metadata={"help": "s: step of the fixed-point iteration.", "range": "> 0 and finite"}
    )
    fixed_point_iterations: int = field(default=5, metadata={"help": "K: number of fixed-point iterations.", "range": ">= 1"})
    perturbed_share: float = field(
        default=0.01, metadata={"help": "Share of a batch that carries the perturbation.", "range": "in (0, 1]"}
    )

    def __post_init__(self):
        super().__post_init__()
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


class IBAUTrainer(PurifyTrainer):
    """Trainer of i-BAU; see `PurifyTrainer` for the arguments and `IBAUConfig` for the objective.

    With several processes delta and q are common to all. The log's ``loss`` and ``clean_loss`` are H: a share of its images
    carries delta; ``perturbation`` is the L2 norm of delta in pixels of [0, 1]. The final folder holds delta.

    Raises:
        ValueError: The model's attention cannot be differentiated twice.
        RuntimeError: After training, when no weight has changed.
    """

    method = "i-BAU"
    paper = "https://arxiv.org/abs/2110.03735"
    amsgrad = True

    def prepare(self) -> None:
        """Refuse attention that cannot be differentiated twice; begin without a delta."""
        if (attention := self.model.config._attn_implementation) not in ATTENTIONS:
            raise ValueError(f"{attention} has no second derivative: load the model with attn_implementation='sdpa' or 'eager'")
        self._std = torch.tensor(self.preprocessing.std, device=self.args.device).view(1, 3, 1, 1)
        self.delta = torch.zeros((1, 3, *self.preprocessing.size), device=self.args.device, requires_grad=True)
        self.round = -1

    def start(self) -> None:
        """Forget the delta of an earlier run of `train`."""
        self.round = -1

    # The inner problem, once a round -----------------------------------------------------------------------------------

    def training_batch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As it is; before the first of a round the round's delta is found, unless that came with the checkpoint."""
        number = int(self.state.epoch or 0)
        if number != self.round:
            self.begin_round(number)
        return inputs

    def begin_round(self, number: int) -> None:
        """Find this round's delta."""
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
            for batch in self.retain_batches("i-BAU: perturbation"):
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
        if self.in_training_step:
            self.model.eval()
            self._pixel_values = inputs["pixel_values"]
            carries = self._chosen(len(self._pixel_values)) / self._std
            inputs = {**inputs, "pixel_values": self._pixel_values + carries * self.delta}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _chosen(self, count: int) -> Tensor:
        """Which images carry delta, as 0 or 1, (count, 1, 1, 1); drawn by seed, step and process."""
        generator = np.random.default_rng([self.args.seed, self.batch_number, self.args.process_index])
        rows = generator.permutation(count)[: max(1, round(self.args.perturbed_share * count))]
        return torch.zeros(count).index_fill(0, torch.from_numpy(rows), 1.0).view(-1, 1, 1, 1).to(self._std.device)

    def finish_gradient(self, window_loss: Tensor) -> Tensor:
        """Add the implicit term, with G on the window's last micro-batch."""
        outer_gradient = self._mean(self.delta.grad)
        self.delta.grad = None
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            inner, _ = self._inner(self._pixel_values, self.delta)
            terms = implicit_gradient(inner, self.delta, outer_gradient, parameters, self._solve, self._mean)
        torch._foreach_add_([p.grad for p in parameters], terms)
        return window_loss

    def _solve(self, product: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
        return fixed_point(product, target, self.args.fixed_point_step, self.args.fixed_point_iterations)

    def _mean(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "mean")

    # What the log, the manifest, the folder and a checkpoint hold -------------------------------------------------------

    def step_statistics(self) -> dict[str, float]:
        """``perturbation``: the L2 norm of delta in pixels of [0, 1]."""
        return {"perturbation": self.delta.norm().item()}

    def facts(self) -> dict[str, Any]:
        """Adds the norms of the last delta, in pixels of [0, 1], and its file."""
        found = {"l2": self.delta.norm().item(), "linf": self.delta.abs().max().item(), "rounds": self.round + 1}
        if not self.is_writing_checkpoint:
            found["file"] = PERTURBATION
        return super().facts() | {"perturbation": found}

    def write_files(self, folder: Path, state_dict: dict | None = None) -> None:
        """Adds the perturbation to the final folder."""
        super().write_files(folder, state_dict)
        if not self.is_writing_checkpoint:
            save_file({"delta": self.delta.detach().cpu(), "round": torch.tensor(self.round)}, folder / PERTURBATION)

    def resume_state(self) -> dict[str, Any]:
        """Adds delta and its round."""
        return super().resume_state() | {"delta": self.delta, "round": self.round}

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Goes on with that delta."""
        super().load_resume_state(state)
        self.delta = state["delta"].to(self.args.device).requires_grad_()
        self.round = state["round"]
