"""Run by `torchrun` in test_distributed.py: one D3 run per case, its weights and log saved by the main process."""

import json
import sys

from accelerate.utils import gather_object
from safetensors.torch import save_file
from tiny import tiny_samples, tiny_vit

from d3_hf.defenses.d3.trainer import HINGES, D3Config, D3Trainer

CASES = {hinge: dict(hinge=hinge, epsilon=0.8, max_steps=4, active_set=False) for hinge in HINGES} | {
    "active": dict(active_set=True, epsilon=1.0, max_steps=10, learning_rate=0.01, weight_decay=0.1)
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
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=accumulation, logging_steps=1) | CASES[case]
    args = D3Config(folder, use_cpu=True, disable_tqdm=True, **options)
    trainer = Watched(tiny_vit(), args, tiny_samples(32))
    trainer.train()
    return trainer


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
