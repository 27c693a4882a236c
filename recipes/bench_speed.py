"""Ratios that should stay small: D3's step and memory against plain fine-tuning's, measuring, the loader against the step.

    OMP_WAIT_POLICY=passive python recipes/bench_speed.py --steps 60

One process, alternating, medians. The network is the CIFAR ResNet-20 with its head selected, batch 128, random images. For the
active set, all linear weights and the distance of features it is a ViT of 6 layers and width 192, batch 64, images 32x32 in
patches of 4, with a learning rate at which next to nothing moves and epsilon where a fifth of the images is above it.
"""

import copy
import sys
import time
from dataclasses import dataclass, field
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from d3_hf.attacks import BadNets
from d3_hf.benchmark.meters import peak_memory, reset_peak_memory
from d3_hf.cli import run
from d3_hf.data.augmentation import Augmentation
from d3_hf.data.images import RawImages
from d3_hf.data.preprocessing import Preprocessing
from d3_hf.data.training_images import TrainingImages
from d3_hf.defenses.d3.trainer import D3Config, D3Trainer
from d3_hf.defenses.fine_tuning import FineTuningConfig, FineTuningTrainer
from d3_hf.evaluation.measure import measure
from d3_hf.models import new_model
from d3_hf.options.parser import Parser

BATCH, CLASSES = 128, 10
VIT = dict(hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=768, patch_size=4)
ACTIVE = 0.2  # share of the images above epsilon
# What is compared with fine-tuning on the ViT.
ON_VIT = {
    "D3 active": {"active_set": True},
    "D3 dense": {"active_set": False},
    "D3 all-linear": {"active_set": False, "target_modules": "all-linear"},
    "D3 features": {"active_set": False, "distance": "both"},
}


@dataclass
class BenchArguments:
    """How long to measure.

    Args:
        steps: Steps per round.
        rounds: Rounds, alternating between the trainers.
        architecture: Network to train.
        vit_steps: Steps per round of the ViT's trainers; 0 leaves them out.
    """

    steps: int = field(default=60, metadata={"help": "Steps per round."})
    rounds: int = field(default=5, metadata={"help": "Alternating rounds."})
    architecture: str = field(default="resnet20_cifar", metadata={"help": "Network to train."})
    vit_steps: int = field(default=20, metadata={"help": "Steps per round of the ViT's trainers; 0: leave them out."})


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


def train(trainer_class, config_class, bench: BenchArguments, images: RawImages) -> tuple[list[float], float]:
    """Train one round; the seconds of its steps, the first ones left out, and the peak memory in MiB."""
    model = new_model(images.class_names, bench.architecture, [0.5] * 3, [0.5] * 3, 32)
    common = dict(output_dir="outputs/bench", max_steps=bench.steps, disable_tqdm=True, logging_steps=10**6)
    args = config_class(**common, sam_rho=0.0)  # the distance alone, without what doubles the passes
    times = StepTimes()
    trainer = trainer_class(model=model, args=args, train_dataset=images, callbacks=[times])
    reset_peak_memory()
    trainer.train()
    return times.seconds[5:], peak_memory()


def vit_seconds(bench: BenchArguments, images: RawImages) -> dict[str, list[float]]:
    """Median seconds of a ViT's step in each round: of plain fine-tuning and of `ON_VIT`."""
    torch.manual_seed(0)
    start = new_model(images.class_names, "vit", [0.5] * 3, [0.5] * 3, 32, VIT)
    pixels = Preprocessing.from_processor(start.image_processor)(images.images)
    with torch.no_grad():
        logits = torch.cat([start(pixel_values=batch).logits for batch in pixels.split(BATCH)])
    epsilon = F.cross_entropy(logits, images.labels, reduction="none").quantile(1 - ACTIVE).item()
    common = dict(output_dir="outputs/bench", max_steps=bench.vit_steps, disable_tqdm=True, logging_steps=bench.vit_steps)
    common |= dict(optim="sgd", per_device_train_batch_size=64, learning_rate=1e-5, warmup_steps=0, crop_padding=0, cutmix=0)
    d3 = common | dict(epsilon=epsilon, warm_start="near")
    rounds = {"FT": [], **{name: [] for name in ON_VIT}}
    for _ in range(bench.rounds):
        for name, found in rounds.items():
            model, times = copy.deepcopy(start), StepTimes()
            args = FineTuningConfig(**common) if name == "FT" else D3Config(**d3, **ON_VIT[name])
            kind = FineTuningTrainer if name == "FT" else D3Trainer
            trainer = kind(model=model, args=args, train_dataset=images, callbacks=[times])
            trainer.train()
            found.append(median(times.seconds[5:]))
            if name == "D3 active":
                share = trainer.state.log_history[0]["active_fraction"]
    print(f"active images: {share:.3f} of all")
    return rounds


def measuring_ratio(images: RawImages, rounds: int) -> tuple[float, float]:
    """What measuring ACC, ASR, RA and PACC takes of measuring ACC alone: in passes, and in seconds (median)."""
    model = new_model(images.class_names, "resnet20_cifar", [0.5] * 3, [0.5] * 3, 32)
    preprocessing, attack, ratios = Preprocessing.from_processor(model.image_processor), BadNets(), []
    for _ in range(rounds):
        alone, every_rate = (measure(model, images, preprocessing, a, progress=False) for a in (None, attack))
        ratios.append(every_rate.seconds / alone.seconds)
    return every_rate.forward_images / alone.forward_images, median(ratios)


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
    rounds, peaks = {name: [] for name in kinds}, {name: [] for name in kinds}
    for _ in range(bench.rounds):
        for name, kind in kinds.items():
            seconds, peak = train(*kind, bench, images)
            rounds[name].append(median(seconds))
            peaks[name].append(peak)
    ratios = [d3 / ft for d3, ft in zip(rounds["D3"], rounds["FT"], strict=True)]
    print(f"FT {1000 * median(rounds['FT']):.2f} ms, D3 {1000 * median(rounds['D3']):.2f} ms per step of {BATCH} images")
    print(f"D3 / FT: {median(ratios):.4f} (median of {bench.rounds} rounds, {min(ratios):.4f}..{max(ratios):.4f})")
    where = "GPU" if torch.cuda.is_available() else "process"
    print(f"peak memory of the {where}, D3 / FT: {median(peaks['D3']) / median(peaks['FT']):.3f}")
    passes, seconds = measuring_ratio(images, bench.rounds)
    print(f"measuring ACC, ASR, RA and PACC takes {passes:.2f} of the passes and {seconds:.2f} of the time of ACC alone")
    loader = loader_images_per_second(images)
    print(
        f"loader {loader:.0f} images/s on one core, {loader * median(rounds['FT']) / BATCH:.0f} times the training step's need"
    )
    if bench.vit_steps:
        rounds = vit_seconds(bench, images)
        for name in ON_VIT:
            ratios = [d3 / ft for d3, ft in zip(rounds[name], rounds["FT"], strict=True)]
            print(f"ViT, {name} / FT: {median(ratios):.3f} ({min(ratios):.3f}..{max(ratios):.3f} in {bench.rounds} rounds)")


if __name__ == "__main__":
    run(main, sys.argv[1:])
