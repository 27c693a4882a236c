"""FP, Fine-Pruning: remove the units that clean images hardly activate, then fine-tune.

Liu, Dolan-Gavitt, Garg: "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", RAID 2018, arXiv
1805.12185.

Units are ranked by their mean absolute activation on clean images and pruned from the least active on, 1 % at a time, as long
as the accuracy on held-out retain images keeps its share of the victim's; then the Trainer fine-tunes everything on the whole
retain set, and what was pruned stays zero. Which units:

- convolutional networks: the output channels of the last stage, as the head reads them (after pooling; for VGG the units of
  its last hidden layer). A pruned channel is a zero column of the head's weight, BackdoorBench's form: behind a residual sum a
  filter's own weights do not decide whether its channel is zero.
- transformers (this project's form): the hidden units of the last block's MLP: zero rows and biases of its first layer and zero
  columns of its second.

Cost: one forward pass over 80 % of the retain set, at most 100 over 20 %, then fine-tuning. Assumes a few clean images, and
that the backdoor sits in units that they do not use. Differs from BackdoorBench: tolerance on held-out retain images, not on
test images; the step that breaks it is taken back (there it is kept); one order of the units throughout.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..models.neurons import neuron_layers
from .shared.staged import StagedConfig, StagedTrainer

STEP = 0.01  # share of the units pruned at a time (BackdoorBench)


@dataclass(frozen=True)
class Units:
    """Units that can be pruned.

    Attributes:
        reader: The layer that reads them; its input has one channel or feature per unit.
        parts: Parameters and the dimension of each that runs over the units; all are zero where a unit is pruned.
        where: What they are, in words.
    """

    reader: nn.Module
    parts: list[tuple[nn.Parameter, int]]
    where: str

    def zero(self, units: Tensor) -> None:
        """Set the parts of the units, int64 (n,), to zero."""
        for parameter, dim in self.parts:
            parameter.data.index_fill_(dim, units.to(parameter.device), 0.0)


def last_units(model: nn.Module, image_size: tuple[int, int]) -> Units:
    """The units that Fine-Pruning prunes; see the module's text.

    Raises:
        ValueError: A transformer without a pair of linear layers that widens and narrows again (a gated MLP, say); see
            `neuron_layers`.
    """
    head, layers = neuron_layers(model, image_size)
    if isinstance(next(iter(layers.values())), nn.Conv2d):
        return Units(model.get_submodule(head), [(model.get_submodule(head).weight, 1)], f"inputs of {head}")
    pairs = [
        (one, two)
        for one, two in pairwise(layers.items())
        if one[1].out_features == two[1].in_features > one[1].in_features == two[1].out_features
    ]
    if not pairs:
        raise ValueError(
            f"fine-pruning of a transformer prunes MLP hidden units, and {type(model).__name__} has no linear layer that "
            "widens followed by one that narrows back"
        )
    (name, widen), (_, narrow) = pairs[-1]
    biases = [(widen.bias, 0)] if widen.bias is not None else []
    return Units(narrow, [(widen.weight, 0), *biases, (narrow.weight, 1)], f"outputs of {name}")


@dataclass
class FinePruningConfig(StagedConfig):
    """Arguments of Fine-Pruning; the schedule of the fine-tuning is the one all defences share.

    Args:
        max_validation_drop: In [0, 1); 0.1, relative (BackdoorBench's acc_ratio, there on test images).
    """

    output_dir: str | None = field(default="outputs/fine_pruned", metadata={"help": "Folder for the pruned, tuned model."})


class FinePruningTrainer(StagedTrainer):
    """Trainer of Fine-Pruning; see `PurifyTrainer` for the arguments.

    Raises:
        ValueError: The architecture has no such units, see `last_units`.
        RuntimeError: Pruning the first 1 % of the units already costs more accuracy than allowed.
    """

    method = "Fine-Pruning"
    paper = "https://arxiv.org/abs/1805.12185"

    def prepare(self) -> None:
        """Find the units."""
        super().prepare()
        self.units = last_units(self.model, self.preprocessing.size)

    @torch.no_grad()
    def activations(self) -> Tensor:
        """Mean absolute activation of each unit over the tuning images (and their pixels or tokens), float64 (n,)."""
        sums: list[Tensor] = []
        is_convolution = isinstance(self.units.reader, nn.Conv2d)

        def add(module, args):
            features = args[0].movedim(1, -1) if is_convolution else args[0]
            sums.append(features.flatten(0, -2).abs().double().mean(0) * len(features))

        hook = self.units.reader.register_forward_pre_hook(add)
        try:
            self.accuracy(self.tune)
        finally:
            hook.remove()
        return torch.stack(sums).sum(0) / len(self.tune)

    def start(self) -> None:
        """Prune as many of the least active units as the accuracy allows."""
        order = self.activations().argsort()
        before = self.accuracy(self.validate)
        count, after = self._prunable(order, before)
        chosen = self.agree(torch.where(torch.arange(len(order), device=order.device) < count, order, -1))
        pruned = sorted(unit for unit in chosen.tolist() if unit >= 0)
        self.found = {"where": self.units.where, "units": len(order), "pruned": pruned} | self.accuracies(before, after)
        self._hold()

    def _prunable(self, order: Tensor, before: float) -> tuple[int, float]:
        """How many units, in this order, can go, and the accuracy without them; the model is left as it was."""
        originals = [parameter.detach().clone() for parameter, _ in self.units.parts]
        step, found, after = math.ceil(STEP * len(order)), 0, before
        for count in self.progress(range(step, len(order), step), "Pruning", math.ceil(len(order) / step) - 1):
            self.units.zero(order[:count])
            accuracy = self.accuracy(self.validate)
            if not self.is_tolerable(accuracy, before):
                break
            found, after = count, accuracy
        for (parameter, _), original in zip(self.units.parts, originals, strict=True):
            parameter.data.copy_(original)
        if not found:
            raise RuntimeError(
                f"fine-pruning: the {step} least active of {len(order)} {self.units.where} already cost more than "
                f"max_validation_drop={self.args.max_validation_drop} of the retain accuracy {before:.3f}: nothing was pruned"
            )
        return found, after

    def _hold(self) -> None:
        self._pruned = torch.tensor(self.found["pruned"], device=self.args.device)
        self.units.zero(self._pruned)

    def announce(self, resumed: bool) -> None:
        """Say what is pruned."""
        self.say(f"pruned {len(self.found['pruned'])} of {self.found['units']} {self.found['where']}")

    def optimizer_step(self) -> None:
        """After the optimizer's step, what was pruned is set to zero again."""
        self.units.zero(self._pruned)

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """What was pruned stays so."""
        super().load_resume_state(state)
        self._hold()
