"""Neural Cleanse: reverse-engineer a trigger for every class, flag the classes that need an oddly small one, unlearn it.

Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao: "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks",
IEEE S&P 2019. Three stages:

1. For each class t a mask m (h, w) and a pattern p (3, h, w), both in (0, 1) by (tanh + 1) / 2, on pixels in [0, 1]:
       min_{m, p}  mean_x CE(f((1 - m) x + m p), t) + cost ||m||_1
   by Adam. The cost adapts: it is doubled after ``cost_patience`` epochs in a row in which the share of images taken for t is
   at least ``success_threshold``, and divided by 2^1.5 after as many below it. The smallest mask that reached the threshold
   is kept.
2. The anomaly index of class t is ``|L_t - median(L)| / (1.4826 median|L - median(L)|)`` for the L1 norms L of the masks. A
   class is flagged if its index is above ``anomaly_threshold``, its norm below the median and its trigger works.
3. Fine-tuning in which each image carries, with probability ``unlearning_ratio``, the trigger of a flagged class, drawn evenly,
   and keeps its true label.

If no class is flagged there is nothing to unlearn. BackdoorBench then returns the model unchanged; here stage 3 becomes plain
fine-tuning, and a warning, the method's name in the card and ``outcome`` in the manifest say so: an unchanged model must not
pass for a defended one, and leaving the victim out of a table would flatter the method.

Data: success, which steers the cost, the choice of the mask and the early stop, is measured on 20 % of the retain images,
drawn by the seed; the mask is fitted to the other 80 %, unaugmented. Stage 3 uses all. The defender owns a few labelled images
without triggers. It works on every network, but needs three classes or more: of two norms none is anomalous.

Cost: stage 1 takes, per class and epoch, a forward and a backward pass (to the pixels only) over 80 % of the images and a
forward pass over the rest. With C classes it is up to C * ``inversion_epochs`` passes over the retain set (800 for CIFAR-10)
where stage 3 takes ``num_train_epochs`` (15). Several processes share the classes among them.

What differs from BackdoorBench's code: success is measured on images that the mask was not fitted to, and the images that
carry the trigger are drawn anew for every batch instead of once.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from ..data.training_images import without_augmentation
from ..training import reference
from ..training.config import PurifyConfig, check_options
from ..training.trainer import PurifyTrainer
from .shared.staged import VALIDATION_SHARE

logger = logging.getLogger(__name__)

TRIGGERS = "reversed_triggers.safetensors"
COST_UP, COST_DOWN = 2.0, 2.0**1.5
ADAM_BETAS = (0.5, 0.9)
LEAST_GAIN = 0.01  # relative: a mask that shrinks by less does not delay the early stop
MAD_TO_SIGMA = 1.4826  # of a normal distribution
FEWEST_IMAGES, FEWEST_CLASSES = 5, 3


@dataclass
class NeuralCleanseConfig(PurifyConfig):
    """Arguments of Neural Cleanse; the schedule of the unlearning is the shared one. Defaults are BackdoorBench's.

    Args:
        inversion_epochs: >= 1, most passes over the images per class. 80.
        inversion_learning_rate: > 0, of Adam with betas 0.5 and 0.9. 0.1.
        initial_cost: > 0, weight of ``||m||_1`` at the start. 1e-3.
        success_threshold: In (0, 1], share of images that a trigger must turn. 0.98.
        cost_patience: >= 1, epochs in a row before the cost changes. 5.
        stop_patience: >= 1, epochs without a mask smaller by 1 % after which a class is done. 25.
        anomaly_threshold: > 0, anomaly index above which a class is flagged. 2 (paper).
        unlearning_ratio: In (0, 1], probability that an image carries the trigger. 0.2 (paper).

    Raises:
        ValueError: A value is out of range; fp16 is on.
    """

    output_dir: str | None = field(default="outputs/neural_cleanse", metadata={"help": "Folder for the purified model."})
    inversion_epochs: int = field(default=80, metadata={"help": "Most passes over the images per class."})
    inversion_learning_rate: float = field(default=0.1, metadata={"help": "Learning rate of mask and pattern."})
    initial_cost: float = field(default=1e-3, metadata={"help": "Weight of the mask's L1 norm at the start."})
    success_threshold: float = field(default=0.98, metadata={"help": "Share of images that a trigger must turn."})
    cost_patience: int = field(default=5, metadata={"help": "Epochs in a row before the cost changes."})
    stop_patience: int = field(default=25, metadata={"help": "Epochs without a smaller mask before a class is done."})
    anomaly_threshold: float = field(default=2.0, metadata={"help": "Anomaly index above which a class is flagged."})
    unlearning_ratio: float = field(default=0.2, metadata={"help": "Probability that an image carries the trigger."})

    def __post_init__(self):
        super().__post_init__()
        check_options(self, ">= 1", "inversion_epochs", "cost_patience", "stop_patience")
        check_options(self, "> 0 and finite", "inversion_learning_rate", "initial_cost", "anomaly_threshold")
        check_options(self, "in (0, 1]", "success_threshold", "unlearning_ratio")
        if self.fp16:
            raise ValueError("fp16 rounds the gradient of the mask to zero; use bf16 or float32")


# The mathematics -------------------------------------------------------------------------------------------------------


def stamp(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """``(1 - m) x + m p``; the same in pixels and, with a normalised pattern, in normalised values."""
    return (1 - mask) * images + mask * pattern


def next_cost(cost: float, streak: int, patience: int) -> tuple[float, int]:
    """Adapt the cost after an epoch.

    Args:
        cost: Weight of the mask's norm.
        streak: Epochs in a row at or above the threshold, or, negative, below it.
        patience: Length of a streak that changes the cost.

    Returns:
        The cost and the streak, which begins anew where the cost changed.
    """
    if abs(streak) < patience:
        return cost, streak
    return (cost * COST_UP if streak > 0 else cost / COST_DOWN), 0


def anomaly_indices(norms: Tensor) -> Tensor:
    """``|L - median| / (1.4826 MAD)`` of L1 norms (C,); where the MAD is 0, infinite off the median."""
    norms = norms.double()
    deviations = (norms - norms.quantile(0.5)).abs()
    indices = deviations / (MAD_TO_SIGMA * deviations.quantile(0.5))
    return indices.where(deviations > 0, 0.0)


def flagged_classes(norms: Tensor, reached: Tensor, threshold: float) -> Tensor:
    """Classes, int64 (F,), whose trigger works (``reached``, bool (C,)) and has an anomalously small norm (``norms``, (C,))."""
    small = norms.double() < norms.double().quantile(0.5)
    return torch.nonzero(small & reached & (anomaly_indices(norms) > threshold)).flatten()


def reverse_trigger(
    attack: Callable[[Any, Tensor, Tensor], Tensor],
    fit: list[Any],
    validate: list[Any],
    target: int,
    raw: Tensor,
    args: NeuralCleanseConfig,
) -> tuple[Tensor, bool]:
    """Find the smallest trigger that turns images into a class.

    Args:
        attack: From a batch, a mask (1, h, w) and a pattern (3, h, w) to the logits (B, C) of the stamped images.
        fit: Batches to fit the trigger to.
        validate: Batches to measure its success on.
        target: The class t.
        raw: Start, (4, h, w): mask and pattern before (tanh + 1) / 2.
        args: The schedule.

    Returns:
        Mask and pattern (4, h, w) in (0, 1), and whether they reached the threshold; if none did, the last ones.
    """
    raw = raw.clone().requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=args.inversion_learning_rate, betas=ADAM_BETAS)
    cost, streak, waited, best, trigger = args.initial_cost, 0, 0, math.inf, None
    for _ in range(args.inversion_epochs):
        for batch in fit:
            squashed = (raw.tanh() + 1) / 2
            logits = attack(batch, squashed[:1], squashed[1:])
            labels = torch.full((len(logits),), target, device=logits.device)
            (raw.grad,) = torch.autograd.grad(F.cross_entropy(logits, labels) + cost * squashed[:1].sum(), raw)
            optimizer.step()
        with torch.no_grad():
            squashed = (raw.tanh() + 1) / 2
            hits = torch.cat([attack(batch, squashed[:1], squashed[1:]).argmax(1) == target for batch in validate])
        success, norm = hits.float().mean().item() >= args.success_threshold, squashed[:1].sum().item()
        waited = 0 if success and norm < (1 - LEAST_GAIN) * best else waited + 1
        if success and norm < best:
            best, trigger = norm, squashed
        if trigger is not None and waited >= args.stop_patience:
            break
        cost, streak = next_cost(cost, max(streak, 0) + 1 if success else min(streak, 0) - 1, args.cost_patience)
    return (squashed, False) if trigger is None else (trigger, True)


# The trainer -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Findings:
    """What stages 1 and 2 found; C classes, F of them flagged.

    Attributes:
        norms: float32 (C,), L1 norms of the masks.
        reached: bool (C,), whose trigger reached the threshold.
        flagged: int64 (F,), the flagged classes.
        masks: float32 (F, 1, h, w) in (0, 1).
        patterns: float32 (F, 3, h, w) in (0, 1), pixels.
    """

    norms: Tensor
    reached: Tensor
    flagged: Tensor
    masks: Tensor
    patterns: Tensor


class NeuralCleanseTrainer(PurifyTrainer):
    """Trainer of Neural Cleanse; see `PurifyTrainer` for the arguments and the module's text for the stages.

    Checkpoints and the final folder hold the reversed triggers of the flagged classes. The log's ``loss`` and ``clean_loss``
    are over all images of a batch, with and without a trigger.

    Attributes:
        findings: What stages 1 and 2 found; ``None`` before `train`.

    Raises:
        ValueError: The model has fewer than three classes, or there are fewer than five images.
        RuntimeError: After training, when no weight has changed.
    """

    method = "Neural Cleanse"
    paper = "https://doi.org/10.1109/SP.2019.00031"

    def __init__(self, model, args: NeuralCleanseConfig, *arguments, **kwargs):
        super().__init__(model, args, *arguments, **kwargs)
        if model.config.num_labels < FEWEST_CLASSES:
            raise ValueError(f"Neural Cleanse compares classes: of {model.config.num_labels} norms none can be anomalous")
        if self.train_dataset is not None and len(self.train_dataset) < FEWEST_IMAGES:
            raise ValueError(f"Neural Cleanse needs {FEWEST_IMAGES} images to fit and to check a trigger on")
        self._start = reference.remembered(model)
        self.findings: Findings | None = None

    # Stages 1 and 2 ----------------------------------------------------------------------------------------------------

    def begin_purification(self, resumed: bool) -> None:
        """Reverse the triggers, unless they came with a checkpoint, and say which classes are flagged."""
        found = self.findings if resumed else self.find_triggers()
        masks, patterns = found.masks.to(self.args.device), found.patterns.to(self.args.device)
        self.findings = replace(found, masks=masks, patterns=patterns)
        indices = anomaly_indices(self.findings.norms).tolist()
        names = [f"{self.model.config.id2label[c]} (anomaly index {indices[c]:.2f})" for c in self.findings.flagged.tolist()]
        self.method = type(self).method
        if names:
            self.accelerator.print(f"Neural Cleanse unlearns the triggers of {', '.join(names)}")
            return
        self.method = "Neural Cleanse (no class flagged: plain fine-tuning)"
        if self.is_world_process_zero():
            logger.warning(
                "Neural Cleanse flags no class (largest anomaly index %.2f): there is no trigger to unlearn, the model is only "
                "fine-tuned",
                max(indices),
            )

    def find_triggers(self) -> Findings:
        """Reverse a trigger for every class, each process some of them, and flag the anomalous ones."""
        device, classes = self.args.device, self.model.config.num_labels
        fit, validate = self._split()
        triggers = torch.zeros((classes, 4, *self.preprocessing.size), device=device)
        reached = torch.zeros(classes, device=device)
        self.model.eval()
        mine = range(self.args.process_index, classes, self.args.world_size)
        for target in tqdm(mine, "Reversing triggers", unit="class", disable=self.args.disable_tqdm):
            triggers[target], reached[target] = reverse_trigger(
                self._attack, fit, validate, target, self._random_start(target).to(device), self.args
            )
        triggers, reached = self.accelerator.reduce(triggers, "sum").cpu(), self.accelerator.reduce(reached, "sum").cpu() > 0
        norms = triggers[:, 0].sum((1, 2))
        flagged = flagged_classes(norms, reached, self.args.anomaly_threshold)
        masks, patterns = triggers[flagged].split([1, 3], dim=1)
        return Findings(norms, reached, flagged, masks.contiguous(), patterns.contiguous())

    def _split(self) -> tuple[list[dict], list[dict]]:
        """The retain images without augmentation as batches: 80 % to fit triggers to, 20 % to measure their success on."""
        images = without_augmentation(self.train_dataset)
        rows = np.random.default_rng(self.args.seed).permutation(len(images)).tolist()
        validation = max(1, round(VALIDATION_SHARE * len(images)))
        return tuple(
            # With a generator of its own, because the loader would draw from the global one.
            list(DataLoader(Subset(images, part), size, collate_fn=self.data_collator, generator=torch.Generator()))
            for part, size in (
                (rows[validation:], self.args.train_batch_size),
                (rows[:validation], self.args.eval_batch_size),
            )
        )

    def _attack(self, batch: dict[str, Tensor], mask: Tensor, pattern: Tensor) -> Tensor:
        pixel_values = self._prepare_inputs(batch)["pixel_values"]
        stamped = stamp(pixel_values, mask, self.preprocessing.normalize(255 * pattern[None])[0])
        return self.model(pixel_values=stamped).logits.float()

    def _random_start(self, target: int) -> Tensor:
        """Mask and pattern uniform in (0, 1) (paper's authors), by seed and class, before (tanh + 1) / 2."""
        seed = int(np.random.SeedSequence([self.args.seed, target]).generate_state(1)[0])
        uniform = torch.rand((4, *self.preprocessing.size), generator=torch.Generator().manual_seed(seed))
        return torch.atanh(0.999 * (2 * uniform - 1))

    # Stage 3 -----------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """While training some images carry a reversed trigger; their labels stay."""
        if self.model.training and len(self.findings.flagged):
            inputs = {**inputs, "pixel_values": self._with_triggers(inputs["pixel_values"])}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _with_triggers(self, pixel_values: Tensor) -> Tensor:
        """Draw, by seed, step and process, which images carry which trigger, and stamp them."""
        generator = np.random.default_rng([self.args.seed, self.state.global_step, self.args.process_index])
        carries = torch.from_numpy(generator.random(len(pixel_values)) < self.args.unlearning_ratio)
        which = torch.from_numpy(generator.integers(len(self.findings.flagged), size=len(pixel_values)))
        carries, which = carries.to(pixel_values.device), which.to(pixel_values.device)
        masks = self.findings.masks[which] * carries[:, None, None, None]
        return stamp(pixel_values, masks, self.preprocessing.normalize(255 * self.findings.patterns[which]))

    def end_purification(self) -> None:
        """Raise if no weight changed."""
        reference.check_changed(self.model, self._start)

    # What the manifest says, what the checkpoint holds -----------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Adds the norm and the anomaly index (null: infinite) of every class, the flagged classes and what was done."""
        found, facts = self.findings, super().facts()
        if found is None:
            return facts
        flagged = found.flagged.tolist()
        return facts | {
            "outcome": "reversed triggers unlearned" if flagged else "no class flagged: plain fine-tuning",
            "flagged_classes": flagged,
            "mask_l1": found.norms.tolist(),
            "anomaly_index": [index if math.isfinite(index) else None for index in anomaly_indices(found.norms).tolist()],
            "trigger_works": found.reached.tolist(),
            "triggers_file": TRIGGERS,
        }

    def write_files(self, folder: Path, state_dict: dict | None = None) -> None:
        """Adds the reversed triggers."""
        super().write_files(folder, state_dict)
        if self.findings is not None:
            save_file(vars(self.findings), folder / TRIGGERS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.findings = Findings(**load_file(Path(resume_from_checkpoint) / TRIGGERS))
