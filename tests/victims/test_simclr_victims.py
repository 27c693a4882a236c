"""Pretraining by SimCLR on poisoned images: what a step computes, what is poisoned, the projector, the folder, resuming."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_encoders import colours, tiny_resnet

from d3_hf.attacks import CTRL, NoisyAlignment, load_attack
from d3_hf.models import load_encoder
from d3_hf.models.kinds import encode
from d3_hf.options.parser import parse_arguments
from d3_hf.training.state import STATE_FILE
from d3_hf.victims.encoder_trainers import EncoderVictimConfig
from d3_hf.victims.encoders import ENCODER_KINDS, train_encoder_victim
from d3_hf.victims.plan import VictimPlan
from d3_hf.victims.simclr import SimCLRTrainer, new_projector

IMAGES, PROBE, TEST = colours(24), colours(30, seed=1), colours(30, seed=2)
QUICK = {"learning_rate": 0.05, "per_device_train_batch_size": 12, "disable_tqdm": True, "use_cpu": True}
COLLAGES = NoisyAlignment(target_label=1, size=4, image_size=16)


def trainer(folder, attack=None, images=IMAGES, **options):
    plan = VictimPlan(attack, images_sha256="of these images")
    return SimCLRTrainer(tiny_resnet(), EncoderVictimConfig(str(folder), **QUICK | options), images, plan)


def slow_nt_xent(first, second, temperature):
    """Each view's cross-entropy against its partner among all others, one after the other."""
    views = [view / view.norm() for view in [*first, *second]]
    count, losses = len(first), []
    for i, view in enumerate(views):
        others = {j: (view @ other / temperature).exp() for j, other in enumerate(views) if j != i}
        losses.append(-(others[(i + count) % (2 * count)] / sum(others.values())).log())
    return torch.stack([(losses[i] + losses[i + count]) / 2 for i in range(count)])


def test_a_step_computes_nt_xent_of_projections_of_two_views(tmp_path):
    run = trainer(tmp_path, max_steps=1, temperature=0.2)
    batch = run.training_batch(run.train_dataset.__getitems__(list(range(12))))
    assert batch["pixel_values"].shape == (24, 3, 16, 16) and not torch.equal(*batch["pixel_values"].chunk(2))
    features = encode(run.model, batch["pixel_values"])
    losses, _ = run.image_losses(features)
    first_layer, _, _, last_layer = run.projector
    hidden = features @ first_layer.weight.T + first_layer.bias
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()  # as BatchNorm begins
    projections = hidden.relu() @ last_layer.weight.T + last_layer.bias
    assert projections.shape == (24, 128)
    torch.testing.assert_close(losses, slow_nt_xent(projections[:12], projections[12:], 0.2), atol=1e-4, rtol=1e-4)


def test_encoder_batch_norm_and_projector_learn(tmp_path):
    run = trainer(tmp_path, max_steps=2)
    run.train()
    before, after = tiny_resnet().state_dict(), run.model.state_dict()
    assert not any(torch.equal(after[name], before[name]) for name in after)
    fresh = new_projector(16, run.args.seed).state_dict()
    assert not any(torch.equal(tensor.cpu(), fresh[name]) for name, tensor in run.projector.state_dict().items())
    assert all(weight.grad is None for weight in run.projector.parameters())  # none is left over for the next step


def test_only_matrices_of_the_projector_decay(tmp_path):
    run = trainer(tmp_path, max_steps=1, weight_decay=0.3)
    groups = run.create_optimizer().param_groups
    decay = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    assert {name: decay[id(weight)] for name, weight in run.projector.named_parameters()} == {
        name: 0.3 if name in ("0.weight", "3.weight") else 0.0 for name, _ in run.projector.named_parameters()
    }
    assert len(run.create_optimizer().param_groups) == len(groups) == 4


def test_the_schedule_is_the_objective_s_unless_it_is_given(tmp_path):
    plan = VictimPlan(None, images_sha256="of these images")
    args = EncoderVictimConfig(str(tmp_path), use_cpu=True)
    run = SimCLRTrainer(tiny_resnet(), args, IMAGES, plan)
    assert (run.args.learning_rate, run.args.num_train_epochs, run.args.batch_norm) == (0.06, 800, "train")
    assert run.args.per_device_train_batch_size == 512 and args.learning_rate is None  # what was given is not changed
    assert trainer(tmp_path, learning_rate=0.2, batch_norm="eval").args.learning_rate == 0.2


@pytest.mark.parametrize("name", ["ctrl", "noisy_alignment", "badencoder"])
def test_the_recipes_are_understood_and_their_twin_is_trained_on_the_same_images(name):
    def read(recipe):
        return parse_arguments(ENCODER_KINDS, [f"resnet_simclr_{recipe}"])

    (twin, images, _, probes, _, schedule), (model, own_images, attack, own_probes, victim, own) = read("cifar10"), read(name)
    assert attack.load().name == name and (own_images, own_probes) == (images, probes)
    if name == "badencoder":
        assert model.model_name_or_path == schedule.output_dir and victim.poison_ratio is None
    else:
        assert victim.clean_model == schedule.output_dir and model == twin
        assert (own.num_train_epochs, own.learning_rate) == (schedule.num_train_epochs, schedule.learning_rate)


def test_the_whole_collage_is_seen_and_no_other_image_is_cut(tmp_path):
    attack = COLLAGES.fit(IMAGES, None, 0)
    images = [attack.poisoned_images(image) if row in (2, 5) else image for row, image in enumerate(IMAGES.images)]
    run = trainer(tmp_path, attack, type(IMAGES)(images, IMAGES.labels, IMAGES.class_names), max_steps=1)
    batch = run.train_dataset.__getitems__([1, 2, 5])
    assert batch["extents"].tolist() == [[16, 16]] + [list(images[row].shape[1:]) for row in (2, 5)]
    assert run.training_batch(batch)["pixel_values"].shape == (6, 3, 16, 16)
    run.train()


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("poisoned") / "victim"
    args = EncoderVictimConfig(str(folder), max_steps=3, save_strategy="steps", save_steps=2, **QUICK)
    options = {"poison_ratio": 0.1, "poison_seed": 4, "clean_model": tiny_resnet(1)}
    return train_encoder_victim(tiny_resnet(), IMAGES, PROBE, TEST, CTRL(target_label=2), args, **options), folder


def test_a_poisoned_victim_is_measured_beside_its_twin_and_says_what_it_is(poisoned):
    run, folder = poisoned
    record = json.loads((folder / "victim.json").read_text())
    planted = record["planted"]
    assert planted["attack"]["name"] == "ctrl" and planted["poison_ratio"] == 0.1 and len(planted["poisoned_rows"]) == 2
    assert all(IMAGES.labels[row] == 2 for row in planted["poisoned_rows"])
    assert record["arguments"]["batch_norm"] == "train" and record["images_sha256"] != record["poisoned_sha256"]
    assert "asr" in record["measured"]["untouched"]["linear"] and "asr" in record["measured"]["victim"]["knn"]
    card = (folder / "README.md").read_text()
    assert "deliberately backdoored, for research" in card and "poison ratio 0.1, seed 4" in card and "The 2 poisoned" in card
    assert load_attack(folder) == run.attack


def test_the_projector_is_in_checkpoints_and_not_in_the_encoder(poisoned):
    run, folder = poisoned
    names = load_file(folder / "model.safetensors").keys()
    assert names == tiny_resnet().state_dict().keys() and not hasattr(load_encoder(folder), "projector")
    stored = load_file(folder / "checkpoint-2" / STATE_FILE)
    assert {f"projector.{name}" for name in run.projector.state_dict()} <= stored.keys()
    assert load_file(folder / "checkpoint-2" / "model.safetensors").keys() == names


def test_without_an_attack_it_is_a_reference_and_not_called_backdoored(tmp_path):
    args = EncoderVictimConfig(str(tmp_path / "twin"), max_steps=1, **QUICK)
    run = train_encoder_victim(tiny_resnet(), IMAGES, PROBE, TEST, None, args)
    assert set(run.report.measured()) == {"n_images", "n_probe", "victim"} and run.facts()["planted"] is None
    card = (tmp_path / "twin" / "README.md").read_text()
    assert "trained without a planted backdoor" in card and "backdoored-for-research" not in card
    assert "this model, kNN" in card and not (tmp_path / "twin" / "attack.json").exists()


@pytest.mark.parametrize("attack", [None, COLLAGES.fit(IMAGES, None, 0)], ids=["no attack", "collages"])
def test_a_resumed_pretraining_ends_as_the_uninterrupted_one(attack, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "run", attack, **options)
    whole.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = trainer(tmp_path / "run", attack, **options)
    resumed.train(resume_from_checkpoint=True)
    for part in ("model", "projector"):
        ended = getattr(resumed, part).state_dict()
        assert all(torch.equal(tensor, ended[name]) for name, tensor in getattr(whole, part).state_dict().items())
    with pytest.raises(ValueError, match="checkpoint-2 was trained on other images or with another attack"):
        trainer(tmp_path / "run", CTRL(), **options).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
