"""Run by test_sharding.py in two processes: `sharded.py FOLDER` trains all of `RUNS`, on shards if launched with FSDP."""

import gc
import json
import os
import sys
from pathlib import Path

from accelerate import PartialState
from safetensors.torch import save_file
from streamed import NAMES, stream, write_files
from tiny import SGD, tiny_samples, tiny_timm_vit, tiny_vit

from d3_hf.defenses.d3.trainer import D3Config, D3Trainer
from d3_hf.defenses.fine_tuning import FineTuningConfig, FineTuningTrainer

CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2}
# The loss falls: the best model is not the last.
BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
D3, FT = (D3Trainer, D3Config), (FineTuningTrainer, FineTuningConfig)
# The network, the defence, its options; epsilon is such that some windows cost nothing.
RUNS = {
    "D3 best": (tiny_vit, D3, {"epsilon": 0.8, "greater_is_better": True} | CHECKPOINTS | BEST),
    "D3 batch hinge": (tiny_timm_vit, D3, {"hinge": "batch", "epsilon": 1.09, "target_modules": "all-linear"} | CHECKPOINTS),
    "D3 distilled twice": (tiny_vit, D3, {"distillation": 0.5, "dual_rate": 0.1, "epsilon": None, "distance": "both"}),
    "FT streamed": (tiny_vit, FT, {"reinitialize_head": True, "crop_padding": 2, "horizontal_flip": True} | CHECKPOINTS),
}
RESUMED = ("D3 batch hinge", "FT streamed")
LAYERS = {tiny_vit: "ViTLayer", tiny_timm_vit: "Block"}  # what FSDP2 is to shard apart


def run(folder, name, accumulation, resume=None, **launch):
    """Train one of `RUNS`, or the rest of it from a checkpoint, evaluate, and save the model."""
    make, (trainer_class, config_class), options = RUNS[name]
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = LAYERS[make]
    args = config_class(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=accumulation, max_steps=4, logging_steps=1,
        disable_tqdm=True, learning_rate=0.1, **SGD, **launch, **options,
    )  # fmt: skip
    model, images = make(), tiny_samples(32)
    if "streamed" in name:
        model.config.id2label = dict(enumerate(NAMES))
        images = stream(write_files(folder.parent / f"data{args.process_index}", files=1))
    trainer = trainer_class(model, args, images, tiny_samples(8, seed=1))
    trainer.train(resume_from_checkpoint=resume)
    trainer.evaluate()
    if "twice" in name:
        trainer.train()
    trainer.save_model()
    return trainer


def main(folder):
    gc.freeze()
    use_cpu = "ACCELERATE_USE_FSDP" not in os.environ
    for name in RUNS:
        trainer = run(folder / name, name, 2, use_cpu=use_cpu)
        if trainer.is_world_process_zero():
            tensors = {type(parameter.data).__name__ for parameter in trainer.model.parameters()}
            found = [trainer.args.world_size, type(trainer.model_wrapped).__name__, *sorted(tensors)]
            (folder / f"{name}.json").write_text(json.dumps({"mode": found, "log": trainer.state.log_history}))
        else:
            save_file(trainer.plain.state_dict(), folder / f"{name}.safetensors")
    for name in RESUMED:
        run(folder / f"{name} resumed", name, 2, str(folder / name / "checkpoint-2"), use_cpu=use_cpu)
    PartialState().wait_for_everyone()  # before one of them ends the connection
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
