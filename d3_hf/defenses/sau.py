"""SAU, Shared Adversarial Unlearning: find perturbations that fool the suspicious and the purified model alike, unlearn them.

Wei, Zhang, Zha, Wu: "Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning Shared Adversarial Examples", NeurIPS
2023, arXiv 2307.10562. h0 is the suspicious model, kept; h the model being purified, h = h0 at the start. Per batch of N:

    inner:  min_{||d_i||_inf <= bound}  beta_adversarial L_adv + beta_shared L_share, one d per image, in pixels of [0, 1]
            L_adv   = -1/(2N) [sum_{i not flipped in h} CE(h(x_i + d_i), y_i) + the same for h0]
            L_share = 1/N sum_{i not shared} JS(h(x_i + d_i), h0(x_i + d_i))
    outer:  min_h  lambda_clean CE(h(x), y) + lambda_adversarial CE(h(x + d), y) + lambda_shared L_sh
            L_sh    = -1/N sum_{i: h0 fooled} log(1 - p_h(k_i | x_i + d_i)),   k_i = h0's class of x_i + d_i

An image is *flipped* in a model when d changes the model's own prediction, *shared* when it is flipped in both to one and the
same wrong class; h0 is *fooled* when its class k_i is wrong and not its prediction of x_i. The inner problem starts at
``d = +bound`` and takes sign-gradient steps with both models in eval mode; x + d is not clipped to [0, 1].

Cost per update, in passes over the batch: with S = ``pgd_steps``, 2 S + 5 forward and 2 S + 2 backward ones, 2 S of these to
the pixels only (15 and 12 at S = 5; fine-tuning: 1 and 1), fewer when all images are shared early; memory for two models. The
defender owns a few labelled images without triggers. It works on every network.

What differs from the authors' code: ``log(1 - p)`` is computed exactly from the logits instead of with clamps, which cut off
the gradient of the very examples that are unlearned least; dropout, where a network has it, is on in the outer pass.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..training.config import BATCH_NORM_POLICIES, PurifyConfig, on_cnns
from ..training.trainer import PurifyTrainer

Logits = Callable[[Tensor], Tensor]


@dataclass
class SAUConfig(PurifyConfig):
    """Arguments of SAU. The weights and the attack are the paper's; the schedule is the authors' code's for CIFAR-10.

    Args:
        lambda_clean: >= 0, weight of the cross-entropy on the images (lambda_1). 1.
        lambda_adversarial: >= 0, weight of the cross-entropy on the adversarial examples. 0; more is adversarial training.
        lambda_shared: > 0, weight of the unlearning of h0's classes (the paper's lambda_2). 1.
        beta_adversarial: >= 0, weight of fooling in the inner problem (the paper's lambda_3). 0.01.
        beta_shared: >= 0, weight of agreement in the inner problem (the paper's lambda_4). 1.
        pgd_bound: > 0, largest change of a pixel, on the scale where pixels are in [0, 1]. 0.2.
        pgd_step: > 0, size of a step on that scale. 0.2.
        pgd_steps: >= 1, number of steps. 5.
        batch_norm: ``"eval"`` (authors: running statistics kept, scale and shift trained), ``"frozen"`` or ``"train"``: batch
            statistics of images and examples together, which the authors found to lower ACC and ASR.
        learning_rate: 1e-4, constant.
        optim: Adam, as AdamW without weight decay, always with the AMSGrad maximum.
        num_train_epochs: Published: 100 for CIFAR-10 and GTSRB; 20 for Tiny ImageNet. With batches of 256 of 2,500 images
            1,000 updates, which a rate of 1e-4 needs; for a budget equal to other defences' count passes, not epochs.
        per_device_train_batch_size: Published: 256.
        crop_padding: 0: the authors do not augment.

    Raises:
        ValueError: Both betas are 0; fp16 is on; see `PurifyConfig`.
    """

    output_dir: str | None = field(default="outputs/sau", metadata={"help": "Folder for the purified model."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate."})
    optim: str = field(default="adamw_torch", metadata={"help": "Optimizer, any name of TrainingArguments."})
    optim_args: str | None = field(default=None, metadata={"help": "Arguments of the optimizer."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the learning rate."})
    batch_norm: str = field(
        default="eval",
        metadata={"help": "BatchNorm while training: train, eval or frozen.", "choices": BATCH_NORM_POLICIES},
    )
    crop_padding: int = field(default=0, metadata={"help": "Zero padding in pixels before the random crop."})
    lambda_clean: float = field(
        default=1.0, metadata={"help": "Weight of the cross-entropy on the images.", "range": ">= 0 and finite"}
    )
    lambda_adversarial: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy on the examples.", "range": ">= 0 and finite"}
    )
    lambda_shared: float = field(
        default=1.0, metadata={"help": "Weight of the unlearning of shared classes.", "range": "> 0 and finite"}
    )
    beta_adversarial: float = field(
        default=0.01, metadata={"help": "Inner problem: weight of fooling both models.", "range": ">= 0 and finite"}
    )
    beta_shared: float = field(
        default=1.0, metadata={"help": "Inner problem: weight of their agreement.", "range": ">= 0 and finite"}
    )
    pgd_bound: float = field(default=0.2, metadata={"help": "Largest change of a pixel in [0, 1].", "range": "> 0 and finite"})
    pgd_step: float = field(
        default=0.2, metadata={"help": "Size of a sign-gradient step, same scale.", "range": "> 0 and finite"}
    )
    pgd_steps: int = field(default=5, metadata={"help": "Number of sign-gradient steps.", "range": ">= 1"})

    by_network = on_cnns(num_train_epochs=100, per_device_train_batch_size=256)

    def __post_init__(self):
        super().__post_init__()
        if self.beta_adversarial == self.beta_shared == 0:
            raise ValueError("beta_adversarial and beta_shared are both 0: the inner problem would have no objective")
        if self.fp16:
            raise ValueError("fp16 rounds the small gradients of the examples to zero; use bf16 or float32")


# The mathematics -------------------------------------------------------------------------------------------------------


def js_divergence(logits: Tensor, other: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two predictions: logits (B, C) and (B, C) to (B,), in nats, at most ln 2."""
    p, q = logits.log_softmax(1), other.log_softmax(1)
    middle = torch.logaddexp(p, q) - math.log(2)
    return ((p.exp() * (p - middle)).sum(1) + (q.exp() * (q - middle)).sum(1)) / 2


def unlearning_losses(logits: Tensor, classes: Tensor) -> Tensor:
    """``-log(1 - p_k)`` per image, for logits (B, C) and classes k int64 (B,): how far the model still believes in k.

    Exact for any p_k < 1 in the logits' precision; the gradient is bounded, also where p_k rounds to 1.
    """
    others = logits.scatter(1, classes[:, None], -math.inf)
    return logits.logsumexp(1) - others.logsumexp(1)


def inner_losses(
    logits: tuple[Tensor, Tensor], predictions: tuple[Tensor, Tensor], labels: Tensor, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """The inner objective N (beta_adversarial L_adv + beta_shared L_share), image by image.

    Args:
        logits: (B, C) of h and of h0 on x + d.
        predictions: int64 (B,), classes of h and of h0 on x.
        labels: int64 (B,).
        betas: beta_adversarial and beta_shared.

    Returns:
        The objective (B,), and which images are shared, bool (B,); the objective of those is zero, so they stay.
    """
    fooling, classes = torch.zeros_like(labels, dtype=logits[0].dtype), [z.argmax(1) for z in logits]
    flipped = [c != own for c, own in zip(classes, predictions, strict=True)]
    for z, done in zip(logits, flipped, strict=True):
        fooling = fooling - F.cross_entropy(z, labels, reduction="none") * ~done / 2
    shared = flipped[0] & flipped[1] & (classes[0] == classes[1]) & (classes[0] != labels)
    return betas[0] * fooling + betas[1] * js_divergence(*logits) * ~shared, shared


def shared_perturbation(
    models: tuple[Logits, Logits],
    pixel_values: Tensor,
    labels: Tensor,
    predictions: tuple[Tensor, Tensor],
    std: Tensor,
    args: SAUConfig,
) -> Tensor:
    """Solve the inner problem by projected sign-gradient descent; stops when every image is shared.

    Args:
        models: Functions from ``pixel_values`` to logits of h and of h0, in eval mode.
        pixel_values: Normalised images float32 (B, 3, h, w).
        labels: int64 (B,).
        predictions: int64 (B,), classes of h and of h0 on the images.
        std: (1, 3, 1, 1), the normalisation's: d in pixels of [0, 1] adds d / std to ``pixel_values``.
        args: The bound, the step, the number of steps and the weights.

    Returns:
        d like ``pixel_values``, in pixels of [0, 1], no entry larger than ``pgd_bound``; no parameter gets a gradient.
    """
    delta = torch.full_like(pixel_values, args.pgd_bound)
    for _ in range(args.pgd_steps):
        delta.requires_grad_()
        logits = tuple(model(pixel_values + delta / std) for model in models)
        losses, shared = inner_losses(logits, predictions, labels, (args.beta_adversarial, args.beta_shared))
        if shared.all():
            break
        (gradient,) = torch.autograd.grad(losses.sum(), delta)
        delta = (delta.detach() - args.pgd_step * gradient.sign()).clamp_(-args.pgd_bound, args.pgd_bound)
    return delta.detach()


# The trainer -----------------------------------------------------------------------------------------------------------


class SAUTrainer(PurifyTrainer):
    """Trainer of SAU; see `PurifyTrainer` for the arguments and `SAUConfig` for the objective.

    h0 is a copy of the model as it is handed over: build the trainer from the suspicious model, also when resuming from a
    checkpoint of an interrupted run. The log adds ``fooled_fraction``, the share of images whose example fools h0, and
    ``shared_fraction``, the share on which h follows it; the second is what falls.

    Raises:
        ValueError: A checkpoint belongs to another suspicious model.
        RuntimeError: After training, when no weight has changed.
    """

    method = "SAU"
    paper = "https://arxiv.org/abs/2307.10562"
    log_names = ("clean_loss", "fooled_fraction", "shared_fraction")
    amsgrad = True

    def prepare(self) -> None:
        """Keep h0."""
        self.suspicious = copy.deepcopy(self.model).requires_grad_(False).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """While training the images and their adversarial examples go through the model as one batch."""
        if self.in_training_step and "labels" in inputs:
            inputs = {**inputs, "pixel_values": self._with_examples(inputs["pixel_values"], inputs["labels"])}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _with_examples(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        models = tuple(lambda x, m=m: m(pixel_values=x).logits.float() for m in (self.model, self.suspicious))
        std = pixel_values.new_tensor(self.preprocessing.std)[None, :, None, None]
        self.model.eval()
        with self.accelerator.autocast():
            with torch.no_grad():
                predictions = tuple(model(pixel_values).argmax(1) for model in models)
            delta = shared_perturbation(models, pixel_values, labels, predictions, std, self.args)
            examples = pixel_values + delta / std
            with torch.no_grad():
                self._classes = models[1](examples).argmax(1)
        self._fooled = (self._classes != labels) & (self._classes != predictions[1])
        self.model.train()
        return torch.cat([pixel_values, examples])

    def sample_loss(self, cross_entropy: Tensor) -> Tensor:
        """lambda_clean times the cross-entropy."""
        return self.args.lambda_clean * cross_entropy

    def clean_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The outer objective while training, from logits (2 B, C) of images and examples; else the cross-entropy."""
        if not self.in_training_step or labels is None:
            return super().clean_loss(outputs, labels, num_items_in_batch)
        logits, adversarial = outputs.logits.float().chunk(2)
        self._shared = self._fooled & (adversarial.detach().argmax(1) == self._classes)
        losses = self.args.lambda_shared * unlearning_losses(adversarial, self._classes) * self._fooled
        losses = losses + self.args.lambda_adversarial * F.cross_entropy(adversarial, labels, reduction="none")
        clean = super().clean_loss(SimpleNamespace(logits=logits), labels, num_items_in_batch)
        return clean + losses.sum() / num_items_in_batch

    def sample_statistics(self, cross_entropy: Tensor) -> list[Tensor]:
        """Sums for ``clean_loss``, ``fooled_fraction`` and ``shared_fraction``."""
        return [cross_entropy.sum(), self._fooled.sum(), self._shared.sum()]
