"""Run by `torchrun` in test_distributed.py: every defence on a tiny victim, to the end."""

import sys

from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from tiny import tiny_resnet, tiny_samples, tiny_vit

from d3_hf.defenses import DEFENCES, defence
from d3_hf.training.reference import fingerprint

EPOCH = {"num_train_epochs": 1, "learning_rate": 0.02}
# What makes each act within a few steps.
OPTIONS = {
    "d3": EPOCH,
    "fine_tuning": EPOCH,
    "linear_probing": EPOCH,
    "ft_sam": EPOCH | {"rho": 0.5},
    "fst": EPOCH,
    "sau": EPOCH | {"pgd_steps": 2},
    "tsbd": EPOCH | {"unlearn_epochs": 20, "unlearn_learning_rate": 0.02, "unlearn_accuracy": 0.3, "max_validation_drop": 0.5},
    "tsc": {"rounds": 1, "curve_epochs": 1, "finetune_epochs": 1, "learning_rate": 0.02},
    "anp": {"max_steps": 12, "learning_rate": 0.2, "max_validation_drop": 0.5},
    "fine_pruning": EPOCH,
    "nad": EPOCH | {"teacher_epochs": 1, "attention_weights": [1.0]},
    "neural_cleanse": EPOCH | {"inversion_epochs": 2, "anomaly_threshold": 1e-6},
    "ibau": EPOCH | {"inner_epochs": 1, "perturbed_share": 0.5},
    "rnp": {"num_train_epochs": 4, "learning_rate": 0.2, "unlearn_learning_rate": 0.05, "max_validation_drop": 0.5},
}
VICTIMS = {name: tiny_resnet if name in ("anp", "rnp") else tiny_vit for name in DEFENCES}  # those two prune BatchNorm's scales


def run(folder, name, batch_size):
    """A defence on 40 images and the victim that lies in the folder; the trainer."""
    config, trainer_class = defence(name)
    options = dict(per_device_train_batch_size=batch_size, use_cpu=True, disable_tqdm=True, overwrite_output_dir=True)
    model = VICTIMS[name]()
    model.load_state_dict(load_file(f"{folder}/{VICTIMS[name].__name__}.safetensors"))
    trainer = trainer_class(model.eval(), config(f"{folder}/run", **options | OPTIONS[name]), tiny_samples(40))
    trainer.train()
    return trainer


if __name__ == "__main__":
    for name in DEFENCES:
        trainer = run(sys.argv[1], name, 4)
        held = set(gather_object([fingerprint(trainer.model.parameters())]))
        if trainer.is_world_process_zero():
            mode = {"processes": str(trainer.args.world_size), "versions": str(len(held))}
            save_file(trainer.model.state_dict(), f"{sys.argv[1]}/{name}.safetensors", mode)
