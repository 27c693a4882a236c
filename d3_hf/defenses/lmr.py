"""LMR, Logit-Margin Repulsion: locate the backdoor's class, repel the other classes' images from it, cut what fed it.

Yang, Xu, Zhong, Pi, Huang, Ruan: "Logit-Margin Repulsion for Backdoor Defense", CVPR 2026. Written from published notes on the
paper, not from its text or code. With z the logits, c the backdoor's class and (.)_+ the positive part:

1. Locate: a copy of the victim ascends the cross-entropy of clean images; c is the class that clean images lean towards.
2. Repel: the victim minimises, until images of c are answered no better than by chance or the passes are used up,

       L = [y != c] (CE + alpha (z_c - max_{j != c} z_j + m1)_+ + beta (max_{j != y} z_j - z_y + m2)_+)

3. Restore: of the head's D input columns the p D whose weight for c changed most in step 2, s_j = |W1_cj - W0_cj|, become zero
   and stay so; fine-tuning on all images with the cross-entropy brings c back.

What the notes leave open, and what is this project's:

- c is read along the ascent; the paper takes the class of the largest mean log-probability once accuracy is at chance. Each
  step votes for the class of the largest mean log-probability over its batch, and c has the most votes of all steps up to the
  first whose batch is at ``unlearn_accuracy``. On a pretrained ViT the backdoor's class led the first steps and another one
  those at chance. A vote counts the same whatever the size of the logits, which grow without bound. It is a guess still: the
  published NAD network leaned to its target at every step, small ViTs whose backdoor worked on every image leaned elsewhere, by
  this statistic and by others, and a network without a backdoor leans to one class as steadily. The manifest holds the whole
  path; ``target_label`` names c if it is known.
- The third term leaves images of c out; the notes have it for all, and it would hold c while step 2 waits for c to go.
- The columns are pruned whole, for all classes: where a trigger raises z_c by a feature it lowers the others' logits by it, and
  the row of c is half of the difference.

Cost: one forward and backward pass per step of the ascent and per update of steps 2 and 3, one forward pass over the images of
c per epoch of step 2 and two over the retain set; memory for three models. Assumes a few clean images, of class c too. It works
on every network whose head is a linear layer, whatever its normalisation; the ascent and step 2 use the optimizer that the
configuration names. With a wrong c what is left is fine-tuning. A backdoor with several targets (all-to-all) is out of reach,
and what is located then is any class.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from ..labels import label_names_of
from ..training.config import PurifyConfig
from ..training.trainer import PurifyTrainer
from .shared.apart import trainer_apart
from .shared.selection import select_weights
from .shared.staged import StagedTrainer, check_functional
from .shared.unlearning import ascent, unlearned_level

# The paper's; its results hold for alpha from 0.5 to 3 and beta from 0.1 to 1.
ALPHA, BETA, M2 = 1.0, 0.25, 0.5


# The mathematics -------------------------------------------------------------------------------------------------------


def most_voted(means: Tensor) -> int:
    """The class that leads most steps of an ascent; of several that of the larger sum of means.

    Args:
        means: Mean log-probability of each class at each step, (steps, C).
    """
    votes = means.argmax(1).bincount(minlength=means.shape[1])
    return int(means.sum(0).masked_fill(votes < votes.max(), -torch.inf).argmax())


def margin_over_rest(logits: Tensor, classes: Tensor) -> Tensor:
    """``z_k - max_{j != k} z_j`` of logits (B, C) and a class k for each, int64 (B,): (B,), negative where k does not win."""
    chosen = classes[:, None]
    return logits.gather(1, chosen)[:, 0] - logits.scatter(1, chosen, -torch.inf).amax(1)


def repelled(cross_entropy: Tensor, logits: Tensor, labels: Tensor, target: int, margin: float) -> Tensor:
    """The loss of step 2 for each image.

    Args:
        cross_entropy: Of each image, (B,).
        logits: float32 (B, C).
        labels: int64 (B,).
        target: The class c.
        margin: m1.

    Returns:
        (B,); 0 for images of c.
    """
    away = F.relu(margin_over_rest(logits, torch.full_like(labels, target)) + margin)
    unsure = F.relu(M2 - margin_over_rest(logits, labels))
    return (labels != target) * (cross_entropy + ALPHA * away + BETA * unsure)


def most_changed(before: Tensor, after: Tensor, share: float) -> Tensor:
    """Numbers, ascending, of the ``floor(share D)`` entries, at least one, in which two vectors (D,) differ most: int64."""
    count = max(1, int(share * len(before)))
    return (after - before).abs().topk(count).indices.sort().values


# Step 2 ----------------------------------------------------------------------------------------------------------------


class Repulsion(PurifyTrainer):
    """Trainer of step 2.

    Attributes:
        target: c, set before it trains.
    """

    method = "LMR, step 2"
    target: int

    def clean_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """As the base class; keeps the logits for `sample_loss`."""
        self._batch = outputs.logits.float(), labels
        return super().clean_loss(outputs, labels, num_items_in_batch)

    def sample_loss(self, cross_entropy: Tensor) -> Tensor:
        """The loss of step 2."""
        logits, labels = self._batch
        return repelled(cross_entropy, logits, labels, self.target, self.args.repulsion_margin)


class StopWhen(TrainerCallback):
    """Ends a training with the first epoch after which something is reached."""

    def __init__(self, is_reached: Callable[[], bool]):
        self.is_reached = is_reached

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop |= self.is_reached()


# The trainer -----------------------------------------------------------------------------------------------------------


@dataclass
class LMRConfig(PurifyConfig):
    """Arguments of LMR; steps 2 and 3 share optimizer, learning rate and schedule.

    Args:
        unlearn_learning_rate: Of the ascent, > 0, with the optimizer that ``optim`` names and no weight decay. None: a tenth of
            ``learning_rate`` (here): with few steps there are few votes.
        unlearn_epochs: At most so many passes of the ascent, >= 1; 100 (here).
        unlearn_accuracy: The ascent ends with a batch whose accuracy is at most this, in [0, 1), or that of always answering
            the most frequent class; 0.2 (RNP's).
        target_label: c, the number of a class of the model, >= 0; None: step 1 locates it.
        repulsion_margin: m1 >= 0, by which c must stay below the best other class, in logits; 3 (paper; up to 10 in its
            ablation, where ASR falls with it).
        repulsion_epochs: At most so many passes of step 2, >= 1. None: ``num_train_epochs``, those of step 3 (here; the paper's
            two numbers are not known).
        prune_share: p in (0, 1), share of the head's input columns; 0.1 (another implementation's; the paper's is not known).

    Raises:
        ValueError: fp16 or activation checkpointing is asked for; see `PurifyConfig`.
    """

    output_dir: str | None = field(default="outputs/lmr", metadata={"help": "Folder for the purified model."})
    unlearn_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the unlearning; default a tenth of learning_rate.", "range": "> 0 and finite"},
    )
    unlearn_epochs: int = field(default=100, metadata={"help": "Largest number of passes of the unlearning.", "range": ">= 1"})
    unlearn_accuracy: float = field(
        default=0.2, metadata={"help": "Accuracy at which the unlearning stops.", "range": "in [0, 1)"}
    )
    target_label: int | None = field(
        default=None, metadata={"help": "Number of the backdoor's class, where it is known.", "range": ">= 0 and finite"}
    )
    repulsion_margin: float = field(
        default=3.0, metadata={"help": "m1: by how much its logit must stay below the best.", "range": ">= 0 and finite"}
    )
    repulsion_epochs: int | None = field(
        default=None,
        metadata={"help": "Largest number of passes of the repulsion; default num_train_epochs.", "range": ">= 1"},
    )
    prune_share: float = field(
        default=0.1, metadata={"help": "p: share of the head's inputs that are cut.", "range": "in (0, 1)"}
    )

    def __post_init__(self):
        check_functional(self)
        super().__post_init__()


class LMRTrainer(StagedTrainer):
    """Trainer of LMR; see `PurifyTrainer` for the arguments and the module's text for the steps.

    The ascent takes 80 % of the retain set, the other steps all of it: no accuracy in the manifest is one of held-out images.

    Raises:
        ValueError: The head is not found or no ``nn.Linear`` (see also `select_weights`); ``target_label`` is no class of the
            model.
        RuntimeError: The clean task is not unlearned within ``unlearn_epochs``; no retain image is of the class; after a
            training, when no weight has changed.
        FloatingPointError: Ascent, repulsion or fine-tuning diverged.
    """

    method = "LMR"
    paper = "https://openaccess.thecvf.com/content/CVPR2026/html/Yang_Logit-Margin_Repulsion_for_Backdoor_Defense_CVPR_2026_paper.html"
    found_as = "repulsion"

    def prepare(self) -> None:
        """Find the head, and make the copy that step 2 trains."""
        super().prepare()
        (self.head,) = select_weights(self.model, "head", self.preprocessing.size)
        kind = type(self.model.get_submodule(self.head.name.removesuffix(".weight")))
        if not issubclass(kind, nn.Linear):
            raise ValueError(
                f"LMR prunes the inputs of a linear head; that of {type(self.model).__name__} is a {kind.__name__}"
            )
        self.classes, given = label_names_of(self.model.config), self.args.target_label
        if given is not None and given >= len(self.classes):
            raise ValueError(f"target_label must be a class of the model, 0 to {len(self.classes) - 1}; got {given}")
        self.repelling = copy.deepcopy(self.model)  # here, before the model is wrapped

    @property
    def weight(self) -> Tensor:
        """The head's weight (C, D), detached, sharing memory with the model."""
        return self.head.parameter.detach()

    # Steps 1 and 2, and the cut ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Locate, repel, prune."""
        everything = list(range(len(self.train_dataset)))
        before, head = self.accuracy(everything), self.weight.clone()
        target, how = self.locate() if self.args.target_label is None else (self.args.target_label, {})
        found = {"class": target, "class_name": self.classes[target], "located": how} | self.repel(target)
        columns = most_changed(head[target], self.weight[target], self.args.prune_share)
        self.found = found | {"pruned": self.agree(columns).tolist(), "inputs": head.shape[1]}
        self._hold()
        self.found |= {"retain_accuracy_before": before, "retain_accuracy_after": self.accuracy(everything)}

    def locate(self) -> tuple[int, dict[str, Any]]:
        """The class that the ascent leans to; and its steps, the accuracy of the last one's batch, the level, and the leading
        classes in the order of the steps with the number of steps that each led.

        Raises:
            RuntimeError: The accuracy of no batch fell to the level.
        """
        level, path, accuracy = unlearned_level(self), [], 1.0
        for logits, labels, _ in ascent(self, self._ascending_optimizer):
            path.append(logits.log_softmax(1).mean(0))
            accuracy = (logits.argmax(1) == labels).float().mean().item()
            if accuracy <= level:
                break
        else:
            raise RuntimeError(
                f"LMR could not unlearn the clean task: accuracy {accuracy:.3f} > {level:.3f} after {self.args.unlearn_epochs} "
                "epochs; raise unlearn_epochs or unlearn_learning_rate, or give target_label"
            )
        means = torch.stack(path)
        target = self.agree(torch.tensor(most_voted(means), device=self.args.device)).item()
        leaders = [[leader, len(list(steps))] for leader, steps in groupby(means.argmax(1).tolist())]
        return target, {"leaders": leaders, "steps": len(path), "accuracy": accuracy, "level": level}

    def _ascending_optimizer(self, tensors: list[Tensor]) -> torch.optim.Optimizer:
        kind, options = self.get_optimizer_cls_and_kwargs(self.args)
        rate = self.args.unlearn_learning_rate or self.args.learning_rate / 10
        return kind([{"params": tensors, "weight_decay": 0.0}], **options | {"lr": rate})

    def repel(self, target: int) -> dict[str, Any]:
        """Step 2: train the copy, move the model to it, and say what became of the class.

        Raises:
            RuntimeError: No retain image is of the class.
        """
        labels = torch.cat([batch["labels"] for batch in self.images_at(list(range(len(self.train_dataset))))])
        rows = (labels == target).nonzero()[:, 0].tolist()
        if not rows:
            raise RuntimeError(
                f"LMR: no retain image is of class {target} ({self.classes[target]}), which could not be restored: add some"
            )
        self.repelling.load_state_dict(self.model.state_dict())
        kept = [self.accuracy(rows)]

        def is_forgotten() -> bool:
            tensors = dict(self.repelling.named_parameters()) | dict(self.repelling.named_buffers())
            accuracy = torch.tensor(self.accuracy(rows, tensors), dtype=torch.float64, device=self.args.device)
            kept.append(self.agree(accuracy).item())  # each process has BatchNorm statistics of its own
            return kept[-1] <= 1 / len(self.classes)

        epochs = self.args.repulsion_epochs or self.args.num_train_epochs
        with trainer_apart(self, Repulsion, self.repelling, epochs) as repulsion:
            repulsion.target = target
            repulsion.add_callback(StopWhen(is_forgotten))
            repulsion.train()
        self.model.load_state_dict(self.agree(self.repelling.state_dict()))
        return {"class_accuracy_before": kept[0], "class_accuracy_repelled": kept[-1], "repulsion_epochs": len(kept) - 1}

    def _hold(self) -> None:
        self._pruned = torch.tensor(self.found["pruned"], device=self.args.device)
        self.optimizer_step()

    def announce(self, resumed: bool) -> None:
        """Say which class was repelled, and what was pruned."""
        found = self.found
        led = sum(steps for leader, steps in found["located"].get("leaders", []) if leader == found["class"])
        how = f"led {led} of {found['located']['steps']} steps of the unlearning" if led else "as given"
        self.accelerator.print(
            f"LMR repelled class {found['class']} ({found['class_name']}; {how}): its accuracy "
            f"{found['class_accuracy_before']:.3f} -> {found['class_accuracy_repelled']:.3f} in {found['repulsion_epochs']} "
            f"epochs; pruned {len(found['pruned'])} of {found['inputs']} inputs of the head: accuracy on the retain set "
            f"{found['retain_accuracy_before']:.3f} -> {found['retain_accuracy_after']:.3f}"
        )

    # Step 3 ------------------------------------------------------------------------------------------------------------

    def optimizer_step(self) -> None:
        """After the optimizer's step the pruned columns are set to zero again."""
        self.weight.index_fill_(1, self._pruned, 0.0)

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """What was pruned stays so."""
        super().load_resume_state(state)
        self._hold()
