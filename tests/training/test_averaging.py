"""Averaged weights: the mean over the last epochs, with BatchNorm statistics of its own."""

import copy

import pytest
import torch
from raising import D3, FT, build
from safetensors.torch import load_file
from tiny import tiny_resnet, tiny_samples
from transformers import TrainerCallback

from d3_hf.defenses.shared import geometry


class Snapshots(TrainerCallback):
    def __init__(self):
        self.weights = []

    def on_epoch_end(self, args, state, control, model, **kwargs):
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})


@pytest.mark.parametrize("defence", [D3, FT])
@pytest.mark.parametrize("batch_norm", ["train", "eval"])
def test_average_is_the_mean_of_the_last_epochs(tmp_path, defence, batch_norm):
    samples = tiny_samples(18)
    options = dict(num_train_epochs=4, max_steps=-1, learning_rate=0.1, batch_norm=batch_norm)
    made = build(defence, tmp_path, tiny_resnet(), samples, average_last=0.5, **options)
    snapshots = Snapshots()
    made.add_callback(snapshots)
    made.train()
    expected = {n: (snapshots.weights[2][n] + snapshots.weights[3][n]) / 2 for n in snapshots.weights[0]}
    if defence is D3:
        (name,) = [segment.name for segment in made.segments]
        expected[name] *= made.radii[0] / expected[name].norm()
        torch.testing.assert_close(torch.stack(geometry.norms(made.weights())), torch.stack(made.radii), rtol=1e-5, atol=0)
    for name, parameter in made.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-6, atol=1e-7)
    assert made.facts()["averaged_epochs"] == 2
    plain = build(defence, tmp_path, tiny_resnet(), samples, **options)
    plain.train()
    for name, parameter in plain.model.named_parameters():  # what is averaged is the run as it would be
        assert torch.equal(parameter, snapshots.weights[3][name]), name
    statistics = slow_statistics(made.model, samples) if batch_norm == "train" else tiny_resnet().state_dict()
    for name, buffer in made.model.named_buffers():
        if "running" in name:
            torch.testing.assert_close(buffer, statistics[name], rtol=1e-5, atol=1e-6)
    made.save_model()
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in made.model.state_dict().items())


def slow_statistics(model, samples):
    """Running statistics as the mean of the batches' own, each weighed by its number of images."""
    model, sums = copy.deepcopy(model).train(), {}
    layers = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = 1.0
    for start in range(0, len(samples), 4):
        pixels = torch.stack([s["pixel_values"] for s in samples[start : start + 4]])
        with torch.no_grad():
            model(pixel_values=pixels)
        for name, buffer in model.named_buffers():
            sums[name] = sums.get(name, 0) + buffer * len(pixels) / len(samples)
    return sums


def test_a_second_training_averages_anew(tmp_path):
    options = dict(num_train_epochs=2, max_steps=-1, average_last=0.9, bf16=True)
    made = build(FT, tmp_path, tiny_resnet(), **options)
    made.train()
    made.train()
    assert made.facts()["averaged_epochs"] == 2 and not made.model.training
