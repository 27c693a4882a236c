"""Relearning: how few poisoned images and steps bring a backdoor back, beside a twin that never had one.

A model is tuned on images of which n carry the trigger and the attacker's label, and its ASR read after s steps: the curve of
n. What the model remembers of its backdoor is what it learns faster than a twin of the same architecture that was never
poisoned, tuned in the same way on the same images in the same order:

    area = 1 / s_max  integral_0^s_max ASR(s) ds,    gap = area(model) - area(twin)
    half-life = the least s with ASR(s) >= (ASR(0) + 1) / 2

by straight lines between the steps that are read. A gap of 0 or below shows no memory; it does not show that there is none.

Source: the retuning attack of Min et al., "Uncovering, Explaining, and Mitigating the Superficial Safety of Backdoor Defense"
(NeurIPS 2024): 1,000 images, 5 of them triggered, SGD at 0.01 with momentum 0.9, no decay, batches of 128, 40 steps. The grid
around it, area and half-life are this project's. Differs: images are not augmented (theirs carry one fixed draw of it), and
which are poisoned is drawn as for victims, those of the target class among them. Written from published notes.

Cost: for each n and seed as many steps as the largest number, of 128 images forward and backward, and a measurement for each
number: by default 9 curves of 80 steps, ten passes over 1,000 images each.
"""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.integrate import trapezoid
from transformers import PreTrainedModel, TrainerCallback

from ..attacks import Attack, poison
from ..data.images import RawImages
from ..data.preprocessing import Preprocessing
from ..defenses.fine_tuning import FineTuningConfig, FineTuningTrainer
from ..evaluation.measure import measure
from ..models.computed import refuse_hooked
from ..models.source import preprocessing_of

POISONED, STEPS, SEEDS = (1, 5, 20), (5, 10, 20, 40, 80), (0, 1, 2)
RETUNING: dict[str, Any] = {
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "num_train_epochs": 1,  # max_steps decides
    "per_device_train_batch_size": 128,
    "cutmix": 0.0,
    "crop_padding": 0,  # a crop would cut a trigger off
    "logging_strategy": "no",
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Curve:
    """What one run of retuning came to.

    Args:
        poisoned: Images that carried the trigger.
        seed: Of their choice and of the order of all.
        steps: After how many steps it was measured, from 0 on.
        asr: ASR then, in [0, 1].
        accuracy: ACC then, in [0, 1].
    """

    poisoned: int
    seed: int
    steps: tuple[int, ...]
    asr: tuple[float, ...]
    accuracy: tuple[float, ...]


def area(steps: Sequence[float], rates: Sequence[float]) -> float:
    """Mean rate over the steps, in [0, 1], by trapezoids; ``steps`` rise, and there are two or more."""
    return float(trapezoid(rates, steps) / (steps[-1] - steps[0]))


def half_life(steps: Sequence[float], rates: Sequence[float]) -> float:
    """Steps until the rate is half of the way from where it begins to 1; infinite if it never is.

    Args:
        steps: Rising, from 0 on.
        rates: Then, in [0, 1].
    """
    level = (rates[0] + 1) / 2
    reached = np.flatnonzero(np.asarray(rates) >= level)
    if not len(reached):
        return float("inf")
    last = int(reached[0])
    return float(np.interp(level, rates[max(last - 1, 0) : last + 1], steps[max(last - 1, 0) : last + 1]))


def gaps(curves: Sequence[Curve], twins: Sequence[Curve]) -> dict[int, list[float]]:
    """The area between the curves of a model and of its twin, in [-1, 1]: by number of poisoned images, one for each seed.

    Raises:
        ValueError: The two were not made with the same numbers of images and steps and the same seeds.
    """
    found: dict[int, list[float]] = {}
    if [(c.poisoned, c.seed, c.steps) for c in curves] != [(c.poisoned, c.seed, c.steps) for c in twins]:
        raise ValueError(
            "model and twin were tuned with other images, steps or seeds: make both curves with the same arguments"
        )
    for curve, twin in zip(curves, twins, strict=True):
        found.setdefault(curve.poisoned, []).append(area(curve.steps, curve.asr) - area(twin.steps, twin.asr))
    return found


class _Look(TrainerCallback):
    """Measures ACC and ASR after some of the steps."""

    def __init__(self, trainer: FineTuningTrainer, test: RawImages, attack: Attack, steps: Sequence[int]):
        self.trainer, self.test, self.attack, self.steps = trainer, test, attack, steps
        self.found: list[tuple[float, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            self.found.append(rates_of(self.trainer.plain, self.test, self.trainer.preprocessing, self.attack))


def rates_of(model: PreTrainedModel, test: RawImages, preprocessing: Preprocessing, attack: Attack) -> tuple[float, float]:
    """ASR and ACC, in [0, 1]."""
    found = measure(model, test, preprocessing, attack, progress=False)
    return found.asr.value, found.accuracy.value


def relearn(
    model: PreTrainedModel,
    attack: Attack,
    images: RawImages,
    test: RawImages,
    poisoned: Sequence[int] = POISONED,
    steps: Sequence[int] = STEPS,
    seeds: Sequence[int] = SEEDS,
    **options: Any,
) -> list[Curve]:
    """Tune copies of a model on images with few triggers among them, all of its weights, and watch the ASR.

    Args:
        model: A classifier of `load_classifier`, purified or a twin; not changed, copies are.
        attack: The trigger, learned if it has to be, and its rule for labels.
        images: To tune on, without triggers; 1,000 in the paper. Images that neither the model nor ``test`` has seen.
        test: To measure on, without triggers.
        poisoned: How many of ``images`` are to carry the trigger; a curve for each.
        steps: After how many steps to measure, rising, at least 1.
        seeds: A curve for each; the choice of images at one seed holds that of fewer.
        options: Of `FineTuningConfig`, in place of `RETUNING`: for a vision transformer ``optim="adamw_torch"``,
            ``optim_args=None`` and the learning rate of its purification.

    Returns:
        A curve for each number of poisoned images and each seed, in this order. The first point, at 0 steps, is the model's.

    Raises:
        ValueError: ``steps`` do not rise from 1 or more; a weight is computed by a hook, so that the model cannot be copied;
            see `poison`, `measure` and `FineTuningTrainer`.
        FloatingPointError: The tuning diverged.
    """
    if list(steps) != sorted(set(steps)) or not steps or steps[0] < 1:
        raise ValueError(f"steps must rise and be at least 1; got {list(steps)}")
    refuse_hooked(model)
    start, curves = rates_of(model, test, preprocessing_of(model), attack), []
    for count in poisoned:
        for seed in seeds:
            mixed, _ = poison(images, attack, count / len(images), seed)
            with tempfile.TemporaryDirectory() as folder:
                args = FineTuningConfig(folder, seed=seed, max_steps=steps[-1], **(RETUNING | options))
                trainer = FineTuningTrainer(copy.deepcopy(model).requires_grad_(True), args, mixed)
                look = _Look(trainer, test, attack, steps)
                trainer.add_callback(look)
                trainer.train()
            asr, accuracy = zip(start, *look.found, strict=True)
            curves.append(Curve(count, seed, (0, *steps), asr, accuracy))
    return curves
