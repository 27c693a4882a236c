"""What a user runs in test_push.py, in a process whose Hub is the fake one."""

import gc
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from tiny import tiny_samples, tiny_vit, with_processor
from transformers import AutoModelForImageClassification, ViTForImageClassification

from d3_hf import D3Config, D3Trainer, RawImages, load_classifier, load_images, purify, retain_split
from d3_hf.attacks import BadNets
from d3_hf.publishing.report import Report

TOKEN = "hf_testTESTtestTESTtestTESTtestTEST01"
MODEL_FILES = {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", "purification.json"}
FAST = dict(max_steps=2, per_device_train_batch_size=32, use_cpu=True, disable_tqdm=True)


def suspicious_model():
    config = tiny_vit().config
    config.num_labels = 10
    return with_processor(ViTForImageClassification(config))


def user_session():
    """Four pushes; the suspicious model is a folder here and a Hub repository."""
    model = load_classifier(Path("suspicious").absolute())
    images = load_images("digits")
    retain, _ = retain_split(images["train"], fraction=0.05, seed=0)
    trainer = D3Trainer(model=model, args=D3Config(output_dir="out", **FAST), train_dataset=retain, eval_dataset=images["test"])
    trainer.data_source = str(Path("trusted").absolute())
    trainer.train()
    trainer.save_model()
    out = trainer.push_to_hub()

    args = D3Config(output_dir="purified", push_to_hub=True, hub_model_id="me/model-purified", **FAST)
    trainer = D3Trainer(load_classifier("them/suspicious"), args, retain, data_source="them/digits")
    test, named = RawImages.from_dataset(images["test"]), Report(data="them/digits", split="test")
    report = purify(trainer, test, BadNets(target_label=0), report=named)
    save_file(logits_of(trainer.model, load_classifier("me/model-purified")), "logits.safetensors")

    options = dict(save_strategy="steps", save_steps=1, hub_strategy="end", hub_model_id="samples", hub_private_repo=False)
    samples = D3Trainer(tiny_vit(), D3Config(output_dir="samples", push_to_hub=True, **options, **FAST), tiny_samples())
    samples.train()
    samples.save_model()

    args = D3Config(output_dir="proposed", push_to_hub=True, hub_create_pr=True, **FAST)
    proposed = D3Trainer(load_classifier("them/suspicious"), args, retain)
    proposed.train()
    pull_request = proposed.push_to_hub().pr_url

    card = ModelCard.load("me/model-purified")
    card.validate()
    card.data.base_model = "no model"
    with pytest.raises(ValueError, match="no model id"):
        card.validate()
    source = load_classifier("me/model-purified").source
    seen = {"out": out.oid, "results": report.results, "source": asdict(source), "pull_request": pull_request}
    Path("seen.json").write_text(json.dumps(seen))


def logits_of(pushed, loaded):
    """Logits of the model that was pushed and of its copies from the Hub, by `load_classifier` and by the Auto class."""
    models = {"pushed": pushed, "loaded": loaded, "auto": AutoModelForImageClassification.from_pretrained("me/model-purified")}
    pixels = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return {name: model.eval()(pixel_values=pixels).logits for name, model in models.items()}


if __name__ == "__main__":
    gc.freeze()  # accelerate collects all garbage after each training
    user_session()
    gc.unfreeze()
