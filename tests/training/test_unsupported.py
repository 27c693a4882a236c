"""What cannot be trained is refused before anything is written."""

import pytest
import torch
from tiny import FAST, tiny_samples, tiny_vit
from torch import nn

from d3_hf.defenses.d3.trainer import D3Config, D3Trainer
from d3_hf.training import config


def adapted():
    model = tiny_vit()
    model.peft_config = {"default": None}
    return model


def spread():
    model = tiny_vit()
    model.hf_device_map = {"": 0}
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (adapted, {}, "merge the adapter"),
        (spread, {}, "load on one device"),
        (lambda: nn.Linear(2, 2), {}, "wrap it with d3_hf.load_classifier"),
        (tiny_vit, {"optim": "galore_adamw_layerwise"}, "before the gradient is complete: use sgd"),
        (tiny_vit, {"optim": "apollo_adamw_layerwise"}, "before the gradient is complete: use sgd"),
        (tiny_vit, {"optim": "adalomo"}, "before the gradient is complete: use sgd"),
    ],
)
def test_refused(tmp_path, make, options, message):
    args = D3Config(str(tmp_path / "run"), optim_args=None, **FAST)
    for name, value in options.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=message):
        D3Trainer(make(), args, tiny_samples())
    assert not (tmp_path / "run").exists()


def test_one_of_several_gpus_is_taken_and_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(config.logger, "warning_once", said.append)
    args = D3Config(str(tmp_path / "run"), per_device_train_batch_size=3)
    assert (args.n_gpu, args.train_batch_size) == (1, 3)
    assert [line.partition(":")[0] for line in said] == ["one of 2 GPUs is used"]


def test_model_init_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model_init would replace the suspicious model"):
        D3Trainer(tiny_vit(), D3Config(str(tmp_path / "run"), **FAST), tiny_samples(), model_init=tiny_vit)
