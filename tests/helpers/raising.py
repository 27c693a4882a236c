"""How the tests of what can be added to D3 and its controls build and compare their runs."""

import torch
from tiny import SGD, tiny_samples

from d3_hf.data.images import RawImages
from d3_hf.defenses.d3.trainer import D3Config, D3Trainer
from d3_hf.defenses.fine_tuning import FineTuningConfig, FineTuningTrainer

D3, FT = (D3Config, D3Trainer), (FineTuningConfig, FineTuningTrainer)
COMMON = dict(
    per_device_train_batch_size=4, max_steps=3, logging_steps=1, learning_rate=0.01, disable_tqdm=True, use_cpu=True,
    **SGD,
)  # fmt: skip


def build(defence, folder, model, samples=None, **options):
    config_class, trainer_class = defence
    return trainer_class(model, config_class(str(folder), **(COMMON | options)), samples or tiny_samples())


def same_weights(one, two, **tolerance):
    for (name, got), want in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, **(tolerance or dict(rtol=0, atol=0)), msg=lambda m, n=name: f"{n}: {m}")


def raw_images(count=12, size=16):
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return RawImages(pixels, torch.arange(count) % 3, ["LABEL_0", "LABEL_1", "LABEL_2"])
