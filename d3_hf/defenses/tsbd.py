"""TSBD, Two-Stage Backdoor Defense: zero what clean unlearning changes most, then fine-tune with small gradients.

Lin, Liu, Wei, Li, Xiong: "Unveiling and Mitigating Backdoor Vulnerabilities based on Unlearning Weight Changes and Backdoor
Activeness", NeurIPS 2024, arXiv 2405.20291.

1. Unlearn the clean task on a copy theta_u of the victim theta_0; the neuron weight change of neuron j is
   NWC_j = sum over its weights |w_u - w_0|. Of the fraction n of all neurons that changed most, the fraction m of the weights
   that changed most become zero in the victim.
2. Activeness-aware fine-tuning, a penalty on the gradient norm: with g_1 = grad L(theta), theta' = theta + r g_1 / ||g_1|| per
   parameter tensor and g_2 = grad L(theta'), the step follows (1 - alpha) g_1 + alpha g_2.

Neurons are output channels of convolutions, shortcuts excluded. For transformers, this project's extension: output units of the
linear layers, which are the MLPs' and the attentions' output projections; the head is left out as in the original, and so are
queries, keys and values, because a zero in them changes where an attention head looks and removes no unit.

Cost: 1 forward and backward pass per update of the unlearning and 1 forward pass per epoch, at most one forward pass over 20 %
of the retain set per candidate of n, then 2 forward and backward passes per step. Assumes a few clean images. Differs from
the published code: n is chosen on held-out retain images (there it is swept and never chosen); unlearning uses the other 80 %,
in shuffled order; BatchNorm statistics are updated by the pass that gives g_1, not by an extra one after the step; a tensor
without gradient stays where it is (there 0 / 0).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.neurons import neuron_layers
from ..training.config import on_cnns
from .shared.staged import StagedConfig, StagedTrainer, check_functional
from .shared.unlearning import unlearned_copy

SHORTCUTS = ("shortcut", "downsample")  # how networks name them; the authors' code looks for the first
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "qkv", "q", "k", "v", "kv")
RATIOS = (0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 0.9)


def neuron_weights(model: nn.Module, image_size: tuple[int, int]) -> dict[str, Tensor]:
    """Weights by name whose rows are the neurons, detached; see the module's text for which.

    Raises:
        ValueError: There are none; see `neuron_layers`.
    """
    _, layers = neuron_layers(model, image_size)
    excluded = {
        name for name in layers if any(s in name.lower() for s in SHORTCUTS) or name.rpartition(".")[2] in ATTENTION_INPUTS
    }
    weights = {f"{name}.weight": layer.weight.detach() for name, layer in layers.items() if name not in excluded}
    if not weights:
        raise ValueError(f"TSBD: all layers of {type(model).__name__} are shortcuts or attention inputs, no neurons are left")
    return weights


def neuron_weight_changes(changes: list[Tensor]) -> Tensor:
    """NWC of all neurons of all layers, in order: the L1 norm of each row of each tensor."""
    return torch.cat([change.flatten(1).abs().sum(1) for change in changes])


def subweights(changes: list[Tensor], n: float, m: float) -> list[Tensor]:
    """Which weights to zero: of the fraction n of neurons with the largest NWC, the fraction m of weights that changed most.

    Args:
        changes: Unlearned minus original weights, neurons along the first dimension.
        n: Fraction of all neurons, in (0, 1]; rounded to at least one.
        m: Fraction of the weights of those neurons together, in (0, 1]; rounded to at least one.

    Returns:
        Bool tensors like ``changes``; ties at the m-th weight are all included.
    """
    scores = neuron_weight_changes(changes)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.topk(max(1, round(n * len(scores)))).indices] = True
    rows = chosen.split([len(change) for change in changes])
    pool = torch.cat([change[row].abs().flatten() for change, row in zip(changes, rows, strict=True)])
    smallest = pool.kthvalue(len(pool) - max(1, round(m * len(pool))) + 1).values
    return [
        (change.abs() >= smallest) & row.view(-1, *(1,) * (change.ndim - 1)) for change, row in zip(changes, rows, strict=True)
    ]


def ascend(weights: dict[str, Tensor], gradients: dict[str, Tensor], radius: float) -> dict[str, Tensor]:
    """``theta + r g / ||g||`` for each tensor by itself; a tensor with zero gradient stays."""
    tiny = torch.finfo(torch.float32).tiny
    factors = {name: radius / gradient.norm().clamp_min(tiny) for name, gradient in gradients.items()}
    return {name: weight.detach() + factors[name] * gradients[name] for name, weight in weights.items()}


@dataclass
class TSBDConfig(StagedConfig):
    """Arguments of TSBD. (code) marks the authors' released code.

    Args:
        learning_rate: Of the fine-tuning. Published: 0.01, momentum 0.9, no weight decay, constant (code).
        num_train_epochs: Of the fine-tuning. Published: 20 (code; its loop runs 21).
        per_device_train_batch_size: Of both stages. Published: 256 (code).
        unlearn_learning_rate: Of the ascent, > 0; 1e-4, momentum 0.9 (code).
        unlearn_epochs: At most so many passes of the ascent, >= 1; 1,000 (code).
        unlearn_accuracy: Stop the ascent when the accuracy on the tuning images, in evaluation mode, is at most this, in
            [0, 1), or that of always answering the most frequent class; 0.1 (code, on ten classes).
        neuron_ratios: Candidates for n, in (0, 1]; the largest is taken up to which validation accuracy right after the
            re-initialisation is tolerable. The list of the authors' sweep. A list of one and ``max_validation_drop`` near 1
            fix n.
        weight_ratio: m in (0, 1]; 0.7 (code).
        gradient_radius: r > 0; 0.05 (code).
        gradient_mix: alpha in [0, 1]; 0.7 (code).
        max_validation_drop: In [0, 1); 0.3 (here, not measured): fine-tuning recovers much of what the zeros cost.

    Raises:
        ValueError: fp16 or activation checkpointing is asked for; see `PurifyConfig`.
    """

    output_dir: str | None = field(default="outputs/tsbd", metadata={"help": "Folder for the purified model."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the learning rate."})
    unlearn_learning_rate: float = field(
        default=1e-4, metadata={"help": "Learning rate of the unlearning.", "range": "> 0 and finite"}
    )
    unlearn_epochs: int = field(default=1000, metadata={"help": "Largest number of passes of the unlearning.", "range": ">= 1"})
    unlearn_accuracy: float = field(
        default=0.1, metadata={"help": "Accuracy at which the unlearning stops.", "range": "in [0, 1)"}
    )
    neuron_ratios: list[float] = field(
        default_factory=lambda: list(RATIOS),
        metadata={"help": "Candidates for n, the share of neurons to re-initialise.", "range": "in (0, 1]"},
    )
    weight_ratio: float = field(
        default=0.7, metadata={"help": "m: share of those neurons' weights set to zero.", "range": "in (0, 1]"}
    )
    gradient_radius: float = field(
        default=0.05, metadata={"help": "r: how far the second gradient is taken.", "range": "> 0 and finite"}
    )
    gradient_mix: float = field(default=0.7, metadata={"help": "alpha: weight of the second gradient.", "range": "in [0, 1]"})
    max_validation_drop: float = field(default=0.3, metadata={"help": "Relative loss of retain validation accuracy allowed."})

    by_network = on_cnns(learning_rate=0.01, num_train_epochs=20, per_device_train_batch_size=256)

    def __post_init__(self):
        check_functional(self)
        super().__post_init__()


class TSBDTrainer(StagedTrainer):
    """Trainer of TSBD; see `PurifyTrainer` for the arguments.

    Raises:
        ValueError: The model has no neurons of the kinds above.
        RuntimeError: The clean task is not unlearned within ``unlearn_epochs``, or the smallest n already costs too much.
        FloatingPointError: Unlearning diverged.
    """

    method = "TSBD"
    paper = "https://arxiv.org/abs/2405.20291"
    found_as = "reinitialised"

    def prepare(self) -> None:
        """Find the neurons."""
        super().prepare()
        self.neuron_names = list(neuron_weights(self.model, self.preprocessing.size))
        self._window: list[tuple[dict, Any]] = []

    @property
    def neurons(self) -> dict[str, Tensor]:
        """The weights by name whose rows are the neurons: detached, sharing memory with the model."""
        return {name: self.model.get_parameter(name).detach() for name in self.neuron_names}

    # Stage 1 -----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Unlearn, choose n, set the sub-weights to zero."""
        changes, unlearned = self.weight_changes()
        before = self.accuracy(self.validate)
        ratio, weights, after = self.choose_ratio(changes, before)
        self.agree(weights)
        zeroed = sum(int((weights[name] != weight).sum()) for name, weight in self.neurons.items())
        for name, weight in self.neurons.items():
            weight.copy_(weights[name])
        self.found = {
            "unlearning": unlearned,
            "neuron_ratio": ratio,
            "neurons": sum(len(weight) for weight in weights.values()),
            "share_of_weights_zeroed": zeroed / sum(weight.numel() for weight in weights.values()),
        } | self.accuracies(before, after)

    def weight_changes(self) -> tuple[list[Tensor], dict[str, Any]]:
        """Unlearned minus original weights of all neuron layers, and how the unlearning went.

        Raises:
            RuntimeError: Accuracy on the tuning images did not fall to ``unlearn_accuracy``.
        """
        tensors, found = unlearned_copy(self, weight_decay=0.0, evaluate=True)
        return [tensors[name] - weight for name, weight in self.neurons.items()], found

    def choose_ratio(self, changes: list[Tensor], before: float) -> tuple[float, dict[str, Tensor], float]:
        """The largest n up to which validation accuracy is tolerable, the weights by name with its zeros, and the accuracy."""
        chosen, accuracy = None, before
        for ratio in sorted(self.args.neuron_ratios):
            weights, accuracy = self.with_zeros(changes, ratio)
            if not self.is_tolerable(accuracy, before):
                break
            chosen = ratio, weights, accuracy
        if chosen is None:
            raise RuntimeError(
                f"TSBD: n = {min(self.args.neuron_ratios)} already lowers the retain accuracy from {before:.3f} to "
                f"{accuracy:.3f}, more than max_validation_drop={self.args.max_validation_drop}: nothing was re-initialised"
            )
        return chosen

    def with_zeros(self, changes: list[Tensor], ratio: float) -> tuple[dict[str, Tensor], float]:
        """The neuron layers' weights with the sub-weights at zero, and that network's accuracy on the validation images."""
        zeros = subweights(changes, ratio, self.args.weight_ratio)
        weights = {name: w.masked_fill(zero, 0.0) for (name, w), zero in zip(self.neurons.items(), zeros, strict=True)}
        return weights, self.accuracy(self.validate, weights)

    def announce(self, resumed: bool) -> None:
        """Say what was re-initialised."""
        ratio, neurons, share = (self.found[name] for name in ("neuron_ratio", "neurons", "share_of_weights_zeroed"))
        self.say(f"re-initialised n = {ratio} of {neurons} neurons ({share:.1%} of their layers' weights)")

    # Stage 2 -----------------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As the base class; keeps the micro-batch for the second gradient."""
        self._window.append((dict(inputs), num_items_in_batch))
        return super().training_step(model, inputs, num_items_in_batch)

    def finish_gradient(self, window_loss: Tensor) -> Tensor:
        """Replace the gradient by ``(1 - alpha) g_1 + alpha g_2`` and return the loss at theta."""
        parameters = {name: p for name, p in self.model.named_parameters() if p.grad is not None}
        first = {name: p.grad for name, p in parameters.items()}
        shifted = {n: w.requires_grad_() for n, w in ascend(parameters, first, self.args.gradient_radius).items()}
        second = [torch.zeros_like(g) for g in first.values()]
        for inputs, count in self._window:
            batch = self._prepare_inputs(inputs)
            loss = F.cross_entropy(self.training_logits_with(shifted, batch), batch["labels"], reduction="sum")
            share = loss * self.accelerator.num_processes / count
            torch._foreach_add_(second, torch.autograd.grad(share, list(shifted.values())))
        self._window = []
        second = self.accelerator.reduce(second, "mean")
        gradients = list(first.values())
        torch._foreach_mul_(gradients, 1 - self.args.gradient_mix)
        torch._foreach_add_(gradients, second, alpha=self.args.gradient_mix)
        return window_loss
