"""Retain sets as parquet files; run by `torchrun` in test_streaming.py, D3 runs that read them as streams."""

import json
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
from accelerate.utils import gather_object
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from PIL import Image as Picture
from safetensors.torch import save_file
from tiny import CLASSES, SGD, SIZE, tiny_vit

from d3_hf.data.augmentation import Augmentation
from d3_hf.defenses.d3.trainer import D3Config, D3Trainer

COUNT = 48
# datasets sleeps at the end of each pass, seconds for the few images of these tests.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.0
NAMES = [f"class {number}" for number in range(CLASSES)]


def write_files(folder, files, count=COUNT):
    """Images of noise around a colour for each class, the row's number in the corner pixel, in some parquet files."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % CLASSES
    pixels = random.integers(0, 100, (count, SIZE, SIZE, 3), dtype=np.uint8)
    pixels[np.arange(count), :, :, labels] += 100
    pixels[:, 0, 0] = np.arange(count)[:, None]
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    images = Dataset.from_dict({"image": [Picture.fromarray(p) for p in pixels], "label": labels}, features=features)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in range(files):
        images.shard(files, file, contiguous=True).to_parquet(folder / f"train-{file}-of-{files}.parquet")
    return folder


def stream(folder):
    files = {"train": sorted(map(str, Path(folder).glob("*.parquet")))}
    return load_dataset("parquet", data_files=files, streaming=True)["train"]


def run(folder, data, accumulation, **options):
    options = dict(max_steps=4, crop_padding=2, horizontal_flip=True, epsilon=0.5) | options
    args = D3Config(
        str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=accumulation, logging_steps=1, use_cpu=True,
        disable_tqdm=True, learning_rate=0.01, active_set=False, **SGD, **options,
    )  # fmt: skip
    model = tiny_vit()
    model.config.id2label = dict(enumerate(NAMES))
    return D3Trainer(model, args, stream(data))


def rows(images, count):
    """Which images of the files a stream gives first, as their corner pixels say."""
    return [int(sample["pixel_values"][0, 0, 0]) for sample in islice(replace(images, augmentation=Augmentation(0)), count)]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for files in (1, 2):
        trainer = run(folder / f"run{files}", folder / f"data{files}", 2)
        trainer.train()
        found = gather_object([rows(trainer.train_dataset, COUNT)])
        if trainer.is_world_process_zero():
            save_file(trainer.model.state_dict(), folder / f"{files}.safetensors")
            record = {"mode": type(trainer.model_wrapped).__name__, "rows": found, "log": trainer.state.log_history}
            (folder / f"{files}.json").write_text(json.dumps(record))
