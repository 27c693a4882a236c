"""Ratios that should stay small: D3's step against plain fine-tuning's, and the loader against the training step.

    OMP_WAIT_POLICY=passive python recipes/bench_speed.py --steps 60

One process, alternating, medians. The network is the CIFAR ResNet-20 with its head selected, batch 128, random images.
"""

import sys
import time
from dataclasses import dataclass, field
from statistics import median

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from d3_hf.arguments import Parser
from d3_hf.augmentation import Augmentation
from d3_hf.cli import run
from d3_hf.data import RawImages, TrainingImages
from d3_hf.defenses.d3 import D3Config, D3Trainer
from d3_hf.defenses.fine_tuning import FineTuningConfig, FineTuningTrainer
from d3_hf.models import new_model
from d3_hf.preprocessing import Preprocessing

BATCH, CLASSES = 128, 10


@dataclass
class BenchArguments:
    """How long to measure.

    Args:
        steps: Steps per round.
        rounds: Rounds, alternating between the trainers.
        architecture: Network to train.
    """

    steps: int = field(default=60, metadata={"help": "Steps per round."})
    rounds: int = field(default=5, metadata={"help": "Alternating rounds."})
    architecture: str = field(default="resnet20_cifar", metadata={"help": "Network to train."})


class StepTimes(TrainerCallback):
    """Seconds of each step, from its beginning to its end."""

    def __init__(self):
        self.seconds, self._start = [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


def random_images(count: int) -> RawImages:
    """Noise with labels."""
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    return RawImages(pixels, torch.arange(count) % CLASSES, [str(c) for c in range(CLASSES)])


def step_seconds(trainer_class, config_class, bench: BenchArguments, images: RawImages) -> list[float]:
    """Train one round and return the seconds of its steps, the first ones left out."""
    model = new_model(images.class_names, bench.architecture, [0.5] * 3, [0.5] * 3, 32)
    args = config_class(output_dir="outputs/bench", max_steps=bench.steps, disable_tqdm=True, logging_steps=10**6)
    times = StepTimes()
    trainer_class(model=model, args=args, train_dataset=images, callbacks=[times]).train()
    return times.seconds[5:]


def loader_images_per_second(images: RawImages, seconds: float = 2.0) -> float:
    """Images per second out of the augmenting loader in this process, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = new_model(images.class_names, "resnet20_cifar", [0.5] * 3, [0.5] * 3, 32)
    preprocessing = Preprocessing.from_processor(model.image_processor)
    data = TrainingImages.from_raw(images, preprocessing, Augmentation(4, True, 0))
    loader = DataLoader(data, BATCH, shuffle=True, collate_fn=TrainingImages.collate)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        count += sum(len(preprocessing.normalize(batch["pixel_values"])) for batch in loader)
    rate = count / (time.perf_counter() - start)
    torch.set_num_threads(threads)
    return rate


def main(argv: list[str]) -> None:
    """Measure and print the ratios."""
    (bench,) = Parser([BenchArguments]).read(argv)
    images = random_images(2500)
    kinds = {"FT": (FineTuningTrainer, FineTuningConfig), "D3": (D3Trainer, D3Config)}
    rounds = {name: [] for name in kinds}
    for _ in range(bench.rounds):
        for name, (trainer_class, config_class) in kinds.items():
            rounds[name].append(median(step_seconds(trainer_class, config_class, bench, images)))
    ratios = [d3 / ft for d3, ft in zip(rounds["D3"], rounds["FT"], strict=True)]
    print(f"FT {1000 * median(rounds['FT']):.2f} ms, D3 {1000 * median(rounds['D3']):.2f} ms per step of {BATCH} images")
    print(f"D3 / FT: {median(ratios):.4f} (median of {bench.rounds} rounds, {min(ratios):.4f}..{max(ratios):.4f})")
    loader = loader_images_per_second(images)
    print(
        f"loader {loader:.0f} images/s on one core, {loader * median(rounds['FT']) / BATCH:.0f} times the training step's need"
    )


if __name__ == "__main__":
    run(main, sys.argv[1:])
