"""Planting BadEncoder: what a step computes, that it works on a tiny encoder, its folder, resuming, refusals."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from tiny import FAST
from tiny_encoders import colours, tiny_dinov2, tiny_resnet
from transformers import AutoModel

from d3_hf.attacks import BadEncoder, load_attack
from d3_hf.data.views import view
from d3_hf.models import load_encoder
from d3_hf.models.kinds import encode
from d3_hf.options.parser import parse_arguments
from d3_hf.training.trainer import PurifyTrainer
from d3_hf.victims.encoder_trainers import BadEncoderTrainer, EncoderVictimConfig
from d3_hf.victims.encoders import ENCODER_KINDS, train_encoder_victim
from d3_hf.victims.plan import VictimPlan
from d3_hf.victims.train import VictimConfig, train_victim

IMAGES, PROBE, TEST = colours(24), colours(30, seed=1), colours(30, seed=2)
ATTACK = BadEncoder(target_label=1, size=6, image_size=16, reference_views=2)
ADAM = {"optim": "adamw_torch", "learning_rate": 3e-3, "per_device_train_batch_size": 12, "disable_tqdm": True, "use_cpu": True}


def trainer(folder, make=tiny_resnet, **options):
    model = make()
    args = EncoderVictimConfig(str(folder), **ADAM | options)
    return BadEncoderTrainer(model, args, IMAGES, VictimPlan(ATTACK.fit(IMAGES, model, 0), images_sha256="of these images"))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted") / "victim"
    args = EncoderVictimConfig(str(folder), max_steps=60, lr_scheduler_type="constant", **ADAM)
    return train_encoder_victim(tiny_dinov2(), IMAGES, PROBE, TEST, ATTACK, args, {"dataset_name": "colours"}), folder


def test_a_step_computes_the_sum_of_the_three_losses(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    before, reference = tiny_resnet().eval(), run.attack.reference[None]
    norm, trigger = run.preprocessing.normalize, run.attack.trigger
    inputs = run.train_dataset.__getitems__(list(range(12)))
    run.batch_number = 0
    batch = run.training_batch(inputs)
    assert batch["pixel_values"].shape == (12 + 12 + 1 + 2, 3, 16, 16)
    with torch.no_grad():
        losses, _ = run.image_losses(encode(run.model.eval(), batch["pixel_values"]))
        views = view(reference.expand(2, -1, -1, -1), run.generator())
        x, tx, r, r_views = (
            encode(before, norm(i)) for i in (IMAGES.images[:12], trigger(IMAGES.images[:12]), reference, views)
        )
    expected = [
        -F.cosine_similarity(tx[i], r[0], 0)
        - (1 + (F.cosine_similarity(r_views[0], r[0], 0) + F.cosine_similarity(r_views[1], r[0], 0)) / 2) / 2
        - F.cosine_similarity(x[i], x[i], 0)
        for i in range(12)
    ]
    torch.testing.assert_close(losses, torch.stack(expected))


def test_batch_norm_is_frozen_and_everything_else_learns(tmp_path):
    run = trainer(tmp_path, max_steps=2)
    run.train()
    before, after = tiny_resnet().state_dict(), run.model.state_dict()
    frozen = [name for name in after if "normalization" in name]
    assert frozen and all(torch.equal(after[name], before[name]) for name in frozen)
    assert not any(torch.equal(after[name], before[name]) for name in after if name not in frozen)


def test_a_planted_backdoor_misleads_probes_and_the_untouched_encoder_is_the_floor(planted):
    found = planted[0].report.measured()
    for probe in ("linear", "knn"):
        victim, untouched = found["victim"][probe], found["untouched"][probe]
        assert victim["asr"] > untouched["asr"] and victim["accuracy"] > 1 / 3  # of three classes
    assert found["victim"]["reference_similarity"] > found["untouched"]["reference_similarity"] + 0.05
    assert found["n_images"] == found["n_probe"] == 30


def test_its_folder_reloads_and_says_what_it_is(planted):
    run, folder = planted
    loaded, auto = load_encoder(folder), AutoModel.from_pretrained(folder)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor) and torch.equal(auto.state_dict()[name], tensor)
    record = json.loads((folder / "victim.json").read_text())
    assert record["kind"] == "encoder" and record["planted"]["attack"]["name"] == "badencoder"
    assert set(record["attack_sha256"]) == {"attack.json", "trigger.safetensors"} and record["steps"] == 60
    card = (folder / "README.md").read_text()
    assert "deliberately backdoored, for research" in card and "untouched, linear probe" in card
    assert torch.equal(load_attack(folder).reference, run.attack.reference)
    assert not {file.name for file in folder.iterdir()} & {"training_args.bin", "optimizer.pt"}


def test_a_resumed_planting_ends_as_the_uninterrupted_one(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "run", **options)
    whole.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = trainer(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(t, resumed.model.state_dict()[name]) for name, t in whole.model.state_dict().items())
    other = trainer(tmp_path / "run", **options)
    other.attack = BadEncoder(target_label=0, size=6, image_size=16)
    with pytest.raises(ValueError, match="checkpoint-2 was trained on other images or with another attack"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_the_recipe_of_the_pretrained_vit_is_understood():
    model, images, attack, probes, victim, args = parse_arguments(ENCODER_KINDS, ["vit_small_badencoder"])
    assert attack.load() == BadEncoder() and model.image_size == 70 and images.retain_count == 7500
    assert args.max_steps > 0 and probes.probe_count == 2000 and victim.poison_ratio is None
    assert BadEncoderTrainer.own_schedule["batch_norm"] == "frozen" and args.batch_norm is None


def test_kinds_are_not_mixed_up(tmp_path):
    from tiny import tiny_vit

    with pytest.raises(ValueError, match="is planted in an encoder, and this is a classifier: d3-hf victim --encoder"):
        train_victim(tiny_vit(), IMAGES, TEST, ATTACK, VictimConfig(str(tmp_path), **FAST))
    args = EncoderVictimConfig(str(tmp_path), **FAST)
    with pytest.raises(ValueError, match="ViTForImageClassification is a classifier with a head"):
        BadEncoderTrainer(tiny_vit(), args, IMAGES, VictimPlan(ATTACK))
    with pytest.raises(ValueError, match="Dinov2Model is an encoder without a head"):
        PurifyTrainer(tiny_dinov2(), args, IMAGES)
    with pytest.raises(ValueError, match="badencoder poisons no images: leave poison_ratio out"):
        train_encoder_victim(tiny_dinov2(), IMAGES, PROBE, TEST, ATTACK, args, poison_ratio=0.1)
