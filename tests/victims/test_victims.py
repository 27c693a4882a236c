"""Training victims: every attack reaches its ASR on digits, the folder says how, hardening does its work."""

import copy
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor, set_seed

from d3_hf.attacks import ATTACKS, LF, BadNets, InTrainingAttack, from_description, load_attack, poison
from d3_hf.attacks.in_training import TriggerPoisoner
from d3_hf.data.images import RawImages
from d3_hf.data.load import load_images
from d3_hf.options.arguments import AttackArguments
from d3_hf.training.sam import adaptive_perturbation
from d3_hf.training.state import read_state
from d3_hf.victims.plan import VictimPlan
from d3_hf.victims.random_heads import RandomHeads
from d3_hf.victims.record import clean_model_of
from d3_hf.victims.train import VictimConfig, VictimTrainer, _fitted, train_victim

QUIET = {"use_cpu": True, "disable_tqdm": True}
NAMES = [str(digit) for digit in range(10)]
# Per attack: parameters that a small network learns within seconds, poison ratio, ASR in percent that it must reach, epochs.
VICTIMS = {
    "badnets": ({}, 0.1, 90, 4),
    "blended": ({}, 0.1, 90, 4),
    "sig": ({"amplitude": 120}, 0.09, 60, 4),
    "lf": ({"num_images": 10, "passes": 2}, 0.1, 80, 4),
    "lf_noise": ({}, 0.1, 80, 4),
    "trojannn": ({"steps": 30}, 0.1, 90, 4),
    # At 16x16, where the corners are larger in relation to the digit; one class cannot supply more.
    "lc_lite": ({"target_label": 8, "steps": 6}, 0.094, 60, 6),
    "wanet": ({"strength": 4, "cross_ratio": 0.5}, 0.2, 60, 6),
    "input_aware": ({"mask_steps": 60}, 0.1, 60, 6),
    "ssba_lite": ({"steps": 60, "bound": 24}, 0.1, 60, 6),
    "bpp": ({"levels": 3}, 0.2, 80, 6),
}
SLOW = ("input_aware", "ssba_lite")  # networks of their own are trained


def small_resnet(seed=0):
    """A residual network of 30,000 weights that learns digits at 32x32 in seconds."""
    set_seed(seed)
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
    )  # fmt: skip
    model = ResNetForImageClassification(config)
    model.image_processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return model


@pytest.fixture(scope="module")
def digits():
    images = load_images("digits")
    return RawImages.from_dataset(images["train"]), RawImages.from_dataset(images["test"])


def config(folder, epochs, **options):
    options = {"num_train_epochs": epochs, "optim": "adamw_torch", "optim_args": None, "learning_rate": 0.005} | options
    options = {"per_device_train_batch_size": 32, "crop_padding": 0} | options
    return VictimConfig(output_dir=str(folder), **QUIET, **options)


@pytest.fixture(scope="module")
def small_digits(digits):
    return [
        RawImages(F.interpolate(images.images.float(), (16, 16), mode="area").to(torch.uint8), images.labels, NAMES)
        for images in digits
    ]


@pytest.fixture(scope="module")
def clean(digits, tmp_path_factory):
    trainer = train_victim(small_resnet(), *digits, None, config(tmp_path_factory.mktemp("clean"), 4))
    assert trainer.report.measured()["victim"]["accuracy"] > 0.9 and "asr" not in trainer.report.measured()["victim"]
    return trainer.model


def test_every_attack_has_a_victim():
    assert VICTIMS.keys() == ATTACKS.keys()


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in VICTIMS])
def test_every_attack_reaches_its_asr(name, digits, small_digits, clean, tmp_path):
    parameters, ratio, percent, epochs = VICTIMS[name]
    digits = small_digits if name == "lc_lite" else digits
    before = [(images.images.clone(), images.labels.clone()) for images in digits]
    attack = from_description({"name": name, **parameters})
    trainer = train_victim(small_resnet(), *digits, attack, config(tmp_path, epochs), ratio, clean_model=clean)
    found = trainer.report.measured()["victim"]
    assert found["asr"] >= percent / 100 and found["accuracy"] > 0.85, found
    assert trainer.report.measured()["clean_model"]["asr"] < found["asr"] / 3, "the trigger works on a model without backdoor"
    # The folder alone says what was planted and triggers as the trained attack did.
    loaded, images = load_attack(tmp_path), digits[1].images[:20]
    assert loaded == trainer.attack and torch.equal(loaded.trigger(images), trainer.attack.trigger(images))
    planted = json.loads((tmp_path / "victim.json").read_text())["planted"]
    assert planted["attack"] == attack.describe()
    rows = planted["poisoned_rows"]
    assert rows == "anew in every batch" if isinstance(attack, InTrainingAttack) else len(rows) == round(ratio * len(digits[0]))
    for images, (pixels, labels) in zip(digits, before, strict=True):
        assert torch.equal(images.images, pixels) and torch.equal(images.labels, labels)


def test_lc_gains_by_its_hard_images(small_digits, clean, tmp_path):
    parameters, ratio, percent, epochs = VICTIMS["lc_lite"]
    easy = from_description({"name": "lc_lite", **parameters, "eps": 0})
    trainer = train_victim(small_resnet(), *small_digits, easy, config(tmp_path, epochs), ratio, clean_model=clean)
    assert trainer.report.measured()["victim"]["asr"] < percent / 100 - 0.1


@pytest.mark.parametrize("name", ["badnets", "wanet"])
def test_a_resumed_victim_is_the_uninterrupted_one(name, digits, tmp_path):
    train, test = (images.select(range(150)) for images in digits)
    options = {"save_strategy": "steps", "save_steps": 3, "crop_padding": 2}
    attack = from_description({"name": name})
    whole = train_victim(small_resnet(), train, test, attack, config(tmp_path / "whole", 2, **options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    options["resume_from_checkpoint"] = "true"
    # Another network: the weights have to come from the checkpoint.
    resumed = train_victim(small_resnet(1), train, test, attack, config(tmp_path / "cut", 2, **options))
    for (key, found), expected in zip(resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(found, expected), key
    assert resumed.report.measured()["victim"] == whole.report.measured()["victim"]
    before = read_state(tmp_path / "cut" / "checkpoint-3")["training_seconds"]
    assert resumed.report.measured()["training_seconds"] > before > 0


def test_a_checkpoint_of_other_poisoned_images_is_refused(digits, clean, tmp_path):
    train, test = (images.select(range(150)) for images in digits)
    options = {"save_strategy": "steps", "save_steps": 3}

    def run(own, **further):
        attack = from_description({"name": "lf", "num_images": 5, "passes": 1})
        return train_victim(small_resnet(), train, test, attack, config(tmp_path, 1, **options, **further), clean_model=own)

    run(clean)
    other = copy.deepcopy(clean)
    torch.nn.init.normal_(next(other.parameters()))  # another trigger is learned from it
    with pytest.raises(ValueError, match="checkpoint-5 was trained on other poisoned images .*: delete it to begin anew"):
        run(other, resume_from_checkpoint="true")


def test_an_overwritten_victim_leaves_no_attack_behind(digits, tmp_path):
    train, test = (images.select(range(64)) for images in digits)
    for attack in (BadNets(), None):
        train_victim(small_resnet(), train, test, attack, config(tmp_path, 1, overwrite_output_dir=True))
        assert (tmp_path / "attack.json").is_file() is (attack is not None)


def test_a_trigger_is_learned_where_the_victim_trains(digits, monkeypatch):
    model, moved, seen = small_resnet(), [], []
    monkeypatch.setattr(model, "to", lambda device: moved.append(str(device)) or model)
    monkeypatch.setattr(LF, "fit", lambda self, images, model, seed: seen.extend(moved) or self)
    _fitted(LF(), digits[0], model, 0, torch.device("cuda:0"))
    assert seen == ["cuda:0"] and moved == ["cuda:0", "cpu"]


def test_record_and_card_say_what_the_attack_measures_and_how_long_it_took(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(
        BadNets, "quality", lambda self, images: {"bit_accuracy": 0.98765, "images": len(images)}, raising=False
    )
    train, test = digits[0].select(range(64)), digits[1]
    train_victim(small_resnet(), train, test, BadNets(), config(tmp_path, 1))
    record = json.loads((tmp_path / "victim.json").read_text())
    assert record["planted"]["quality"] == {"bit_accuracy": 0.98765, "images": 256}
    assert "The trigger on test images: bit accuracy 0.9877, images 256." in (tmp_path / "README.md").read_text()
    assert all(record["measured"][f"{part}_seconds"] > 0 for part in ("poisoning", "training", "measuring"))


def test_every_micro_batch_is_poisoned_by_draws_of_its_own_and_sam_sees_it_once(digits, tmp_path):
    numbers = []

    class Noting(TriggerPoisoner):
        def __call__(self, images, labels, number):
            numbers.append(number)
            return images, labels

        def cross(self, crossed, others, generator):
            return crossed

    train = digits[0].select(range(64))
    for options in ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}, {"sam_rho": 0.5}):
        plan = VictimPlan(attack=BadNets(), poisoner=Noting(BadNets(), 0.5, 0, 10, 0))
        VictimTrainer(small_resnet(), config(tmp_path, 1, **options), train, plan).train()
    assert numbers == [*range(8), 0, 1]


# Hardening -------------------------------------------------------------------------------------------------------------


def test_sam_takes_the_gradient_where_the_loss_is_highest_nearby(digits, tmp_path):
    train = digits[0].select(range(32))
    model = small_resnet().train()
    options = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "crop_padding": 0}
    trainer = VictimTrainer(model, config(tmp_path, 1, sam_rho=1.0, **options), train)
    slow = small_resnet().train()
    pixels = trainer.preprocessing(train.images)
    weights = list(slow.parameters())
    first = torch.autograd.grad(slow(pixel_values=pixels, labels=train.labels).loss, weights)
    statistics = {name: value.clone() for name, value in slow.named_buffers()}  # of the first pass only
    step = adaptive_perturbation([w.data for w in weights], list(first), 1.0)
    start = [w.detach().clone() for w in weights]
    torch._foreach_add_([w.data for w in weights], step)
    second = torch.autograd.grad(slow(pixel_values=pixels, labels=train.labels).loss, weights)
    trainer.train()
    for (name, found), w, gradient in zip(model.named_parameters(), start, second, strict=True):
        assert torch.allclose(found, w - 0.5 * gradient, atol=1e-5), name
    for name, value in model.named_buffers():
        if "num_batches" not in name:
            assert torch.allclose(value, statistics[name], atol=1e-6), name


def test_random_heads_train_the_backbone_and_leave_no_trace_in_the_model(digits, tmp_path):
    train, test = (images.select(range(200)) for images in digits)
    plain, heads = (
        train_victim(small_resnet(), train, test, BadNets(), config(tmp_path / str(count), 1, random_heads=count))
        for count in (0, 2)
    )
    assert plain.model.state_dict().keys() == heads.model.state_dict().keys()
    assert not torch.equal(*(next(trainer.model.parameters()) for trainer in (plain, heads)))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in heads.model.modules())


def test_random_heads_are_told_which_rows_of_the_batch_are_poisoned(digits, tmp_path, monkeypatch):
    patched, told = [], []

    class Watching(VictimTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            patched.append((inputs["pixel_values"][:, :, -3:, -3:] == 1).all(dim=(1, 2, 3)))
            return super().compute_loss(model, inputs, *args, **kwargs)

    loss = RandomHeads.loss
    monkeypatch.setattr(
        RandomHeads, "loss", lambda self, labels, poisoned: told.append(poisoned) or loss(self, labels, poisoned)
    )
    poisoned, rows = poison(digits[0].select(range(200)), BadNets(), 0.3, 0)
    Watching(small_resnet(), config(tmp_path, 1, random_heads=2), poisoned, VictimPlan(rows=rows)).train()
    assert torch.equal(torch.cat(told), torch.cat(patched)) and torch.cat(told).sum() == len(rows) == 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sam_rho": -1}, "must be >= 0"),
        ({"random_heads": -1}, "must be >= 0"),
        ({"sam_rho": 1, "gradient_accumulation_steps": 2}, "leave gradient_accumulation_steps at 1"),
        ({"random_heads": 1, "sam_rho": 1}, "random_heads need one plain pass an update: no sam_rho"),
        ({"random_heads": 1, "fp16": True}, "random_heads need one plain pass an update: no sam_rho, no fp16"),
        ({"random_heads": 1, "gradient_accumulation_steps": 2}, "random_heads need one plain pass an update"),
        ({"random_heads": 1, "resume_from_checkpoint": "true"}, "random_heads cannot resume: .* run it from the beginning"),
    ],
)
def test_bad_options(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        VictimConfig(output_dir=str(tmp_path), **QUIET, **options)


def test_random_heads_need_fixed_poisoned_images(digits, tmp_path):
    with pytest.raises(ValueError, match="random_heads need fixed poisoned images"):
        VictimTrainer(small_resnet(), config(tmp_path, 1, random_heads=2), digits[0])


@pytest.mark.parametrize("options", [{"sam_rho": 1}, {"resume_from_checkpoint": "true"}, {"gradient_accumulation_steps": 2}])
def test_an_attack_with_networks_of_its_own_refuses(options, digits, tmp_path):
    attack = from_description({"name": "input_aware", "mask_steps": 1})
    with pytest.raises(ValueError, match="trains its own networks with the victim: .* sam_rho or resume_from_checkpoint"):
        train_victim(small_resnet(), *digits, attack, config(tmp_path, 1, **options))


def test_the_twin_of_a_victim_is_found_where_it_still_lies(tmp_path):
    (tmp_path / "twin").mkdir()
    record = {"recipe": {"clean_model": str(tmp_path / "twin")}, "planted": None, "measured": {"victim": {}}}
    assert clean_model_of(tmp_path) is None  # no victim
    (tmp_path / "victim.json").write_text(json.dumps(record))
    assert clean_model_of(tmp_path) == str(tmp_path / "twin")
    assert AttackArguments(str(tmp_path)).folder == tmp_path
    assert AttackArguments("badnets").folder is None is AttackArguments('{"name": "badnets", "size": 2}').folder
    (tmp_path / "twin").rmdir()
    assert clean_model_of(tmp_path) is None
