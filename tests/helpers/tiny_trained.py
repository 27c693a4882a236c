"""What the tests of the defences share: tiny victims that classify their retain set, and checks of what a defence saves."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import SGD, tiny_samples

from d3_hf.defenses.fine_tuning import FineTuningConfig, FineTuningTrainer

QUIET = dict(disable_tqdm=True, use_cpu=True, per_device_train_batch_size=8)


@functools.cache
def weights(make):
    with tempfile.TemporaryDirectory() as folder:
        args = FineTuningConfig(folder, max_steps=40, learning_rate=0.05, **SGD, **QUIET)
        trainer = FineTuningTrainer(make(), args, tiny_samples(40))
        trainer.train()
        return trainer.model.state_dict()


def trained(make):
    """The model after 40 steps on `tiny_samples(40)`, a new one each time."""
    model = make()
    model.load_state_dict(weights(make))
    return model.eval()


@functools.cache
def base_of(make):
    """A folder with the model before those steps: the base of the trained one."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    model = make()
    model.config.save_pretrained(folder / "base")
    # Of two processes `save_pretrained` writes the weights in the first alone, and each has a folder of its own here.
    save_file(model.state_dict(), folder / "base" / "model.safetensors", {"format": "pt"})
    return str(folder / "base")


def differing(one, other):
    """Names of the tensors in which two models differ; they must have the same names."""
    one, other = one.state_dict(), other.state_dict()
    assert list(one) == list(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


@torch.no_grad()
def logits(model):
    pixels = torch.stack([sample["pixel_values"] for sample in tiny_samples(6, seed=5)])
    return model.eval()(pixel_values=pixels).logits


def assert_reloads(trainer, folder):
    """The saved folder holds the model as it is, with nothing left in it or hooked to it."""
    trainer.save_model()
    reloaded = type(trainer.model).from_pretrained(folder)
    assert differing(reloaded, trainer.model) == []
    torch.testing.assert_close(logits(reloaded), logits(trainer.model), rtol=0, atol=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())


def right(model, rows):
    """Share of the retain samples at ``rows`` that are classified right, one by one."""
    samples = tiny_samples(40)
    with torch.no_grad():
        found = [model.eval()(pixel_values=samples[r]["pixel_values"][None]).logits.argmax().item() for r in rows]
    return sum(f == samples[r]["labels"] for f, r in zip(found, rows, strict=True)) / len(rows)
