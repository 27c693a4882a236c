"""The schedule that fits a network: which optimizer, learning rate, batch and how many updates, where the user says nothing.

`RULES` is the whole of it, but for what a method says of itself (`PurifyConfig.by_network`). It looks at the network's layers
only, never at what a defender cannot see; an option that is given always wins. Epochs follow from updates, so that few images
get as many as many do.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import nn
from transformers.training_args import OptimizerNames

from ..models.batch_norm import batch_norms
from ..publishing.execution import plain
from .config import BY_RULE, SGD_ARGUMENTS, PurifyConfig, two_digits

# By name: norms of timm and of transformers are classes of their own.
OTHER_NORMS = ("LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        name: Which networks it is for, in words.
        fits: Whether it is for a network; the first row that fits counts.
        measured: Where the numbers behind it are.
        optim, optim_args, learning_rate: As `TrainingArguments` has them.
        width: Channels of the network that the learning rate was measured on; for another width it is scaled by the inverse, as
            Adam's steps ask for (Yang et al. 2022, arXiv 2203.03466, table 3). None: not scaled.
        warmup: Share of the updates.
        images: In each update, over all processes and micro-batches.
        updates: Of the whole run; at least one pass over the images is made.
        learning_rate_from_base: The same as ``learning_rate``, of a run that starts near the public base: the start is what
            takes the backdoor out there, and steps only have to bring ACC back.
        images_from_base: Images from which on that rate is whole; of fewer it falls with their root. None: it is always whole.
        updates_from_base: Of such a run, which has further to go.
        passes_from_base: Over the images that it makes at least: many images are worth more updates to it.
        cutmix: Its alpha, for methods whose loss fits it.
    """

    name: str
    fits: Callable[[nn.Module], bool]
    measured: str
    optim: str
    optim_args: str | None
    learning_rate: float
    width: int | None
    warmup: float
    images: int
    updates: int
    learning_rate_from_base: float
    images_from_base: int | None
    updates_from_base: int
    passes_from_base: int
    cutmix: float

    def options(self, args: PurifyConfig, model: nn.Module, count: int | None = None) -> dict[str, Any]:
        """What the row, and before it the method, says of each option but those that count updates, for so many images."""
        scale = self.width / (width_of(model) or self.width) if self.width else 1.0
        shared_by = args.world_size * args.gradient_accumulation_steps
        learning_rate = self._rate_from_base(count) if _near_base(args) else self.learning_rate
        row = {
            "optim": self.optim,
            "optim_args": self.optim_args,
            "learning_rate": two_digits(learning_rate * scale),
            "per_device_train_batch_size": math.ceil(self.images / shared_by),
            "cutmix": self.cutmix,
        }
        own = args.by_network.get(self.name, {})
        return row | {name: value(count) if callable(value) else value for name, value in own.items()}

    def _rate_from_base(self, count: int | None) -> float:
        """Of an unknown number of images the whole rate."""
        share = 1.0 if count is None or self.images_from_base is None else min(1.0, count / self.images_from_base)
        return self.learning_rate_from_base * share**0.5


def other_norms(model: nn.Module) -> list[nn.Module]:
    """The layers that normalise by anything but BatchNorm's statistics, as transformers, ConvNeXt and BiT have them."""
    return [module for module in model.modules() if any(norm in type(module).__name__ for norm in OTHER_NORMS)]


def width_of(model: nn.Module) -> int | None:
    """Channels of the last of `other_norms` that scales its channels; None where none does."""
    scales = [getattr(module, "weight", None) for module in other_norms(model)]
    return next((len(scale) for scale in reversed(scales) if scale is not None), None)


RULES = (
    # On a pretrained ViT-S ten epochs at half as much more cost twice the ACC; CutMix leaves a quarter of BadNets' ASR and two
    # points more ACC. A ViT of 64 channels needs the rate that its width asks for (tests/defenses/test_defaults.py). The
    # long warm-up is for Adam, whose first steps are all of the full rate. Near the base half the rate is worth one to four
    # points of ACC at 1,000 images and leaves as little of the backdoor, and of 300 images a quarter is worth two more; twice
    # the updates were worth four at the whole rate, and of 2,500 images ten passes two points more than five.
    Rule(
        name="LayerNorm",
        fits=lambda model: bool(other_norms(model)),
        measured="model_cards/vit.md",
        optim="adamw_torch",
        optim_args=None,
        learning_rate=1e-4,
        width=384,
        warmup=0.3,
        images=32,
        updates=200,
        learning_rate_from_base=5e-5,
        images_from_base=1000,
        updates_from_base=400,
        passes_from_base=10,
        cutmix=1.0,
    ),
    # ResNet-20 and WideResNet-16-1: at 0.01 a trigger that no longer yields the target still destroys the prediction.
    Rule(
        name="BatchNorm",
        fits=lambda model: bool(batch_norms(model)),
        measured="model_cards/proof.md",
        optim="sgd",
        optim_args=SGD_ARGUMENTS,
        learning_rate=0.1,
        width=None,
        warmup=0,
        images=128,
        updates=300,
        learning_rate_from_base=0.1,
        images_from_base=None,
        updates_from_base=300,
        passes_from_base=1,
        cutmix=0.0,
    ),
    # Not measured; 0.01 is BackdoorBench's for every network.
    Rule(
        name="no normalisation",
        fits=lambda model: True,
        measured="",
        optim="sgd",
        optim_args=SGD_ARGUMENTS,
        learning_rate=0.01,
        width=None,
        warmup=0,
        images=128,
        updates=300,
        learning_rate_from_base=0.01,
        images_from_base=None,
        updates_from_base=300,
        passes_from_base=1,
        cutmix=0.0,
    ),
)


def numbers() -> dict[str, dict[str, Any]]:
    """What the rows say, by their names, without what only explains them: JSON-able, and another when a run would be."""
    explains = {"name", "fits", "measured"}
    return {rule.name: {f.name: getattr(rule, f.name) for f in fields(rule) if f.name not in explains} for rule in RULES}


def rule_of(model: nn.Module) -> Rule:
    """The row of `RULES` for a network."""
    return next(rule for rule in RULES if rule.fits(model))


def rule_said(facts: dict[str, Any]) -> str:
    """What `resolved` found, in one line."""
    options = ", ".join(f"{name} {value}" for name, value in facts["options"].items())
    return f"schedule for a network with {facts['rule']}: {options}"


def passes(updates: int, count: int, images: int) -> int:
    """How often to go over ``count`` images, ``images`` in each update, for about so many updates: at least once."""
    return max(1, round(updates / math.ceil(count / images)))


def _near_base(args: PurifyConfig) -> bool:
    """Whether a run starts near the public base."""
    return bool(getattr(args, "base_model", None))


def _epochs(args: PurifyConfig, rule: Rule, count: int) -> int:
    images = images_of(args)
    if args.max_steps > 0:
        return passes(args.max_steps, count, images)
    if _near_base(args):
        return max(passes(rule.updates_from_base, count, images), rule.passes_from_base)
    return passes(rule.updates, count, images)


def images_of(args: PurifyConfig) -> int:
    """Images in one update, over all processes and micro-batches."""
    return args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps


def updates_of(args: PurifyConfig, count: int) -> int:
    """Updates of a run over ``count`` images."""
    return args.max_steps if args.max_steps > 0 else round(args.num_train_epochs * math.ceil(count / images_of(args)))


def resolved(
    args: PurifyConfig, model: nn.Module, count: int | None, mixes: bool = False
) -> tuple[PurifyConfig, dict[str, Any]]:
    """Settle the options of `BY_RULE`, and those that the method says something of, that are still None.

    Args:
        args: As given; not changed.
        model: The network.
        count: Images in the retain set; None where that is not known.
        mixes: Whether the method's loss fits CutMix.

    Returns:
        A copy with all of them settled, and for print and manifest ``rule``, ``measured_in`` and the ``options`` that it
        settled; empty where nothing was left to it.

    Raises:
        ValueError: Another optimizer than the rule's is given without its learning rate, or arguments without the optimizer
            that they are for.
    """
    rule = rule_of(model)
    names = dict.fromkeys([*BY_RULE, *args.by_network.get(rule.name, {})])
    left = [name for name in names if getattr(args, name) is None]
    if not left:
        return args, {}
    args = copy.copy(args)
    row = rule.options(args, model, count)
    if args.optim is None and args.optim_args is not None:
        raise ValueError(
            f"optim_args={args.optim_args!r} is for one optimizer, and the network's rule may name another: give optim"
        )
    if args.optim is not None and args.optim != row["optim"]:
        if args.learning_rate is None:
            raise ValueError(
                f"the rule for a network with {rule.name} has a learning rate for {row['optim']}: give learning_rate too with "
                f"optim={plain(args.optim)}"
            )
        row["optim_args"] = SGD_ARGUMENTS if args.optim == OptimizerNames.SGD else None
    if not mixes:
        args.cutmix, left = args.cutmix or 0.0, [name for name in left if name != "cutmix"]
    for name in left:
        if name in row:
            setattr(args, name, row[name])
    args.optim = OptimizerNames(args.optim)
    if args.num_train_epochs is None:
        args.num_train_epochs = _epochs(args, rule, count or 1)
    if args.warmup_steps is None:
        args.warmup_steps = int(rule.warmup * updates_of(args, count or 1))  # none in a run of two or three updates
    options = {name: plain(getattr(args, name)) for name in left if getattr(args, name) is not None}
    said = {"rule": rule.name, "measured_in": rule.measured, "options": options}
    return args, said if options else {}
