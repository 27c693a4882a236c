"""Run by `torchrun` in test_distributed_defences.py: every defence on a tiny victim, to the end."""

import sys

from accelerate.utils import gather_object
from every_defence import NETWORKS, build
from safetensors.torch import load_file, save_file

from d3_hf.defenses import DEFENCES
from d3_hf.training.reference import fingerprint


def run(folder, name, batch_size):
    """A defence on 40 images and the victim that lies in the folder; the trainer."""
    model = NETWORKS[name]()
    model.load_state_dict(load_file(f"{folder}/{NETWORKS[name].__name__}.safetensors"))
    options = dict(per_device_train_batch_size=batch_size, overwrite_output_dir=True)
    trainer = build(name, f"{folder}/run", model.eval(), **options)
    trainer.train()
    return trainer


if __name__ == "__main__":
    for name in DEFENCES:
        trainer = run(sys.argv[1], name, 4)
        held = set(gather_object([fingerprint(trainer.model.parameters())]))
        if trainer.is_world_process_zero():
            mode = {"processes": str(trainer.args.world_size), "versions": str(len(held))}
            save_file(trainer.model.state_dict(), f"{sys.argv[1]}/{name}.safetensors", mode)
