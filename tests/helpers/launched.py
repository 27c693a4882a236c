"""Run by `torchrun` in test_distributed.py: one D3 run per case, its weights and log saved by the main process."""

import json
import sys

import torch
from accelerate.utils import gather_object
from pictures import noise
from safetensors.torch import save_file
from tiny import CLASSES, SGD, SIZE, tiny_samples, tiny_vit

from d3_hf.data.images import RawImages
from d3_hf.defenses.d3.config import HINGES
from d3_hf.defenses.d3.trainer import D3Config, D3Trainer

CASES = {hinge: dict(hinge=hinge, epsilon=0.8, max_steps=4, active_set=False) for hinge in HINGES} | {
    "active": dict(active_set=True, epsilon=1.0, max_steps=24, learning_rate=0.01, weight_decay=0.1)
}


class Watched(D3Trainer):
    """Notes how many images of each micro-batch are active, and how many go through the network with a graph."""

    def __init__(self, model, *arguments):
        super().__init__(model, *arguments)
        self.active, self.with_graph = [], []
        model.register_forward_hook(self._note)

    def _note(self, module, inputs, output):
        if output.logits.requires_grad:
            self.with_graph.append(len(output.logits))

    def sample_loss(self, cross_entropy):
        self.active.append((cross_entropy > self.epsilon).sum().item())
        return super().sample_loss(cross_entropy)


def run(folder, case, accumulation):
    options = (
        dict(per_device_train_batch_size=2, gradient_accumulation_steps=accumulation, logging_steps=1, learning_rate=0.1)
        | SGD
        | CASES[case]
    )
    args = D3Config(f"{folder}/{case}", use_cpu=True, disable_tqdm=True, **options)
    trainer = Watched(tiny_vit(), args, tiny_samples(32))
    trainer.train()
    return trainer


def end_of(folder, seed):
    """What a run on images of a seed ends with."""
    images = RawImages(torch.from_numpy(noise(8, 3, SIZE, SIZE, seed=seed)), torch.arange(8) % CLASSES, list("abc"))
    args = D3Config(
        f"{folder}/end", max_steps=1, per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True, warmup_steps=0
    )
    try:
        D3Trainer(tiny_vit(), args, images).train()
    except ValueError as error:
        return str(error)
    return "trained"


if __name__ == "__main__":
    for case in CASES:
        trainer = run(sys.argv[1], case, 2)
        active, with_graph = gather_object([trainer.active]), gather_object([trainer.with_graph])  # one list a process
        if trainer.is_world_process_zero():
            save_file(trainer.model.state_dict(), f"{sys.argv[1]}/{case}.safetensors")
            with open(f"{sys.argv[1]}/{case}.json", "w") as file:
                mode = [trainer.args.world_size, type(trainer.model_wrapped).__name__]
                record = {"mode": mode, "log": trainer.state.log_history, "active": active, "with_graph": with_graph}
                json.dump(record, file)
    ends = {
        "same": gather_object([end_of(sys.argv[1], seed=0)]),
        "different": gather_object([end_of(sys.argv[1], seed=trainer.args.process_index)]),
    }
    if trainer.is_world_process_zero():
        with open(f"{sys.argv[1]}/ends.json", "w") as file:
            json.dump(ends, file)
