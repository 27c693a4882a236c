"""Every defence on a tiny victim, with options that make it act within a few steps."""

from tiny import SGD, tiny_resnet, tiny_samples, tiny_vit
from tiny_trained import QUIET, base_of, trained

from d3_hf.defenses import DEFENCES, defence

EPOCH = {"num_train_epochs": 1, "learning_rate": 0.02}
SGD_EPOCH = EPOCH | SGD  # whatever the rule for the network: Adam makes much of rounding
OPTIONS = {
    "d3": SGD_EPOCH,
    "fine_tuning": SGD_EPOCH,
    "base_tuning": SGD_EPOCH | {"keep": 0.25, "base_pull": 0.5},
    "linear_probing": SGD_EPOCH,
    "ft_sam": SGD_EPOCH | {"rho": 0.5},
    "fst": SGD_EPOCH,
    "sau": EPOCH | {"pgd_steps": 2},
    "tsbd": SGD_EPOCH
    | {"unlearn_epochs": 20, "unlearn_learning_rate": 0.02, "unlearn_accuracy": 0.3, "max_validation_drop": 0.5},
    "tsc": {"rounds": 1, "curve_epochs": 2, "finetune_epochs": 1, "learning_rate": 0.02},
    "anp": {"max_steps": 12, "learning_rate": 0.2, "max_validation_drop": 0.5},
    "fine_pruning": SGD_EPOCH,
    "nad": SGD_EPOCH | {"teacher_epochs": 1, "attention_weights": [1.0]},
    "neural_cleanse": SGD_EPOCH | {"inversion_epochs": 2, "anomaly_threshold": 1e-6},
    "ibau": EPOCH | {"inner_epochs": 1, "perturbed_share": 0.5},
    "rnp": {"num_train_epochs": 4, "learning_rate": 0.2, "unlearn_learning_rate": 0.05, "max_validation_drop": 0.5},
    "lmr": SGD_EPOCH | {"unlearn_learning_rate": 0.02, "repulsion_epochs": 2, "prune_share": 0.3},
}
NETWORKS = {
    name: tiny_resnet if name in ("anp", "rnp") else tiny_vit for name in DEFENCES
}  # those two prune BatchNorm's scales
ALL_AT_ONCE = ("anp", "rnp")  # their masks are learned without the Trainer's loop: there is no checkpoint and no bf16 step
STREAMED = ("d3", "fine_tuning", "base_tuning", "linear_probing", "ft_sam", "fst")


def required(name):
    """Options without which the defence ``name`` cannot be configured."""
    return {"base_model": base_of(NETWORKS[name])} if name == "base_tuning" else {}


def build(name, folder, model=None, images=None, **options):
    """A trainer of the defence ``name`` on its tiny victim and 40 samples; ``options`` go over `OPTIONS`."""
    config_class, trainer_class = defence(name)
    args = config_class(str(folder), **(QUIET | OPTIONS[name] | required(name) | options))
    return trainer_class(model or trained(NETWORKS[name]), args, images or tiny_samples(40))
