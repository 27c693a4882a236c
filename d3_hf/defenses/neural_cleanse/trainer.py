"""Neural Cleanse: reverse-engineer a trigger for every class, flag the classes that need an oddly small one, unlearn it.

Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao: "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks",
IEEE S&P 2019. Three stages:

1. For each class the smallest mask (h, w) with a pattern (3, h, w) of pixels that turns images into it: the search, and its
   formula, is that of `d3_hf.assurance.inversion`, which the signal `trigger_inversion` uses too.
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
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ...assurance.inversion import Schedule, random_start, reverse_trigger, split_rows, stamp, stamped_logits
from ...labels import label_names_of
from ...training.config import PurifyConfig
from ...training.trainer import PurifyTrainer
from .flags import Findings, anomaly_indices, flag

logger = logging.getLogger(__name__)

TRIGGERS = "reversed_triggers.safetensors"
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
        ValueError: fp16 is on; see `PurifyConfig`.
    """

    output_dir: str | None = field(default="outputs/neural_cleanse", metadata={"help": "Folder for the purified model."})
    inversion_epochs: int = field(
        default=Schedule.epochs, metadata={"help": "Most passes over the images per class.", "range": ">= 1"}
    )
    inversion_learning_rate: float = field(
        default=Schedule.learning_rate, metadata={"help": "Learning rate of mask and pattern.", "range": "> 0 and finite"}
    )
    initial_cost: float = field(
        default=Schedule.initial_cost,
        metadata={"help": "Weight of the mask's L1 norm at the start.", "range": "> 0 and finite"},
    )
    success_threshold: float = field(
        default=Schedule.success_threshold, metadata={"help": "Share of images that a trigger must turn.", "range": "in (0, 1]"}
    )
    cost_patience: int = field(
        default=Schedule.cost_patience, metadata={"help": "Epochs in a row before the cost changes.", "range": ">= 1"}
    )
    stop_patience: int = field(
        default=Schedule.stop_patience,
        metadata={"help": "Epochs without a smaller mask before a class is done.", "range": ">= 1"},
    )
    anomaly_threshold: float = field(
        default=2.0, metadata={"help": "Anomaly index above which a class is flagged.", "range": "> 0 and finite"}
    )
    unlearning_ratio: float = field(
        default=0.2, metadata={"help": "Probability that an image carries the trigger.", "range": "in (0, 1]"}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.fp16:
            raise ValueError("fp16 rounds the gradient of the mask to zero; use bf16 or float32")


class NeuralCleanseTrainer(PurifyTrainer):
    """Trainer of Neural Cleanse; see `PurifyTrainer` for the arguments and the module's text for the stages.

    The final folder holds the reversed triggers of the flagged classes. The log's ``loss`` and ``clean_loss`` are over all
    images of a batch, with and without a trigger.

    Attributes:
        findings: What stages 1 and 2 found; ``None`` before `train`.

    Raises:
        ValueError: The model has fewer than three classes, or there are fewer than five images.
        RuntimeError: After training, when no weight has changed.
    """

    paper = "https://doi.org/10.1109/SP.2019.00031"
    findings: Findings | None = None

    @property
    def method(self) -> str:
        """Neural Cleanse, with what it came to where no class was flagged."""
        nothing_flagged = self.findings is not None and not len(self.findings.flagged)
        return "Neural Cleanse (no class flagged: plain fine-tuning)" if nothing_flagged else "Neural Cleanse"

    def prepare(self) -> None:
        """Refuse what cannot be compared."""
        if self.model.config.num_labels < FEWEST_CLASSES:
            raise ValueError(f"Neural Cleanse compares classes: of {self.model.config.num_labels} norms none can be anomalous")
        if self.train_dataset is not None and len(self.train_dataset) < FEWEST_IMAGES:
            raise ValueError(f"Neural Cleanse needs {FEWEST_IMAGES} images to fit and to check a trigger on")

    # Stages 1 and 2 ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Reverse the triggers and flag."""
        self._keep(self.find_triggers())

    def _keep(self, found: Findings) -> None:
        masks, patterns = found.masks.to(self.args.device), found.patterns.to(self.args.device)
        self.findings = replace(found, masks=masks, patterns=patterns)

    def announce(self, resumed: bool) -> None:
        """Say which classes are flagged."""
        indices = anomaly_indices(self.findings.norms).tolist()
        classes = label_names_of(self.model.config)
        names = [f"{classes[c]} (anomaly index {indices[c]:.2f})" for c in self.findings.flagged.tolist()]
        if names:
            self.accelerator.print(f"Neural Cleanse unlearns the triggers of {', '.join(names)}")
        elif self.is_world_process_zero():
            logger.warning(
                "Neural Cleanse flags no class (largest anomaly index %.2f): there is no trigger to unlearn, the model is only "
                "fine-tuned",
                max(indices),
            )

    def find_triggers(self) -> Findings:
        """Reverse a trigger for every class, each process some of them, and flag the anomalous ones."""
        args, device, size = self.args, self.args.device, self.preprocessing.size
        schedule = Schedule(
            epochs=args.inversion_epochs,
            learning_rate=args.inversion_learning_rate,
            initial_cost=args.initial_cost,
            success_threshold=args.success_threshold,
            cost_patience=args.cost_patience,
            stop_patience=args.stop_patience,
        )
        fit, validate = (list(self.retain_batches("Reading images", batches=batches)) for batches in self._split())
        triggers = torch.zeros((self.model.config.num_labels, 4, *size), device=device)
        reached = torch.zeros(len(triggers), device=device)
        self.model.eval()
        mine = range(args.process_index, len(triggers), args.world_size)
        for target in tqdm(mine, "Reversing triggers", unit="class", disable=args.disable_tqdm):
            start = random_start(size, target, args.seed).to(device)
            triggers[target], reached[target] = reverse_trigger(self._attack, fit, validate, target, start, schedule)
        triggers, reached = (self.accelerator.reduce(found, "sum").cpu() for found in (triggers, reached))
        return flag(triggers, reached > 0, args.anomaly_threshold)

    def _split(self) -> tuple[list[list[int]], list[list[int]]]:
        """The rows of each batch: 80 % of the images to fit triggers to, 20 % to measure their success on."""
        fit, held_out = split_rows(len(self.train_dataset), self.args.seed)
        return (
            _in_batches(fit, self.args.per_device_train_batch_size),
            _in_batches(held_out, self.args.per_device_eval_batch_size),
        )

    def _attack(self, batch: dict[str, Tensor], mask: Tensor, pattern: Tensor) -> Tensor:
        return stamped_logits(self.model, self.preprocessing, batch["pixel_values"], mask, pattern)

    # Stage 3 -----------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """While training some images carry a reversed trigger; their labels stay."""
        if self.in_training_step and len(self.findings.flagged):
            inputs = {**inputs, "pixel_values": self._with_triggers(inputs["pixel_values"])}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _with_triggers(self, pixel_values: Tensor) -> Tensor:
        """Draw, by seed, step and process, which images carry which trigger, and stamp them."""
        generator = np.random.default_rng([self.args.seed, self.batch_number, self.args.process_index])
        carries = torch.from_numpy(generator.random(len(pixel_values)) < self.args.unlearning_ratio)
        which = torch.from_numpy(generator.integers(len(self.findings.flagged), size=len(pixel_values)))
        carries, which = carries.to(pixel_values.device), which.to(pixel_values.device)
        masks = self.findings.masks[which] * carries[:, None, None, None]
        return stamp(pixel_values, masks, self.preprocessing.normalize(255 * self.findings.patterns[which]))

    # What the manifest, the folder and a checkpoint hold ---------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Adds the norm and the anomaly index (null: infinite) of every class, the flagged classes and what was done."""
        facts, found = super().facts(), self.findings
        if found is None:
            return facts
        if not self.is_writing_checkpoint:
            facts["triggers_file"] = TRIGGERS
        flagged = found.flagged.tolist()
        return facts | {
            "outcome": "reversed triggers unlearned" if flagged else "no class flagged: plain fine-tuning",
            "flagged_classes": flagged,
            "mask_l1": found.norms.tolist(),
            "anomaly_index": [index if math.isfinite(index) else None for index in anomaly_indices(found.norms).tolist()],
            "trigger_works": found.reached.tolist(),
        }

    def write_files(self, folder: Path, state_dict: dict | None = None) -> None:
        """Adds the reversed triggers to the final folder."""
        super().write_files(folder, state_dict)
        if self.findings is not None and not self.is_writing_checkpoint:
            save_file(vars(self.findings), folder / TRIGGERS)

    def resume_state(self) -> dict[str, Any]:
        """Adds the findings."""
        return super().resume_state() | vars(self.findings)

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Goes on with those findings."""
        super().load_resume_state(state)
        self._keep(Findings(**{f.name: state[f.name] for f in fields(Findings)}))


def _in_batches(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
