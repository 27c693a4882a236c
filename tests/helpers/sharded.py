"""Run by the launchers of test_sharding.py: `sharded.py ddp|fsdp|zero2|zero3 FOLDER` trains all of `RUNS` in two processes."""

import json
import os
import sys
from pathlib import Path

from safetensors.torch import save_file
from streamed import NAMES, stream, write_files
from tiny import tiny_samples, tiny_timm_vit, tiny_vit

from d3_hf.defenses.d3.trainer import HINGES, D3Config, D3Trainer
from d3_hf.defenses.fine_tuning import FineTuningConfig, FineTuningTrainer

SHARED = dict(per_device_train_batch_size=2, max_steps=4, logging_steps=1, disable_tqdm=True)
# Makes the network, its layers that FSDP2 is to shard apart, and options under which some windows cost nothing.
NETWORKS = {
    "hf": (tiny_vit, "ViTLayer", {"epsilon": 0.8}),
    "timm": (tiny_timm_vit, "Block", {"epsilon": 1.09, "target_modules": "all-linear"}),
}
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2}
BEST = CHECKPOINTS | {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
RUNS = {f"{name} {hinge}": (name, D3Trainer, {"hinge": hinge} | CHECKPOINTS) for name in NETWORKS for hinge in HINGES}
RUNS |= {
    "hf additions": ("hf", D3Trainer, {"distillation": 0.5, "dual_rate": 0.1, "epsilon": None}),
    "hf streamed": ("hf", D3Trainer, CHECKPOINTS | {"crop_padding": 2, "horizontal_flip": True}),
    "hf best": ("hf", D3Trainer, BEST | {"metric_for_best_model": "accuracy", "greater_is_better": False}),
    "timm new head": ("timm", FineTuningTrainer, {"reinitialize_head": True}),
}
RESUMED, TWICE = ("hf sample", "timm batch", "hf streamed"), ("hf additions", "timm new head")


def run(folder, name, accumulation, resume=None, **launch):
    """Train one of `RUNS`, or the rest of it from a checkpoint, evaluate, train those of `TWICE` again, and save the model."""
    network, kind, options = RUNS[name]
    make, layers, defaults = NETWORKS[network]
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = layers
    options = SHARED | {"gradient_accumulation_steps": accumulation} | launch | options
    if kind is D3Trainer:
        args = D3Config(str(folder), **(defaults | options))
    else:
        args = FineTuningConfig(str(folder), **options)
    model, images = make(), tiny_samples(32)
    if name == "hf streamed":
        model.config.id2label = dict(enumerate(NAMES))
        images = stream(write_files(folder.parent / f"data{args.process_index}", files=1))
    trainer = kind(model, args, images, tiny_samples(8, seed=1))
    if trainer.is_deepspeed_enabled and network == "hf":  # by default ZeRO-3 partitions no weights as small as these
        zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
    trainer.train(resume_from_checkpoint=resume)
    trainer.evaluate()
    if name in TWICE:
        trainer.train()
    trainer.save_model()
    return trainer


def main(mode, folder):
    for name in RUNS:
        trainer = run(folder / name, name, 2, use_cpu=mode == "ddp")
        if trainer.is_world_process_zero():
            tensors = {type(parameter.data).__name__ for parameter in trainer.model.parameters()}
            found = [trainer.args.world_size, type(trainer.model_wrapped).__name__, *sorted(tensors)]
            if trainer.is_deepspeed_enabled:
                whole = any(parameter.numel() or parameter.ds_persist for parameter in trainer.model.parameters())
                found += [trainer.model_wrapped.zero_optimization_stage(), whole]
            (folder / f"{name}.json").write_text(json.dumps({"mode": found, "log": trainer.state.log_history}))
        else:
            save_file(trainer.plain.state_dict(), folder / f"{name}.safetensors")
    for name in RESUMED:
        run(folder / f"{name} resumed", name, 2, str(folder / name / "checkpoint-2"), use_cpu=mode == "ddp")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
