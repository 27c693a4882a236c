"""Run by `torchrun` in test_distributed.py: one D3 run per hinge, its weights and log saved by the main process."""

import json
import sys

from safetensors.torch import save_file
from tiny import tiny_samples, tiny_vit

from d3_hf.defenses.d3 import HINGES, D3Config, D3Trainer


def run(folder, hinge, accumulation):
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=accumulation, max_steps=4, logging_steps=1)
    args = D3Config(folder, hinge=hinge, epsilon=0.8, use_cpu=True, disable_tqdm=True, **options)
    trainer = D3Trainer(tiny_vit(), args, tiny_samples(32))
    trainer.train()
    return trainer


if __name__ == "__main__":
    for hinge in HINGES:
        trainer = run(sys.argv[1], hinge, 2)
        if trainer.is_world_process_zero():
            save_file(trainer.model.state_dict(), f"{sys.argv[1]}/{hinge}.safetensors")
            with open(f"{sys.argv[1]}/{hinge}.json", "w") as file:
                mode = [trainer.args.world_size, type(trainer.model_wrapped).__name__]
                json.dump({"mode": mode, "log": trainer.state.log_history}, file)
