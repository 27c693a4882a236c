"""What cannot be trained is refused before anything is written."""

import pytest
from tiny import FAST, tiny_samples, tiny_vit
from torch import nn

from d3_hf.defenses.d3.trainer import D3Config, D3Trainer


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
        (tiny_vit, {"_n_gpu": 2}, "2 GPUs by nn.DataParallel; start it with `accelerate launch`"),
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


def test_model_init_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model_init would replace the suspicious model"):
        D3Trainer(tiny_vit(), D3Config(str(tmp_path / "run"), **FAST), tiny_samples(), model_init=tiny_vit)
